"""The tokenizer of a Hugging Face folder, where it gives every character back."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from andromeda.data.tokenizer import Tokenizer
from andromeda.hub.hub_folder import HubFolder
from andromeda.utils.errors import CheckpointError, DataError
from andromeda.utils.untrusted import MalformedFile, read_regular

MAX_BYTES = 64 << 20
UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
BEGINNING = ("LlamaTokenizer", "GemmaTokenizer")
"""Tokenizer classes of transformers that begin every text with their bos_token where no file says otherwise."""


def read_tokenizer(folder: HubFolder, config: Mapping[str, Any], vocab_size: int, notes: list[str]) -> Tokenizer:
    """The folder's tokenizer. notes: takes sentences about it. Raises DataError, one sentence, naming --no-tokenizer."""
    eos = one_id(config, "eos_token_id")
    reasons = []
    for name, read in (("tokenizer.json", without_normalizer), ("tokenizer.model", bytes_of)):
        if not folder.has(name):
            continue
        try:
            content = read(folder, notes)
            bos = beginning_of_text(folder, config, name, content)
            tokenizer = load_copy(content, name, eos, bos)
        except DataError as error:
            reasons.append(str(error).rstrip("."))
            continue
        if tokenizer.vocab_size > vocab_size:
            reasons.append(f"{name} has {tokenizer.vocab_size:,} tokens and the model {vocab_size:,}")
            continue
        if bos is None:
            notes.append(
                f"Texts begin with the end-of-text token {tokenizer.eos} here, as in training, and with no token of their own in "
                "transformers: give prompts as token ids to leave it out."
            )
        return tokenizer
    why = "; ".join(reasons) or "there is no tokenizer.json and no tokenizer.model"
    raise DataError(f"The tokenizer of {folder.path} cannot be used here ({why}): import the weights alone with --no-tokenizer.")


def one_id(config: Mapping[str, Any], name: str) -> int | None:
    """A token id of config.json, the first where there are several; None where there is none."""
    given = config.get(name)
    given = given[0] if isinstance(given, list) and given else given
    return given if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < 1 << 31 else None


def beginning_of_text(folder: HubFolder, config: Mapping[str, Any], name: str, content: bytes) -> int | None:
    """The token that transformers puts before every text; None where it puts none, or no file tells.

    The post-processor of tokenizer.json decides, else `add_bos_token` of tokenizer_config.json, else the tokenizer's class.
    """
    if name == "tokenizer.json" and (template := template_of(json.loads(content).get("post_processor"))):
        return first_token(template)
    try:
        settings = folder.json("tokenizer_config.json") if folder.has("tokenizer_config.json") else {}
    except CheckpointError as error:
        raise DataError(str(error)) from None
    usual = str(settings.get("tokenizer_class", "")).removesuffix("Fast") in BEGINNING
    return one_id(config, "bos_token_id") if settings.get("add_bos_token", usual) is True else None


def template_of(step: Any) -> dict[str, Any]:
    """The template by which a post-processor of tokenizer.json places special tokens; empty where it has none."""
    if not isinstance(step, dict):
        return {}
    if step.get("type") == "TemplateProcessing":
        return step
    inner = step.get("processors")
    return next((found for one in inner if (found := template_of(one))), {}) if isinstance(inner, list) else {}


def first_token(template: Mapping[str, Any]) -> int | None:
    """Id of the special token that a template places before a single text."""
    try:
        name = template["single"][0]["SpecialToken"]["id"]
        found = template["special_tokens"][name]["ids"][0]
    except (LookupError, TypeError):
        return None
    return found if type(found) is int else None


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


def load_copy(content: bytes, name: str, eos: int | None, bos: int | None) -> Tokenizer:
    """The tokenizer of a file's content."""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / name
        path.write_bytes(content)
        return Tokenizer.load(path, eos, bos)
