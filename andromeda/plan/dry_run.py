"""Activation memory of a training step, from a dry run on fake tensors, which have shapes and no storage.

The model, the loss, autocast, activation checkpointing and torch.compile's choice of what to save for backward are the real ones, so
nothing here repeats what the model does. Bytes grow linearly with the number of layers, so two shallow models give those of a
deep one.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from andromeda.config.derived import layer_cycle
from andromeda.config.model import ModelConfig
from andromeda.config.run import RunConfig
from andromeda.model.cached_cast_linear import refresh
from andromeda.model.transformer import Transformer
from andromeda.ops import cross_entropy, mlp
from andromeda.ops.attention import sdpa
from andromeda.ops.attention.tensor_cache import TensorCache
from andromeda.ops.compute_dtype import HALF_DTYPES, compute_dtype
from andromeda.plan.memory_tracker import MemoryTracker
from andromeda.train.activation_checkpoint import checkpoint_blocks
from andromeda.train.objective import MicroBatch, NextTokenObjective
from andromeda.train.precision import PRECISIONS, HalfPrecision, Precision

CPU = torch.device("cpu")
EAGER, COMPILED = "eager", "aot_eager_decomp_partition"
"""torch.compile backends: the second saves for backward what inductor would save, and generates no code."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one micro-batch beyond weights and gradients."""

    forward: int
    """Peak of the forward pass, including logits in the loss and autocast's copies of weights."""
    saved: int
    """Saved for backward by blocks, embedding and loss."""
    working: int
    """Temporaries at the peak of the backward pass, on top of what is saved or, once they are larger, the gradients."""
    loss: int
    """The part of `saved` that belongs to the loss: gradients of the head and of the last hidden states."""
    forward_copies: int
    """The part of `forward` that is copies of weights in the compute dtype."""
    saved_copies: int
    """The part of `saved` that is such copies."""
    casts: int = 0
    """The blocks' weights in the compute dtype on a GPU, cast once per step and held throughout."""

    def peak(self, gradients: int, accumulated: bool) -> int:
        """Peak of the step. gradients: bytes of all of them; accumulated: whether they exist from the start."""
        if accumulated:
            return max(self.forward, self.saved + self.working) + gradients
        return max(self.forward, max(self.saved, gradients) + self.working)


def step_memory(config: RunConfig, rows: int, sequence: int, precision: str, *, gpu: bool, compiled: bool) -> StepMemory:
    """Memory of a micro-batch of `rows` sequences of `sequence` tokens.

    gpu: attention saves what a fused kernel saves (queries, keys, values, output, one log-sum-exp per query), whatever the mask; on a
    CPU masks are counted too. Every sequence is taken as one document.
    """
    model = as_fused(config.model) if gpu else config.model
    # Full checkpointing saves the blocks' inputs, compiled or not.
    compiled = compiled and config.train.activation_checkpointing != "full"
    shallow, deep = depths(model)

    def at(depth: int, backend: str) -> StepMemory:
        changed = config.model_copy(update={"model": model.model_copy(update={"num_layers": depth})})
        return _measure(changed, rows, sequence, precision, gpu, backend)

    if model.num_layers <= deep and not compiled:
        return at(model.num_layers, EAGER)
    backend = COMPILED if compiled else EAGER
    a, b = at(shallow, backend), at(deep, backend)
    # Inductor's kernels keep intermediates in registers, so temporaries are those of eager operations, not of the traced graph.
    working = (at(deep, EAGER) if compiled else b).working

    def grown(first: int, second: int) -> int:
        return second + (second - first) * (model.num_layers - deep) // (deep - shallow)

    return StepMemory(
        forward=grown(a.forward, b.forward),
        saved=grown(a.saved, b.saved),
        working=working,
        loss=b.loss,
        forward_copies=grown(a.forward_copies, b.forward_copies),
        saved_copies=grown(a.saved_copies, b.saved_copies),
        casts=grown(a.casts, b.casts),
    )


def depths(model: ModelConfig) -> tuple[int, int]:
    """Two depths at the same point of the cycle of windows and, with skips, of pairs as the model's own depth."""
    cycle = layer_cycle(model)
    shallow = model.num_layers % cycle or cycle
    return shallow, shallow + cycle


def as_fused(model: ModelConfig) -> ModelConfig:
    """The model without masks and biases for which a fused kernel saves nothing."""
    alibi = model.alibi if model.alibi.fold_into_qk else model.alibi.model_copy(update={"num_heads": 0})
    attention = model.attention.model_copy(update={"sliding_window": 0, "full_attention_interval": 0, "softcap": 0.0, "backend": "auto"})
    return model.model_copy(update={"alibi": alibi, "attention": attention})


def _measure(config: RunConfig, rows: int, sequence: int, precision: str, gpu: bool, backend: str) -> StepMemory:
    """One forward and backward pass on fake tensors."""
    with fake_tensors(rows * sequence * config.model.experts.top_k, gpu):
        model = Transformer(config.model)
        compute = PRECISIONS.get(precision, PRECISIONS["bf16"])(CPU)
        # fp8 layers hold their weights in two layouts, which are as many bytes.
        layers = compute.convert_linears(model) if gpu and isinstance(compute, HalfPrecision) else ()
        refresh(layers)
        checkpoint_blocks(model, config.train.activation_checkpointing)
        if backend != EAGER:
            for block in model.decoder.blocks:
                block.compile(backend=backend)
        ids = torch.zeros(rows, sequence, dtype=torch.long)
        tracker = MemoryTracker()
        with tracker:
            tracker.watch(model.parameters())
            tracker.enter([*model.buffers(), ids])
            unlearned = MicroBatch(ids, ids.clone().fill_(cross_entropy.IGNORE_INDEX), None)
            held = _step(model, unlearned, compute, config.train.z_loss, tracker)
        return replace(held, casts=sum(layer.rows.nbytes for layer in layers if layer.rows is not None))


@contextlib.contextmanager
def fake_tensors(routed: int, gpu: bool) -> Iterator[None]:
    """Fake tensors, and the values that a forward pass needs from them.

    routed: tokens routed to experts. The only values that a pass reads are the tokens per expert: equal here, which changes no sum.
    gpu: loss and attention take the paths of a GPU. Compiled code is dropped afterwards.
    """

    def balanced(load: Tensor) -> list[int]:
        count = load.numel()
        return [routed // count + (index < routed % count) for index in range(count)]

    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", balanced))
        # Cached attention masks of the dry run must not be used with real tensors.
        stack.enter_context(mock.patch.object(sdpa, "_query_blocks", TensorCache(4)))
        if gpu:
            # On a CPU attention is computed in float32 even if matmuls are in 16 bits.
            stack.enter_context(mock.patch.object(sdpa, "HALF_DTYPES", ()))
            stack.enter_context(mock.patch.object(mlp, "is_supported", lambda x, *parameters: compute_dtype(x) in HALF_DTYPES))
            stack.enter_context(mock.patch.dict(cross_entropy._CHUNK_LOGITS, cpu=cross_entropy._CHUNK_LOGITS["cuda"]))
        # `_step` collects garbage while it counts; frozen, the objects of the imported libraries are not searched each time.
        gc.freeze()
        torch._dynamo.reset()
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            torch._dynamo.reset()
            gc.unfreeze()


def _step(model: Transformer, rows: MicroBatch, compute: Precision, z_loss: float, tracker: MemoryTracker) -> StepMemory:
    """Bytes of a step beyond those held before it."""
    before = tracker.held
    with compute.autocast():
        hidden = model.hidden(rows.ids)
    # Tracing leaves tensors in reference cycles, which could be collected at any time.
    gc.collect()
    blocks = tracker.held - before
    del hidden
    tracker.restart()
    with compute.autocast():
        total: Tensor = NextTokenObjective(model, z_loss)(rows).total
        forward_copies = tracker.copied
    forward = tracker.peak - before
    gc.collect()
    saved, saved_copies = tracker.held - before, tracker.copied
    tracker.restart()
    total.backward()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    working = max(0, tracker.peak - before - max(saved, gradients))
    return StepMemory(forward, saved, working, saved - blocks, forward_copies, saved_copies)
