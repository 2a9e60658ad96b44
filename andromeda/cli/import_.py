"""`andromeda import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from andromeda.utils.errors import CheckpointError


def import_(
    folder: Annotated[Path, typer.Argument(help="A Hugging Face folder on this machine: config.json, safetensors, tokenizer.")],
    out: Annotated[Path, typer.Option(help="The run folder that is written.")],
    no_tokenizer: Annotated[bool, typer.Option("--no-tokenizer", help="Import the weights alone.")] = False,
) -> None:
    """Make a run folder of a Hugging Face folder. Nothing of the folder is run: no code, no pickle."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: give a Hugging Face folder on this machine.")

    from andromeda.hub.import_folder import read_folder, write_run

    imported = read_folder(folder, tokenizer=not no_tokenizer)
    for note in imported.notes:
        print(note)
    count = sum(weight.numel() for weight in imported.weights.values())
    print(f"{write_run(imported, out)}: {count:,} parameters")
