"""A model on the meta device: every parameter has its shape and no memory, so that parts can be asked before anything is built."""

from __future__ import annotations

from collections import OrderedDict

import torch

from andromeda.config.model import ModelConfig
from andromeda.model.transformer import Transformer


def meta_model(config: ModelConfig) -> Transformer:
    """The model on the meta device."""
    with torch.device("meta"):
        return Transformer(config)


REMEMBERED = 16
"""Models on the meta device that are kept for the next question about the same configuration."""
_models: OrderedDict[str, Transformer] = OrderedDict()


def shared_meta_model(config: ModelConfig) -> Transformer:
    """`meta_model`, built once for a configuration: to be asked, never changed."""
    key = config.model_dump_json()
    if key not in _models:
        _models[key] = meta_model(config)
    _models.move_to_end(key)
    while len(_models) > REMEMBERED:
        _models.popitem(last=False)
    return _models[key]
