"""The evaluation of reasoning: generated problems, greedy exact match, in and out of distribution."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from andromeda.config.base import BaseConfig
from andromeda.config.validation_errors import validate
from andromeda.data.reasoning_tasks import Arithmetic, AssociativeRecall, DyckLanguage, Induction, MultiHop, Parity, ReasoningTask
from andromeda.evaluate.loaded_model import LoadedModel
from andromeda.evaluate.request import EvalOptions, Measurement
from andromeda.evaluate.token_loss import batch_size_for
from andromeda.generate.engine import eval_mode
from andromeda.train.callbacks.probes import PROBE_TASKS, AnswerBatch
from andromeda.train.precision import Precision
from andromeda.utils.progress_callback import ProgressCallback


class TaskVariants(NamedTuple):
    """A task as training's probes have it, and larger, out of that distribution."""

    usual: ReasoningTask[Any]
    harder: ReasoningTask[Any]


REASONING: dict[str, TaskVariants] = {
    "digits": TaskVariants(PROBE_TASKS["arithmetic"], Arithmetic(first=10, count=90)),
    "recall": TaskVariants(PROBE_TASKS["recall"], AssociativeRecall(pairs=32)),
    "induction": TaskVariants(PROBE_TASKS["induction"], Induction(length=64)),
    "multihop": TaskVariants(PROBE_TASKS["multihop"], MultiHop(aliases=2)),
    "parity": TaskVariants(Parity(6), Parity(20)),
    "dyck": TaskVariants(DyckLanguage(2), DyckLanguage(6)),
}
"""By name."""


class ReasoningSettings(BaseConfig):
    """`samples` problems of each task."""

    samples: PositiveInt
    seed: NonNegativeInt


class ReasoningEvaluation:
    """All tasks of reasoning."""

    kind = "reasoning"

    def settings(self, options: EvalOptions, loaded: LoadedModel) -> list[BaseConfig]:
        """200 problems of each task by default."""
        loaded.tokenizer("Reasoning")
        return [ReasoningSettings(samples=options.samples or 200, seed=options.seed)]

    def read(self, values: dict[str, Any]) -> ReasoningSettings:
        """Settings that were stored."""
        return validate(ReasoningSettings, values)

    def measure(self, loaded: LoadedModel, settings: ReasoningSettings, report: ProgressCallback) -> Measurement:
        """Both forms of every task; None where problems are longer than the context, or need more different tokens than there are."""
        result = {}
        for number, (name, pair) in enumerate(REASONING.items()):
            scores = [_score(loaded, task, f"{settings.seed} {name} {form}", settings.samples) for form, task in enumerate(pair)]
            result[name] = {"in": scores[0], "out": scores[1], "chance": pair.usual.chance, "chance_out": pair.harder.chance}
            report("reasoning", number + 1, len(REASONING))
        return Measurement(self.kind, None, result)


def _score(loaded: LoadedModel, task: ReasoningTask[Any], seed: str, samples: int) -> float | None:
    tokenizer, random = loaded.tokenizer("Reasoning"), Random(seed)
    alphabet = np.flatnonzero(tokenizer.byte_lengths()).tolist()

    def spell(said: str | tuple[int, ...]) -> list[int]:
        return tokenizer.encode(said) if isinstance(said, str) else list(said)

    try:
        problems = [task.draw(random, alphabet) for _ in range(samples)]
    except ValueError:  # fewer different tokens than the task takes
        return None
    rows = [([tokenizer.bos, *spell(problem.prompt)], spell(problem.answer)) for problem in problems]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    if longest > loaded.context:
        return None
    count, right = batch_size_for(loaded.model, longest), 0.0
    with eval_mode(loaded.model):
        for start in range(0, samples, count):
            group = rows[start : start + count]
            right += float(AnswerBatch(group).score(loaded.model, Precision(loaded.device))) * len(group)
    return right / samples
