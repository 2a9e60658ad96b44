"""Which device a run computes on."""

from __future__ import annotations

import torch

from andromeda.errors import ConfigError, nearest


def find_device(name: str, key: str = "train.device") -> torch.device:
    """The device that a user names under `key`; `auto` is the first GPU, or else the CPU. Raises ConfigError where there is none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"There is no device {name!r}{nearest(name, ['auto', 'cpu', 'cuda'])}: give auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{key} = {name!r}, but this machine shows {torch.cuda.device_count()} CUDA devices: use auto or cpu.")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{key} = {name!r} is a kind of device that is not supported: use auto, cpu or cuda.")
    return device
