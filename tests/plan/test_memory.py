"""What a step is planned to hold against what a real step on this CPU holds.

Resident memory is too coarse for this (allocators keep what they once had), so two exact measures are used: the storages
that autograd saves, seen by its hooks, and every allocation and release that the profiler records.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from andromeda.config.load import from_values
from andromeda.config.run import RunConfig
from andromeda.model.transformer import Transformer
from andromeda.ops.attention import sdpa
from andromeda.ops.attention.tensor_cache import TensorCache
from andromeda.optim import Muon
from andromeda.parallel.layout import Layout
from andromeda.plan.dry_run import step_memory
from andromeda.plan.memory import TrainStateBytes, training_memory, update_bytes
from andromeda.train.activation_checkpoint import checkpoint_blocks
from andromeda.train.objective import MicroBatch, NextTokenObjective
from andromeda.train.precision import PRECISIONS

pytestmark = pytest.mark.usefixtures("still_heap")
ROWS, T = 2, 64

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "swiglu, window": {"feedforward": {"kind": "swiglu"}, "attention": {"sliding_window": 16, "full_attention_interval": 2}},
    "parallel, alibi, shift": {"block": {"kind": "parallel"}, "alibi": {"num_heads": 2}, "shift": {"kind": "chunks"}},
    "moe": {"feedforward": {"kind": "moe", "intermediate_size": 96}, "experts": {"num_experts": 4, "top_k": 2, "num_shared_experts": 1}},
    "speedrun": {"value_embedding": {"kind": "layered"}, "skips": {"first": True, "unet": True}},
}


def config(checkpointing: str, **changes: Any) -> RunConfig:
    model: dict[str, Any] = {
        "vocab_size": 512,
        "max_seq_len": T,
        "hidden_size": 64,
        "num_layers": 4,
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "qk_norm": "rms"},
        "rotary": {"kind": "rope"},
        "feedforward": {"kind": "relu2", "intermediate_size": 256},
    }
    for key, value in changes.items():
        model[key] = {**model.get(key, {}), **value} if isinstance(value, dict) else value
    return from_values({"model": model, "train": {"activation_checkpointing": checkpointing}})


class Real:
    """A training step without the update, on a built model."""

    def __init__(self, run: RunConfig, precision: str, compiled: bool = False) -> None:
        self.model = Transformer(run.model)
        checkpoint_blocks(self.model, run.train.activation_checkpointing)
        if compiled:
            for block in self.model.decoder.blocks:
                block.compile()
        ids = torch.randint(0, run.model.vocab_size, (ROWS, T))
        self.rows, self.objective = MicroBatch(ids, ids, None), NextTokenObjective(self.model)
        self.precision = PRECISIONS[precision](torch.device("cpu"))
        self.gradients = sum(p.numel() * p.element_size() for p in self.model.parameters())

    def forward(self) -> Tensor:
        with self.precision.autocast():
            return self.objective(self.rows).total

    def step(self) -> None:
        self.forward().backward()


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Garbage is collected before some work, and not during it.

    The profiler knows what was allocated in an earlier profile of this process: a model in a cycle of references, left
    by another test and collected now, would be subtracted.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes held at the worst moment of some work and at its end, by the profiler's record of the allocator."""
    # Masks of an earlier step would be remembered, and not be allocated again.
    sdpa._query_blocks = TensorCache(4)
    with nothing_collected(), torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kept = work()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del kept
    return peak, held


CASES = [(name, "fp32") for name in MODELS] + [("plain", "bf16")]


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize(("name", "precision"), CASES)
def test_planned_memory_is_what_a_step_takes(name: str, checkpointing: str, precision: str) -> None:
    run = config(checkpointing, **MODELS[name])
    planned = step_memory(run, ROWS, T, precision, gpu=False, compiled=False)
    real = Real(run, precision)
    real.step()  # whatever is made once is made here
    real.model.zero_grad()
    _, saved = allocated(real.forward)
    assert planned.saved == pytest.approx(saved, rel=0.01)
    peak, _ = allocated(real.step)
    # What kernels take for themselves is not seen.
    assert planned.peak(real.gradients, accumulated=False) == pytest.approx(peak, rel=0.05)


def test_what_an_earlier_measurement_left_is_not_subtracted() -> None:
    def left_in_a_cycle() -> None:
        cycle: list[object] = [torch.zeros(10_000)]
        cycle.append(cycle)

    def collecting() -> Tensor:
        kept = torch.zeros(100)
        gc.collect()
        return kept

    allocated(left_in_a_cycle)
    assert allocated(collecting) == (400, 400)


def test_saved_is_what_autograds_hooks_see() -> None:
    run = config("none", feedforward={"kind": "swiglu"})
    real, storages = Real(run, "fp32"), {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = real.forward()
    for known in (*real.model.parameters(), *real.rows[:2]):
        storages.pop(known.untyped_storage()._cdata, None)
    planned = step_memory(run, ROWS, T, "fp32", gpu=False, compiled=False)
    # Two scalars of the loss are held beside what is saved.
    assert planned.saved == pytest.approx(sum(storages.values()), rel=0.001)
    assert total.requires_grad


def test_a_deep_model_is_planned_from_shallow_ones() -> None:
    """Depth 9 with a cycle of 2: measured at 1 and 3, and compared with the real thing."""
    run = config("none", num_layers=9, attention={"sliding_window": 16, "full_attention_interval": 2})
    planned = step_memory(run, ROWS, T, "fp32", gpu=False, compiled=False)
    real = Real(run, "fp32")
    real.step()
    real.model.zero_grad()
    assert planned.saved == pytest.approx(allocated(real.forward)[1], rel=0.01)
    assert planned.peak(real.gradients, accumulated=False) == pytest.approx(allocated(real.step)[0], rel=0.05)


def test_a_plan_leaves_nothing_behind_that_a_run_could_meet() -> None:
    run = config("none", attention={"sliding_window": 16})
    step_memory(run, ROWS, T, "fp32", gpu=False, compiled=False)
    Real(run, "fp32").step()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_compiled_blocks_save_what_was_planned(checkpointing: str) -> None:
    run = config(checkpointing, feedforward={"kind": "swiglu"})
    planned = step_memory(run, ROWS, T, "fp32", gpu=False, compiled=True)
    torch._dynamo.reset()
    real = Real(run, "fp32", compiled=True)
    real.step()
    real.model.zero_grad()
    assert planned.saved == pytest.approx(allocated(real.forward)[1], rel=0.02)


def test_a_fused_kernel_saves_the_same_whatever_the_pattern() -> None:
    window = config("none", attention={"sliding_window": 16}, alibi={"num_heads": 2})
    plain = step_memory(config("none"), ROWS, T, "bf16", gpu=True, compiled=False)
    assert step_memory(window, ROWS, T, "bf16", gpu=True, compiled=False) == plain


def test_copies_of_weights_are_those_of_products_in_16_bits() -> None:
    """One copy of every matrix of a matmul and of every gain of the stream, two bytes a number; in float32 there is none."""
    run = config("none", head={"bias": True})
    planned = step_memory(run, ROWS, T, "bf16", gpu=False, compiled=False)
    copied = [p for name, p in Transformer(run.model).named_parameters() if ("decoder" in name and p.ndim == 2) or "norm" in name]
    assert planned.saved_copies == 2 * sum(p.numel() for p in copied)
    assert planned.forward_copies >= planned.saved_copies
    assert step_memory(run, ROWS, T, "fp32", gpu=False, compiled=False).saved_copies == 0


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_holds_the_blocks_matrices_once_more(precision: str, compiled: bool) -> None:
    """Two bytes a number, all the time, and not among what is saved; with fsdp, which gathers them, there are none."""
    run = config("none", num_layers=5)
    planned = step_memory(run, ROWS, T, precision, gpu=True, compiled=compiled)
    matrices = [p for name, p in Transformer(run.model).named_parameters() if "decoder" in name and p.ndim == 2]
    assert planned.casts == 2 * sum(p.numel() for p in matrices)
    assert planned.saved_copies < planned.casts / 100
    assert step_memory(run, ROWS, T, "fp32", gpu=True, compiled=compiled).casts == 0
    state, model = TrainStateBytes(1000, 1000, 2000, 0), Transformer(run.model)
    alone, sharded = (training_memory(run, Layout(shard=shard), model, planned, state, 0) for shard in (1, 2))
    without = training_memory(run, Layout(), model, replace(planned, casts=0), state, 0)
    assert alone.peak - without.peak == planned.casts
    assert sharded.passing.casts == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_saves_one_wide_vector_of_a_gelu_network(compiled: bool) -> None:
    """Two bytes for each inner feature of a token and layer: what GELU is taken of, not GELU."""
    saved = [
        step_memory(
            config("none", feedforward={"kind": "gelu", "bias": True, "intermediate_size": hidden}),
            ROWS,
            T,
            "bf16",
            gpu=True,
            compiled=compiled,
        ).saved
        for hidden in (256, 320)
    ]
    assert saved[1] - saved[0] == 4 * ROWS * T * 64 * 2


def test_what_muons_update_takes() -> None:
    run = from_values({"model": {"hidden_size": 64, "num_layers": 3, "vocab_size": 64, "attention": {"num_heads": 4, "head_dim": 16}}})
    optim = run.train.optim.model_copy(update={"kind": "muon"})
    model = Transformer(run.model)
    muon = Muon(
        [nn.Parameter(p.detach()) for name, p in model.named_parameters() if "decoder" in name and p.ndim == 2 and "qk_norm" not in name]
    )
    for group in muon.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.randn_like(parameter)
    muon.step()
    assert update_bytes(model, optim, gpu=False) == pytest.approx(allocated(muon.step)[0], rel=0.02)
