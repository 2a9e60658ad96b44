"""The ways to run a model, and that they agree. Each check takes a model and its logits (B, T, V) of `ids()` in one plain pass."""

from __future__ import annotations

import torch
from torch import Tensor

from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.kv_cache.static import StaticKVCache
from andromeda.model.transformer import Transformer
from tests.conformance.models import T, agree, ids

DOCUMENTS = torch.tensor([[2] * 5 + [3] + [9] * 6, [0, 4] + [5] * 8 + [7] * 2])
"""Lengths 5, 1, 6 and 1, 1, 8, 2: longer and shorter than windows and shifts. Numbers never fall along a row."""


def in_chunks(model: Transformer, tokens: Tensor, sizes: list[int], documents: Tensor | None = None) -> Tensor:
    """Logits of tokens (B, T), passed in pieces of the given sizes, one after the other."""
    assert sum(sizes) == tokens.shape[1]
    cache, pieces, start = DynamicKVCache(), [], 0
    for size in sizes:
        part = slice(start, start + size)
        numbers = None if documents is None else documents[:, part]
        pieces.append(model(tokens[:, part], documents=numbers, cache=cache, span=T))
        start += size
    return torch.cat(pieces, 1)


def a_token_never_sees_a_later_one(model: Transformer, full: Tensor) -> None:
    for changed in (5, T - 1):
        tokens = ids()
        tokens[:, changed] = (tokens[:, changed] + 1) % 29
        after = model(tokens, span=T)
        torch.testing.assert_close(after[:, :changed], full[:, :changed], rtol=0, atol=1e-13)
        assert (after[:, changed] - full[:, changed]).abs().max() > 1e-4


def decoding_with_a_cache_is_the_full_pass(model: Transformer, full: Tensor) -> None:
    agree(in_chunks(model, ids(), [1] * T), full)


def prefill_in_chunks_is_the_full_pass(model: Transformer, full: Tensor) -> None:
    for sizes in ([5, 1, 3, 2, 1], [1, 7, 4]):
        agree(in_chunks(model, ids(), sizes), full)


def packed_documents_are_separate_sequences(model: Transformer, full: Tensor) -> None:
    tokens = ids()
    packed = model(tokens, documents=DOCUMENTS, span=T)
    for b in range(len(tokens)):
        _, lengths = DOCUMENTS[b].unique_consecutive(return_counts=True)
        alone = [model(piece[None], span=T)[0] for piece in tokens[b].split(lengths.tolist())]
        agree(packed[b], torch.cat(alone))
    assert (packed - full).abs().max() > 1e-3


def packed_documents_with_a_cache_are_the_full_pass(model: Transformer, full: Tensor) -> None:
    agree(in_chunks(model, ids(), [3, 2, 1, 1, 4, 1], DOCUMENTS), model(ids(), documents=DOCUMENTS, span=T))


def sequences_padded_on_the_left_are_the_sequences_alone(model: Transformer, full: Tensor) -> None:
    tokens, lengths = ids(batch=3), (12, 7, 1)
    documents = torch.stack([(torch.arange(T) >= T - length).long() for length in lengths])
    padded = in_chunks(model, tokens, [6, 4, 1, 1], documents)
    for b, length in enumerate(lengths):
        agree(padded[b, T - length :], model(tokens[b : b + 1, T - length :], span=T)[0])


def rows_kept_in_a_cache_go_on_as_they_were(model: Transformer, full: Tensor) -> None:
    tokens, cache, kept = ids(batch=3), DynamicKVCache(), torch.tensor([2, 0])
    whole = model(tokens, span=T)
    model(tokens[:, :7], cache=cache, span=T)
    cache.select_rows(kept)
    agree(model(tokens[kept, 7:], cache=cache, span=T), whole[kept, 7:])


def a_cache_of_one_size_goes_on_where_another_ended(model: Transformer, full: Tensor) -> None:
    cache, fixed = DynamicKVCache(), StaticKVCache(2, T + 1, torch.device("cpu"))
    document = torch.zeros(2, 1, dtype=torch.long)
    model(ids()[:, :7], cache=cache, span=T)
    model(ids()[:, :1], documents=document, cache=fixed, span=T)
    fixed.load(cache.contents())
    pieces = [model(ids()[:, t : t + 1], documents=document, cache=fixed, span=T) for t in range(7, T)]
    agree(torch.cat(pieces, 1), full[:, 7:])


CHECKS = (
    a_token_never_sees_a_later_one,
    decoding_with_a_cache_is_the_full_pass,
    prefill_in_chunks_is_the_full_pass,
    packed_documents_are_separate_sequences,
    packed_documents_with_a_cache_are_the_full_pass,
    sequences_padded_on_the_left_are_the_sequences_alone,
    rows_kept_in_a_cache_go_on_as_they_were,
    a_cache_of_one_size_goes_on_where_another_ended,
)
