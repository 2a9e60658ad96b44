"""The training stream: a pure function of (configuration, seed, sequence number).

So a run resumes from a sequence number, and any split into micro-batches or processes sees the same sequences in the same order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from andromeda.config.data import RANKED, DataConfig, SourceConfig
from andromeda.data.augmentation import SequenceTransform, build_transforms
from andromeda.data.corpus import Corpus, open_corpus
from andromeda.data.mixture import MixtureSchedule, ProportionalSchedule
from andromeda.data.packing import IGNORE, PACKINGS, PackedSequence, Packing
from andromeda.data.targets import TargetColumn
from andromeda.data.tokenizer import Tokenizer
from andromeda.utils.errors import ConfigError, DataError

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Batch:
    """B sequences of T tokens.

    `targets` is -100 where there is nothing to predict. `documents` numbers the documents inside each sequence from 0 upwards;
    padding has a number of its own.
    """

    ids: torch.Tensor
    """int64 (B, T)."""
    targets: torch.Tensor
    """int64 (B, T)."""
    documents: torch.Tensor
    """int32 (B, T)."""
    tokens: int
    """Targets that count."""
    bytes: int
    """UTF-8 bytes that these targets stand for: the denominator of bits per byte. 0 without a tokenizer."""
    head_targets: dict[str, torch.Tensor] = field(default_factory=dict)
    """Further targets of the corpus by name (data/targets.py): classes and ranks (B, T) int64, -100 where there is none; labels
    (B, T, K) uint8, 255; numbers (B, T) float64, NaN."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        ids, targets, documents = (t.to(device, non_blocking=non_blocking) for t in (self.ids, self.targets, self.documents))
        heads = {name: t.to(device, non_blocking=non_blocking) for name, t in self.head_targets.items()}
        return replace(self, ids=ids, targets=targets, documents=documents, head_targets=heads)


class TokenStream:
    """Sequences of tokens by number; see `open_stream`."""

    def __init__(
        self,
        corpora: list[Corpus],
        packings: list[Packing],
        schedule: MixtureSchedule | ProportionalSchedule,
        fingerprint: str,
        stages: Sequence[SequenceTransform] = (),
    ) -> None:
        self._corpora, self._packings, self._schedule, self._stages = corpora, packings, schedule, stages
        self.fingerprint = fingerprint
        """sha256 of everything that decides which tokens sequence r holds."""
        self.vocab_size = max(c.vocab_size for c in corpora)
        """Every id is below it."""
        self.tokenizer: Tokenizer | None = corpora[0].tokenizer
        """None only for shards that were made elsewhere, without a tokenizer."""
        self._targets = _joint_targets(corpora)
        self.targets = {name: column.report for name, column in self._targets.items()}
        """What the corpora have besides tokens, by name."""
        lengths = [p.num_sequences for p in packings]
        self.num_sequences = None if None in lengths else sum(n for n in lengths if n is not None)
        """Sequences of a held-out stream; None for training, which never ends."""
        known = self.tokenizer.byte_lengths() if self.tokenizer else np.zeros(0, dtype=np.int64)
        self._byte_lengths = np.pad(known, (0, self.vocab_size - len(known)))

    def batch(self, start: int, count: int) -> Batch:
        """Sequences `start` to `start + count - 1`; fewer where a held-out stream ends, at least one."""
        if self.num_sequences is not None:
            count = min(count, self.num_sequences - start)
        if start < 0 or count < 1:
            end = f"has sequences 0 to {self.num_sequences - 1}" if self.num_sequences else "begins at sequence 0"
            raise DataError(f"There are no {count} sequences from number {start} on: the stream {end}.")
        return self.gather(range(start, start + count))

    def gather(self, numbers: Sequence[int]) -> Batch:
        """The sequences with these numbers, in this order."""
        sequences, heads = [], []
        for number in numbers:
            source, inside = self._schedule.locate(number)
            sequence = _split_ranked(self._packings[source].sequence(inside), self._corpora[source])
            for stage in self._stages:
                sequence = stage(sequence, number)
            sequence = _learned_only(sequence, self._corpora[source].loss_mask)
            sequences.append(sequence)
            heads.append(self._head_targets(self._corpora[source], sequence.positions))
        ids, targets, documents, _ = (np.stack(column) for column in zip(*sequences, strict=True))
        if (highest := max(int(ids.max()), int(targets.max()))) >= self.vocab_size:
            raise DataError(
                f"A shard holds the token id {highest:,}, and the vocabulary ends at {self.vocab_size - 1:,}: it was changed or damaged; "
                "run `andromeda data show CORPUS --verify`."
            )
        counted = targets[targets != IGNORE]
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(targets),
            torch.from_numpy(documents.astype(np.int32)),
            tokens=len(counted),
            bytes=int(self._byte_lengths[counted].sum()),
            head_targets={name: torch.from_numpy(np.stack([one[name] for one in heads])) for name in self._targets},
        )

    def _head_targets(self, corpus: Corpus, positions: np.ndarray) -> dict[str, np.ndarray]:
        """The targets of the tokens at `positions` (T,) of a corpus, with those that only another corpus has as missing."""
        return {
            name: corpus.targets[name].at(positions, corpus.documents.offsets) if name in corpus.targets else column.missing(len(positions))
            for name, column in self._targets.items()
        }

    def epochs(self, sequence: int) -> tuple[float, ...]:
        """How many epochs of each source are complete when `sequence` sequences have been read."""
        return tuple(self._schedule.count(s, sequence) / p.sequences_per_epoch for s, p in enumerate(self._packings))


def _joint_targets(corpora: list[Corpus]) -> dict[str, TargetColumn]:
    """A column for each target that any corpus has. Raises DataError where two mean different things by one name."""
    found: dict[str, TargetColumn] = {}
    for corpus in corpora:
        for name, column in corpus.targets.items():
            other = found.setdefault(name, column).report
            if (other.kind, other.labels) != (column.report.kind, column.report.labels):
                raise DataError(f"The corpora have different targets {name!r} (kind or labels): build them with the same records' labels.")
    return found


def _learned_only(sequence: PackedSequence, mask: np.ndarray | None) -> PackedSequence:
    """The sequence without the targets that are not learned. A target is the token behind the one at its position in the corpus; behind
    the last token of a document comes a separator, and those are never learned."""
    if mask is None:
        return sequence
    learned = mask[(sequence.positions + 1) % len(mask)] == 1
    return sequence._replace(targets=np.where(learned, sequence.targets, IGNORE))


def _split_ranked(sequence: PackedSequence, corpus: Corpus) -> PackedSequence:
    """The sequence with the texts of a ranking, which the corpus keeps as one document, as documents of their own."""
    if not any(column.report.kind in RANKED for column in corpus.targets.values()):
        return sequence
    begins = (sequence.positions >= 0) & (sequence.ids == corpus.documents.eos)
    inner = begins & (np.diff(sequence.documents, prepend=-1) == 0)
    return sequence._replace(documents=sequence.documents + np.cumsum(inner))


class PrefetchingTokenStream(TokenStream):
    """A stream that reads ahead in threads; what a sequence holds, and so the order, stays the same.

    The next calls are expected at the distance of the last two; another call is answered too, only without prefetching.
    """

    def __init__(self, *parts: Any, workers: int) -> None:
        super().__init__(*parts)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="sequences")
        self._workers = workers
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}
        self._last: int | None = None

    def batch(self, start: int, count: int) -> Batch:
        stride = start - self._last if self._last is not None and start > self._last else count
        self._last = start
        ready = self._ahead.pop((start, count), None)
        wanted = [(start + i * stride, count) for i in range(1, self._workers + 1)]
        kept = {key: self._ahead[key] for key in wanted if key in self._ahead}
        for key in self._ahead.keys() - kept.keys():
            self._ahead[key].cancel()
        for key in wanted:
            if key not in kept and (self.num_sequences is None or key[0] < self.num_sequences):
                kept[key] = self._pool.submit(super().batch, *key)
        self._ahead = kept
        return ready.result() if ready else super().batch(start, count)


def open_stream(config: DataConfig, seq_len: int, seed: int, split: Split = "train", *, all_tokens: bool = False) -> TokenStream:
    """Open the sequences of `seq_len` tokens that a run reads.

    Training never ends: each source restarts when it is exhausted, reshuffled by (seed, epoch), and sources are mixed sequence by
    sequence with exact shares. The held-out stream has a fixed order and ends; each of its tokens but the first of a source is a
    target exactly once. all_tokens: those that a corpus keeps from being learned are targets too. Raises ConfigError or DataError when
    the corpora are missing, damaged, or of different tokenizers.
    """
    sources = _sources(config)
    if seq_len < 1:
        raise ConfigError(f"A sequence must hold at least one token, not {seq_len}: set train.seq_len.")
    corpora = [open_corpus(source.path, split) for source in sources]
    if all_tokens:
        corpora = [replace(corpus, loss_mask=None) for corpus in corpora]
    _refuse_different_tokenizers(sources, corpora)
    endless = split == "train"
    shuffle = config.shuffle and endless
    packings: list[Packing] = [
        PACKINGS[config.packing](corpus.documents, seq_len, (seed, i) if shuffle else None, endless) for i, corpus in enumerate(corpora)
    ]
    stages = build_transforms(config.augment, corpora[0].tokenizer, seed) if endless else []
    schedule = (
        MixtureSchedule(_weights(config, sources, corpora)) if endless else ProportionalSchedule([p.num_sequences or 0 for p in packings])
    )
    shares = [str(share) for share in schedule.shares] if isinstance(schedule, MixtureSchedule) else []
    content: list[Any] = [split, [c.fingerprint for c in corpora], shares, config.packing, seq_len, seed if shuffle else None]
    if stages:  # absent when off, so that runs of before augmentation existed can resume
        content.append([config.augment.model_dump(), seed])
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    if config.workers:
        return PrefetchingTokenStream(corpora, packings, schedule, fingerprint, stages, workers=config.workers)
    return TokenStream(corpora, packings, schedule, fingerprint, stages)


def _weights(config: DataConfig, sources: tuple[SourceConfig, ...], corpora: list[Corpus]) -> list[float]:
    """Weights of the mixture; by size, they grow with each source's tokens to the power `upsample`."""
    if not config.by_size:
        return [source.weight for source in sources]
    largest = max(corpus.documents.tokens.size for corpus in corpora)
    # Six digits: shares are exact from here on, and no rounding of a power may change them between machines.
    return [
        round(s.weight * (c.documents.tokens.size / largest) ** config.upsample, 6) or 1e-6 for s, c in zip(sources, corpora, strict=True)
    ]


def _sources(config: DataConfig) -> tuple[SourceConfig, ...]:
    if bool(config.corpus) == bool(config.sources):
        both = "both are given" if config.corpus else "neither is given"
        raise ConfigError(f"Set either data.corpus or data.sources ({both}).")
    return config.sources or (SourceConfig(path=config.corpus),)


def _refuse_different_tokenizers(sources: tuple[SourceConfig, ...], corpora: list[Corpus]) -> None:
    names = [c.tokenizer.fingerprint if c.tokenizer else "" for c in corpora]
    for source, name in zip(sources, names, strict=True):
        if name != names[0]:
            raise DataError(
                f"{source.path} and {sources[0].path} have different tokenizers: build one with `--tokenizer` naming the other's folder."
            )
