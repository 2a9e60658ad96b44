"""The cache as a container: growth, size, positions, documents, and what it refuses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.kv_cache.protocol import NoKVCache
from andromeda.model.transformer import Transformer
from tests.conformance.covering import model_config

CPU = torch.device("cpu")


def fill(cache: DynamicKVCache, sizes: list[int], documents: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Pass numbered keys of one layer through a cache; the keys it holds in the end and the positions of each pass."""
    keys, positions, start = torch.arange(sum(sizes)).view(1, -1, 1, 1).expand(2, -1, 1, 3).float(), [], 0
    held = torch.empty(0)
    for size in sizes:
        part = slice(start, start + size)
        numbers = None if documents is None else documents[:, part]
        own = cache.positions(torch.Size([2, size]), numbers, CPU)
        all_numbers = cache.documents(numbers)
        held, values = cache.state(0).update(keys[:, part], keys[:, part, :, :2])
        assert torch.equal(values, held[..., :2])
        cache.advance(size, own, all_numbers)
        positions.append(own.expand(2, -1))
        start += size
    return held, positions


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), capacity=st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_it_holds_what_it_was_given_in_order(sizes: list[int], capacity: int) -> None:
    cache = DynamicKVCache(capacity)
    held, positions = fill(cache, sizes)
    assert held[0, :, 0, 0].tolist() == list(range(sum(sizes)))
    assert torch.cat(positions, 1)[1].tolist() == list(range(sum(sizes)))
    assert cache.length == sum(sizes)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6), cuts=st.sets(st.integers(1, 20), max_size=5))
@settings(deadline=None, max_examples=60)
def test_positions_count_from_each_documents_start_wherever_the_passes_are_cut(lengths: list[int], cuts: set[int]) -> None:
    T = sum(lengths)
    row = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    expected = [position for n in lengths for position in range(n)]
    edges = [0, *sorted(cut for cut in cuts if cut < T), T]
    sizes = [b - a for a, b in pairwise(edges)]
    _, positions = fill(DynamicKVCache(), sizes, row.expand(2, -1))
    assert torch.cat(positions, 1)[0].tolist() == expected


def test_buffers_double_so_that_copies_stay_linear() -> None:
    cache, sizes = DynamicKVCache(), set()
    for _ in range(1000):
        fill(cache, [1])
        sizes.add(cache.state(0).buffers[0].shape[1])
    assert len(sizes) <= 11
    assert max(sizes) < 2000


def test_room_that_was_reserved_is_not_grown() -> None:
    cache = DynamicKVCache(capacity=50)
    fill(cache, [20, 1, 29])
    assert cache.state(0).buffers[0].shape[1] == 50


def test_bytes_are_two_times_layers_heads_dims_tokens() -> None:
    """2 L G D bytes a token: 16 KiB for 32 layers of one head of 128 in bfloat16; a shift adds its last vectors."""
    model = Transformer(model_config({"heads": "mqa", "shift": "chunks-4"})).bfloat16()
    cache = DynamicKVCache(capacity=10)
    with torch.inference_mode():
        model(torch.zeros(2, 7, dtype=torch.long), cache=cache)
    keys_and_values = 2 * 3 * 1 * 16 * 2
    shifts = 2 * 3 * 4 * 24 * 2
    assert cache.bytes() == 2 * (10 * keys_and_values + shifts)


@pytest.mark.parametrize("first", [True, False])
def test_documents_cannot_come_or_go_half_way(first: bool) -> None:
    model, cache = Transformer(model_config({})), DynamicKVCache()
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(ids, documents=ids if first else None, cache=cache)
    with pytest.raises(ValueError, match="document numbers, or none has"):
        model(ids, documents=None if first else ids, cache=cache)


def test_a_pass_that_failed_can_be_repeated() -> None:
    """An interrupted pass leaves the length as it was, so that the next one writes over what it had begun."""
    model, cache = Transformer(model_config({"heads": "gqa"})).double(), DynamicKVCache()
    ids = torch.randint(0, 29, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids[:, :5], cache=cache)
        cache.state(0).update(*(torch.ones(1, 3, 3, 16).double(),) * 2)
        assert cache.length == 5
        torch.testing.assert_close(model(ids[:, 5:], cache=cache), model(ids)[:, 5:], rtol=1e-10, atol=1e-10)


def test_nothing_remembers_nothing() -> None:
    nothing, x = NoKVCache(), torch.ones(1, 3, 2)
    assert nothing.state(0).shift_state("a", x, 2).tolist() == [[[0, 0], [0, 0]]]
    nothing.advance(3, torch.arange(3)[None], None)
    assert nothing.state(0).shift_state("a", x, 1).sum() == 0
    assert nothing.length == 0


@pytest.mark.parametrize("shift", ["lerp", "smear", "chunks-4"])
@torch.no_grad()
def test_a_rewound_cache_goes_on_as_if_nothing_had_come_after(shift: str) -> None:
    """Several continuations of one prompt, each against a pass over prompt and continuation."""
    model = Transformer(model_config({"shift": shift})).double().eval()
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, model.config.vocab_size, (2, 9), generator=draw)
    cache = DynamicKVCache()
    model.hidden(prompt, cache=cache)
    mark = cache.checkpoint()
    for length in (5, 11, 3):
        more = torch.randint(0, model.config.vocab_size, (2, length), generator=draw)
        after = torch.cat([model(part, cache=cache) for part in more.split(2, 1)], 1)
        torch.testing.assert_close(after, model(torch.cat([prompt, more], 1))[:, 9:], rtol=1e-10, atol=1e-10)
        cache.rollback(mark)
        assert cache.length == 9
