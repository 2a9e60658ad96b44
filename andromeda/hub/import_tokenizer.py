"""The tokenizer of a Hugging Face folder, where it gives every character back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from andromeda.data.tokenizer import Tokenizer
from andromeda.hub.hub_folder import HubFolder
from andromeda.utils.errors import DataError
from andromeda.utils.untrusted import MalformedFile, read_regular

MAX_BYTES = 64 << 20
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def read_tokenizer(folder: HubFolder, config: Mapping[str, Any], vocab_size: int, notes: list[str]) -> Tokenizer:
    """The folder's tokenizer. notes: takes sentences about it. Raises DataError, one sentence, naming --no-tokenizer."""
    eos = end_of_text(config)
    reasons = []
    for name, read in (("tokenizer.json", without_normalizer), ("tokenizer.model", bytes_of)):
        if not folder.has(name):
            continue
        try:
            tokenizer = load_copy(read(folder, notes), name, eos)
        except DataError as error:
            reasons.append(str(error).rstrip("."))
            continue
        if tokenizer.vocab_size > vocab_size:
            reasons.append(f"{name} has {tokenizer.vocab_size:,} tokens and the model {vocab_size:,}")
            continue
        begin = config.get("bos_token_id")
        if isinstance(begin, int) and begin != tokenizer.eos:
            notes.append(
                f"Texts begin with the end-of-text token {tokenizer.eos} here, and this model was trained to begin them with {begin}: "
                f"give prompts as token ids that begin with {begin}."
            )
        return tokenizer
    why = "; ".join(reasons) or "there is no tokenizer.json and no tokenizer.model"
    raise DataError(f"The tokenizer of {folder.path} cannot be used here ({why}): import the weights alone with --no-tokenizer.")


def end_of_text(config: Mapping[str, Any]) -> int | None:
    """The id that ends a text, the first where several do; None where config.json names none."""
    given = config.get("eos_token_id")
    given = given[0] if isinstance(given, list) and given else given
    return given if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < 1 << 31 else None


def bytes_of(folder: HubFolder, notes: list[str], name: str = "tokenizer.model") -> bytes:
    """Content of a tokenizer file. Raises DataError."""
    try:
        return read_regular(folder.file(name), MAX_BYTES)
    except (MalformedFile, OSError) as error:
        raise DataError(f"{name} {error}") from None


def without_normalizer(folder: HubFolder, notes: list[str]) -> bytes:
    """tokenizer.json, without a Unicode normalization: text is kept as it is here, and text in that form has the same ids."""
    values = folder.json("tokenizer.json")
    normalizer = values.get("normalizer")
    if not isinstance(normalizer, dict) or normalizer.get("type") not in UNICODE_FORMS:
        return json.dumps(values, ensure_ascii=False).encode()
    notes.append(f"tokenizer.json normalizes text to {normalizer['type']}, which is left out here: text is never changed.")
    return json.dumps(values | {"normalizer": None}, ensure_ascii=False).encode()


def load_copy(content: bytes, name: str, eos: int | None) -> Tokenizer:
    """The tokenizer of a file's content."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / name
        path.write_bytes(content)
        return Tokenizer.load(path, eos)
