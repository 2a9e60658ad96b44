"""Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; on bytes as in GPT-2), by Hugging Face `tokenizers`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from andromeda.config.data import BuildConfig
from andromeda.data.encoders import SEPARATOR, Encoder
from andromeda.data.encoders.split_patterns import SPLIT_PATTERNS, WHOLE_WORDS
from andromeda.data.encoders.tiktoken_bpe import TiktokenBPE, convert
from andromeda.utils.errors import ConfigError, DataError
from andromeda.utils.untrusted import parse_json, printable

if TYPE_CHECKING:
    from tokenizers import Tokenizer as LibraryTokenizer

MAX_VOCABULARY = 1 << 24
"""Ids of a tokenizer file; the largest in use have a quarter of a million."""
MAX_TRAINING_WORD = 256
"""Characters of a word that merges are learned from. The trainer's time grows with the square of a word's length, and an unbroken
run of millions of letters (a genome, an encoded picture) would keep it busy for days."""


def pattern(digits: int) -> str:
    """The regular expression that cuts text before merging; it matches every character, so nothing is lost.

    In order: a word with at most one sign or space before it; up to `digits` digits; a run of signs with the line end and the
    indentation that follow; line ends with indentation; spaces, the last of which is left for the word behind them.
    Taking the indentation into the token of the line end saves about 6 % of the tokens of Python sources at 4,096 entries,
    compared with cutting after the line end.
    """
    return "|".join(
        [
            r"[^\r\n\p{L}\p{M}\p{N}]?+[\p{L}\p{M}]++",
            rf"\p{{N}}{{1,{digits}}}",
            r" ?[^\s\p{L}\p{M}\p{N}]++(?:\r?\n[ \t]*+)*+",
            r"(?:\r?\n[ \t]*+)++",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )


def byte_of_character() -> dict[str, int]:
    """The printable stand-ins of GPT-2's byte-level alphabet: bytes that print stand for themselves, others for 256, 257, ..."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


OWN_PATTERN = re.compile(re.escape(pattern(1)).replace(re.escape("{1,1}"), r"\{1,\d+\}"))
"""What a pattern looks like, whatever the number of digits."""
FEW_CHARACTERS = 1 << 16


class BPEEncoder(Encoder):
    """A byte-level BPE; special tokens are never read from text, only placed by id."""

    kind = "bpe"
    file_name = "tokenizer.json"

    def __init__(self, blob: bytes) -> None:
        parse_tokenizer_file(blob)
        self.model_file = blob
        self._model = open_library_tokenizer(blob)
        added = self._model.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        plain = {i: token.content.encode() for i, token in added.items() if not token.special}
        self.token_bytes = self._spell(plain)
        self._tiktoken: TiktokenBPE | None = None
        self._converted = False

    def _spell(self, plain: dict[int, bytes]) -> list[bytes]:
        """Bytes of every id, from the vocabulary's stand-in characters; ids that no token has stay empty."""
        byte = byte_of_character()
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        table = [b""] * vocabulary_size(vocabulary)
        special = set(self.special_tokens.values())
        for word, i in vocabulary.items():
            if i in plain:
                table[i] = plain[i]
            elif i not in special:
                try:
                    table[i] = bytes(byte[c] for c in word)
                except KeyError:
                    raise DataError(f"This tokenizer is not byte-level (token {word!r} has no bytes): use a byte-level BPE.") from None
        return table

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """By tiktoken where that gives the same ids; a few short texts are not worth converting the tokenizer for."""
        if self._tiktoken is None and not self._converted and sum(map(len, texts)) > FEW_CHARACTERS:
            self._tiktoken, self._converted = convert(self.model_file, self.token_bytes, OWN_PATTERN), True
        fast = self._tiktoken
        if fast is None:
            return self._encode_by_library(texts)
        rest = iter(self._encode_by_library([text for text in texts if not fast.accepts(text)]))
        return [fast.encode(text) if fast.accepts(text) else next(rest) for text in texts]

    def _encode_by_library(self, texts: list[str]) -> list[list[int]]:
        return [found.ids for found in self._model.encode_batch_fast(texts, add_special_tokens=False)] if texts else []


def parse_tokenizer_file(blob: bytes) -> dict[str, Any]:
    """Content of a tokenizer.json. Raises DataError."""
    try:
        content = parse_json(blob)
    except (ValueError, OSError) as error:
        raise unreadable(error) from None
    return content if isinstance(content, dict) else {}


def open_library_tokenizer(blob: bytes) -> LibraryTokenizer:
    """A tokenizer.json as the library has it, which reads no special token from a text. Raises DataError."""
    from tokenizers import Tokenizer

    try:
        found: LibraryTokenizer = Tokenizer.from_str(blob.decode())
    except BaseException as error:  # the library raises bare Exception, and PanicException, which is none
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise unreadable(error) from None
    found.encode_special_tokens = True
    found.no_truncation()
    found.no_padding()
    return found


def vocabulary_size(vocabulary: Mapping[str, int]) -> int:
    """One more than the largest id. Raises DataError where that is no number of tokens."""
    if not 0 < (size := max(vocabulary.values(), default=-1) + 1) <= MAX_VOCABULARY:
        raise DataError(f"The tokenizer file has a vocabulary of {size:,} ids: build or export it again.")
    return size


def unreadable(error: BaseException) -> DataError:
    """What to say of a file that the library does not take."""
    reason = printable((str(error).splitlines() or [type(error).__name__])[0])[:200]
    return DataError(f"The tokenizer file cannot be read ({reason}): build or export it again.")


def train(texts: Iterable[str], config: BuildConfig) -> BPEEncoder:
    """Learn `config.vocab_size` entries: special tokens, the 256 bytes, then merges in order of frequency."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = [SEPARATOR, *config.special_tokens]
    least = 256 + len(specials)
    if config.vocab_size < least:
        raise ConfigError(
            f"A bpe vocabulary of {config.vocab_size} is too small: it holds at least {least} (256 bytes and special tokens)."
        )
    named = config.pre_tokenizer != "andromeda"
    if named and "max_digits" in config.model_fields_set:
        raise ConfigError(f"max_digits belongs to Andromeda's own pattern: leave it out with pre_tokenizer {config.pre_tokenizer}.")
    model = Tokenizer(models.BPE(ignore_merges=config.pre_tokenizer in WHOLE_WORDS))
    cut = pre_tokenizers.Split(Regex(SPLIT_PATTERNS[config.pre_tokenizer] if named else pattern(config.max_digits)), "isolated")
    shorten = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{MAX_TRAINING_WORD}}}"), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([cut, shorten, spell])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    model.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])
    size = model.get_vocab_size()
    if size < config.vocab_size:
        raise ConfigError(f"The text allows a bpe vocabulary of only {size}, not {config.vocab_size}: ask for {size} or give more text.")
    return BPEEncoder(model.to_str().encode())


def load(blob: bytes) -> BPEEncoder:
    return BPEEncoder(blob)


def add_special(blob: bytes, first: int, names: Sequence[str]) -> bytes:
    """A tokenizer.json with special tokens `names` added, whose ids count up from `first`."""
    content = parse_tokenizer_file(blob)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": first + i, "content": name, **flags} for i, name in enumerate(names)]
    content["added_tokens"] = [*(content.get("added_tokens") or []), *added]
    return json.dumps(content, ensure_ascii=False).encode()
