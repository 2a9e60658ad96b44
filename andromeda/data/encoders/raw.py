"""Raw bytes: every UTF-8 byte is a token. Nothing to train, nothing to lose."""

from __future__ import annotations

import json
from collections.abc import Sequence

from andromeda.config.data import BuildConfig
from andromeda.data.encoders import SEPARATOR, Encoder
from andromeda.utils.untrusted import parse_json

MAX_SPECIAL = 1 << 16
"""Special tokens of a tokenizer file."""


class ByteEncoder(Encoder):
    """Ids 0 to 255 are the bytes, the special tokens follow."""

    kind = "bytes"
    file_name = "bytes.json"

    def __init__(self, specials: list[str]) -> None:
        self.model_file = json.dumps(specials).encode()
        self.special_tokens = {name: 256 + i for i, name in enumerate(specials)}
        self.token_bytes = [bytes([i]) for i in range(256)] + [b""] * len(specials)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]


def create(config: BuildConfig) -> ByteEncoder:
    """The byte tokenizer with the configuration's special tokens."""
    return ByteEncoder([SEPARATOR, *config.special_tokens])


def load(blob: bytes) -> ByteEncoder:
    specials = parse_json(blob)
    if not (isinstance(specials, list) and len(specials) <= MAX_SPECIAL and all(isinstance(name, str) for name in specials)):
        raise ValueError("its special tokens are no list of texts")
    return ByteEncoder(specials)


def add_special(blob: bytes, first: int, names: Sequence[str]) -> bytes:
    """A list of special tokens with `names` added."""
    del first
    return json.dumps([*parse_json(blob), *names]).encode()
