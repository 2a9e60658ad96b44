"""Whatever moment a process dies at and whatever happens to a file, the newest checkpoint that is used is whole."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from andromeda.train import checkpoint
from andromeda.train.checkpoint import Snapshot
from andromeda.train.state import load_model
from andromeda.utils.errors import CheckpointError


def snapshot(step: int, healthy: bool = True) -> Snapshot:
    draw = torch.Generator().manual_seed(step)
    model = {
        "weight": torch.randn(7, 5, generator=draw),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
        "bf16": torch.randn(3, generator=draw).bfloat16(),
        "transposed": torch.randn(4, 3, generator=draw).T,
        "count": torch.tensor(step),
        "flags": torch.tensor([True, False]),
    }
    return Snapshot(step, {"model": model, "random": {"torch": torch.arange(9, dtype=torch.uint8)}}, {"healthy": healthy, "note": "é"})


def bits(snapshot: Snapshot) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {
        f"{part}:{name}": (t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for part, held in snapshot.tensors.items()
        for name, t in held.items()
    }


def silent(text: str) -> None:
    """No warning is looked at."""


def test_round_trip(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, snapshot(3))
    back = checkpoint.read(path)
    assert back.step == 3
    assert bits(back) == bits(snapshot(3))
    assert (back.metadata["healthy"], back.metadata["note"]) == (True, "é")
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}, "nothing that could run code"


class Died(BaseException):
    """A process that ends here and now."""


def die_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """End the process at the call number `count` of anything that touches the disk; a file being written is half written."""
    calls = iter(range(10**6))

    def torn(call: Callable[..., Any], halve: bool = False) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(calls) < count:
                return call(*args, **kwargs)
            if halve:
                call(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            raise Died

        return wrapped

    for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, torn(getattr(os, name)))
    monkeypatch.setattr(Path, "replace", torn(Path.replace))
    monkeypatch.setattr(checkpoint, "save_file", torn(checkpoint.save_file, halve=True))


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step again"])
def test_death_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """Saving step 2 over steps 1 (and an older 2), with pruning, dies at every disk operation in turn."""
    outcomes = set()
    for moment in range(1000):
        folder = tmp_path / str(moment)
        checkpoint.save(folder, snapshot(1))
        if again:
            checkpoint.save(folder, Snapshot(2, snapshot(1).tensors, snapshot(1).metadata))
        with monkeypatch.context() as patch:
            die_at(patch, moment)
            try:
                checkpoint.save(folder, snapshot(2))
                checkpoint.prune(folder, 1)
                died = False
            except Died:
                died = True
        newest = checkpoint.latest(folder, pytest.fail)
        assert newest is not None
        found = checkpoint.read(newest)
        assert bits(found) in (bits(snapshot(1)), bits(snapshot(2)))
        outcomes.add((found.step, bits(found) == bits(snapshot(2))))
        checkpoint.save(folder, snapshot(3))  # and the next one still goes
        checkpoint.prune(folder, 1)
        assert [path.name for path in folder.iterdir()] == ["step-00000003"]
        if not died:
            break
    assert not died
    assert moment > 15
    assert {(1, False), (2, True)} <= outcomes


@pytest.mark.parametrize("file", ["model.safetensors", "random.safetensors", "state.json", "index.json"])
def test_damage_is_passed_over(tmp_path: Path, file: str) -> None:
    checkpoint.save(tmp_path, snapshot(1))
    newest = checkpoint.save(tmp_path, snapshot(2)) / file
    whole = newest.read_bytes()
    places = sorted({*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1})
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in places]
    for content in (*(whole[:at] for at in places), *flipped):
        newest.write_bytes(content)
        warnings: list[str] = []
        chosen = checkpoint.latest(tmp_path, warnings.append)
        assert chosen is not None
        # A changed space in index.json may leave its meaning what it was.
        if json_or_none(content) != json.loads(whole) if file == "index.json" else True:
            assert chosen.name == "step-00000001"
            assert len(warnings) == 1
            assert "step-00000002 is damaged" in warnings[0]
    newest.unlink()
    assert checkpoint.latest(tmp_path, silent) == tmp_path / "step-00000001"


def json_or_none(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_all_damaged_is_one_sentence(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path, silent) is None
    for step in (1, 2):
        os.truncate(checkpoint.save(tmp_path, snapshot(step)) / "model.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"Every checkpoint in .* is damaged"):
        checkpoint.latest(tmp_path, silent)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, snapshot(1))

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(CheckpointError, match=r"step 2 cannot be written .*No space left.*older checkpoints are untouched"):
            checkpoint.save(tmp_path, snapshot(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_file_that_cannot_grow(tmp_path: Path) -> None:
    """The library's own error for a file that the system refuses to write becomes the same sentence."""
    checkpoint.save(tmp_path, snapshot(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step 2 cannot be written .*File too large"):
            checkpoint.save(tmp_path, snapshot(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_disk_that_changes_what_it_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.save_file

    def lies(tensors: dict[str, torch.Tensor], path: Path) -> None:
        real(tensors, path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(checkpoint, "save_file", lies)
    with pytest.raises(CheckpointError, match="does not read back as it was written"):
        checkpoint.save(tmp_path, snapshot(1))
    assert checkpoint.list_all(tmp_path) == []


def test_prune_counts_healthy_ones(tmp_path: Path) -> None:
    for step, healthy in ((1, True), (2, True), (3, False), (4, True), (5, False)):
        checkpoint.save(tmp_path, snapshot(step, healthy))
    checkpoint.prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.dir_name(step) for step in (2, 3, 4, 5)]
    (tmp_path / checkpoint.dir_name(4) / "state.json").write_text("{")
    checkpoint.prune(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.dir_name(step) for step in (2, 3, 4, 5)]


def test_set_aside_is_kept_but_not_listed(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, snapshot(1))
    shutil.copytree(path, tmp_path / "damaged-step-00000001")
    checkpoint.set_aside(path)
    assert [p.name for p in tmp_path.iterdir()] == ["damaged-step-00000001"]
    assert checkpoint.list_all(tmp_path) == []


def test_another_model_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good = {name: tensor + 1 for name, tensor in before.items()}
    for change, sentence in (
        ({"1.weight": torch.zeros(4, 2)}, r"1\.weight has the shape \(4, 2\) in the checkpoint and \(2, 2\) in the model;"),
        ({"2.bias": torch.zeros(1)}, r"2\.bias is only in the checkpoint;"),
        ({"1.weight": torch.zeros(4, 2), "2.bias": torch.zeros(1)}, r"\(and 1 more differences\)"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            load_model(model, good | change)
    with pytest.raises(CheckpointError, match=r"0\.bias is only in the model"):
        load_model(model, {name: tensor for name, tensor in good.items() if name != "0.bias"})
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    load_model(model, good)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in good.items())
