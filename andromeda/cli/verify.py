"""`andromeda verify`."""

from __future__ import annotations

import tempfile
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer


def verify(
    run: Annotated[Path, typer.Argument(help="A run folder, one's own or a stranger's.")],
    corpus: Annotated[str, typer.Option(help="Where the run's corpus lies now.")] = "",
    files: Annotated[str, typer.Option(help="A folder with the texts and questions that were measured on.")] = "",
    repeat: Annotated[bool, typer.Option("--repeat", help="Train the run again on the CPU, and compare its weights bit for bit.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print each check as one JSON object a line.")] = False,
) -> None:
    """Compute everything again that a run folder says of itself, and compare. Exit code 1 where something does not agree."""
    from andromeda.cli.data import progress
    from andromeda.cli.tables import show
    from andromeda.evaluate import verification as checking
    from andromeda.evaluate.reproduce import retrain_and_compare as repeating
    from andromeda.train.run_dir import RunFolder
    from andromeda.train.state import find_device
    from andromeda.utils.errors import CheckpointError, DataError

    if not RunFolder(run).exists:
        raise CheckpointError(f"{run} is not a run folder (it holds no config.toml): give the --out of `andromeda train`.")
    find_device(device, "--device")
    if files and not Path(files).is_dir():
        raise DataError(f"--files {files} is no folder: give the one that holds the texts and questions now.")
    locations = checking.DataLocations(corpus, files)
    checks = []
    with progress() as report, tempfile.TemporaryDirectory() as place:
        again = repeating(run, Path(place) / "run", locations, report) if repeat else ()
        for check in chain(checking.verify(run, locations, device, report), again):
            checks.append(check)
            if as_json:
                print(checking.as_json(check), flush=True)
    wrong = sum(not check.agrees for check in checks)
    if not as_json:
        rows = [
            [c.what, c.stored, c.new, "" if c.difference is None else f"{c.difference:.1e}", "agrees" if c.agrees else "DIFFERS", c.note]
            for c in checks
        ]
        show(f"{run}: what it says, and what is found", ("", "stored", "new", "difference", "verdict", ""), rows, right=(1, 2, 3))
        print(f"{wrong} of {len(checks)} checks do not agree." if wrong else f"All {len(checks)} checks agree.")
    if wrong:
        raise typer.Exit(1)
