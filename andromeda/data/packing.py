"""How documents become sequences of T tokens: two packings, each a pure function from a sequence's number to its content.

A corpus is one array of tokens in which every document starts with the separator, so the target of a document's last token
is the separator that would follow it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from andromeda.data.permutation import shuffled
from andromeda.data.shards import TokenArray

IGNORE = -100
"""Target of a position that has nothing to predict."""
SEQUENCE_ORDER = 1
"""Keeps the order of sequences apart from the order of documents under the same seed."""
OPEN_SEQUENCES = 64
"""Unfinished sequences that first-fit looks at."""


class PackedSequence(NamedTuple):
    """One sequence, each (T,) int64: token ids, targets, the number of the document inside the sequence (0, 1, 2, ...), and where each
    token is in its corpus, -1 for padding and for tokens that were moved."""

    ids: np.ndarray
    targets: np.ndarray
    documents: np.ndarray
    positions: np.ndarray


class TokenizedDocuments(NamedTuple):
    """The documents to pack: all tokens, where each document starts (N + 1,), and the separator's id."""

    tokens: TokenArray
    offsets: np.ndarray
    eos: int


class Packing(Protocol):
    """Sequences by number. `sequences_per_epoch` is the number of sequences in which every document comes once."""

    sequences_per_epoch: float
    num_sequences: int | None
    """Number of sequences, or None when the packing never ends."""

    def sequence(self, number: int) -> PackedSequence: ...


class StreamPacking:
    """Documents one after the other, cut every T tokens; each epoch has its own order of documents and of sequences.

    Sequence c of an epoch's text holds tokens cT to cT + T, so each token but the first is a target exactly once; the last sequence is
    padded. With a seed the sequences are shuffled as well: neighbors in the text are mostly of one document, and a batch of them
    would teach little more than one.
    """

    def __init__(self, texts: TokenizedDocuments, seq_len: int, seed: tuple[int, ...] | None, endless: bool) -> None:
        self._texts, self._T, self._seed = texts, seq_len, seed
        self._lengths = np.diff(texts.offsets)
        self._size = texts.tokens.size
        sequences = -(-(self._size - 1) // seq_len)
        self.num_sequences = None if endless else sequences
        # A text of one token has nothing to predict; an endless stream of it is sequences of padding.
        self._count = max(1, sequences)
        self.sequences_per_epoch = float(self._count)
        self._epoch = lru_cache(maxsize=3)(self._arrange)

    def _arrange(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents of an epoch in order (N,), where each ends in the epoch's text (N,), and its sequences in order (count,)."""
        if self._seed is None:
            order, sequences = np.arange(len(self._lengths)), np.arange(self._count)
        else:
            order = shuffled(len(self._lengths), *self._seed, epoch)
            sequences = shuffled(self._count, *self._seed, epoch, SEQUENCE_ORDER)
        return order, np.cumsum(self._lengths[order]), sequences

    def sequence(self, number: int) -> PackedSequence:
        epoch, inside = divmod(number, self._count)
        order, ends, sequences = self._epoch(epoch)
        at = int(sequences[inside]) * self._T
        stop = min(at + self._T + 1, self._size)
        pieces: list[tuple[int, int]] = []
        while at < stop:
            pieces.append(self._piece(order, ends, at, stop))
            at += pieces[-1][1] - pieces[-1][0]
        tokens = np.concatenate([self._texts.tokens.read(*piece) for piece in pieces])
        owner, positions = _places(pieces)
        return _padded(tokens[:-1], tokens[1:], owner[:-1], positions[:-1], self._T, self._texts.eos)

    def _piece(self, order: np.ndarray, ends: np.ndarray, at: int, stop: int) -> tuple[int, int]:
        """Where in the corpus tokens from `at` up to `stop` of an epoch's text are, to the end of the document at most."""
        place = int(np.searchsorted(ends, at, side="right"))
        end = int(self._texts.offsets[order[place] + 1])
        start = end - (int(ends[place]) - at)
        return start, min(end, start + stop - at)


class DocumentPacking:
    """Sequences that start with a document's start: whole documents share a sequence, longer ones are cut into pieces of T.

    Documents are taken in an order drawn by the seed and put into the first of up to 64 unfinished sequences that has room
    (first-fit). What shares a sequence is decided once; each epoch goes through the sequences in its own order, so that a sequence is found
    without packing the epochs before it.
    """

    def __init__(self, texts: TokenizedDocuments, seq_len: int, seed: tuple[int, ...] | None, endless: bool) -> None:
        self._texts, self._T, self._seed = texts, seq_len, seed
        starts, lengths = _pieces(texts.offsets, seq_len)
        order = np.arange(len(starts)) if seed is None else shuffled(len(starts), *seed)
        starts, lengths = starts[order], lengths[order]
        sequences = first_fit(lengths, seq_len)
        by_row = np.argsort(sequences, kind="stable")
        self._starts, self._stops = starts[by_row], starts[by_row] + lengths[by_row]
        self._borders = np.concatenate([[0], np.cumsum(np.bincount(sequences))])
        self._count = len(self._borders) - 1
        self.sequences_per_epoch = float(self._count)
        self.num_sequences = None if endless else self._count
        self._epoch = lru_cache(maxsize=3)(self._arrange)

    def _arrange(self, epoch: int) -> np.ndarray:
        return np.arange(self._count) if self._seed is None else shuffled(self._count, *self._seed, epoch)

    def sequence(self, number: int) -> PackedSequence:
        epoch, inside = divmod(number, self._count)
        sequence = self._epoch(epoch)[inside]
        first, last = self._borders[sequence], self._borders[sequence + 1]
        ids, targets = [], []
        pieces = list(zip(self._starts[first:last].tolist(), self._stops[first:last].tolist(), strict=True))
        for start, stop in pieces:
            tokens = self._texts.tokens.read(start, min(stop + 1, self._texts.tokens.size))
            ids.append(tokens[: stop - start])
            targets.append(np.append(tokens, self._texts.eos)[1 : stop - start + 1])
        return _padded(np.concatenate(ids), np.concatenate(targets), *_places(pieces), self._T, self._texts.eos)


PACKINGS: dict[str, type[StreamPacking] | type[DocumentPacking]] = {"stream": StreamPacking, "documents": DocumentPacking}


def _places(pieces: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """For each token of the pieces from start up to stop: the number of its piece, and where it is in the corpus."""
    owner = np.repeat(np.arange(len(pieces)), [stop - start for start, stop in pieces])
    return owner, np.concatenate([np.arange(start, stop) for start, stop in pieces])


def _padded(ids: np.ndarray, targets: np.ndarray, documents: np.ndarray, positions: np.ndarray, T: int, separator: int) -> PackedSequence:
    """Fill a sequence up to T with separators that predict nothing and are a document of their own."""
    missing = T - len(ids)
    if not missing:
        return PackedSequence(ids, targets, documents, positions)
    own = documents[-1] + 1 if len(documents) else 0
    return PackedSequence(
        np.concatenate([ids, np.full(missing, separator)]),
        np.concatenate([targets, np.full(missing, IGNORE)]),
        np.concatenate([documents, np.full(missing, own)]),
        np.concatenate([positions, np.full(missing, -1)]),
    )


def _pieces(offsets: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of all documents, those longer than T cut into pieces of T and a rest."""
    lengths = np.diff(offsets)
    counts = -(-lengths // T)
    document = np.repeat(np.arange(len(lengths)), counts)
    index = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = offsets[:-1][document] + index * T
    return starts, np.minimum(offsets[1:][document] - starts, T)


def first_fit(lengths: np.ndarray, T: int) -> np.ndarray:
    """Sequence of each piece (N,): the first open one with room, else a new one; the fullest one closes when too many are open."""
    sequences = np.zeros(len(lengths), dtype=np.int64)
    room = np.zeros(OPEN_SEQUENCES, dtype=np.int64)
    name = np.zeros(OPEN_SEQUENCES, dtype=np.int64)
    used = 0
    for i, length in enumerate(lengths.tolist()):
        slot = int((room >= length).argmax())
        if room[slot] < length:
            slot = int(room.argmin())
            room[slot], name[slot] = T, used
            used += 1
        sequences[i] = name[slot]
        room[slot] -= length
    return sequences
