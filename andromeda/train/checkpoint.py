"""Checkpoints on disk: safetensors and JSON, nothing that could run code when it is read.

A checkpoint is a folder. It is written under a hidden name, flushed to the disk, read back and compared, and only then renamed; older
ones are deleted after that. So every folder with a checkpoint's name is complete, whenever the process is killed. Against damage on the
disk, `index.json` holds the size and SHA-256 of every file, and a checkpoint that does not match is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from andromeda.utils.errors import CheckpointError
from andromeda.utils.files import sync_folder, write_whole
from andromeda.utils.untrusted import MalformedFile, is_plain_name, open_regular, printable, read_json_object

FORMAT = 1
NEEDED = ("model.safetensors", "state.json")
"""Files that every checkpoint has."""
STATE_TYPES: dict[str, tuple[type, str]] = {
    "step": (int, "a whole number"),
    "healthy": (bool, "true or false"),
    "cursor": (dict, "a table"),
    "config": (dict, "a table"),
    "data": (str, "a text"),
    "guard": (dict, "a table"),
    "meter": (dict, "a table"),
    "optimizer": (dict, "a table"),
    "precision": (dict, "a table"),
    "random": (dict, "a table"),
    "metrics_bytes": (int, "a whole number"),
    "metrics_sha256": (str, "a text"),
}
"""What state.json holds under names that are used without loading the state."""
Warn = Callable[[str], None]
Tensors = dict[str, dict[str, Tensor]]
"""Tensors of each part (model, optimizer, ema, random) by name."""


@dataclass(frozen=True)
class Snapshot:
    """The whole state of a run at one step."""

    step: int
    tensors: Tensors
    metadata: dict[str, Any]
    """Everything that is not a tensor; JSON."""


def dir_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Write `snapshot` into `folder` (a run's checkpoints/) and return its path. Raises CheckpointError when the disk fails."""
    final = folder / dir_name(snapshot.step)
    temporary = folder / f".{final.name}.new"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for part, tensors in snapshot.tensors.items():
            _write_tensors(temporary / f"{part}.safetensors", tensors)
        write_whole(temporary / "state.json", json.dumps({"format": FORMAT, "step": snapshot.step, **snapshot.metadata}).encode())
        index = {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())}
        write_whole(temporary / "index.json", json.dumps(index, indent=1).encode())
        _publish(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint of step {snapshot.step} cannot be written to {folder} ({getattr(error, 'strerror', None) or error}): "
            "make room there and resume with --resume; the older checkpoints are untouched."
        ) from None
    return final


def _publish(temporary: Path, final: Path) -> None:
    if final.exists():  # after a rollback; the older checkpoint that was restored is still there
        _remove(final)
    os.rename(temporary, final)
    sync_folder(final.parent)


def _remove(path: Path) -> None:
    """Hidden first, so that a kill while its files go leaves no half of a checkpoint under a checkpoint's name."""
    doomed = path.with_name(f".{path.name}.old")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write, make durable, read back, compare bit by bit."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(kept, path)
    descriptor = os.open(path, os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)
    with safe_open(path, framework="pt") as file:
        for name, tensor in kept.items():
            if not torch.equal(_bits(file.get_tensor(name)), _bits(tensor)):
                raise CheckpointError(f"{path} does not read back as it was written: check the disk; the older checkpoints are untouched.")


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor; NaN equals NaN there."""
    return tensor.reshape(-1).view(torch.uint8)


def _fingerprint(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def list_all(folder: Path) -> list[Path]:
    """Checkpoints in a folder, newest first, whether or not they are intact."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def find_damage(path: Path, parts: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a checkpoint, or None. parts: check only these (and the state); none is all."""
    try:
        index = read_json_object(path / "index.json")
        there = {file.name for file in path.glob("*.safetensors")}
        for name in sorted(there | index.keys()):
            if not is_plain_name(name) or name not in index:
                return f"{printable(name)} does not belong to index.json" if name in there else "index.json cannot be read"
        wanted = [*(f"{part}.safetensors" for part in parts), "state.json"] if parts else [*NEEDED, *(index.keys() - set(NEEDED))]
        for name in wanted:
            file = path / name
            if name not in index or not file.exists():
                return f"{printable(name)} is missing"
            if file.stat().st_size != int(index[name]["bytes"]):
                return f"{printable(name)} has {file.stat().st_size} bytes instead of {int(index[name]['bytes'])}"
            if _fingerprint(file)["sha256"] != index[name]["sha256"]:
                return f"{printable(name)} was changed after it was written"
    except FileNotFoundError as error:
        return f"{printable(Path(error.filename).name)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "index.json cannot be read"
    return None


def iter_intact(folder: Path, warn: Warn, parts: tuple[str, ...] = ()) -> Iterator[Path]:
    """Intact checkpoints, newest first, with a warning for each damaged one that is skipped."""
    for path in list_all(folder):
        reason = find_damage(path, parts)
        if reason is None:
            yield path
        else:
            warn(f"checkpoint {path.name} is damaged ({reason}); trying the one before it.")


def latest(folder: Path, warn: Warn, parts: tuple[str, ...] = ()) -> Path | None:
    """The newest intact checkpoint, or None where there is no checkpoint at all. Raises CheckpointError when all are damaged."""
    newest = next(iter_intact(folder, warn, parts), None)
    if newest is None and list_all(folder):
        raise CheckpointError(f"Every checkpoint in {folder} is damaged: copy them again from a backup, or train again in another folder.")
    return newest


def read(path: Path) -> Snapshot:
    """A checkpoint whose files are intact."""
    values = read_metadata(path)
    tensors = {file.stem: read_tensors(file) for file in sorted(path.glob("*.safetensors"))}
    return Snapshot(values["step"], tensors, values)


def read_metadata(path: Path) -> dict[str, Any]:
    """The part of a checkpoint that is not tensors."""
    try:
        values = read_json_object(path / "state.json")
    except OSError:
        raise CheckpointError(f"{path / 'state.json'} cannot be read: use an older checkpoint.") from None
    except MalformedFile as error:
        raise CheckpointError(f"{path / 'state.json'} cannot be read (it {error}): use an older checkpoint.") from None
    found = values.get("format")
    if found != FORMAT:
        raise CheckpointError(f"{path} has checkpoint format {found!r} and this version reads {FORMAT}: use the version that wrote it.")
    for name, (kind, what) in STATE_TYPES.items():
        if name in values and type(values[name]) is not kind:
            raise CheckpointError(f"{name} in {path / 'state.json'} is not {what}: use an older checkpoint.")
    if "step" not in values or dir_name(values["step"]) != path.name:
        raise CheckpointError(f"{path / 'state.json'} is not of the step that its folder names: use an older checkpoint.")
    counts = values.get("cursor", {}).values()
    states = values.get("random", {}).get("python", [])
    if (
        not all(type(count) in (int, float) and count >= 0 for count in [*counts, values.get("metrics_bytes", 0)])
        or type(states) is not list
    ):
        raise CheckpointError(f"{path / 'state.json'} holds counts or random states of other types: use an older checkpoint.")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, on the CPU."""
    try:
        open_regular(path).close()  # before safetensors opens it, which would wait for a named pipe
        return load_file(path)
    except (OSError, SafetensorError, MalformedFile, LookupError, ValueError, RuntimeError) as error:
        reason = printable(" ".join(str(error).split()))[:200]
        raise CheckpointError(f"{path} cannot be read ({reason}): use an older checkpoint.") from None


def set_aside(path: Path) -> None:
    """Take a checkpoint that is damaged or abandoned out of the list without deleting it."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)


def set_aside_newer(than: Path) -> None:
    """Take all that is newer than a checkpoint out of the list."""
    there = list_all(than.parent)
    for path in there[: there.index(than)]:
        set_aside(path)


def prune(folder: Path, keep: int) -> None:
    """Remove all older than the `keep` newest healthy checkpoints (those that a rollback may go to), and what killed processes left."""
    for leftover in [*folder.glob(".step-*.new"), *folder.glob(".step-*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)
    kept = 0
    for path in list_all(folder):
        if kept >= keep:
            _remove(path)
        else:
            kept += _healthy(path)


def _healthy(path: Path) -> bool:
    try:
        return read_metadata(path).get("healthy") is True
    except CheckpointError:
        return False
