"""One tokenizer interface over byte-level BPE, SentencePiece Unigram and raw bytes; always lossless."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from andromeda.config.data import BuildConfig
from andromeda.data.encoders import SEPARATOR, Encoder, bpe, raw, sentencepiece_bpe, unigram
from andromeda.utils.errors import ConfigError, DataError, nearest
from andromeda.utils.files import write_whole
from andromeda.utils.untrusted import MalformedFile, is_plain_name, read_json_object, read_regular, read_text

META = "andromeda.json"
MAX_BYTES = 256 << 20
"""Of a tokenizer file; the largest in use have 20 MB."""
LOADERS: dict[str, Callable[[bytes], Encoder]] = {
    "bpe": bpe.load,
    "sentencepiece_bpe": sentencepiece_bpe.load,
    "unigram": unigram.load,
    "bytes": raw.load,
}
ADD_SPECIAL: dict[str, Callable[[bytes, int, Sequence[str]], bytes]] = {
    "bpe": bpe.add_special,
    "sentencepiece_bpe": bpe.add_special,
    "unigram": unigram.add_special,
    "bytes": raw.add_special,
}
"""A model file with further special tokens, by kind."""
CHAT_TEMPLATE = "chat_template.jinja"
MAX_TEMPLATE = 1 << 20
"""Bytes of a chat template; those in use have some thousands."""
SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
"""Names under which other projects' tokenizers keep the document separator."""
ROUND_TRIP_TEXT = "  def f(x):\r\n\treturn 'é' + 'e\u0301' + \"\u2581\"  # A\ufb01 <s></s><|endoftext|> 12345 \U0001f600\x00\n\n \n"
"""Text that every tokenizer must give back: other projects' tokenizers often normalize or drop some of it."""


class Tokenizer:
    """Text to token ids and back without loss.

    `eos` is the document separator. It is placed before every document, so it begins a text (BOS) and ends it (EOS).
    A model from elsewhere may begin a text with another token, `bos`; its corpora place both before every document.
    The text of a special token is ordinary text: only code places special ids. `chat_template` is the Jinja template that writes a
    conversation, where the model knows one; it travels with the tokenizer from a chat corpus to the run and its exports.
    """

    def __init__(self, encoder: Encoder, eos: int | None = None, bos: int | None = None, chat_template: str = "") -> None:
        self._encoder = encoder
        self.chat_template = chat_template
        self.kind = encoder.kind
        self.special_tokens = dict(encoder.special_tokens)
        self._table = list(encoder.token_bytes)
        known = [self.special_tokens[name] for name in SEPARATORS if name in self.special_tokens]
        self.eos = eos if eos is not None else known[0] if known else len(self._table)
        self.bos = self.eos if bos is None else bos
        self._table += [b""] * (self.eos + 1 - len(self._table))
        self.special_tokens.setdefault(SEPARATOR, self.eos)
        if bos is not None and bos not in self.special_tokens.values():
            raise DataError(f"The token {self.bos} cannot begin a text, for it is no special token of this tokenizer: name one that is.")

    @property
    def vocab_size(self) -> int:
        """Number of ids V; every id is below it."""
        return len(self._table)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the model file, its kind, the separator, and the token that begins a text where that is another one."""
        head = json.dumps([self.kind, self.eos, self.vocab_size, *self._own_bos]).encode()
        return hashlib.sha256(head + b"\0" + self._encoder.model_file).hexdigest()

    @property
    def _own_bos(self) -> list[int]:
        return [] if self.bos == self.eos else [self.bos]

    @property
    def separator(self) -> list[int]:
        """What stands before every document of a corpus: `eos`, and `bos` where that is another token."""
        return [self.eos, *self._own_bos]

    @property
    def model_file(self) -> bytes:
        """Content of the file that holds the trained model: tokenizer.json (bpe), a SentencePiece model (unigram), a list (bytes)."""
        return self._encoder.model_file

    def encode(self, text: str) -> list[int]:
        """Token ids of a text or of a part of one, without separator."""
        return self.encode_batch([text])[0]

    def encode_start(self, text: str) -> list[int]:
        """Token ids of a text from its beginning, without separator: some tokenizers put a space first (see `encoders`)."""
        _refuse_surrogates([text])
        return self._encoder.encode_start(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of several texts. Raises DataError for text that has no UTF-8 spelling (a lone surrogate)."""
        _refuse_surrogates(texts)
        return self._encoder.encode_batch(list(texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of a token sequence; special tokens are empty."""
        table = self._table
        try:
            return b"".join([table[i] if i >= 0 else table[len(table)] for i in ids])
        except IndexError:
            raise DataError(f"A token id lies outside of the vocabulary of {len(table)}: another tokenizer wrote it.") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of a token sequence; bytes that are no UTF-8 (a sequence cut inside a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> DecodeStream:
        """A decoder for tokens that arrive one at a time."""
        return DecodeStream(self)

    def byte_lengths(self) -> np.ndarray:
        """int64 (V,): UTF-8 bytes each token stands for, 0 for special tokens. Sums to a document's exact length."""
        return np.array([len(b) for b in self._table], dtype=np.int64)

    def with_chat(self, template: str, special_tokens: Iterable[str] = ()) -> Tokenizer:
        """This tokenizer with a chat template, and with those special tokens that it lacks, whose ids follow the last one.

        The ids of all else stay. Raises DataError where the tokenizer cannot be extended.
        """
        size = len(self._encoder.token_bytes)
        # A separator that was appended to another project's tokenizer is not in its file, and its id must not go to another token.
        missing = [SEPARATOR] if self.eos >= size else []
        missing += [name for name in dict.fromkeys(special_tokens) if name not in self.special_tokens]
        if not missing or missing == [SEPARATOR]:
            return Tokenizer(self._encoder, self.eos, self._own_bos[0] if self._own_bos else None, template)
        encoder = LOADERS[self.kind](ADD_SPECIAL[self.kind](self.model_file, size, missing))
        result = Tokenizer(encoder, self.eos, self._own_bos[0] if self._own_bos else None, template)
        placed = [result.special_tokens.get(name) for name in missing]
        if placed != list(range(size, size + len(missing))) or result._table[: self.vocab_size] != self._table:
            raise DataError("This tokenizer cannot take further special tokens at its end: build a corpus with --special-token instead.")
        return result

    def extends(self, other: Tokenizer) -> bool:
        """Whether this is `other`, or `other` with special tokens added behind its last one: all text has the same ids."""
        if self.fingerprint == other.fingerprint:
            return True
        added = sorted((i, name) for name, i in self.special_tokens.items() if i >= other.vocab_size)
        if self.kind != other.kind or not added or any(name in other.special_tokens for _, name in added):
            return False
        return other.with_chat("", [name for _, name in added]).fingerprint == self.fingerprint

    def save(self, folder: Path | str) -> None:
        """Write the model file, `andromeda.json` and the chat template into a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / self._encoder.file_name, self._encoder.model_file)
        meta = {
            "kind": self.kind,
            "file": self._encoder.file_name,
            "eos": self.eos,
            "vocab_size": self.vocab_size,
            "sha256": self.fingerprint,
        }
        if self.bos != self.eos:
            meta["bos"] = self.bos
        if self.chat_template:
            write_whole(folder / CHAT_TEMPLATE, self.chat_template.encode())
            meta["chat_template_sha256"] = template_sha256(self.chat_template)
        write_whole(folder / META, (json.dumps(meta, indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path | str, eos: int | None = None, bos: int | None = None) -> Tokenizer:
        """Read a folder that `save` wrote, a corpus folder, or another project's tokenizer.json or SentencePiece .model.

        `eos` names the separator of another project's tokenizer; without it, it is found by its usual names or appended. `bos` names
        the token that begins a text, the separator by default.
        """
        path = Path(path)
        for folder in (path, path / "tokenizer"):
            if (folder / META).is_file():
                return _load_own(folder)
        if (path / "tokenizer.json").is_file():
            path = path / "tokenizer.json"
        return _load_foreign(path, eos, bos)


class DecodeStream:
    """Turns tokens into text as they come, holding back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, *ids: int) -> str:
        """The text that became certain with these tokens; may be empty."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing."""
        return self._decoder.decode(b"", final=True)


def train_tokenizer(texts: Iterable[str], config: BuildConfig) -> Tokenizer:
    """Train the tokenizer that the configuration asks for. The result depends on the texts and the configuration alone."""
    if len({SEPARATOR, *config.special_tokens}) != 1 + len(config.special_tokens):
        raise ConfigError(f"Special tokens must differ from each other and from {SEPARATOR}: {', '.join(config.special_tokens)}.")
    if config.tokenizer == "bytes":
        encoder = raw.create(config)
        if "vocab_size" in config.model_fields_set and config.vocab_size != len(encoder.token_bytes):
            raise ConfigError(f"The bytes tokenizer has {len(encoder.token_bytes)} entries, not {config.vocab_size}: leave vocab_size out.")
        return Tokenizer(encoder)
    if config.tokenizer == "unigram":
        return Tokenizer(unigram.train(texts, config))
    return Tokenizer(bpe.train(texts, config))


def _load_own(folder: Path) -> Tokenizer:
    try:
        meta = read_json_object(folder / META)
        bos = meta.get("bos")
        if not is_plain_name(meta["file"]) or type(meta["eos"]) is not int or not (bos is None or type(bos) is int):
            raise ValueError(f"{META} has values of other types")
        encoder = LOADERS[meta["kind"]](read_regular(folder / meta["file"], MAX_BYTES))
        tokenizer = Tokenizer(encoder, meta["eos"], bos)
        expected = meta["sha256"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise DataError(f"The tokenizer in {folder} cannot be read ({error}): build the corpus again.") from error
    if tokenizer.fingerprint != expected:
        raise DataError(f"The tokenizer in {folder} does not match its sha256: it was changed or damaged; build the corpus again.")
    tokenizer.chat_template = _load_template(folder / CHAT_TEMPLATE, meta.get("chat_template_sha256"))
    return tokenizer


def template_sha256(template: str) -> str:
    """What names a chat template."""
    return hashlib.sha256(template.encode()).hexdigest()


def _load_template(path: Path, expected: object) -> str:
    """The chat template beside a tokenizer; one that came with a model from elsewhere has no sha256."""
    if expected is None and not path.exists():
        return ""
    try:
        template = read_text(path, MAX_TEMPLATE)
    except (MalformedFile, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"The chat template {path} cannot be read ({reason}): restore it.") from None
    if expected is not None and template_sha256(template) != expected:
        raise DataError(f"The chat template {path} does not match its sha256: it was changed or damaged; restore it.")
    return template


def _refuse_surrogates(texts: Iterable[str]) -> None:
    try:
        for text in texts:
            text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"The text cannot be encoded as UTF-8 (character {error.start} is half of a pair): remove it.") from None


def _load_json(content: bytes) -> Encoder:
    """A tokenizer.json: SentencePiece's kind of BPE where unknown characters are spelled in bytes, else a byte-level one."""
    model = bpe.parse_tokenizer_file(content).get("model")
    spelled = isinstance(model, dict) and model.get("byte_fallback") is True
    return sentencepiece_bpe.load(content) if spelled else bpe.load(content)


def _load_foreign(path: Path, eos: int | None, bos: int | None) -> Tokenizer:
    """A tokenizer of another project, accepted only if it gives every character back."""
    kinds: dict[str, Callable[[bytes], Encoder]] = {".json": _load_json, ".model": unigram.load}
    if not path.is_file():
        raise DataError(f"There is no tokenizer at {path}: name a corpus folder, a tokenizer.json or a .model file.")
    if path.suffix not in kinds:
        raise DataError(f"{path.name} is no tokenizer file{nearest(path.suffix, kinds)}: name a tokenizer.json or a SentencePiece .model.")
    try:
        content = read_regular(path, MAX_BYTES)
    except MalformedFile as error:
        raise DataError(f"{path} {error}: name a tokenizer file.") from None
    tokenizer = Tokenizer(kinds[path.suffix](content), eos, bos)
    if tokenizer.decode(tokenizer.encode(ROUND_TRIP_TEXT)) != ROUND_TRIP_TEXT:
        raise DataError(f"The tokenizer {path.name} changes text (it normalizes or drops characters): use a byte-level one.")
    return tokenizer
