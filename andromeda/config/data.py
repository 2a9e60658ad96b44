"""Where the tokens of a run come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt

from andromeda.config.base import BaseConfig, Strings, as_tuple


class SourceConfig(BaseConfig):
    """One corpus folder (made by `andromeda data build`) or .bin shard in a mixture."""

    path: str
    """Corpus folder or .bin shard."""
    weight: PositiveFloat = 1.0
    """Share of the tokens, relative to the other sources; kept exactly at every point of the stream."""


class AugmentationConfig(BaseConfig):
    """Stages that change training rows, never held-out ones; all off by default (docs/data.md has their measured effect)."""

    fim: float = Field(0.0, ge=0.0, le=1.0)
    """Share of documents rearranged for fill-in-the-middle (arXiv 2207.14255); its three special tokens are reserved at build time."""
    fim_spm: float = Field(0.5, ge=0.0, le=1.0)
    """Share of those written suffix first (SPM); the others are written prefix first (PSM)."""
    mask: float = Field(0.0, ge=0.0, lt=1.0)
    """Share of input tokens that are exchanged; targets stay."""
    mask_with: Literal["random", "special"] = "random"
    """By a random token, or by the special token <|mask|>."""


class DataConfig(BaseConfig):
    """The training stream: which corpora, in what proportion, packed how."""

    corpus: str = ""
    """Folder of a single corpus; empty when `sources` is given."""
    sources: Annotated[tuple[SourceConfig, ...], BeforeValidator(as_tuple)] = ()
    """A mixture of corpora; all must share one tokenizer."""
    packing: Literal["stream", "documents"] = "stream"
    """`stream` cuts one long token stream into rows; `documents` starts rows at document starts and never splits one that fits."""
    document_mask: bool = True
    """Attention never crosses a document's boundary."""
    shuffle: bool = True
    """Rows come in an order drawn from the seed; off is the order of the corpus."""
    upsample: float = Field(1.0, ge=0.0, le=1.0)
    """With `by_size`: power of the sizes; 1 is in proportion to them, less upsamples small sources (arXiv 1907.05019)."""
    by_size: bool = False
    """Multiply the sources' weights by their sizes."""
    augment: AugmentationConfig = AugmentationConfig()
    workers: int = Field(0, ge=0, le=1024)
    """Loader threads; the order does not depend on it."""


class BuildConfig(BaseConfig):
    """What `andromeda data build` does with raw text."""

    tokenizer: Literal["bpe", "unigram", "bytes"] = "bpe"
    """Byte-level BPE, SentencePiece Unigram, or the 256 bytes."""
    vocab_size: int = Field(4096, gt=0, le=1 << 24)
    """Entries of a trained tokenizer, special tokens included."""
    digits: PositiveInt = 2
    """Longest run of digits that can be one token (bpe)."""
    validation: float = Field(0.01, gt=0.0, lt=0.5)
    """Share of documents held out, chosen by the hash of their content."""
    shard_tokens: PositiveInt = 1 << 24
    """Tokens of one file."""
    text_field: str = "text"
    """Key of the text in .jsonl and .parquet rows and in datasets."""
    include: Strings = ()
    """Endings to read (such as ".py"), unknown ones as plain text; empty reads every known kind."""
    tokenizer_path: str = ""
    """A tokenizer to use instead of training one: a folder that `save` wrote, a tokenizer.json or a SentencePiece .model."""
    specials: Strings = ()
    """Names of special tokens besides the document separator; text never turns into them."""
    shortest: PositiveInt = 1
    """Bytes; a shorter document is skipped."""
    longest: PositiveInt = 1 << 30
    """Bytes; a longer document is skipped."""
    cut: int = Field(0, ge=0)
    """Bytes; a longer document is cut at line ends into documents of at most this size. 0 leaves documents whole."""
    max_bytes: int = Field(0, ge=0)
    """Bytes of text to read from each source, in an order drawn by the hash of the file's name; 0 reads everything."""
