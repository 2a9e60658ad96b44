"""The evaluation by lm-evaluation-harness: any of its tasks, or a user's own from a folder."""

from __future__ import annotations

import hashlib
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from andromeda.config.base import BaseConfig, Strings
from andromeda.config.mistakes import read
from andromeda.evaluate.loaded_model import LoadedModel
from andromeda.evaluate.request import EvalOptions, Measurement
from andromeda.evaluate.result import safe_file_name
from andromeda.utils.errors import MissingExtra, RequestError, nearest
from andromeda.utils.progress_callback import ProgressCallback


class HarnessSettings(BaseConfig):
    """Tasks by their names there; None leaves examples and number of questions to each task."""

    tasks: Strings
    include: str
    shots: NonNegativeInt | None
    samples: PositiveInt | None
    seed: NonNegativeInt


class HarnessEvaluation:
    """Tasks of lm-evaluation-harness."""

    kind = "harness"

    def settings(self, options: EvalOptions, loaded: LoadedModel) -> list[BaseConfig]:
        """The tasks that are named."""
        _check_extra()
        loaded.tokenizer("The evaluation harness")
        if not options.tasks:
            raise RequestError("The evaluation harness needs a task: name one with --task, such as --task hellaswag.")
        if options.include and not Path(options.include).is_dir():
            raise RequestError(f"There is no folder {options.include}: give the one of your tasks with --include.")
        return [
            HarnessSettings(tasks=options.tasks, include=options.include, shots=options.shots, samples=options.samples, seed=options.seed)
        ]

    def read(self, values: dict[str, Any]) -> HarnessSettings:
        """Settings that were stored."""
        return read(HarnessSettings, values)

    def measure(self, loaded: LoadedModel, settings: HarnessSettings, report: ProgressCallback) -> Measurement:
        """Every figure that the harness computes. Raises MissingExtra where it is not installed."""
        _check_extra()
        from lm_eval import simple_evaluate

        from andromeda.evaluate.lm_eval_adapter import AndromedaLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        tasks = _task_manager(settings)
        model = AndromedaLM(loaded.model, loaded.tokenizer("The evaluation harness"), report=report)
        try:
            found = simple_evaluate(
                model=model,
                tasks=list(settings.tasks),
                num_fewshot=settings.shots,
                limit=settings.samples,
                task_manager=tasks,
                bootstrap_iters=0,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
        except (OSError, ConnectionError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RequestError(f"{' and '.join(settings.tasks)} cannot be run ({reason}): is its data on this machine?") from None
        result = {
            task: {metric.removesuffix(",none"): float(value) for metric, value in metrics.items() if _is_metric(metric, value)}
            for task, metrics in found["results"].items()
        }
        hashes = sorted(str(sample["doc_hash"]) for samples in found["samples"].values() for sample in samples)
        return Measurement(
            safe_file_name("harness-" + "-".join(settings.tasks)), hashlib.sha256(" ".join(hashes).encode()).hexdigest(), result
        )


def _task_manager(settings: HarnessSettings) -> Any:
    """What knows the tasks. Raises RequestError for one that does not exist."""
    from lm_eval.tasks import TaskManager

    if settings.include:
        # A folder of a few tasks is read at once, the harness's own thousands take seconds.
        own = TaskManager(include_path=settings.include, include_defaults=False)
        if set(settings.tasks) <= set(own.all_tasks):
            return own
    tasks = TaskManager(include_path=settings.include or None)
    for name in settings.tasks:
        if name not in tasks.all_tasks:
            raise RequestError(f"lm-evaluation-harness has no task {name!r}{nearest(name, tasks.all_tasks)}: see --include.")
    return tasks


def _is_metric(name: str, value: Any) -> bool:
    """A figure of the model, not of the task's size."""
    return isinstance(value, int | float) and not name.startswith("sample_")


def _check_extra() -> None:
    if find_spec("lm_eval") is None:
        raise MissingExtra("lm-eval", "harness", "The evaluation harness")
