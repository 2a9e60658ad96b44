"""Whether a run fits a device's memory, checked before anything is built: a system that runs out of memory kills without a message."""

from __future__ import annotations

import psutil
import torch

from andromeda.config.model import ModelConfig
from andromeda.config.run import RunConfig
from andromeda.model.meta_model import shared_meta_model
from andromeda.model.transformer import Transformer
from andromeda.optim import optimizer_state_bytes
from andromeda.parallel.layout import ONE, Layout
from andromeda.utils.errors import ConfigError

COMPUTE_ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
"""Bytes of a number that a matmul reads, by the precision of training."""


def check_state_fits(config: RunConfig, device: torch.device, layout: Layout = ONE) -> None:
    """Raise ConfigError when this process's part of weights, gradients and optimizer state is more than the device's whole memory."""
    model, optim = shared_meta_model(config.model), config.train.optim
    parameters = list(model.parameters())
    num_bytes = sum(2 * p.numel() * p.element_size() for p in parameters) + optimizer_state_bytes(model, optim)
    num_bytes //= layout.shard * layout.context * layout.tensor
    _check(sum(p.numel() for p in parameters), num_bytes, "weights, gradients and optimizer state alone", device)


def check_weights_fit(config: ModelConfig, device: torch.device, itemsize: int = 4) -> None:
    """Raise ConfigError when the weights, `itemsize` bytes a number, are more than the device's whole memory."""
    count = count_parameters(config)
    _check(count, count * itemsize, "weights", device)


def count_parameters(config: ModelConfig) -> int:
    """Number of parameters of a model, shared ones counted once; nothing is allocated."""
    return sum(weight.numel() for weight in shared_meta_model(config).parameters())


def _check(count: int, num_bytes: int, what: str, device: torch.device) -> None:
    if num_bytes > (available := device_memory(device)):
        raise ConfigError(
            f"The model's {count:,} parameters need {num_bytes / 2**30:,.1f} GiB for {what}, and {device} has "
            f"{available / 2**30:,.1f} GiB: use a smaller model or another device (`andromeda plan` shows what a run needs)."
        )


def check_activations_fit(config: RunConfig, device: torch.device, precision: str, layout: Layout = ONE) -> None:
    """Raise ConfigError when the blocks of one micro-batch save more for the backward pass than the device's whole memory."""
    size = config.train.micro_batch_size or config.train.batch_size // layout.data
    seq_len = (config.train.seq_len or config.model.max_seq_len) // layout.context
    num_bytes, available = size * seq_len * min_saved_bytes_per_token(config, precision) // layout.tensor, device_memory(device)
    if num_bytes > available:
        raise ConfigError(
            f"A micro-batch of {size:,} sequences of {seq_len:,} tokens saves at least {num_bytes / 2**30:,.1f} GiB for the backward pass, "
            f"and {device} has {available / 2**30:,.1f} GiB: lower train.micro_batch_size or train.seq_len "
            "(`andromeda plan` shows what a run needs)."
        )


def min_saved_bytes_per_token(config: RunConfig, precision: str) -> int:
    """A lower bound of the bytes per token that all blocks save for the backward pass: the inputs of their matmuls and of attention.

    Queries, keys, values, attention's output and the feed-forward's inner activations; recomputed blocks save their input alone.
    """
    numbers = config.model.num_layers * config.model.hidden_size
    if config.train.activation_checkpointing == "none":
        numbers += saved_numbers_per_token(shared_meta_model(config.model))
    return numbers * COMPUTE_ITEMSIZE[precision]


def saved_numbers_per_token(model: Transformer) -> int:
    """Numbers per token that the parts of all blocks say that the backward pass keeps at least."""
    parts = [part for block in model.decoder.blocks for part in block.children()]
    return sum(part.saved_per_token() for part in parts if hasattr(part, "saved_per_token"))  # type: ignore[operator]


def device_memory(device: torch.device) -> int:
    """Bytes of memory that a device has, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total: int = psutil.virtual_memory().total
    return total
