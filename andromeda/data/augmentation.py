"""Augmentation: transforms between packing and batch, each a pure function of (sequence, sequence number, seed).

So what a sequence holds still depends on the configuration, the seed and its number alone, and a run resumes as before. A transform
keeps the sequence's length and its documents. Bytes are counted afterwards, from the targets that are left.

Fill in the middle (arXiv 2207.14255): a document is cut at two places into prefix, middle and suffix, and the middle comes
last, so that a model that only reads forwards learns to write between two texts. Written prefix first (PSM), or suffix first (SPM,
in the paper's variant for joint training, where the prefix runs on into the middle):

    PSM   <prefix> p <suffix> s <middle> m        SPM   <prefix> <suffix> s <middle> p m

It works on what of a document is in the sequence ("context level" there), and cuts between tokens. Token masking corrupts
inputs and never targets: the model must do without the token that it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np

from andromeda.config.data import AugmentationConfig
from andromeda.data.packing import IGNORE, PackedSequence
from andromeda.data.tokenizer import Tokenizer
from andromeda.utils.errors import ConfigError

FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
MASK = "<|mask|>"
MIN_DOCUMENT_TOKENS = 8
"""Tokens of a document in the sequence, below which a document is not rearranged."""
FIM_DRAWS, MASK_DRAWS = 1, 2
"""Separate the draws of the transforms under the same seed."""

SequenceTransform = Callable[[PackedSequence, int], PackedSequence]
"""A sequence and its number in the stream to the sequence that is trained on."""


def build_transforms(config: AugmentationConfig, tokenizer: Tokenizer | None, seed: int) -> list[SequenceTransform]:
    """The transforms that are on, in order. Raises ConfigError when the tokenizer lacks a special token that one needs."""
    stages: list[SequenceTransform] = []
    if config.fim:
        tokens = _specials(tokenizer, FIM, "data.augment.fim")
        assert tokenizer is not None
        stages.append(FillInTheMiddle(config, tokens, tokenizer.eos, seed))
    if config.mask:
        if tokenizer is None:
            raise ConfigError("data.augment.mask must know special tokens, and the corpus has no tokenizer: build it from text.")
        special = _specials(tokenizer, (MASK,), "data.augment.mask")[0] if config.mask_with == "special" else None
        stages.append(TokenMasking(config.mask, special, tokenizer, seed))
    return stages


def _specials(tokenizer: Tokenizer | None, names: tuple[str, ...], key: str) -> tuple[int, ...]:
    known = tokenizer.special_tokens if tokenizer else {}
    missing = [name for name in names if name not in known]
    if missing:
        options = " ".join(f"--special-token '{name}'" for name in missing)
        raise ConfigError(f"{key} needs the special tokens {', '.join(missing)}: build the corpus again with {options}.")
    return tuple(known[name] for name in names)


class FillInTheMiddle:
    """Rearranges a share of the documents of each sequence."""

    def __init__(self, config: AugmentationConfig, tokens: tuple[int, ...], separator: int, seed: int) -> None:
        self._share, self._suffix_first = config.fim, config.fim_spm
        self._tokens, self._separator, self._seed = tokens, separator, seed

    def __call__(self, sequence: PackedSequence, number: int) -> PackedSequence:
        ids, targets, positions = sequence.ids.copy(), sequence.targets.copy(), sequence.positions.copy()
        draw = np.random.Generator(np.random.Philox(key=[self._seed, number], counter=[0, 0, 0, FIM_DRAWS]))
        for start, stop in _pieces(sequence):
            # Drawn for every document, so that one document does not depend on the others.
            chosen, first, *cuts = draw.random(4)
            if chosen < self._share and stop - start >= MIN_DOCUMENT_TOKENS:
                self._rearrange(ids[start:stop], targets[start:stop], first < self._suffix_first, cuts)
                positions[start:stop] = -1
        return PackedSequence(ids, targets, sequence.documents, positions)

    def _rearrange(self, ids: np.ndarray, targets: np.ndarray, suffix_first: bool, cuts: list[float]) -> None:
        """In place. The three special tokens take the place of the last three, which the sequence loses."""
        prefix, suffix, middle = (np.array([token]) for token in self._tokens)
        begins = int(ids[0] == self._separator)
        head, text = ids[:begins], ids[begins : len(ids) - 3]
        one, two = sorted(round(cut * len(text)) for cut in cuts)
        p, m, s = text[:one], text[one:two], text[two:]
        parts = [head, prefix, suffix, s, middle, p, m] if suffix_first else [head, prefix, p, suffix, s, middle, m]
        ended = targets[-1] == self._separator  # the document ends here, and so does what is written in the middle
        ids[:] = np.concatenate(parts)
        targets[:-1] = ids[1:]
        targets[-1] = targets[-1] if ended else IGNORE


class TokenMasking:
    """Replaces a share of the input tokens, special ones excepted."""

    def __init__(self, share: float, token: int | None, tokenizer: Tokenizer, seed: int) -> None:
        self._share, self._token, self._seed = share, token, seed
        self._kept = np.array(sorted(tokenizer.special_tokens.values()))
        self._words = np.flatnonzero(tokenizer.byte_lengths())

    def __call__(self, sequence: PackedSequence, number: int) -> PackedSequence:
        draw = np.random.Generator(np.random.Philox(key=[self._seed, number], counter=[0, 0, 0, MASK_DRAWS]))
        hit = (draw.random(len(sequence.ids)) < self._share) & ~np.isin(sequence.ids, self._kept)
        instead = self._words[draw.integers(0, len(self._words), len(sequence.ids))] if self._token is None else self._token
        return sequence._replace(ids=np.where(hit, instead, sequence.ids))


def _pieces(sequence: PackedSequence) -> Iterator[tuple[int, int]]:
    """Where each document of the sequence begins and ends; padding, which predicts nothing, is none."""
    borders = [0, *(np.flatnonzero(np.diff(sequence.documents)) + 1).tolist(), len(sequence.ids)]
    for start, stop in pairwise(borders):
        if (sequence.targets[start:stop] != IGNORE).any():
            yield start, stop
