"""Layouts that cannot work: each is refused in one sentence by one process alone, before it joins others or allocates anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from andromeda.cli.train import train
from andromeda.config.run import RunConfig
from andromeda.parallel import mesh as meshes
from andromeda.parallel.mesh import check_devices, join_mesh
from andromeda.utils.errors import ConfigError

CPU = torch.device("cpu")
MOE = {"model__feedforward__kind": "moe", "model__experts__num_experts": 4, "model__experts__top_k": 2}

WRONG = {
    "two sizes are left open": (4, {"parallel__replicate": -1}, "both -1"),
    "sizes make another number": (8, {"parallel__replicate": 2, "parallel__shard": 2}, "--nproc 4"),
    "sizes that are alone": (1, {"parallel__tensor": 2}, "parallel.tensor = 2"),
    "sizes do not divide": (4, {"parallel__tensor": 3}, "does not divide 4 processes"),
    "experts over other ranks": (4, {**MOE, "parallel__expert": 3}, "does not divide parallel.shard = 4"),
    "more ranks than sequences": (8, {}, "fewer than the 8 processes"),
    "sequences left over": (3, {}, "not a multiple of the 3 processes"),
    "micro-batch of other ranks' sequences": (2, {"train__micro_batch_size": 4}, "more than the 2 sequences"),
    "micro-batches left over": (2, {"train__batch_size": 12, "train__micro_batch_size": 4}, "does not divide the 6 sequences"),
    "8-bit moments of shards": (2, {"train__optim__kind": "adamw8bit"}, "adamw8bit"),
    "an own optimizer of shards": (2, {"train__optim__kind": "add_an_optimizer:Lion"}, "add_an_optimizer:Lion"),
    "one device for all": (2, {"train__device": "cuda:1"}, "names one device for 2 processes"),
    "experts that are split and spread": (4, {**MOE, "parallel__tensor": 2, "parallel__expert": 2}, "set one of them to 1"),
    "matrices in 8 bits that are split": (2, {"train__precision": "fp8", "train__device": "cuda", "parallel__tensor": 2}, "fp8"),
    "rows that are split": (2, {"train__clip": {"kind": "adaptive"}, "parallel__tensor": 2}, "adaptive"),
    "sequences that do not divide": (2, {"train__seq_len": 30, "parallel__context": 2}, "parallel.context = 2"),
    "heads that do not divide": (4, {"parallel__tensor": 4}, "model.attention.num_heads"),
    "experts of a dense model": (2, {"parallel__expert": 2}, "the model has none"),
    "experts that do not divide": (4, {**MOE, "model__experts__num_experts": 6, "parallel__expert": 4}, "num_experts"),
    "vocabulary that does not divide": (2, {"parallel__tensor": 2}, "vocab_size"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_layout_is_refused_alone(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    processes, changes, named = WRONG[kind]
    monkeypatch.setattr(meshes, "init_mesh", lambda *given: pytest.fail("joined the others"))
    if processes > 1:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ConfigError, match=named) as refusal:
        join_mesh(tiny(**changes), CPU)
    sentence = str(refusal.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert not refusal.value.told


def test_only_the_first_process_tells(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError) as refusal:
        join_mesh(tiny(), CPU)
    assert refusal.value.told


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_devices(torch.device("cuda"), 1)
    with pytest.raises(ConfigError, match="2 processes were started on this host, which has 1 GPU: start one a GPU"):
        check_devices(torch.device("cuda"), 2)


def test_the_launcher_refuses_before_it_starts_anything(tiny: Callable[..., RunConfig], tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from andromeda.config.load import dumps
    from andromeda.parallel import launch

    monkeypatch.setattr(launch, "launch", lambda *given: pytest.fail("started processes"))
    (tmp_path / "run.toml").write_text(dumps(tiny()))
    with pytest.raises(ConfigError, match="fewer than the 8 processes"):
        train(str(tmp_path / "run.toml"), [], out=tmp_path / "out", nproc=8)
    assert not (tmp_path / "out").exists()
