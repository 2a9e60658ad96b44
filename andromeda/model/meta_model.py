"""A model that has the shape of everything and no memory: what is to be known of it before it is built."""

from __future__ import annotations

import torch

from andromeda.config.model import ModelConfig
from andromeda.model.transformer import Transformer


def meta_model(config: ModelConfig) -> Transformer:
    """The model without numbers, on the meta device: every parameter has its shape and no memory."""
    with torch.device("meta"):
        return Transformer(config)
