"""What a user may ask of `andromeda eval`, before it is known which evaluation needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from andromeda.config.base import BaseConfig, StringTuple, as_tuple
from andromeda.config.validation_errors import validate
from andromeda.evaluate.loaded_model import LoadedModel
from andromeda.utils.errors import ConfigError, RequestError
from andromeda.utils.progress_callback import ProgressCallback

Lengths = Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple)]
Depths = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], BeforeValidator(as_tuple)]


class EvalOptions(BaseConfig):
    """Options that are shared by all evaluations; what is empty or 0 is chosen by each."""

    text: str = ""
    """A file to measure on, instead of the held-out documents."""
    corpus: str = ""
    """Where the corpus of the run lies now."""
    file: str = ""
    """Questions, one JSON object a line (fewshot, gsm8k)."""
    lengths: Lengths = ()
    """Tokens of context."""
    depths: Depths = ()
    """Where the evidence begins: 0 is the begin of the text, 1 its end."""
    samples: PositiveInt | None = None
    """Problems, windows or questions."""
    shots: NonNegativeInt | None = None
    """Solved examples before each question."""
    seed: NonNegativeInt = 0
    """Problems are drawn from it."""
    style: Literal["prose", "code"] = "prose"
    """How the problems of retrieval are worded."""
    beyond: bool = False
    """Allow lengths beyond the model's context."""
    stride: NonNegativeInt = 0
    """Tokens that each window scores (bits)."""
    tasks: StringTuple = ()
    """Tasks of lm-evaluation-harness."""
    include: str = ""
    """A folder with tasks of one's own for lm-evaluation-harness."""


class Measurement(NamedTuple):
    """What an evaluation found."""

    name: str
    """Of the result's file."""
    data: str | None
    """Hash of what it was measured on."""
    result: dict[str, Any]


class Evaluation(Protocol):
    """A kind of evaluation: a pure function of a model and of settings."""

    kind: str

    def settings(self, options: EvalOptions, loaded: LoadedModel) -> list[BaseConfig]:
        """The complete settings that the options stand for, so that they can be stored and repeated. Raises RequestError."""

    def read(self, values: dict[str, Any]) -> BaseConfig:
        """Settings that were stored. Raises ConfigError when they are of another version."""

    def measure(self, loaded: LoadedModel, settings: Any, report: ProgressCallback) -> Measurement:
        """Do it. Raises an AndromedaError, one sentence."""


FLAGS = {name: "--" + name.replace("_", "-") for name in EvalOptions.model_fields} | {
    "file": "--questions",
    "shots": "--num-fewshot",
    "beyond": "--extrapolate",
    "tasks": "--harness-task",
    "include": "--include-path",
}


def check_options(**values: Any) -> EvalOptions:
    """Checked options. Raises RequestError, one sentence that names the flags."""
    try:
        return validate(EvalOptions, values, given_names=FLAGS)
    except ConfigError as error:
        raise RequestError(str(error)) from None


def check_lengths(loaded: LoadedModel, lengths: tuple[int, ...], beyond: bool) -> None:
    """Raises RequestError for a length that the model was not made for, unless the user wants to see what happens there."""
    longest, context = max(lengths), loaded.context
    if longest <= context:
        return
    if loaded.config.model.embedding.absolute:
        raise RequestError(f"{longest} tokens are more than this model's {context} learned positions: give shorter --lengths.")
    if not beyond:
        raise RequestError(
            f"{longest} tokens are more than this model's context of {context}: give shorter --lengths, "
            "or add --extrapolate to measure it there."
        )


def existing_file(path: str, purpose: str) -> Path:
    """A file that the user named. Raises RequestError when it is not there."""
    if not path:
        raise RequestError(f"{purpose} needs a file: give it with --questions.")
    if not Path(path).is_file():
        raise RequestError(f"There is no file {path}: give the questions of {purpose} with --questions.")
    return Path(path)
