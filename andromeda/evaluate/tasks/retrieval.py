"""The evaluations of retrieval: one grid of lengths and depths for each task."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveInt

from andromeda.config.base import BaseConfig
from andromeda.config.validation_errors import validate
from andromeda.data.tokenizer import Tokenizer
from andromeda.evaluate.loaded_model import LoadedModel
from andromeda.evaluate.request import Depths, EvalOptions, Lengths, Measurement, check_lengths
from andromeda.evaluate.retrieval_problems import RETRIEVAL_TASKS, STYLES, RetrievalTask, chance_accuracy
from andromeda.evaluate.retrieval_scoring import score_grid, tokenize_problem
from andromeda.utils.errors import ConfigError, RequestError, nearest
from andromeda.utils.log import get_logger
from andromeda.utils.progress_callback import ProgressCallback

SAMPLES, DEPTHS = 20, 5

log = get_logger()


class RetrievalSettings(BaseConfig):
    """`samples` problems for each length and depth."""

    task: str
    style: Literal["prose", "code"]
    lengths: Lengths
    depths: Depths
    samples: PositiveInt
    seed: NonNegativeInt


class RetrievalEvaluation:
    """Some of the tasks of retrieval."""

    kind = "retrieval"

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def settings(self, options: EvalOptions, loaded: LoadedModel) -> list[BaseConfig]:
        """A grid for each task. By default the model's context, a half and a quarter of it, where the task fits."""
        tokenizer = loaded.tokenizer("Retrieval")
        if options.lengths:
            check_lengths(loaded, options.lengths, options.beyond)
        found: list[BaseConfig] = []
        missing: list[str] = []
        for name in self._names:
            for length in options.lengths:
                tokenize_problem(RETRIEVAL_TASKS[name], STYLES[options.style], tokenizer, length, 0.0, Random(0))
            lengths = options.lengths or self._fitting(RETRIEVAL_TASKS[name], options, tokenizer, loaded.context)
            if lengths:
                found.append(self._one(RETRIEVAL_TASKS[name], options, tuple(sorted(set(lengths)))))
            else:
                missing.append(name)
        reason = f"context of {loaded.context} tokens is too short for {listed(missing)}"
        if not found:
            raise RequestError(f"This model's {reason}: give longer --lengths with --extrapolate, or leave it out.")
        if missing:
            log.warning("andromeda: this model's %s: left out.", reason)
        return found

    def _one(self, task: RetrievalTask, options: EvalOptions, lengths: tuple[int, ...]) -> RetrievalSettings:
        depths = (0.5,) if task.everywhere else tuple(sorted(set(options.depths))) or evenly(DEPTHS)
        samples = options.samples or SAMPLES
        return RetrievalSettings(task=task.name, style=options.style, lengths=lengths, depths=depths, samples=samples, seed=options.seed)

    def _fitting(self, task: RetrievalTask, options: EvalOptions, tokenizer: Tokenizer, context: int) -> tuple[int, ...]:
        """Those lengths of which a tenth would still be to spare: words differ in their tokens."""
        return tuple(n for n in (context // 4, context // 2, context) if _fits(task, options.style, tokenizer, n * 9 // 10))

    def read(self, values: dict[str, Any]) -> RetrievalSettings:
        """Settings that were stored."""
        settings = validate(RetrievalSettings, values)
        if settings.task not in RETRIEVAL_TASKS:
            raise ConfigError(f"There is no task of retrieval {settings.task!r}{nearest(settings.task, RETRIEVAL_TASKS)}.")
        return settings

    def measure(self, loaded: LoadedModel, settings: RetrievalSettings, report: ProgressCallback) -> Measurement:
        """The grid."""
        task, tokenizer = RETRIEVAL_TASKS[settings.task], loaded.tokenizer("Retrieval")
        cells = score_grid(
            loaded.model,
            tokenizer,
            task,
            STYLES[settings.style],
            lengths=settings.lengths,
            depths=settings.depths,
            samples=settings.samples,
            seed=settings.seed,
            report=report,
        )
        result = {
            "task": task.name,
            "style": settings.style,
            "lengths": list(settings.lengths),
            "depths": list(settings.depths),
            "everywhere": task.everywhere,
            "accuracy": [[cell.accuracy for cell in row] for row in cells],
            "match": [[cell.match for cell in row] for row in cells],
            "chance": chance_accuracy(task.answers, task.others),
            "samples": settings.samples,
        }
        return Measurement(f"retrieval-{task.name}" + ("-code" if settings.style == "code" else ""), None, result)


def evenly(count: int) -> tuple[float, ...]:
    """So many depths from the begin to the end; the middle, if it is one."""
    return tuple(i / (count - 1) for i in range(count)) if count > 1 else (0.5,)


def listed(names: Sequence[str]) -> str:
    """Names as one reads them out."""
    *firsts, last = names or [""]
    return f"{', '.join(firsts)} and {last}" if firsts else last


def _fits(task: RetrievalTask, style: str, tokenizer: Tokenizer, length: int) -> bool:
    try:
        tokenize_problem(task, STYLES[style], tokenizer, length, 0.0, Random(0))
    except RequestError:
        return False
    return True
