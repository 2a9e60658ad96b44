"""Checkpoints on disk: safetensors and JSON, nothing that could run code when it is read.

A checkpoint is a folder, which one process or all ranks of a job write together. It is written under a hidden name, flushed to the
disk, read back and compared, and only then renamed; older ones are deleted after that. So every folder with a checkpoint's name is
complete, whenever a process is killed. Against damage on the disk, `index.json` holds the size and SHA-256 of every file, and a
checkpoint that does not match is skipped.
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
from safetensors.torch import save_file
from torch import Tensor

from andromeda.train.checkpoint_chunks import LocalTensors, local_chunks
from andromeda.train.checkpoint_ranks import ONE, RankFailed, Ranks, ShardPlan, blocks_of
from andromeda.train.checkpoint_reader import SHARDS, part_of_file, read_part
from andromeda.utils.errors import CheckpointError
from andromeda.utils.files import sync_folder, write_whole
from andromeda.utils.untrusted import MalformedFile, is_plain_name, open_regular, printable, read_json_object

FORMAT, SHARDED_FORMAT = 1, 2
"""Of state.json: with one file for each part, and with one for each rank that holds a block of it (checkpoint_reader.py)."""
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
Tensors = Mapping[str, Mapping[str, Tensor]]
"""Tensors of each part (model, optimizer, average, random) by name; DTensors where they are sharded over ranks."""


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


def save(folder: Path, snapshot: Snapshot, ranks: Ranks = ONE) -> Path:
    """Write `snapshot` into `folder` (a run's checkpoints/) and return its path; every one of `ranks` calls this with its own blocks.

    Raises CheckpointError, on every rank, when the disk fails on one.
    """
    return write(folder, snapshot.step, snapshot.metadata, local_chunks(snapshot.tensors, copy=False), ranks)


def write(folder: Path, step: int, metadata: Mapping[str, Any], tensors: LocalTensors, ranks: Ranks) -> Path:
    """What `save` does, with what each rank holds of every tensor. Rank 0's metadata counts."""
    final = folder / dir_name(step)
    temporary = folder / f".{final.name}.new"
    try:
        plan = ShardPlan(ranks.all_gather(blocks_of(tensors)))
        ranks.on_first(lambda: _make_empty(temporary))
        written = ranks.agree(lambda: _write_parts(temporary, tensors, plan, ranks.rank))
        files = {name: fingerprint for of_rank in written for name, fingerprint in of_rank.items()}
        ranks.on_first(lambda: _complete(temporary, {"step": step, **metadata}, plan, files))
        ranks.on_first(lambda: _publish(temporary, final))
    except (OSError, SafetensorError, RankFailed) as error:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"The checkpoint of step {step} cannot be written to {folder} ({getattr(error, 'strerror', None) or error}): "
            "make room there and resume with --resume; the older checkpoints are untouched."
        ) from None
    return final


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_parts(folder: Path, tensors: LocalTensors, plan: ShardPlan, rank: int) -> dict[str, dict[str, Any]]:
    """Write the files of one rank; returns size and hash of each by name."""
    written = {}
    for part in plan.parts:
        if names := plan.names(part, rank):
            path = folder / plan.file(part, rank)
            _write_tensors(path, {name: tensors[part][name].values for name in names})
            written[path.name] = _fingerprint(path)
    return written


def _complete(folder: Path, state: dict[str, Any], plan: ShardPlan, written: dict[str, dict[str, Any]]) -> None:
    """Write the small files of a checkpoint once every rank has written its own."""
    values = {"state.json": {"format": SHARDED_FORMAT if plan.sharded else FORMAT, **state}}
    if plan.sharded:
        values[SHARDS] = plan.describe()
    for name, value in values.items():
        write_whole(folder / name, json.dumps(value).encode())
        written[name] = _fingerprint(folder / name)
    unseen = [name for name in written if not (folder / name).exists()]
    if unseen:
        raise OSError(f"{unseen[0]}, which another rank has written, is not seen by rank 0: --out must be a folder that all hosts share")
    write_whole(folder / "index.json", json.dumps(dict(sorted(written.items())), indent=1).encode())


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
        for name in _wanted_files(index, parts):
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


def _wanted_files(index: Mapping[str, Any], parts: tuple[str, ...]) -> list[str]:
    """The files of some parts and of the state, or, of no parts, all."""
    files: dict[str, list[str]] = {}
    for name in index:
        if name.endswith(".safetensors"):
            files.setdefault(part_of_file(name), []).append(name)
    wanted = [name for part in parts or ("model",) for name in files.get(part, [f"{part}.safetensors"])]
    sharded = any(name != f"{part_of_file(name)}.safetensors" for name in wanted)
    small = ["state.json", *([SHARDS] if sharded else [])]
    return list(dict.fromkeys([*wanted, *small, *(() if parts else index)]))


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


def read(path: Path, like: Mapping[str, Tensor] | None = None) -> Snapshot:
    """A checkpoint whose files are intact; a tensor is read from the disk when it is asked for.

    like: the live weights by name; where they are DTensors, so are weights, optimizer state and averages of the same shape that are
    read, and each rank reads its own blocks alone.
    """
    values = read_metadata(path)
    parts = sorted({part_of_file(file.name) for file in path.glob("*.safetensors")})
    return Snapshot(values["step"], {part: read_part(path, part, like) for part in parts}, values)


def read_metadata(path: Path) -> dict[str, Any]:
    """The part of a checkpoint that is not tensors."""
    try:
        values = read_json_object(path / "state.json")
    except OSError:
        raise CheckpointError(f"{path / 'state.json'} cannot be read: use an older checkpoint.") from None
    except MalformedFile as error:
        raise CheckpointError(f"{path / 'state.json'} cannot be read (it {error}): use an older checkpoint.") from None
    found = values.get("format")
    if found not in (FORMAT, SHARDED_FORMAT):
        raise CheckpointError(f"{path} has checkpoint format {found!r} and this version reads 1 and 2: use the version that wrote it.")
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
