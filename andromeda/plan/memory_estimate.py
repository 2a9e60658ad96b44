"""Memory of a training step in closed form: within a fifth of the dry run for the presets (tests/plan), and without its second of imports.

Blocks are counted from what their parts say that the backward pass keeps at least. The factors below were fitted to the dry run of the
presets; the dry run decides wherever the answer is near the limit of a device.
"""

from __future__ import annotations

from andromeda.config.run import RunConfig
from andromeda.config.train import OptimizerConfig
from andromeda.model.transformer import Transformer
from andromeda.ops.cross_entropy import chunk_tokens
from andromeda.optim import find_optimizer, parameter_roles
from andromeda.optim.optimizer_kind import FLOAT_BYTES
from andromeda.plan.dry_run import StepMemory
from andromeda.train.memory_check import COMPUTE_ITEMSIZE, saved_numbers_per_token

COMPILED, EAGER = 2.0, 3.1
"""Saved by a block, relative to the inputs of its matmuls and of attention: the others are norms, rotations and inner activations."""
OUTSIDE = 6
"""Vectors of the hidden size per token that embedding and final norm save."""
WORKING = 7
"""Vectors of the hidden size per token that are temporary in the backward pass of a block."""
LOGIT_BYTES = 10
"""Of a chunk of logits: in 16 bits, in float32, and their gradient."""
UPDATE_COPIES, MOST_UPDATED = 0.75, 768 << 20
"""Temporaries of an optimizer that does not work in place, relative to its weights in float32, and their most: Muon's, in batches."""


def estimate_step_memory(
    config: RunConfig, model: Transformer, rows: int, sequence: int, precision: str, *, gpu: bool, compiled: bool
) -> StepMemory:
    """As `dry_run.step_memory`, estimated. model: on the meta device."""
    itemsize, tokens = COMPUTE_ITEMSIZE["bf16" if precision == "fp8" else precision], rows * sequence
    width, depth = config.model.hidden_size, config.model.num_layers
    vector = tokens * width * itemsize
    least = tokens * itemsize * (depth * width + saved_numbers_per_token(model))
    whole = (COMPILED if compiled else EAGER) * least
    kept = {"none": whole, "selective": least + depth * vector, "full": depth * vector}[config.train.activation_checkpointing]
    head = model.head.weight.numel()
    loss = vector + head * 4
    logits = chunk_tokens("cuda" if gpu else "cpu", tokens, config.model.vocab_size) * config.model.vocab_size
    saved = int(kept + OUTSIDE * vector + loss)
    # What was not saved is computed again, one block at a time.
    working = int(WORKING * vector + 1.5 * (whole - kept) / depth)
    casts = itemsize * sum(p.numel() for p in model.decoder.blocks.parameters() if p.ndim == 2) if gpu and itemsize < 4 else 0
    return StepMemory(saved + LOGIT_BYTES * logits + head * itemsize, saved, working, loss, 0, 0, casts)


def estimate_update_bytes(model: Transformer, optim: OptimizerConfig) -> int:
    """As `memory.update_bytes`, estimated."""
    kind, _ = find_optimizer(optim)
    if kind.updates_in_place:
        return 0
    roles = parameter_roles(model)
    updated = sum(p.numel() for name, p in model.named_parameters() if kind.handles(p, roles[name]))
    return min(int(UPDATE_COPIES * updated * FLOAT_BYTES), MOST_UPDATED)
