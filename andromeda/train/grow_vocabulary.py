"""Weights for special tokens that a model did not have: the mean of those of all its tokens.

With the mean as its row of the head, a new token begins with a logit that is the mean of the others'; random rows can begin far
above trained ones (Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from andromeda.config.model import ModelConfig
from andromeda.model.meta_model import meta_model
from andromeda.train.checkpoint_chunks import is_sharded, local_chunk, sharded_like
from andromeda.train.state import model_tensors


def vocabulary_dims(config: ModelConfig) -> dict[str, int]:
    """The dimension that counts tokens, of each weight that has one: found by building the model's shapes with twice the vocabulary."""
    model, twice = (
        model_tensors(meta_model(config.model_copy(update={"vocab_size": size}))) for size in (config.vocab_size, 2 * config.vocab_size)
    )
    shapes = {name: (tuple(tensor.shape), tuple(twice[name].shape)) for name, tensor in model.items()}
    return {name: next(d for d in range(len(a)) if a[d] != b[d]) for name, (a, b) in shapes.items() if a != b}


def grow_vocabulary(saved: Mapping[str, Tensor], live: Mapping[str, Tensor], config: ModelConfig, added: range) -> dict[str, Tensor]:
    """The weights over the vocabulary as large as the live ones of a model of `config`, with entries for the tokens `added`.

    saved: whole weights of the smaller model. Padding that it already had stays as it was. Nothing where no token is added.
    """
    result = {}
    for name, dim in vocabulary_dims(config).items() if added else ():
        values = _grown(saved[name], dim, added, live[name].shape[dim])
        result[name] = sharded_like(live[name], values[local_chunk(live[name]).chunk.slices()]) if is_sharded(live[name]) else values
    return result


def _grown(values: Tensor, dim: int, added: range, size: int) -> Tensor:
    mean = values.narrow(dim, 0, added.start).mean(dim, keepdim=True, dtype=torch.float64).to(values.dtype)
    shape = list(values.shape)
    shape[dim] = size - values.shape[dim]
    grown = torch.cat([values, mean.expand(shape)], dim)
    grown.narrow(dim, added.start, len(added)).copy_(mean.expand_as(grown.narrow(dim, added.start, len(added))))
    return grown
