"""Every legal pair of parts: the ways to run a model agree.

A token never sees a later one; decoding with a cache, prefill in chunks, packed documents and padded batches give what
plain passes over single sequences give; a saved model is the same model.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from andromeda.model.cache import Cache
from andromeda.model.rolling import RollingCache
from andromeda.model.transformer import Transformer
from tests.conformance.models import ROWS, T, agree, build, ids, logits

every_row = pytest.mark.parametrize("row", ROWS)


def in_chunks(model: Transformer, tokens: Tensor, sizes: list[int], documents: Tensor | None = None) -> Tensor:
    """Logits of tokens (B, T), passed in pieces of the given sizes, one after the other."""
    assert sum(sizes) == tokens.shape[1]
    cache, pieces, start = Cache(), [], 0
    for size in sizes:
        part = slice(start, start + size)
        numbers = None if documents is None else documents[:, part]
        pieces.append(model(tokens[:, part], documents=numbers, cache=cache, span=T))
        start += size
    return torch.cat(pieces, 1)


@every_row
@torch.no_grad()
def test_a_token_never_sees_a_later_one(row: str) -> None:
    model, before = build(row), logits(row)
    for changed in (5, T - 1):
        tokens = ids()
        tokens[:, changed] = (tokens[:, changed] + 1) % 29
        after = model(tokens, span=T)
        torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=1e-13)
        assert (after[:, changed] - before[:, changed]).abs().max() > 1e-4


@every_row
@torch.no_grad()
def test_decoding_with_a_cache_is_the_full_pass(row: str) -> None:
    agree(in_chunks(build(row), ids(), [1] * T), logits(row))


@every_row
@torch.no_grad()
def test_prefill_in_chunks_is_the_full_pass(row: str) -> None:
    for sizes in ([5, 1, 3, 2, 1], [1, 7, 4]):
        agree(in_chunks(build(row), ids(), sizes), logits(row))


DOCUMENTS = torch.tensor([[2] * 5 + [3] + [9] * 6, [0, 4] + [5] * 8 + [7] * 2])
"""Lengths 5, 1, 6 and 1, 1, 8, 2: longer and shorter than windows and shifts. Numbers never fall along a row."""


@every_row
@torch.no_grad()
def test_packed_documents_are_separate_sequences(row: str) -> None:
    model, tokens = build(row), ids()
    packed = model(tokens, documents=DOCUMENTS, span=T)
    for b in range(len(tokens)):
        _, lengths = DOCUMENTS[b].unique_consecutive(return_counts=True)
        alone = [model(piece[None], span=T)[0] for piece in tokens[b].split(lengths.tolist())]
        agree(packed[b], torch.cat(alone))
    assert (packed - logits(row)).abs().max() > 1e-3


@every_row
@torch.no_grad()
def test_packed_documents_with_a_cache_are_the_full_pass(row: str) -> None:
    model = build(row)
    agree(in_chunks(model, ids(), [3, 2, 1, 1, 4, 1], DOCUMENTS), model(ids(), documents=DOCUMENTS, span=T))


@every_row
@torch.no_grad()
def test_sequences_padded_on_the_left_are_the_sequences_alone(row: str) -> None:
    model, lengths = build(row), (12, 7, 1)
    tokens = ids(batch=3)
    documents = torch.stack([(torch.arange(T) >= T - length).long() for length in lengths])
    padded = in_chunks(model, tokens, [6, 4, 1, 1], documents)
    for b, length in enumerate(lengths):
        agree(padded[b, T - length :], model(tokens[b : b + 1, T - length :], span=T)[0])


@every_row
@torch.no_grad()
def test_rows_kept_in_a_cache_go_on_as_they_were(row: str) -> None:
    model, tokens, cache = build(row), ids(batch=3), Cache()
    full = model(tokens, span=T)
    model(tokens[:, :7], cache=cache, span=T)
    kept = torch.tensor([2, 0])
    cache.keep(kept)
    agree(model(tokens[kept, 7:], cache=cache, span=T), full[kept, 7:])


@every_row
@torch.no_grad()
def test_a_cache_of_one_size_goes_on_where_another_ended(row: str) -> None:
    model, cache, rolling = build(row), Cache(), RollingCache(2, T + 1, torch.device("cpu"))
    document = torch.zeros(2, 1, dtype=torch.long)
    model(ids()[:, :7], cache=cache, span=T)
    model(ids()[:, :1], documents=document, cache=rolling, span=T)
    rolling.load(cache.contents())
    pieces = [model(ids()[:, t : t + 1], documents=document, cache=rolling, span=T) for t in range(7, T)]
    agree(torch.cat(pieces, 1), logits(row)[:, 7:])


@every_row
@torch.no_grad()
def test_a_saved_model_is_the_same_model(row: str, tmp_path: Path) -> None:
    model = build(row)
    shared = {"head.weight"} if model.config.head.tied else set()
    save_file({name: value for name, value in model.state_dict().items() if name not in shared}, tmp_path / "model.safetensors")
    other = Transformer(model.config, seed=99).double().eval()
    missing, unexpected = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert not unexpected
    assert set(missing) == shared
    for block, twin in zip(model.trunk.blocks, other.trunk.blocks, strict=True):
        twin.attention.backend = block.attention.backend
    assert torch.equal(other(ids(), span=T), logits(row))
