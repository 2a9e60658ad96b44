"""Byte-pair encoding of SentencePiece's kind, as the tokenizer.json of Llama 2, Mistral, Mixtral and Gemma holds it.

Spaces are written as U+2581, and a character that is no token is spelled in bytes (`<0x0A>`). Some of these tokenizers put a space
before a text ("dummy prefix"): that belongs to the beginning of a text, never to a part of one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from andromeda.data.encoders import Encoder
from andromeda.data.encoders.bpe import open_library_tokenizer, parse_tokenizer_file, vocabulary_size
from andromeda.data.encoders.unigram import SPACE
from andromeda.utils.errors import DataError

BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class SentencePieceBPEEncoder(Encoder):
    """The ids of Hugging Face `tokenizers`, for parts of a text and for its beginning."""

    kind = "sentencepiece_bpe"
    file_name = "tokenizer.json"

    def __init__(self, blob: bytes) -> None:
        content = parse_tokenizer_file(blob)
        if reason := unsupported_reason(content):
            raise DataError(f"This tokenizer {reason}: use a byte-level BPE.")
        self.model_file = blob
        self._start = open_library_tokenizer(blob)
        self._inside = open_library_tokenizer(json.dumps(without_prefix(content), ensure_ascii=False).encode())
        self.special_tokens = {token.content: i for i, token in self._start.get_added_tokens_decoder().items() if token.special}
        vocabulary: dict[str, int] = self._start.get_vocab(with_added_tokens=True)
        self.token_bytes = [b""] * vocabulary_size(vocabulary)
        for word, i in vocabulary.items():
            byte = BYTE.fullmatch(word)
            if word not in self.special_tokens:
                self.token_bytes[i] = bytes([int(byte[1], 16)]) if byte else word.replace(SPACE, " ").encode()
        self._mark = [vocabulary[f"<0x{b:02X}>"] for b in SPACE.encode()]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        whole = self._inside.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return [self._with_marks([], text) if SPACE in text else found.ids for text, found in zip(texts, whole, strict=True)]

    def encode_start(self, text: str) -> list[int]:
        first, mark, rest = text.partition(SPACE)
        ids: list[int] = self._start.encode(first, add_special_tokens=False).ids
        return self._with_marks(ids, mark + rest) if mark else ids

    def _with_marks(self, ids: list[int], text: str) -> list[int]:
        """Ids of a text that holds U+2581, which is spelled in bytes, since its own token stands for a space."""
        for number, part in enumerate(text.split(SPACE)):
            ids = ids + (self._mark if number else []) + self._inside.encode(part, add_special_tokens=False).ids
        return ids


def unsupported_reason(content: Mapping[str, Any]) -> str:
    """What in a tokenizer.json may change a text, or is not of this kind; empty where it can be used."""
    model = content.get("model")
    words = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(words, dict) or model.get("type") != "BPE" or not model.get("byte_fallback"):
        return "is no BPE that spells unknown characters in bytes"
    if missing := [b for b in range(256) if f"<0x{b:02X}>" not in words]:
        return f"has no token for the byte {missing[0]}"
    spaces = 0
    for step in normalizers_of(content):
        kind = step.get("type")
        if kind == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == SPACE:
            spaces += 1
        elif not (kind == "Prepend" and step.get("prepend") == SPACE):
            return f"normalizes text ({str(kind)[:40]})"
    cut = content.get("pre_tokenizer")
    if isinstance(cut, dict) and cut.get("type") == "Metaspace" and cut.get("replacement") == SPACE:
        spaces += 1
    elif cut is not None and not (isinstance(cut, dict) and cut.get("type") == "Split" and cut.get("behavior") == "MergedWithPrevious"):
        return "cuts text in a way that is not known here"
    return "" if spaces else f"does not write spaces as {SPACE}"


def normalizers_of(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of a tokenizer.json's normalizer, in order."""
    step = content.get("normalizer")
    if not isinstance(step, dict):
        return []
    steps = step.get("normalizers") if step.get("type") == "Sequence" else [step]
    return [one for one in steps if isinstance(one, dict)] if isinstance(steps, list) else []


def without_prefix(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same tokenizer.json, which puts no space before a text."""
    kept = [step for step in normalizers_of(content) if step["type"] != "Prepend"]
    cut = content.get("pre_tokenizer")
    if isinstance(cut, dict) and cut["type"] == "Metaspace":
        cut = {key: value for key, value in cut.items() if key != "add_prefix_space"} | {"prepend_scheme": "never"}
    return dict(content) | {"normalizer": {"type": "Sequence", "normalizers": kept} if kept else None, "pre_tokenizer": cut}


def load(blob: bytes) -> SentencePieceBPEEncoder:
    return SentencePieceBPEEncoder(blob)
