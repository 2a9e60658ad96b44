"""What several verbs have in common: kinds of arguments, and checks that need nothing slow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from andromeda.utils.errors import RequestError

if TYPE_CHECKING:
    from andromeda.config.run import RunConfig

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
Source = Annotated[str, typer.Argument(metavar="PRESET|FILE|RUN", help="A preset, a TOML file or a run folder.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the configuration, such as train.steps=100.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DType = Annotated[str, typer.Option(help="auto, fp32, bf16, fp16 or fp64.")]
Step = Annotated[int | None, typer.Option(help="Use the checkpoint of this step; the newest by default.")]


def _consent(allowed: bool) -> None:
    from andromeda.config.own_code import allow_code_from_here_on

    if allowed:
        allow_code_from_here_on()


AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", callback=_consent, help="Import classes of your own that the configuration names; this runs their code."),
]
Ema = Annotated[bool, typer.Option("--ema", help="Use the moving average of the weights.")]


def load_config(source: str, overrides: Sequence[str] | None) -> RunConfig:
    """The configuration, checked. A verb calls this before it imports torch, so that a wrong key is answered at once."""
    from andromeda.config.load import load
    from andromeda.config.parts import check_code_allowed, check_own_parts, own_classes

    config = load(source, overrides or [])
    check_code_allowed(config)
    if own_classes(config.model):
        check_own_parts(config.model)
    return config


def is_run(path: Path) -> bool:
    """Whether a path is a run folder."""
    from andromeda.train.run_dir import RunDir

    return RunDir(path).exists


def check_exists(run: Path) -> None:
    """Raise CheckpointError, before anything slow is imported, for a path that is not a run folder."""
    from andromeda.utils.errors import CheckpointError

    if not is_run(run):
        raise CheckpointError(f"{run} is not a run folder (it holds no config.toml): give the --out of `andromeda train`.")


def check_run(run: Path) -> RunConfig:
    """The configuration of a run, of which only config.toml is read. Raises CheckpointError or ConfigError."""
    from andromeda.train.run_dir import RunDir

    check_exists(run)
    return RunDir(run).config()


def check_buildable(run: Path) -> None:
    """`check_run`, for a verb that builds the run's model. Raises CodeNotAllowed where that needs code of a user's own."""
    from andromeda.config.parts import check_code_allowed

    check_code_allowed(check_run(run))


def parse_ints(option: str, text: str, least: int = 0) -> tuple[int, ...]:
    """Whole numbers of at least `least` with commas between them; none for an empty text. Raises RequestError."""
    try:
        numbers = tuple(int(word) for word in text.split(",")) if text else ()
    except ValueError:
        numbers = (least - 1,)
    if any(number < least for number in numbers):
        raise RequestError(f"{option} must be whole numbers of at least {least} with commas between them, not {text!r}.")
    return numbers


def is_worker() -> bool:
    """Whether this is one of several processes already, which torchrun or `--nproc` started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
