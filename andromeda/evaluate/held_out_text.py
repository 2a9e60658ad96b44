"""Text to measure a model on: any file, or the held-out documents of the corpus that it was trained on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from andromeda.config.data import DataConfig
from andromeda.data.corpus import Corpus, open_corpus
from andromeda.data.formats import UTF8
from andromeda.evaluate.loaded_model import LoadedModel, file_sha256
from andromeda.utils.errors import AndromedaError, ConfigError, DataError
from andromeda.utils.untrusted import open_regular

HELD_OUT = "held-out"


MAX_TEXT_BYTES = 1 << 30
"""Of a file, which is read whole."""


@dataclass(frozen=True)
class EvalText:
    """Documents one after the other as token ids, each beginning with the separator."""

    name: str
    ids: Tensor
    """int64 (N,)."""
    starts: tuple[int, ...]
    """Where each document begins, and N."""
    lengths: Tensor
    """int64 (V,): bytes that each token stands for; empty where that is unknown."""
    fingerprint: str
    """sha256 of the file, or the fingerprint of the corpus."""
    masked: bool
    """Whether the model was taught that attention never crosses documents."""

    def numbers(self) -> Tensor | None:
        """The document number of every token (N,), or None where attention may cross documents."""
        if not self.masked or len(self.starts) == 2:
            return None
        counts = torch.tensor([end - begin for begin, end in pairwise(self.starts)])
        return torch.repeat_interleave(torch.arange(len(counts)), counts)

    def bytes_of(self, targets: Tensor) -> int:
        """UTF-8 bytes that targets stand for. Raises DataError where that is unknown."""
        if not len(self.lengths):
            raise DataError("The corpus has no tokenizer beside it, so that its bytes are unknown: build it with `andromeda data build`.")
        return int(self.lengths[targets].sum())

    def places(self, length: int) -> list[tuple[int, int]]:
        """Begin and end of all documents that hold `length` tokens."""
        return [(begin, end) for begin, end in pairwise(self.starts) if end - begin >= length]


def open_text(loaded: LoadedModel, file: str = "", corpus: str = "") -> EvalText:
    """The text in `file`, else the held-out documents of the folder `corpus`, else those of the run's own corpora.

    Raises an AndromedaError, one sentence, when there is none or it is of another tokenizer.
    """
    return _from_file(loaded, Path(file)) if file else _held_out(loaded, corpus)


def _from_file(loaded: LoadedModel, path: Path) -> EvalText:
    """One document."""
    tokenizer = loaded.tokenizer("Text from a file")
    if path.is_file() and path.stat().st_size > MAX_TEXT_BYTES:
        raise DataError(f"{path} is larger than {MAX_TEXT_BYTES >> 20:,} MiB: give a part of it.")
    fingerprint = file_sha256(path)
    try:
        with open_regular(path) as file:
            content = file.read().decode(UTF8)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 (byte {error.start}): convert it first.") from None
    ids = torch.tensor([tokenizer.bos, *tokenizer.encode_start(content)])
    if len(ids) < 2:
        raise DataError(f"{path} is empty: give a file with text.")
    return EvalText(path.stem, ids, (0, len(ids)), torch.from_numpy(tokenizer.byte_lengths()), fingerprint, False)


def _held_out(loaded: LoadedModel, corpus: str) -> EvalText:
    data = DataConfig(corpus=corpus) if corpus else loaded.config.data
    paths = [data.corpus] if data.corpus else [source.path for source in data.sources]
    if not paths:
        raise ConfigError(f"{loaded.run} names no corpus with held-out text: give a text with --text or a corpus with --corpus.")
    try:
        corpora = [open_corpus(path, "val") for path in paths]
    except AndromedaError as error:
        raise type(error)(f"{str(error).rstrip('.')}; or say where it is with --corpus, or give another text with --text.") from None
    _refuse_other_tokenizer(loaded, corpora, paths)
    ids, starts, begin = [], [0], 0
    for one in corpora:
        ids.append(one.documents.tokens.read(0, one.documents.tokens.size).astype(np.int64))
        starts += (np.asarray(one.documents.offsets[1:]) + begin).tolist()
        begin = starts[-1]
    known = corpora[0].tokenizer
    lengths = torch.from_numpy(known.byte_lengths()) if known else torch.zeros(0, dtype=torch.long)
    fingerprints = [one.fingerprint for one in corpora]
    fingerprint = fingerprints[0] if len(corpora) == 1 else hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()
    whole = torch.from_numpy(np.concatenate(ids))
    if len(whole) < 2:
        raise DataError(f"{' and '.join(paths)} hold out no text: give a text with --text.")
    if int(whole.max()) >= loaded.config.model.vocab_size:
        raise DataError(f"{' and '.join(paths)} hold token ids above the vocabulary: they were changed or damaged; build them again.")
    return EvalText(HELD_OUT, whole, tuple(starts), lengths, fingerprint, loaded.config.data.document_mask)


def _refuse_other_tokenizer(loaded: LoadedModel, corpora: list[Corpus], paths: list[str]) -> None:
    own = loaded.model.tokenizer
    for corpus, path in zip(corpora, paths, strict=True):
        if own and corpus.tokenizer and corpus.tokenizer.fingerprint != own.fingerprint:
            raise DataError(f"{path} was built with another tokenizer than {loaded.run}: give the run's own, or a text with --text.")
        if corpus.vocab_size > loaded.config.model.vocab_size:
            raise DataError(f"{path} has {corpus.vocab_size} tokens and the model {loaded.config.model.vocab_size}: give its own corpus.")
