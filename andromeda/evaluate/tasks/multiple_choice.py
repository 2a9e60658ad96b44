"""The evaluations on a user's questions: multiple choice by likelihood, and GSM8K by its final number.

Examples are the first questions of the file and are never asked.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from andromeda.config.base import BaseConfig
from andromeda.config.mistakes import read
from andromeda.evaluate.likelihood import likelihoods
from andromeda.evaluate.loaded_model import Subject, sha256
from andromeda.evaluate.questions import Choice, Solved, parted, read_choices, read_solved
from andromeda.evaluate.request import Options, Outcome, existing
from andromeda.evaluate.result import file_name
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


class FewShot:
    """Multiple choice: the likeliest answer, and the likeliest one for its length."""

    kind = "fewshot"

    def settings(self, options: Options, subject: Subject) -> list[BaseConfig]:
        """Without examples by default."""
        subject.tokenizer("Multiple choice")
        path = existing(options.file, "fewshot")
        parted(len(read_choices(path)), options.shots or 0, options.samples)
        return [QuestionSettings(file=str(path), shots=options.shots or 0, samples=options.samples)]

    def read(self, values: dict[str, Any]) -> QuestionSettings:
        """Settings that were stored."""
        return read(QuestionSettings, values)

    def measure(self, subject: Subject, settings: QuestionSettings, report: ProgressCallback) -> Outcome:
        """Both accuracies, and that of guessing."""
        path, tokenizer = existing(settings.file, "fewshot"), subject.tokenizer("Multiple choice")
        questions = read_choices(path)
        asked = [questions[i] for i in parted(len(questions), settings.shots, settings.samples)]
        head = "".join(f"{shown(one)} {one.choices[one.right]}\n\n" for one in questions[: settings.shots])
        pairs = [([tokenizer.eos, *tokenizer.encode(head + shown(one))], tokenizer.encode(f" {c}")) for one in asked for c in one.choices]
        _refuse_long(max(len(a) + len(b) for a, b in pairs), settings.shots, subject)
        logs = iter(likelihoods(subject.model, pairs, report))
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
        return Outcome(file_name(f"fewshot-{path.stem}-{settings.shots}"), sha256(path), result)


def shown(one: Choice) -> str:
    """A question up to where its answer begins."""
    return f"Question: {one.question}\nAnswer:"


def _best(figures: list[float]) -> int:
    return max(range(len(figures)), key=figures.__getitem__)


class Gsm8k:
    """Word problems: whether the number after #### is right."""

    kind = "gsm8k"

    def settings(self, options: Options, subject: Subject) -> list[BaseConfig]:
        """Four examples and at most 100 questions by default."""
        subject.tokenizer("GSM8K")
        path, shots = existing(options.file, "gsm8k"), 4 if options.shots is None else options.shots
        questions = read_solved(path)
        for number, one in enumerate(questions, 1):
            if final(one.answer) is None:
                raise RequestError(f"Question {number} of {path} has no final number: its answer must end in `#### 42`.")
        parted(len(questions), shots, options.samples)
        return [QuestionSettings(file=str(path), shots=shots, samples=options.samples or 100)]

    def read(self, values: dict[str, Any]) -> QuestionSettings:
        """Settings that were stored."""
        return read(QuestionSettings, values)

    def measure(self, subject: Subject, settings: QuestionSettings, report: ProgressCallback) -> Outcome:
        """Greedy answers. An answer without a final number is wrong."""
        path, tokenizer = existing(settings.file, "gsm8k"), subject.tokenizer("GSM8K")
        questions = read_solved(path)
        asked = [questions[i] for i in parted(len(questions), settings.shots, settings.samples)]
        head = "".join(f"Question: {one.question}\nAnswer: {one.answer}\n\n" for one in questions[: settings.shots])
        prompts = [f"{head}Question: {one.question}\nAnswer:" for one in asked]
        longest = max(len(tokenizer.encode(prompt)) + 1 for prompt in prompts)
        _refuse_long(longest + 1, settings.shots, subject)
        room = min(NEW_TOKENS, subject.context - longest)
        right = answered = done = 0
        for piece in Engine(subject.model, tokenizer).stream(prompts, max_new_tokens=room, temperature=0.0, stop=("\n\nQuestion:",)):
            if piece.completion:
                found, one = final(piece.completion.text), asked[piece.completion.index]
                right, answered, done = right + graded(piece.completion.text, one), answered + (found is not None), done + 1
                report("gsm8k", done, len(asked))
        count = len(asked)
        result = {"exact_match": right / count, "answered": answered / count, "questions": count, "shots": settings.shots}
        return Outcome(file_name(f"gsm8k-{path.stem}-{settings.shots}"), sha256(path), result)


def final(answer: str) -> str | None:
    """The number that an answer ends in, without commas and the full stop that may follow it."""
    found = FINAL.search(answer)
    return found[1].replace(",", "").rstrip(".") if found else None


def graded(written: str, solved: Solved) -> bool:
    """Whether a written answer ends in the right number."""
    return final(written) == final(solved.answer)


def _refuse_long(length: int, shots: int, subject: Subject) -> None:
    if length > subject.context:
        what, mend = ("with its examples ", "give fewer --shots") if shots else ("", "leave out what is longer")
        raise RequestError(f"A question {what}has {length} tokens, more than this model's context of {subject.context}: {mend}.")
