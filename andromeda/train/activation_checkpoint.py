"""Activation checkpointing, applied to the blocks of a built model: less memory, more FLOPs, the same gradients.

A block's forward pass is replaced on the instance, so that names in the model stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from andromeda.model.float8_linear import Float8TrainingLinear
from andromeda.model.transformer import Transformer

SAVED_OPS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_grouped_mm",
    "aten::_scaled_mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "andromeda::fa4",
    "andromeda::amax_and_norm_partials",
    "andromeda::cast_to_float8",
    "flex_attention",
)
"""Operations whose outputs `selective` keeps: matmuls, attention, and factors in 8 bits, which are small beside what they
are made of. The rest costs memory traffic only."""
SAVED_OPS_FLOAT8 = (*SAVED_OPS, "andromeda::add_norm_shift", "andromeda::preprocess_qkv")
"""Of blocks in 8 bits: matmuls keep their inputs in 8 bits, so that of a norm with all around it only the sum that it was taken of
is read again; and there is room for queries, keys and values as attention takes them."""


def checkpoint_blocks(model: Transformer, kind: str) -> None:
    """Recompute activations in the backward pass: `none`, `selective` (all but matmuls and attention), or `full`."""
    for block in model.decoder.blocks:
        block.forward = {"none": _none, "selective": _selective, "full": _full}[kind](block)


def _none(block: nn.Module) -> Callable[..., Any]:
    return block.forward


def _full(block: nn.Module) -> Callable[..., Any]:
    return _wrapped(block.forward)


def _selective(block: nn.Module) -> Callable[..., Any]:
    dear = SAVED_OPS_FLOAT8 if any(isinstance(module, Float8TrainingLinear) for module in block.modules()) else SAVED_OPS
    return _wrapped(block.forward, context_fn=partial(create_selective_checkpoint_contexts, partial(_policy, dear)))


def _wrapped(forward: Callable[..., Any], **settings: Any) -> Callable[..., Any]:
    # A function of its own, not a partial: torch.compile passes over a block whose forward is a partial, without a word.
    def recomputed(*args: Any) -> Any:
        # No part draws random numbers, so that there are no states to bring back.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **settings)

    return recomputed


def _policy(dear: Sequence[str], ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name() if isinstance(operation, torch._ops.OpOverload) else str(operation)
    return CheckpointPolicy.MUST_SAVE if name.partition(".")[0] in dear else CheckpointPolicy.PREFER_RECOMPUTE
