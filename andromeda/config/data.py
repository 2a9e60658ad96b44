"""Where the tokens of a run come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from andromeda.config.base import BaseConfig, StringTuple, as_tuple
from andromeda.utils.errors import ConfigError, nearest


class SourceConfig(BaseConfig):
    """One corpus folder (made by `andromeda data build`) or .bin shard in a mixture."""

    path: str
    """Corpus folder or .bin shard."""
    weight: PositiveFloat = 1.0
    """Share of the tokens, relative to the other sources; kept exactly at every point of the stream."""


class AugmentationConfig(BaseConfig):
    """Transforms of training sequences, never of held-out ones; all off by default (docs/data.md has their measured effect)."""

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
    """`stream` cuts one long token stream into sequences; `documents` starts them at document starts and splits none that fits."""
    document_mask: bool = True
    """Attention never crosses a document's boundary."""
    shuffle: bool = True
    """Sequences come in an order drawn from the seed; off is the order of the corpus."""
    upsample: float = Field(1.0, ge=0.0, le=1.0)
    """With `by_size`: power of the sizes; 1 is in proportion to them, less upsamples small sources (arXiv 1907.05019)."""
    by_size: bool = False
    """Multiply the sources' weights by their sizes."""
    augment: AugmentationConfig = AugmentationConfig()
    workers: int = Field(0, ge=0, le=1024)
    """Loader threads; the order does not depend on it."""


TOKENIZER_KINDS = ("bpe", "unigram", "bytes")
"""Tokenizers that `andromeda data build` trains, or in the case of bytes needs no training for."""

TARGET_KINDS = ("label", "labels", "spans", "number", "pair", "ranking")
"""Kinds of targets that a corpus keeps beside its tokens (data/targets.py)."""
RANKED = ("pair", "ranking")
"""Those whose records hold several texts, best first."""
RESERVED_TARGETS = ("targets", "ids", "documents", "head", "next_token", "distillation")
"""Names that a batch or the loss uses for itself."""

RENAMED_BUILD_KEYS = {
    "tokenizer_path": "tokenizer",
    "specials": "special_tokens",
    "digits": "max_digits",
    "validation": "validation_fraction",
    "shortest": "min_document_bytes",
    "longest": "max_document_bytes",
    "cut": "split_documents_at",
}
"""Keys of version 0.1 and what they are called now. Refused in a new configuration, translated in the manifest of an old corpus."""


class BuildConfig(BaseConfig):
    """What `andromeda data build` does with raw text."""

    tokenizer: str = "bpe"
    """What to train: bpe (byte-level), unigram (SentencePiece) or bytes; or a trained one to use: a corpus or tokenizer folder, a
    tokenizer.json or a SentencePiece .model."""
    vocab_size: int = Field(4096, gt=0, le=1 << 24)
    """Vocabulary size of a trained tokenizer, special tokens included."""
    special_tokens: StringTuple = ()
    """Names of special tokens besides the document separator; text never turns into them."""
    pre_tokenizer: Literal["andromeda", "gpt-2", "llama-bpe", "qwen2"] = "andromeda"
    """Pattern that cuts text before merging (bpe): Andromeda's own, or one of those that llama.cpp knows, which a GGUF file needs."""
    max_digits: int = Field(2, gt=0, le=1000)
    """Longest run of digits that can be one token (bpe)."""
    validation_fraction: float = Field(0.01, gt=0.0, lt=0.5)
    """Fraction of the documents held out, chosen by the hash of their content."""
    shard_tokens: PositiveInt = 1 << 24
    """Tokens of one shard file."""
    text_field: str = "text"
    """Key of the text in .jsonl and .parquet records and in datasets."""
    targets: StringTuple = ()
    """Targets of the documents as NAME=KIND, NAME a field of the records, KIND label, labels, spans, number, pair or ranking."""
    include: StringTuple = ()
    """File extensions to read (such as ".py"), unknown ones as plain text; empty reads every known kind."""
    min_document_bytes: PositiveInt = 1
    """A shorter document is skipped."""
    max_document_bytes: PositiveInt = 1 << 30
    """A longer document is skipped."""
    split_documents_at: int = Field(0, ge=0)
    """Bytes; a longer document is split at line ends into documents of at most this size. 0 keeps documents whole."""
    max_bytes: int = Field(0, ge=0)
    """Bytes of text to read from each source, in an order drawn by the hash of the file's name; 0 reads everything."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_renamed_keys(cls, values: Any) -> Any:
        old = [key for key in RENAMED_BUILD_KEYS if isinstance(values, dict) and key in values]
        if old:
            raise ConfigError("; ".join(f"{key} is now called {RENAMED_BUILD_KEYS[key]}" for key in old) + ".")
        return values

    @model_validator(mode="after")
    def _check_targets(self) -> BuildConfig:
        for target in self.targets:
            name, _, kind = target.partition("=")
            if not name.isidentifier() or kind not in TARGET_KINDS:
                hint = nearest(kind, TARGET_KINDS)
                raise ConfigError(f"{target!r} is no target{hint}: give NAME=KIND, the kind one of {', '.join(TARGET_KINDS)}.")
        names = [target.partition("=")[0] for target in self.targets]
        if len(set(names)) < len(names) or set(names) & {"prompt", "chosen", "rejected", self.text_field, *RESERVED_TARGETS}:
            raise ConfigError(f"The targets {', '.join(names)} need names of their own, other than those of texts: rename one.")
        if sum(kind in RANKED for kind in self.target_kinds.values()) > 1:
            raise ConfigError("A record is one pair or one ranking: declare one target of these kinds.")
        if self.targets and self.split_documents_at:
            raise ConfigError("A document that is split has no target of its own: leave out split_documents_at, or the targets.")
        return self

    @property
    def target_kinds(self) -> dict[str, str]:
        """Kind of each target by name."""
        return dict(target.split("=") for target in self.targets)

    @property
    def trains_tokenizer(self) -> bool:
        """Whether `tokenizer` names a kind, not a trained tokenizer's path."""
        return self.tokenizer in TOKENIZER_KINDS


def translate_build_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """The build settings that an older version stored, under today's names."""
    current = {RENAMED_BUILD_KEYS.get(key, key): value for key, value in values.items() if key != "tokenizer_path"}
    if path := values.get("tokenizer_path"):
        current["tokenizer"] = path
    return current
