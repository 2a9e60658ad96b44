"""Questions of a user's own file: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from andromeda.data.formats import UTF8
from andromeda.utils.errors import DataError, RequestError
from andromeda.utils.untrusted import MalformedFile, open_regular

PROMPTS = ("question", "prompt", "context", "query")
ANSWERS = ("answer", "label", "gold")


class MultipleChoiceQuestion(NamedTuple):
    """A question with several answers."""

    question: str
    choices: list[str]
    right: int


class WordProblem(NamedTuple):
    """A question with a worked answer."""

    question: str
    answer: str


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file. Raises DataError, naming the line."""
    found = []
    try:
        with open_regular(path) as file:
            lines = file.read().decode(UTF8).split("\n")
    except MalformedFile as error:
        raise DataError(f"{path} {error}: give a file.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 (byte {error.start}): convert it first.") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"Line {number} of {path} is not JSON: each line must be one JSON object.") from None
            if not isinstance(value, dict):
                raise DataError(f"Line {number} of {path} is not a JSON object: give a question with its answer.")
            found.append(value)
    if not found:
        raise DataError(f"{path} holds no questions: each line must be one JSON object.")
    return found


def read_choices(path: Path) -> list[MultipleChoiceQuestion]:
    """Questions with `choices` and the number (from 0), letter or text of the right one. Raises DataError."""
    return [_choice(row, number, path) for number, row in enumerate(read_jsonl(path), 1)]


def _choice(row: dict[str, Any], number: int, path: Path) -> MultipleChoiceQuestion:
    choices, answer = row.get("choices"), _first(row, ANSWERS)
    question = _first(row, PROMPTS)
    if not isinstance(question, str) or not isinstance(choices, list) or len(choices) < 2:
        raise DataError(f"Question {number} of {path} needs a question and a list of at least two choices.")
    choices = [str(choice) for choice in choices]
    if isinstance(answer, str) and answer in choices:
        return MultipleChoiceQuestion(question, choices, choices.index(answer))
    if isinstance(answer, str) and len(answer) == 1 and answer.isalpha():
        answer = ord(answer.upper()) - ord("A")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"Question {number} of {path} needs an answer that is one of its choices: its number from 0, letter or text.")
    return MultipleChoiceQuestion(question, choices, answer)


def read_solved(path: Path) -> list[WordProblem]:
    """Questions with worked answers. Raises DataError."""
    found = []
    for number, row in enumerate(read_jsonl(path), 1):
        question, answer = _first(row, PROMPTS), _first(row, ANSWERS)
        if not isinstance(question, str) or not isinstance(answer, str):
            raise DataError(f"Question {number} of {path} needs a question and an answer, both text.")
        found.append(WordProblem(question, answer))
    return found


def asked_range(count: int, shots: int, samples: int | None) -> range:
    """Which questions are asked: those after the examples. Raises RequestError when none is left."""
    if shots >= count:
        raise RequestError(f"{shots} examples leave none of the {count} questions to ask: give a lower --num-fewshot.")
    return range(shots, count if samples is None else min(count, shots + samples))


def _first(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if name in row), None)
