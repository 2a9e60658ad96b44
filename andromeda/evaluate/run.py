"""Which evaluations there are, and how one becomes a result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from andromeda.config.base import BaseConfig
from andromeda.evaluate.loaded_model import Subject
from andromeda.evaluate.request import Evaluation, Options
from andromeda.evaluate.result import Result
from andromeda.evaluate.retrieval import RETRIEVAL
from andromeda.evaluate.tasks.harness import Harness
from andromeda.evaluate.tasks.multiple_choice import FewShot, Gsm8k
from andromeda.evaluate.tasks.reasoning import Reasoning
from andromeda.evaluate.tasks.retrieval import Retrieval
from andromeda.evaluate.tasks.text import BitsPerByte, Position, VariedContext
from andromeda.utils.errors import AndromedaError, ConfigError, DataError, RequestError, nearest
from andromeda.utils.progress_callback import ProgressCallback

_ALL: tuple[Evaluation, ...] = (
    BitsPerByte(),
    Position(),
    VariedContext(),
    Retrieval(list(RETRIEVAL)),
    Reasoning(),
    FewShot(),
    Gsm8k(),
    Harness(),
)
EVALUATIONS: dict[str, Evaluation] = {one.kind: one for one in _ALL}
"""By kind."""
TASKS: dict[str, Evaluation] = EVALUATIONS | {name: Retrieval([name]) for name in RETRIEVAL}
"""What a user can name."""
DEFAULT = ("bits", "position", "context", "retrieval", "reasoning")
"""What is measured when nothing is named."""

Skip = Callable[[str], None]


class Request(NamedTuple):
    """One evaluation to do."""

    evaluation: Evaluation
    settings: BaseConfig


def check_names(tasks: Sequence[str]) -> None:
    """Raises RequestError for a task that does not exist."""
    for task in tasks:
        if task not in TASKS:
            raise RequestError(f"There is no evaluation {task!r}{nearest(task, TASKS)}: the tasks are {', '.join(TASKS)}.")


def each(subject: Subject, tasks: Sequence[str], options: Options, report: ProgressCallback, skip: Skip) -> Iterator[Result]:
    """The results that are asked for, the default ones when none is, as they come.

    Raises RequestError for a task that cannot be done, before any work where that can be known; of the default ones, those
    are told to `skip` and left out.
    """
    todo: list[Request] = []
    for task in dict.fromkeys(tasks or DEFAULT):
        try:
            todo += [one for one in _requests(task, options, subject) if one not in todo]
        except (RequestError, ConfigError) as error:
            _refuse(task, error, bool(tasks), skip)
    for request in todo:
        try:
            yield evaluate(subject, request, report)
        except (RequestError, DataError, ConfigError) as error:
            _refuse(request.evaluation.kind, error, bool(tasks), skip)


def _requests(task: str, options: Options, subject: Subject) -> list[Request]:
    evaluation = EVALUATIONS[TASKS[task].kind]
    return [Request(evaluation, settings) for settings in TASKS[task].settings(options, subject)]


def _refuse(task: str, error: AndromedaError, named: bool, skip: Skip) -> None:
    if named:
        raise error
    skip(f"{task} is left out: {error}")


def evaluate(subject: Subject, request: Request, report: ProgressCallback) -> Result:
    """Do it. Raises an AndromedaError, one sentence."""
    outcome = request.evaluation.measure(subject, request.settings, report)
    where, made_of = subject.circumstances()
    settings: dict[str, Any] = {**request.settings.model_dump(mode="json"), "average": subject.average}
    return Result(
        kind=request.evaluation.kind,
        name=outcome.name + ("-average" if subject.average else ""),
        step=subject.step,
        weights=subject.weights,
        data=outcome.data,
        settings=settings,
        result=outcome.result,
        machine=where,
        versions=made_of,
    )
