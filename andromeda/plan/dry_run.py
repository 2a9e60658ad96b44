"""What one training step holds in passing, found by taking the step on tensors that have shapes and no memory.

The model, the loss, autocast, checkpointing and torch.compile's own choice of what to save are the real ones (torch's fake
tensors stand in for numbers), so nothing here repeats what the model does. Bytes grow linearly with depth, so two shallow
models give those of a deep one.
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
"""torch.compile backends: the second saves between forward and backward pass what inductor would, and generates no code."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes beyond weights and gradients that one micro-batch holds."""

    forward: int
    """At the worst moment of the forward pass, logits of the loss and autocast's copies of the weights included."""
    saved: int
    """Kept for the backward pass by blocks, embedding and loss."""
    working: int
    """On top of what is saved, or of the gradients once they are more: operations under way at the worst moment."""
    loss: int
    """The part of `saved` that is the loss's: the gradients of the head and of the last hidden states."""
    forward_copies: int
    """The part of `forward` that is copies of weights in the type of products."""
    saved_copies: int
    """The part of `saved` that is such copies."""
    casts: int = 0
    """The blocks' weights as products read them on a GPU, cast once a step: there all the time."""

    def peak(self, gradients: int, accumulated: bool) -> int:
        """The worst moment. gradients: bytes when all are there; accumulated: whether they are from the start."""
        if accumulated:
            return max(self.forward, self.saved + self.working) + gradients
        return max(self.forward, max(self.saved, gradients) + self.working)


def step_memory(config: RunConfig, rows: int, sequence: int, precision: str, *, gpu: bool, compiled: bool) -> StepMemory:
    """What a micro-batch of `rows` rows of `sequence` tokens holds.

    gpu: attention saves what any fused kernel saves (queries, keys, values, output, one number a row), whatever the pattern;
    on a CPU masks are counted too. Documents are taken as one a row.
    """
    model = _as_fused(config.model) if gpu else config.model
    # Full checkpointing keeps the blocks' inputs, compiled or not.
    compiled = compiled and config.train.activation_checkpointing != "full"
    shallow, deep = _depths(model)

    def at(depth: int, backend: str) -> StepMemory:
        changed = config.model_copy(update={"model": model.model_copy(update={"num_layers": depth})})
        return _measure(changed, rows, sequence, precision, gpu, backend)

    if model.num_layers <= deep and not compiled:
        return at(model.num_layers, EAGER)
    backend = COMPILED if compiled else EAGER
    a, b = at(shallow, backend), at(deep, backend)
    # A compiled kernel keeps its steps in registers: what is under way is that of operations one by one, not of the graph's.
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


def _depths(model: ModelConfig) -> tuple[int, int]:
    """Two depths that end where the model's own does in its cycle of windows and, with skips, of pairs."""
    cycle = layer_cycle(model)
    shallow = model.num_layers % cycle or cycle
    return shallow, shallow + cycle


def _as_fused(model: ModelConfig) -> ModelConfig:
    """The model with patterns left out that a fused kernel computes without saving anything for them."""
    alibi = model.alibi if model.alibi.fold_into_qk else model.alibi.model_copy(update={"num_heads": 0})
    attention = model.attention.model_copy(update={"sliding_window": 0, "full_attention_interval": 0, "softcap": 0.0, "backend": "auto"})
    return model.model_copy(update={"alibi": alibi, "attention": attention})


def _measure(config: RunConfig, rows: int, sequence: int, precision: str, gpu: bool, backend: str) -> StepMemory:
    """One forward and backward pass on fake tensors."""
    with _pretence(rows * sequence * config.model.experts.top_k, gpu):
        model = Transformer(config.model)
        products = PRECISIONS.get(precision, PRECISIONS["bf16"])(CPU)
        # Layers in 8 bits hold their weights in two orders, which are as many bytes.
        layers = products.convert_linears(model) if gpu and isinstance(products, HalfPrecision) else ()
        refresh(layers)
        checkpoint_blocks(model, config.train.activation_checkpointing)
        if backend != EAGER:
            for block in model.decoder.blocks:
                block.compile(backend=backend)
        ids = torch.zeros(rows, sequence, dtype=torch.long)
        ledger = MemoryTracker()
        with ledger:
            ledger.watch(model.parameters())
            ledger.enter([*model.buffers(), ids])
            unlearned = MicroBatch(ids, ids.clone().fill_(cross_entropy.IGNORE_INDEX), None)
            held = _step(model, unlearned, products, config.train.z_loss, ledger)
        return replace(held, casts=sum(layer.rows.nbytes for layer in layers if layer.rows is not None))


@contextlib.contextmanager
def _pretence(routed: int, gpu: bool) -> Iterator[None]:
    """Tensors without memory, and the answers that a pass needs from them.

    routed: rows that go to experts. A pass asks the host one thing only, how many rows each expert has got: all alike here,
    which changes no sum. gpu: loss and attention do what they do on a GPU. What is compiled here is forgotten afterwards.
    """

    def balanced(load: Tensor) -> list[int]:
        count = load.numel()
        return [routed // count + (index < routed % count) for index in range(count)]

    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", balanced))
        # Masks that attention remembers from here must not meet real tensors.
        stack.enter_context(mock.patch.object(sdpa, "_query_blocks", TensorCache(4)))
        if gpu:
            # A CPU attends in float32 even where products are in 16 bits.
            stack.enter_context(mock.patch.object(sdpa, "HALF_DTYPES", ()))
            stack.enter_context(mock.patch.object(mlp, "is_supported", lambda x, *parameters: compute_dtype(x) in HALF_DTYPES))
            stack.enter_context(mock.patch.dict(cross_entropy._CHUNK_LOGITS, cpu=cross_entropy._CHUNK_LOGITS["cuda"]))
        torch._dynamo.reset()
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
            torch._dynamo.reset()


def _step(model: Transformer, rows: MicroBatch, products: Precision, z_loss: float, ledger: MemoryTracker) -> StepMemory:
    """What a step takes beside what is there."""
    before = ledger.held
    with products.autocast():
        hidden = model.hidden(rows.ids)
    # A compiler leaves what it traced with in cycles of references, which may be collected at any time.
    gc.collect()
    blocks = ledger.held - before
    del hidden
    ledger.restart()
    with products.autocast():
        total: Tensor = NextTokenObjective(model, z_loss)(rows).total
        forward_copies = ledger.copied
    forward = ledger.peak - before
    gc.collect()
    saved, saved_copies = ledger.held - before, ledger.copied
    ledger.restart()
    total.backward()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    working = max(0, ledger.peak - before - max(saved, gradients))
    return StepMemory(forward, saved, working, saved - blocks, forward_copies, saved_copies)
