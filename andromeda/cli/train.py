"""`andromeda train`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from andromeda.utils.errors import AndromedaError, ConfigError


def train(
    config: Annotated[str, typer.Argument(help="A preset, a TOML file or a run folder; with --resume the run's own by default.")] = "",
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes: key.path=value, as many as you like.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/NAME by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out from its last checkpoint.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; short for train.device=.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print each line of metrics.jsonl as it is written.")] = False,
) -> None:
    """Train a model, or go on training it. Ctrl-C and SIGTERM save a checkpoint and end the run."""
    changes = list(overrides or [])
    if "=" in config:
        config, changes = "", [config, *changes]
    if device:
        changes.append(f"train.device={device}")
    if not config and not (resume and out):
        raise ConfigError("Name a preset or a TOML file to train, or give --out RUN --resume to go on with a run.")

    from andromeda.config.load import load
    from andromeda.train.progress import build_screen
    from andromeda.train.trainer import train as run

    settings = load(config or str(out), changes)
    with closing(build_screen(settings.train.steps, as_json)) as screen:
        result = run(settings, out or _named(settings.name), resume=resume, screen=screen)
        if result.signal:
            raise typer.Exit(128 + result.signal)
        screen.note(_report(result.folder))


def _named(name: str) -> Path:
    """The folder of a run that none was given for. Raises ConfigError for a name that would lie elsewhere."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ConfigError(f"A run named {name!r} cannot have a folder of that name: give one with --out, or another name=.")
    return Path("runs") / name


def _report(run: Path) -> str:
    """Write report.html; that the run is finished stands, whatever becomes of its page."""
    from andromeda.report import write_report

    try:
        return f"report: {write_report(run)}"
    except AndromedaError as error:
        return f"no report was written: {error}"
