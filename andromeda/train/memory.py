"""Whether a model can be held at all, asked before anything is built: a system that runs out of memory kills without a word."""

from __future__ import annotations

import psutil
import torch

from andromeda.config.model import ModelConfig
from andromeda.errors import ConfigError
from andromeda.model.skeleton import skeleton


def parameters(config: ModelConfig) -> int:
    """Number of weights of a model, a shared one counted once; nothing is allocated."""
    return sum(weight.numel() for weight in skeleton(config).parameters())


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


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
