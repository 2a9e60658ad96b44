"""Roofline times of training and serving: bounds by compute and by memory bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from andromeda.config.model import ModelConfig
from andromeda.config.run import RunConfig
from andromeda.model.flops import forward_flops, forward_flops_per_token, hardware_flops_per_token
from andromeda.plan.memory import HALF, decode_state
from andromeda.utils.hardware import Hardware

FP8_PARTS = ("query", "key", "value", "out", "feed-forward", "experts", "shared experts")
"""Matmuls that fp8 training computes in fp8; attention, head and router stay in bfloat16."""


@dataclass(frozen=True)
class ServingRoofline:
    """Least seconds for one sequence on one GPU."""

    prefill: float
    """Compute bound of a prompt that fills the context."""
    token: float
    """One decoded token at a short context: every active weight is read once."""
    token_full: float
    """The same with a full KV cache, which is also read."""


def seconds_per_step(config: RunConfig, sequence: int, hardware: Hardware, precision: str, gpus: int) -> float | None:
    """Compute bound of a step, including recomputation; None if the device has no such precision."""
    rate, eight = hardware.rate("bf16" if precision == "fp8" else precision), hardware.rate("fp8")
    if rate is None or (precision == "fp8" and eight is None):
        return None
    per_token = hardware_flops_per_token(config.model, sequence, config.train.activation_checkpointing)
    seconds = per_token / rate
    if precision == "fp8" and eight:
        parts = forward_flops_per_token(config.model, sequence)
        passes = 4 if config.train.activation_checkpointing == "full" else 3
        in_eight = passes * sum(parts.get(part, 0.0) for part in FP8_PARTS)
        seconds += in_eight * (1 / eight - 1 / rate)
    return seconds * config.train.batch_size * sequence / gpus


def serving_roofline(model: ModelConfig, active: int, hardware: Hardware, precision: str) -> ServingRoofline | None:
    """Roofline of prefill and decoding at the model's context."""
    rate = hardware.rate("bf16" if precision == "fp8" else precision)
    if rate is None:
        return None
    parts = forward_flops_per_token(model, model.max_seq_len)
    head = parts.pop("head")
    weights, cached = active * HALF, decode_state(model, mixers_only=True)
    one = sum(forward_flops(model, 1.0 * model.num_layers).values()) / rate
    return ServingRoofline(
        (sum(parts.values()) * model.max_seq_len + head) / rate,
        max(one, weights / hardware.bandwidth),
        max(one, (weights + cached.per_token * model.max_seq_len + cached.per_sequence) / hardware.bandwidth),
    )
