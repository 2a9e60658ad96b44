"""Weights for special tokens that a model's tokenizer did not have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from andromeda.config.run import RunConfig
from andromeda.model.transformer import Transformer
from andromeda.train.grow_vocabulary import grow_vocabulary, vocabulary_dims
from andromeda.train.state import model_tensors

OVER_THE_VOCABULARY = {"embedding.tokens.weight", "head.weight", "head.bias", "value_embedding.table.weight"}


@pytest.mark.parametrize("size", [257, 264, 320])
def test_new_rows_are_the_mean(tiny: Callable[..., RunConfig], size: int) -> None:
    """Three tokens behind 257 in a vocabulary of 320: of a model that has no room, too little, or enough. Padding that it has stays."""
    model = tiny(model__head={"bias": True}, model__value_embedding={"kind": "layered"}).model
    small, large = (model.model_copy(update={"vocab_size": n}) for n in (size, 320))
    saved = {name: torch.randn_like(tensor) for name, tensor in model_tensors(Transformer(small)).items()}
    assert vocabulary_dims(large).keys() == OVER_THE_VOCABULARY
    grown = grow_vocabulary(saved, model_tensors(Transformer(large)), large, range(257, 260))
    assert grown.keys() == OVER_THE_VOCABULARY
    for name, values in grown.items():
        mean = saved[name][:257].double().mean(0).float()
        assert len(values) == 320
        torch.testing.assert_close(values[257:260], mean.expand(3, *mean.shape))
        torch.testing.assert_close(values[max(size, 260) :], mean.expand(320 - max(size, 260), *mean.shape))
        assert torch.equal(values[:257], saved[name][:257])
        assert torch.equal(values[260 : max(size, 260)], saved[name][260:])
