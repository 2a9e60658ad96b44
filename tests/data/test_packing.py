"""Both packings against plain loops over the documents."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from andromeda.data.packing import IGNORE, OPEN_SEQUENCES, DocumentPacking, StreamPacking, TokenizedDocuments, first_fit

SEPARATOR = 0
lengths_ = st.lists(st.integers(1, 30), min_size=1, max_size=25)


class Plain:
    """Tokens in memory, with the shards' interface."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens, self.size = tokens, len(tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.size
        return self.tokens[start:stop]


def make(lengths: list[int]) -> tuple[TokenizedDocuments, list[list[int]]]:
    """Documents of given lengths (separator included) whose other tokens are all different."""
    unique = iter(range(1, 10**6))
    documents = [[SEPARATOR, *(next(unique) for _ in range(n - 1))] for n in lengths]
    tokens = np.array([t for d in documents for t in d], dtype=np.int64)
    return TokenizedDocuments(Plain(tokens), np.cumsum([0, *lengths]), SEPARATOR), documents  # type: ignore[arg-type]


def naive_rows(documents: list[list[int]], order: list[int], T: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Concatenate, cut, pad: what an epoch of a stream is by definition."""
    tokens = [t for d in order for t in documents[d]]
    owner = [number for number, d in enumerate(order) for _ in documents[d]]
    rows = []
    for at in range(0, max(1, len(tokens) - 1), T):
        targets = tokens[at + 1 : at + T + 1]
        names, missing = [n - owner[at] for n in owner[at : at + len(targets)]], T - len(targets)
        own = names[-1] + 1 if names else 0
        padding = ([SEPARATOR] * missing, [IGNORE] * missing, [own] * missing)
        rows.append((tokens[at : at + len(targets)] + padding[0], targets + padding[1], names + padding[2]))
    return rows


@given(lengths=lengths_, T=st.integers(1, 40), seed=st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_an_epoch_of_a_stream_is_its_documents_concatenated_cut_and_shuffled(lengths: list[int], T: int, seed: int) -> None:
    texts, documents = make(lengths)
    packing = StreamPacking(texts, T, (seed,), endless=True)
    count = int(packing.sequences_per_epoch)
    for epoch in (2, 0, 1):  # any order of asking gives the same rows
        order = packing._epoch(epoch)[0].tolist()
        assert sorted(order) == list(range(len(lengths)))
        sequences = [packing.sequence(epoch * count + i) for i in range(count)]
        for sequence in sequences:
            there = sequence.positions >= 0
            assert (texts.tokens.read(0, texts.tokens.size)[sequence.positions[there]] == sequence.ids[there]).all()
            assert (sequence.targets[~there] == IGNORE).all()
        rows = [tuple(column.tolist() for column in sequence[:3]) for sequence in sequences]
        assert sorted(rows) == sorted(naive_rows(documents, order, T))


def test_rows_of_one_document_are_spread_over_the_epoch() -> None:
    texts, _ = make([400] * 10)
    packing = StreamPacking(texts, 10, (0,), endless=True)
    firsts = [int(packing.sequence(r).ids[-1]) // 400 for r in range(int(packing.sequences_per_epoch))]
    neighbors = sum(a == b for a, b in pairwise(firsts)) / len(firsts)
    assert neighbors < 0.25  # 1/10 by chance, 39/40 in the text's order


@given(lengths=lengths_, T=st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_a_finite_stream_predicts_every_token_once(lengths: list[int], T: int) -> None:
    texts, documents = make(lengths)
    packing = StreamPacking(texts, T, None, endless=False)
    rows = [packing.sequence(r) for r in range(packing.num_sequences)]
    flat = [t for d in documents for t in d]
    targets = np.concatenate([r.targets for r in rows]) if rows else np.zeros(0)
    assert targets[targets != IGNORE].tolist() == flat[1:]
    assert all(len(column) == T for r in rows for column in r)
    for r in rows:
        padding = r.targets == IGNORE
        assert not padding[0]
        assert (np.diff(padding.astype(int)) >= 0).all()
        if padding.any():
            assert set(r.documents[padding]).isdisjoint(r.documents[~padding])


@given(lengths=lengths_, T=st.integers(1, 40), seed=st.one_of(st.none(), st.integers(0, 5)))
@settings(max_examples=200, deadline=None)
def test_document_packing_loses_nothing_and_splits_only_what_is_too_long(lengths: list[int], T: int, seed: int | None) -> None:
    texts, documents = make(lengths)
    packing = DocumentPacking(texts, T, None if seed is None else (seed,), endless=False)
    inputs, pieces = [], []
    for r in range(packing.num_sequences):
        row = packing.sequence(r)
        assert all(len(column) == T for column in row)
        real = row.targets != IGNORE
        inputs += row.ids[real].tolist()
        assert row.documents[0] == 0
        assert set(np.diff(row.documents)) <= {0, 1}
        assert set(row.documents[real]).isdisjoint(row.documents[~real])
        pieces += [(row.ids[row.documents == d].tolist(), row.targets[row.documents == d].tolist()) for d in np.unique(row.documents[real])]
    expected = []
    for d in documents:
        following = [*d[1:], SEPARATOR]
        expected += [(d[i : i + T], following[i : i + T]) for i in range(0, len(d), T)]
    assert sorted(pieces) == sorted(expected)
    assert sorted(inputs) == sorted(t for d in documents for t in d)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=200))
@settings(max_examples=100, deadline=None)
def test_first_fit_against_a_plain_loop(lengths: list[int]) -> None:
    room, name = [0] * OPEN_SEQUENCES, [-1] * OPEN_SEQUENCES
    rows, used = [], 0
    for length in lengths:
        slot = next((i for i in range(OPEN_SEQUENCES) if room[i] >= length), None)
        if slot is None:
            slot = min(range(OPEN_SEQUENCES), key=lambda i: room[i])
            room[slot], name[slot] = 20, used
            used += 1
        room[slot] -= length
        rows.append(name[slot])
    got = first_fit(np.array(lengths), 20)
    assert got.tolist() == rows
    assert np.bincount(got, weights=lengths).max() <= 20


def test_first_fit_wastes_little() -> None:
    """First-fit uses at most 1.7 times the optimum (Ullman 1971), here known: the sum of lengths over T."""
    lengths = np.random.default_rng(0).integers(1, 500, size=5000)
    rows = first_fit(lengths, 512)
    assert rows.max() + 1 <= 1.1 * lengths.sum() / 512


def test_document_epochs_hold_the_same_rows_in_another_order() -> None:
    texts, _ = make([7, 30, 5, 5, 9, 14, 3, 22] * 5)
    packing = DocumentPacking(texts, 16, (3,), endless=True)
    count = int(packing.sequences_per_epoch)
    epochs = [[tuple(packing.sequence(e * count + r).ids.tolist()) for r in range(count)] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("path", [StreamPacking, DocumentPacking])
def test_one_token_corpora_work(path: type, tmp_path: Path) -> None:
    texts, _ = make([1])
    row = path(texts, 4, (0,), endless=True).sequence(5)
    assert row.ids.tolist() == [0, 0, 0, 0]
