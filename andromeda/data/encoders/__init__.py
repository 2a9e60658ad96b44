"""The ways from text to token ids and back, each one file with `load`, and with `train` where it is trained here."""

from __future__ import annotations

from typing import Protocol

__all__ = ["SEPARATOR", "Encoder"]

SEPARATOR = "<|endoftext|>"
"""Name of the token that stands before every document."""


class Encoder(Protocol):
    """What a tokenizer needs of its kind; everything else (decoding, lengths, streaming) follows from `table`."""

    kind: str
    file_name: str
    """Name of the model's file in a tokenizer folder."""
    model_file: bytes
    """Content of that file."""
    token_bytes: list[bytes]
    """UTF-8 bytes that each token id stands for; empty for special tokens."""
    special_tokens: dict[str, int]
    """Ids of the special tokens by name."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text; no special token is ever among them."""
        ...

    def encode_start(self, text: str) -> list[int]:
        """Token ids of the beginning of a text, where some tokenizers put a space first."""
        return self.encode_batch([text])[0]
