"""Whether a model can be held at all, asked before anything is built: a system that runs out of memory kills without a word."""

from __future__ import annotations

import psutil
import torch

from andromeda.config.derived import intermediate_size
from andromeda.config.model import ModelConfig
from andromeda.config.run import RunConfig
from andromeda.model.meta_model import meta_model
from andromeda.utils.errors import ConfigError

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
"""Of a number that a product reads, by the precision of a training."""


def parameters(config: ModelConfig) -> int:
    """Number of weights of a model, a shared one counted once; nothing is allocated."""
    return sum(weight.numel() for weight in meta_model(config).parameters())


def check_fits(config: ModelConfig, device: torch.device, copies: int, itemsize: int = 4) -> None:
    """Raise ConfigError when `copies` of the weights, `itemsize` bytes a number, are more than the device's whole memory."""
    count = parameters(config)
    needed, held = count * copies * itemsize, memory_of(device)
    if needed > held:
        what = "weights" if copies == 1 else "weights, gradients and optimizer state alone"
        raise ConfigError(
            f"The model's {count:,} parameters need {needed / 2**30:,.1f} GiB for {what}, and {device} has {held / 2**30:,.1f} GiB: "
            "take a smaller model or another device (`andromeda plan` says what a run needs)."
        )


def check_rows_fit(config: RunConfig, device: torch.device, precision: str) -> None:
    """Raise ConfigError when the blocks alone keep more of one micro-batch for the backward pass than the device's whole memory."""
    rows, length = config.train.micro_batch_size or config.train.batch_size, config.train.seq_len or config.model.max_seq_len
    needed, held = rows * length * least_kept(config, precision), memory_of(device)
    if needed > held:
        raise ConfigError(
            f"{rows:,} rows of {length:,} tokens at once need at least {needed / 2**30:,.1f} GiB for the backward pass, and {device} has "
            f"{held / 2**30:,.1f} GiB: give a smaller train.micro_batch_size, or shorter rows (`andromeda plan` says what a run needs)."
        )


def least_kept(config: RunConfig, precision: str) -> int:
    """A lower bound of the bytes a token that a backward pass finds kept in all blocks: what their products and attention read.

    Queries, keys, values, attention's output and the feed-forward's inner activations; recomputing blocks keep their input alone.
    """
    model, attention = config.model, config.model.attention
    numbers = model.hidden_size
    if config.train.activation_checkpointing == "none":
        numbers += 2 * (attention.num_heads + attention.num_kv_heads) * attention.head_dim + intermediate_size(model)
    return model.num_layers * numbers * BYTES[precision]


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
