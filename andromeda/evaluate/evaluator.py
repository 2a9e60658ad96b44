"""Which evaluations there are, and how one becomes a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from andromeda.config.base import BaseConfig
from andromeda.evaluate.loaded_model import LoadedModel
from andromeda.evaluate.request import EvalOptions, Evaluation
from andromeda.evaluate.result import EvalResult
from andromeda.evaluate.retrieval_problems import RETRIEVAL_TASKS
from andromeda.evaluate.tasks.head_predictions import HeadsEvaluation
from andromeda.evaluate.tasks.lm_eval_tasks import Gsm8kEvaluation, HarnessEvaluation, MultipleChoiceEvaluation
from andromeda.evaluate.tasks.reasoning import ReasoningEvaluation
from andromeda.evaluate.tasks.retrieval import RetrievalEvaluation
from andromeda.evaluate.tasks.text import BitsEvaluation, ContextEvaluation, PositionEvaluation
from andromeda.utils.errors import AndromedaError, ConfigError, DataError, RequestError, nearest
from andromeda.utils.progress_callback import ProgressCallback

_ALL: tuple[Evaluation, ...] = (
    BitsEvaluation(),
    PositionEvaluation(),
    ContextEvaluation(),
    RetrievalEvaluation(list(RETRIEVAL_TASKS)),
    ReasoningEvaluation(),
    MultipleChoiceEvaluation(),
    Gsm8kEvaluation(),
    HarnessEvaluation(),
    HeadsEvaluation(),
)
EVALUATIONS: dict[str, Evaluation] = {one.kind: one for one in _ALL}
"""By kind."""
EVAL_TASKS: dict[str, Evaluation] = EVALUATIONS | {name: RetrievalEvaluation([name]) for name in RETRIEVAL_TASKS}
"""What a user can name."""
DEFAULT_TASKS = ("bits", "position", "context", "retrieval", "reasoning")
"""What is measured when nothing is named; of a run with heads, these too."""

SkipCallback = Callable[[str], None]


class PlannedEvaluation(NamedTuple):
    """One evaluation to do."""

    evaluation: Evaluation
    settings: BaseConfig


def check_names(tasks: Sequence[str]) -> None:
    """Raises RequestError for a task that does not exist."""
    for task in tasks:
        if task not in EVAL_TASKS:
            raise RequestError(f"There is no evaluation {task!r}{nearest(task, EVAL_TASKS)}: the tasks are {', '.join(EVAL_TASKS)}.")


def run_evaluations(
    loaded: LoadedModel, tasks: Sequence[str], options: EvalOptions, report: ProgressCallback, skip: SkipCallback
) -> Iterator[EvalResult]:
    """The results that are asked for, the default ones when none is, as they come.

    Raises RequestError for a task that cannot be done, before any work where that can be known; of the default ones, those
    are told to `skip` and left out.
    """
    todo: list[PlannedEvaluation] = []
    default = (*DEFAULT_TASKS, *([HeadsEvaluation.kind] if loaded.config.model.task_heads else ()))
    for task in dict.fromkeys(tasks or default):
        try:
            todo += [one for one in _requests(task, options, loaded) if one not in todo]
        except (RequestError, ConfigError) as error:
            _refuse(task, error, bool(tasks), skip)
    for request in todo:
        try:
            yield run_evaluation(loaded, request, report)
        except (RequestError, DataError, ConfigError) as error:
            _refuse(request.evaluation.kind, error, bool(tasks), skip)


def _requests(task: str, options: EvalOptions, loaded: LoadedModel) -> list[PlannedEvaluation]:
    evaluation = EVALUATIONS[EVAL_TASKS[task].kind]
    return [PlannedEvaluation(evaluation, settings) for settings in EVAL_TASKS[task].settings(options, loaded)]


def _refuse(task: str, error: AndromedaError, named: bool, skip: SkipCallback) -> None:
    if named:
        raise error
    skip(f"{task} is left out: {error}")


def run_evaluation(loaded: LoadedModel, request: PlannedEvaluation, report: ProgressCallback) -> EvalResult:
    """Do it. Raises an AndromedaError, one sentence."""
    outcome = request.evaluation.measure(loaded, request.settings, report)
    where, made_of = loaded.circumstances()
    settings: dict[str, Any] = {**request.settings.model_dump(mode="json"), "average": loaded.average}
    return EvalResult(
        kind=request.evaluation.kind,
        name=outcome.name + ("-average" if loaded.average else ""),
        step=loaded.step,
        weights=loaded.weights,
        data=outcome.data,
        settings=settings,
        result=outcome.result,
        machine=where,
        versions=made_of,
    )
