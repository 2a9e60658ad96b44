"""`andromeda report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="A run folder; the run may be going on.")],
    out: Annotated[Path | None, typer.Option(help="Where the page is written; RUN/report.html by default.")] = None,
) -> None:
    """Write a run as one HTML page: curves, probes, evaluations, samples, sizes, manifest, model card."""
    from andromeda.report import write_report

    print(write_report(run, out))
