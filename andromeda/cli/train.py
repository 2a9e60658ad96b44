"""`andromeda train`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from andromeda.cli.arguments import AllowCode, Overrides, load_config
from andromeda.utils.errors import AndromedaError, ConfigError


def train(
    config: Annotated[
        str,
        typer.Argument(metavar="PRESET|FILE|RUN", help="A preset, a TOML file or a run folder; with --resume the run's own by default."),
    ] = "",
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/NAME by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out from its last checkpoint.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; the same as train.device=.")] = "",
    allow_code: AllowCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each line of metrics.jsonl as it is written.")] = False,
) -> None:
    """Train a model, or resume a run. Ctrl-C and SIGTERM save a checkpoint and end the run."""
    changes = list(overrides or [])
    if "=" in config:
        config, changes = "", [config, *changes]
    if device:
        changes.append(f"train.device={device}")
    if not config and not (resume and out):
        raise ConfigError("Name a preset or a TOML file to train, or give --out RUN --resume to resume a run.")

    from andromeda.config.rules import check_training

    settings = load_config(config or str(out), changes)
    check_training(settings)

    from andromeda.train.progress import build_reporter
    from andromeda.train.trainer import train as run

    with closing(build_reporter(settings.train.steps, as_json)) as reporter:
        result = run(settings, out or _named(settings.name), resume=resume, reporter=reporter)
        if result.signal:
            raise typer.Exit(128 + result.signal)
        reporter.message(_report(result.run_dir))


def _named(name: str) -> Path:
    """The folder of a run that none was given for. Raises ConfigError for a name that would lie elsewhere."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ConfigError(f"A run named {name!r} cannot have a folder of that name: give one with --out, or another name=.")
    return Path("runs") / name


def _report(run: Path) -> str:
    """Write report.html. A report that fails does not make a finished run fail."""
    from andromeda.report import write_report

    try:
        return f"report: {write_report(run)}"
    except AndromedaError as error:
        return f"no report was written: {error}"
