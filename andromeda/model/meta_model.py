"""A model on the meta device: every parameter has its shape and no memory, so that parts can be asked before anything is built."""

from __future__ import annotations

import torch

from andromeda.config.model import ModelConfig
from andromeda.model.transformer import Transformer


def meta_model(config: ModelConfig) -> Transformer:
    """The model on the meta device."""
    with torch.device("meta"):
        return Transformer(config)
