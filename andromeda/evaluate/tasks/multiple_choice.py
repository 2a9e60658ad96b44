"""The evaluations on a user's questions: multiple choice by likelihood, and GSM8K by its final number.

Examples are the first questions of the file and are never asked.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from andromeda.config.base import BaseConfig
from andromeda.config.mistakes import read
from andromeda.evaluate.loaded_model import LoadedModel, file_sha256
from andromeda.evaluate.questions import MultipleChoiceQuestion, WordProblem, asked_range, read_choices, read_solved
from andromeda.evaluate.request import EvalOptions, Measurement, existing_file
from andromeda.evaluate.result import safe_file_name
from andromeda.evaluate.token_loss import continuation_likelihoods
from andromeda.generate.engine import Engine
from andromeda.utils.errors import RequestError
from andromeda.utils.progress_callback import ProgressCallback

NEW_TOKENS = 256
FINAL = re.compile(r"#### (-?[0-9.,]+)")
"""Of GSM8K's answers (arXiv 2110.14168)."""


class QuestionSettings(BaseConfig):
    """A file of questions; None asks all."""

    file: str
    shots: NonNegativeInt
    samples: PositiveInt | None


class MultipleChoiceEvaluation:
    """Multiple choice: the likeliest answer, and the likeliest one for its length."""

    kind = "fewshot"

    def settings(self, options: EvalOptions, loaded: LoadedModel) -> list[BaseConfig]:
        """Without examples by default."""
        loaded.tokenizer("Multiple choice")
        path = existing_file(options.file, "fewshot")
        asked_range(len(read_choices(path)), options.shots or 0, options.samples)
        return [QuestionSettings(file=str(path), shots=options.shots or 0, samples=options.samples)]

    def read(self, values: dict[str, Any]) -> QuestionSettings:
        """Settings that were stored."""
        return read(QuestionSettings, values)

    def measure(self, loaded: LoadedModel, settings: QuestionSettings, report: ProgressCallback) -> Measurement:
        """Both accuracies, and that of guessing."""
        path, tokenizer = existing_file(settings.file, "fewshot"), loaded.tokenizer("Multiple choice")
        questions = read_choices(path)
        asked = [questions[i] for i in asked_range(len(questions), settings.shots, settings.samples)]
        head = "".join(f"{shown(one)} {one.choices[one.right]}\n\n" for one in questions[: settings.shots])
        pairs = [([tokenizer.eos, *tokenizer.encode(head + shown(one))], tokenizer.encode(f" {c}")) for one in asked for c in one.choices]
        _refuse_long(max(len(a) + len(b) for a, b in pairs), settings.shots, loaded)
        logs = iter(continuation_likelihoods(loaded.model, pairs, report))
        plain = normalized = 0
        for one in asked:
            found = [next(logs).log for _ in one.choices]
            lengths = [len(choice.encode()) for choice in one.choices]
            plain += _best(found) == one.right
            normalized += _best([log / max(1, size) for log, size in zip(found, lengths, strict=True)]) == one.right
        count = len(asked)
        result = {
            "accuracy": plain / count,
            "normalized": normalized / count,
            "chance": sum(1 / len(one.choices) for one in asked) / count,
            "questions": count,
            "shots": settings.shots,
        }
        return Measurement(safe_file_name(f"fewshot-{path.stem}-{settings.shots}"), file_sha256(path), result)


def shown(one: MultipleChoiceQuestion) -> str:
    """A question up to where its answer begins."""
    return f"Question: {one.question}\nAnswer:"


def _best(figures: list[float]) -> int:
    return max(range(len(figures)), key=figures.__getitem__)


class Gsm8kEvaluation:
    """Word problems: whether the number after #### is right."""

    kind = "gsm8k"

    def settings(self, options: EvalOptions, loaded: LoadedModel) -> list[BaseConfig]:
        """Four examples and at most 100 questions by default."""
        loaded.tokenizer("GSM8K")
        path, shots = existing_file(options.file, "gsm8k"), 4 if options.shots is None else options.shots
        questions = read_solved(path)
        for number, one in enumerate(questions, 1):
            if final(one.answer) is None:
                raise RequestError(f"Question {number} of {path} has no final number: its answer must end in `#### 42`.")
        asked_range(len(questions), shots, options.samples)
        return [QuestionSettings(file=str(path), shots=shots, samples=options.samples or 100)]

    def read(self, values: dict[str, Any]) -> QuestionSettings:
        """Settings that were stored."""
        return read(QuestionSettings, values)

    def measure(self, loaded: LoadedModel, settings: QuestionSettings, report: ProgressCallback) -> Measurement:
        """Greedy answers. An answer without a final number is wrong."""
        path, tokenizer = existing_file(settings.file, "gsm8k"), loaded.tokenizer("GSM8K")
        questions = read_solved(path)
        asked = [questions[i] for i in asked_range(len(questions), settings.shots, settings.samples)]
        head = "".join(f"Question: {one.question}\nAnswer: {one.answer}\n\n" for one in questions[: settings.shots])
        prompts = [f"{head}Question: {one.question}\nAnswer:" for one in asked]
        longest = max(len(tokenizer.encode(prompt)) + 1 for prompt in prompts)
        _refuse_long(longest + 1, settings.shots, loaded)
        room = min(NEW_TOKENS, loaded.context - longest)
        right = answered = done = 0
        for piece in Engine(loaded.model, tokenizer).stream(prompts, max_new_tokens=room, temperature=0.0, stop=("\n\nQuestion:",)):
            if piece.completion:
                found, one = final(piece.completion.text), asked[piece.completion.index]
                right, answered, done = right + graded(piece.completion.text, one), answered + (found is not None), done + 1
                report("gsm8k", done, len(asked))
        count = len(asked)
        result = {"exact_match": right / count, "answered": answered / count, "questions": count, "shots": settings.shots}
        return Measurement(safe_file_name(f"gsm8k-{path.stem}-{settings.shots}"), file_sha256(path), result)


def final(answer: str) -> str | None:
    """The number that an answer ends in, without commas and the full stop that may follow it."""
    found = FINAL.search(answer)
    return found[1].replace(",", "").rstrip(".") if found else None


def graded(written: str, solved: WordProblem) -> bool:
    """Whether a written answer ends in the right number."""
    return final(written) == final(solved.answer)


def _refuse_long(length: int, shots: int, loaded: LoadedModel) -> None:
    if length > loaded.context:
        what, mend = ("with its examples ", "give fewer --shots") if shots else ("", "leave out what is longer")
        raise RequestError(f"A question {what}has {length} tokens, more than this model's context of {loaded.context}: {mend}.")
