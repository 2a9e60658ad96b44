"""All random states of a process, as tensors and JSON. The data order needs none of them; a user's own part may."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seed every generator of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def tensors() -> dict[str, Tensor]:
    """The states that are arrays."""
    states = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.random.get_state()[1].astype(np.int64))}  # type: ignore[index]
    if torch.cuda.is_available():
        states |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def values() -> dict[str, Any]:
    """The rest."""
    version, state, gauss = random.getstate()
    _, _, position, has_gauss, cached = np.random.get_state()
    return {"python": [version, list(state), gauss], "numpy": [int(position), int(has_gauss), float(cached)]}


def load(saved: dict[str, Tensor], described: dict[str, Any]) -> None:
    """Take back what `tensors` and `values` gave. States of devices that are not here are left out."""
    version, state, gauss = described["python"]
    random.setstate((version, tuple(state), gauss))
    np.random.set_state(("MT19937", saved["numpy"].numpy().astype(np.uint32), *described["numpy"]))
    torch.set_rng_state(saved["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in saved:
            torch.cuda.set_rng_state(saved[f"cuda.{index}"], index)
