"""`andromeda report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from andromeda.cli.arguments import AllowCode, check_run


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder; the run may still be training.")],
    out: Annotated[Path | None, typer.Option(help="File of the page; RUN/report.html by default.")] = None,
    allow_code: AllowCode = False,
) -> None:
    """Write a run as one HTML page: curves, probes, evaluations, samples, sizes, manifest, model card."""
    check_run(run)

    from andromeda.report import write_report

    print(write_report(run, out))
