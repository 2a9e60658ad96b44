"""`andromeda train`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from andromeda.cli.arguments import AllowCode, Overrides, check_exists, is_run, is_worker, load_config
from andromeda.utils.errors import AndromedaError, ConfigError


def train(
    config: Annotated[
        str,
        typer.Argument(
            metavar="PRESET|FILE|RUN", help="A preset, a TOML file or a run folder; with --resume or --init-from that run's own by default."
        ),
    ] = "",
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/NAME by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in --out from its last checkpoint.")] = False,
    init_from: Annotated[
        str, typer.Option(metavar="RUN[@STEP]", help="Begin a new run with the weights of another one (its newest checkpoint, or of STEP).")
    ] = "",
    keep_optimizer: Annotated[
        bool, typer.Option("--keep-optimizer", help="With --init-from: begin with the optimizer's state of that checkpoint too.")
    ] = False,
    nproc: Annotated[
        int, typer.Option(min=0, help="Processes on this machine that share the work, one a GPU (docs/scale.md); 0 is this process alone.")
    ] = 0,
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
    if resume and config and not out and is_run(Path(config)):
        out = Path(config)
    source = config or (_parent(init_from) if init_from else str(out) if resume and out else "")
    if not source:
        raise ConfigError("Name a preset or a TOML file to train, or give --out RUN --resume to resume a run.")
    if not (resume or init_from):
        _refuse_run(config)

    from andromeda.config.rules import check_training

    settings = load_config(source, changes)
    check_training(settings)
    if nproc and not is_worker():
        from andromeda.parallel.layout_rules import check_layout

        check_layout(settings, nproc)
        arguments = _arguments(source, changes, out, resume, init_from, keep_optimizer, allow_code, as_json)
        from andromeda.parallel.launch import launch

        raise typer.Exit(launch(arguments, nproc))

    from andromeda.train.progress import build_reporter
    from andromeda.train.trainer import train as run

    with closing(build_reporter(settings.train.steps, as_json)) as reporter:
        result = run(
            settings,
            out or _named(settings.name),
            resume=resume,
            init_from=init_from or None,
            keep_optimizer=keep_optimizer,
            reporter=reporter,
        )
        if result.signal == signal.SIGPIPE:
            print(
                f"andromeda: nobody reads the output any more; the run is saved after step {result.step} in {result.run_dir}",
                file=sys.stderr,
            )
        if result.signal:
            raise typer.Exit(128 + result.signal)
        if os.environ.get("RANK", "0") == "0":
            reporter.message(write_report(result.run_dir))


def _arguments(
    source: str, changes: list[str], out: Path | None, resume: bool, init_from: str, keep_optimizer: bool, allow_code: bool, as_json: bool
) -> list[str]:
    """The same call for each of several processes."""
    flags = {"--resume": resume, "--keep-optimizer": keep_optimizer, "--allow-code": allow_code, "--json": as_json}
    named = {"--out": str(out or ""), "--init-from": init_from}
    given = [part for name, value in named.items() if value for part in (name, value)]
    return ["train", source, *changes, *given, *(flag for flag, wanted in flags.items() if wanted)]


def _parent(init_from: str) -> str:
    """The run folder that `--init-from` names."""
    from andromeda.train.run_dir import split_step

    run = split_step(init_from)[0]
    check_exists(run)
    return str(run)


def _refuse_run(config: str) -> None:
    """Raise ConfigError for a run folder alone, of which everybody would expect that its weights are used."""
    if is_run(Path(config)):
        run = shlex.quote(config.rstrip("/"))
        raise ConfigError(
            f"{config} is a run, and training its configuration alone would begin with random weights: resume it with "
            f"`andromeda train --out {run} --resume`, start a new run with its weights with `andromeda train {run} --init-from {run} "
            f"--out NEW`, or name the file {run}/config.toml to begin with random weights."
        )


def _named(name: str) -> Path:
    """The folder of a run that none was given for. Raises ConfigError for a name that would lie elsewhere."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ConfigError(f"A run named {name!r} cannot have a folder of that name: give one with --out, or another name=.")
    return Path("runs") / name


def write_report(run: Path) -> str:
    """Write report.html and README.md. A report that fails does not make a finished run fail."""
    from andromeda.report import write_report as write

    try:
        return f"report: {write(run)}"
    except AndromedaError as error:
        return f"no report was written: {error}"
