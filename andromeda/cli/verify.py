"""`andromeda verify`."""

from __future__ import annotations

import tempfile
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from andromeda.cli.arguments import AllowCode, Device, check_exists
from andromeda.utils.errors import DataError


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, your own or somebody else's.")],
    corpus: Annotated[str, typer.Option(help="Where the run's corpus is now.")] = "",
    files: Annotated[str, typer.Option(help="A folder with the texts and questions of the stored evaluations.")] = "",
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train the run again on the CPU, and compare its weights bit for bit.")
    ] = False,
    device: Device = "auto",
    allow_code: AllowCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each check as one JSON object a line.")] = False,
) -> None:
    """Recompute what a run folder claims about itself, and compare. Exit code 1 where something does not agree or cannot be checked."""
    check_exists(run)
    if files and not Path(files).is_dir():
        raise DataError(f"--files {files} is no folder: give the folder that holds the texts and questions now.")

    from andromeda.cli.data import progress
    from andromeda.cli.tables import show
    from andromeda.evaluate import verification as checking
    from andromeda.evaluate.comparison import DataLocations
    from andromeda.evaluate.reproduce import retrain_and_compare as repeating
    from andromeda.train.state import resolve_device

    resolve_device(device, "--device")
    locations = DataLocations(corpus, files)
    checks = []
    with progress() as report, tempfile.TemporaryDirectory() as place:
        again = repeating(run, Path(place) / "run", locations, report) if retrain else ()
        for check in chain(checking.verify(run, locations, device, report), again):
            checks.append(check)
            if as_json:
                print(checking.as_json(check), flush=True)
    wrong, unchecked = sum(not check.agrees and check.checked for check in checks), sum(not check.checked for check in checks)
    if not as_json:
        rows = [[c.what, c.stored, c.new, "" if c.difference is None else f"{c.difference:.1e}", c.verdict, c.note] for c in checks]
        show(f"{run}: stored and recomputed", ("", "stored", "recomputed", "difference", "verdict", ""), rows, right=(1, 2, 3))
        print(_summary(len(checks), wrong, unchecked))
    if wrong or unchecked:
        raise typer.Exit(1)


def _summary(count: int, wrong: int, unchecked: int) -> str:
    if not (wrong or unchecked):
        return f"All {count} checks agree."
    parts = [f"{wrong} of {count} checks do not agree"] * bool(wrong) + [f"{unchecked} of {count} could not be made"] * bool(unchecked)
    return f"{', and '.join(parts)}."
