"""What several ranks save is what any other number of ranks, laid out in any other way, reads, and no kill leaves half of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from andromeda.train import checkpoint
from andromeda.train.checkpoint import Snapshot
from andromeda.train.checkpoint_ranks import Ranks
from andromeda.train.checkpoint_reader import read_part
from andromeda.train.checkpoint_writer import CheckpointWriter
from andromeda.train.weights import weights_sha256
from andromeda.utils.errors import CheckpointError
from andromeda.utils.files import sha256_of
from tests.train.ranks import exit_codes, on_ranks

R, S = Replicate(), Shard
SHAPES: dict[str, tuple[int, ...]] = {"even": (8, 4), "uneven": (7, 5), "short": (3, 2), "vector": (6,), "cube": (2, 9, 4), "empty": (0, 3)}
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "rows over 4": ((4,), (S(0),)),
    "rows over 2": ((2,), (S(0),)),
    "columns over 2": ((2,), (S(1),)),
    "copies of rows": ((2, 2), (R, S(0))),
    "rows and columns": ((2, 2), (S(0), S(1))),
    "rows of rows": ((2, 2), (S(0), S(0))),
    "copies": ((2,), (R,)),
}
"""Mesh and placements; vectors are never cut along a second dimension."""


def whole_tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    return tensors | {"half": torch.randn(5, 3, generator=draw).bfloat16(), "count": torch.tensor(7), "nan": torch.full((4,), torch.nan)}


def laid_out(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The tensors over a mesh; a number stays as it is."""
    sizes, placements = LAYOUTS[layout]
    mesh = mesh_of(sizes)

    def place(tensor: Tensor) -> Tensor:
        fit = [R if isinstance(p, Shard) and p.dim >= tensor.ndim else p for p in placements]
        return distribute_tensor(tensor, mesh, fit) if tensor.ndim else tensor

    return {name: place(tensor) for name, tensor in tensors.items()}


@cache
def mesh_of(sizes: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", sizes)


def ranks() -> Ranks:
    return Ranks(dist.new_group(backend="gloo"))


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(bits(one), bits(other))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def size(layout: str) -> int:
    return torch.Size(LAYOUTS[layout][0]).numel()


def save_laid_out(rank: int, folder: Path, *layouts: str) -> None:
    tensors, group = whole_tensors(), ranks()
    optimizer = {f"{name}/exp_avg": tensor + 1 for name, tensor in tensors.items()}
    metadata = {"healthy": True, "cursor": {"rows": 12}, "rank": rank}
    for layout in layouts:
        parts = {"model": laid_out(tensors, layout), "optimizer": laid_out(optimizer, layout), "random": {"torch": torch.tensor([rank])}}
        checkpoint.save(folder / layout, Snapshot(1, parts, metadata), group)


def check_laid_out(rank: int, folder: Path, saved: list[str], *layouts: str) -> None:
    expected = whole_tensors()
    for layout in layouts:
        like, optimizer = laid_out(expected, layout), laid_out({name: tensor + 1 for name, tensor in expected.items()}, layout)
        wanted = {("model", name): t for name, t in like.items()} | {("optimizer", f"{name}/exp_avg"): t for name, t in optimizer.items()}
        for other in saved:
            found = checkpoint.read(folder / other / "step-00000001", like)
            for (part, key), tensor in wanted.items():
                read = found.tensors[part][key]
                assert type(read) is type(tensor)
                one, two = (t.to_local() if isinstance(t, DTensor) else t for t in (read, tensor))
                assert same_bits(one, two), (other, layout, part, key)
            assert found.metadata["cursor"] == {"rows": 12}
            assert found.metadata["rank"] == 0


def test_any_layout_is_read_by_any_other(tmp_path: Path) -> None:
    four, two = ([layout for layout in LAYOUTS if size(layout) == count] for count in (4, 2))
    on_ranks(4, save_laid_out, tmp_path, *four)
    on_ranks(2, save_laid_out, tmp_path, *two)
    on_ranks(2, check_laid_out, tmp_path, four, *two)
    on_ranks(4, check_laid_out, tmp_path, two, "rows over 4", "rows and columns")
    hashes = {weights_sha256(tmp_path / layout / "step-00000001", "model") for layout in LAYOUTS}
    assert hashes == {sha256_of(tmp_path / "copies" / "step-00000001" / "model.safetensors")}
    for layout in LAYOUTS:
        check_whole(tmp_path / layout, sharded=layout != "copies")


def check_whole(folder: Path, *, sharded: bool) -> None:
    """What one process reads, without any process group."""
    path = checkpoint.latest(folder, pytest.fail)
    assert path is not None
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}, "nothing that could run code"
    for name, tensor in whole_tensors().items():
        assert same_bits(read_part(path, "model")[name], tensor)
        assert same_bits(read_part(path, "optimizer")[f"{name}/exp_avg"], tensor + 1)
    assert read_part(path, "random")["torch"].tolist() == [0]
    assert json.loads((path / "state.json").read_text())["format"] == 1 + sharded
    # Each block is stored once: the files hold as many bytes as the tensors.
    stored = sum(t.nbytes for file in path.glob("model*.safetensors") for t in load_file(file).values())
    assert stored == sum(tensor.nbytes for tensor in whole_tensors().values())


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


def train_sharded(mesh: DeviceMesh) -> tuple[nn.Module, torch.optim.Optimizer]:
    """FSDP2 over tensor parallelism, whose weights torch lays out as strided shards."""
    model = TwoLayers()
    parallelize_module(model, mesh["tensor"], {"first": ColwiseParallel()})
    fully_shard(model, mesh=mesh["shard"])
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def save_trained(rank: int, folder: Path) -> None:
    model, optimizer = train_sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("shard", "tensor")))
    weights = dict(model.named_parameters())
    states = {f"{name}/{entry}": value for name, p in weights.items() for entry, value in optimizer.state[p].items()}
    checkpoint.save(folder, Snapshot(1, {"model": weights, "optimizer": states}, {"healthy": True}), ranks())
    whole = {key: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for key, t in {**weights, **states}.items()}
    if rank == 0:
        save_file({key: value.contiguous() for key, value in whole.items()}, folder / "whole.safetensors")


def test_fsdp_over_tensor_parallelism(tmp_path: Path) -> None:
    on_ranks(4, save_trained, tmp_path)
    expected, path = load_file(tmp_path / "whole.safetensors"), checkpoint.latest(tmp_path, pytest.fail)
    assert path is not None
    found = {**read_part(path, "model"), **read_part(path, "optimizer")}
    assert found.keys() == expected.keys()
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint that two ranks have written."""
    folder = tmp_path_factory.mktemp("two")
    on_ranks(2, save_laid_out, folder, "rows over 2")
    return folder / "rows over 2"


@pytest.fixture
def two(of_two_ranks: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(of_two_ranks, tmp_path / "two"))


def die_while_saving(rank: int, folder: Path, victim: int, moment: int) -> None:
    """SIGKILL before one of the calls of a rank that touch the disk or other ranks; says so when there is no such call."""
    calls = iter(range(10**6))

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            if rank == victim and next(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return wrapped

    tensors, group = laid_out(whole_tensors(), "rows over 2"), ranks()
    for name in ("fsync", "rename", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))
    dist.all_gather_object = deadly(dist.all_gather_object)
    checkpoint.save(folder, Snapshot(2, {"model": tensors}, {"healthy": True}), group)


@pytest.mark.parametrize("moments", [(1, 5, 9), pytest.param(range(40), marks=pytest.mark.slow)], ids=["a few moments", "every moment"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_at_any_moment(of_two_ranks: Path, tmp_path: Path, victim: int, moments: Sequence[int]) -> None:
    """The checkpoint that is there afterwards is the old one or the new one, whole."""
    newest = []
    for moment in moments:
        folder = tmp_path / str(moment)
        shutil.copytree(of_two_ranks, folder)
        codes = exit_codes(2, die_while_saving, folder, victim, moment)
        died = codes[victim] == -signal.SIGKILL
        assert died or codes == [0, 0]
        path = checkpoint.latest(folder, pytest.fail)
        assert path is not None
        found = checkpoint.read(path).tensors["model"]
        assert all(same_bits(found[name], tensor) for name, tensor in whole_tensors().items())
        newest.append(path.name)
        if not died:
            break
    assert newest[0] == "step-00000001"
    assert len(newest) < 40


def fail_on_one(rank: int, folder: Path) -> None:
    """A disk that is full on one rank alone."""
    tensors, group = laid_out(whole_tensors(), "rows over 2"), ranks()
    real = checkpoint.save_file

    def full(*arguments: Any) -> None:
        if rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    checkpoint.save_file = full
    with pytest.raises(CheckpointError, match=r"step 2 cannot be written .*No space left.*older checkpoints are untouched"):
        checkpoint.save(folder, Snapshot(2, {"model": tensors}, {"healthy": True}), group)
    dist.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001"]


def test_a_disk_that_is_full_on_one_rank_fails_on_all(two: Path) -> None:
    on_ranks(2, fail_on_one, two)


def save_in_background(rank: int, folder: Path) -> None:
    """The weights change, and the ranks talk to each other, while they are written."""
    tensors = laid_out(whole_tensors(), "rows over 2")
    writer = CheckpointWriter(folder, 2, ranks(), background=True)
    writer.save(Snapshot(1, {"model": tensors}, {"healthy": True}))
    for _ in range(50):
        for tensor in tensors.values():
            tensor.add_(1)
        dist.all_reduce(torch.ones(100))
    writer.save(Snapshot(2, {"model": tensors}, {"healthy": True}))
    writer.wait()
    writer.save(Snapshot(3, {"model": tensors}, {"healthy": True}))
    writer.wait()


def test_a_checkpoint_in_the_background_is_of_the_step_that_it_names(tmp_path: Path) -> None:
    on_ranks(2, save_in_background, tmp_path)
    assert [path.name for path in checkpoint.list_all(tmp_path)] == ["step-00000003", "step-00000002"]
    for path in checkpoint.list_all(tmp_path):
        found, expected = checkpoint.read(path).tensors["model"], whole_tensors()
        for _ in range(50):
            for tensor in expected.values():
                tensor.add_(1)
        assert [name for name in expected if not same_bits(found[name], expected[name])] == []


def test_a_failure_in_the_background_is_told_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, 1, background=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", lambda *arguments: os.stat("/nowhere"))
        writer.save(Snapshot(1, {"model": whole_tensors()}, {"healthy": True}))
        with pytest.raises(CheckpointError, match="step 1 cannot be written"):
            writer.wait()
    writer.save(Snapshot(2, {"model": whole_tensors()}, {"healthy": True}))
    writer.wait()
    assert [path.name for path in checkpoint.list_all(tmp_path)] == ["step-00000002"]


def change(values: dict[str, Any], what: str) -> None:
    layout = values["layouts"][0]
    if what == "a block is missing":
        layout.pop()
    elif what == "a block reaches outside":
        layout[0][1] = [5000] * len(layout[0][1])
    elif what == "a file elsewhere":
        values["files"]["model"][0] = "../../model-00000-of-00002.safetensors"
    elif what == "a file that is not there":
        layout[0][0] = 9
    elif what == "another shape":
        for entry in values["tensors"]["model"].values():
            entry[1] = [10**9] * len(entry[1])
    else:
        values["tensors"] = [what]


@pytest.mark.parametrize(
    "what",
    ["a block is missing", "a block reaches outside", "a file elsewhere", "a file that is not there", "another shape", "no table"],
)
def test_an_index_that_lies_is_one_sentence(two: Path, what: str) -> None:
    path = two / "step-00000001"
    values = json.loads((path / "shards.json").read_text())
    change(values, what)
    (path / "shards.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="use an older checkpoint"):
        dict(read_part(path, "model"))
    assert "shards.json" in str(checkpoint.find_damage(path))


def test_damage_of_one_ranks_file_is_passed_over(two: Path) -> None:
    path = two / "step-00000001"
    for file in path.iterdir():
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        if file.name != "index.json":
            assert checkpoint.find_damage(path) == f"{file.name} was changed after it was written"
        file.unlink()
        assert checkpoint.find_damage(path) == f"{file.name} is missing"
        file.write_bytes(whole)
    assert checkpoint.find_damage(path) is None
    assert checkpoint.find_damage(path, ("model",)) is None
