"""What a corpus is, in numbers: every document, byte and token accounted for, and the sha256 that names the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationError

from andromeda.config.base import BaseConfig, as_tuple
from andromeda.config.data import BuildConfig
from andromeda.utils.errors import DataError
from andromeda.utils.files import write_whole

NAME = "manifest.json"
HELD_OUT_TEXT = "val.txt"
"""The held-out documents' UTF-8 bytes one after the other, for compressors to be compared on the very same bytes."""
FORMAT = 1


class TokenizerReport(BaseConfig):
    """Which tokenizer made the tokens."""

    kind: str
    vocab_size: int
    eos: int
    fingerprint: str


class SourceReport(BaseConfig):
    """What became of the documents of one source: `read` = `kept` + the sum of `skipped`."""

    name: str
    read: int
    kept: int
    skipped: dict[str, int]
    """Reason to number of documents."""
    ignored_files: int
    """Files of a folder whose ending was not asked for."""
    bytes: int
    """UTF-8 bytes of the documents kept."""
    tokens: int
    """Tokens of the documents kept, separators included."""
    inputs: str
    """sha256 over names, sizes and times of the files listed."""


class ShardReport(BaseConfig):
    """One token file."""

    file: str
    tokens: int
    sha256: str


class SplitReport(BaseConfig):
    """Training or held-out documents."""

    documents: int
    tokens: int
    """Separators included."""
    bytes: int
    shards: Annotated[tuple[ShardReport, ...], BeforeValidator(as_tuple)]
    offsets_sha256: str


class Manifest(BaseConfig):
    """Everything that `andromeda data build` did; a corpus folder without it is not finished."""

    format: int
    fingerprint: str
    """sha256 of the tokenizer and of every token and document border; equal for equal text and settings, whatever the
    order of files, the number of workers, or interruptions."""
    tokenizer: TokenizerReport
    splits: dict[str, SplitReport]
    sources: Annotated[tuple[SourceReport, ...], BeforeValidator(as_tuple)]
    config: BuildConfig
    made_with: dict[str, str]

    def save(self, folder: Path) -> None:
        write_whole(folder / NAME, (self.model_dump_json(indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a corpus folder's manifest. Raises DataError when there is none or it is damaged."""
        return cls.model_validate(_parse(folder))


def fingerprint(tokenizer: str, splits: Mapping[str, tuple[str, str]]) -> str:
    """sha256 that names the data: the tokenizer's fingerprint and, for each split, the sha256 of its tokens and of its offsets.

    Tokens are hashed without shard headers, so that the size of the shards does not matter.
    """
    return hashlib.sha256(json.dumps([tokenizer, *sorted((k, *v) for k, v in splits.items())]).encode()).hexdigest()


def _parse(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    mend = "build it again with `andromeda data build`"
    if not path.is_file():
        raise DataError(f"{folder} is no finished corpus (it has no {NAME}): {mend}.")
    try:
        value = json.loads(path.read_text("utf-8"))
        Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{path} is damaged or of another version ({place}: {first['msg'].lower()}): {mend}.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON ({error}): {mend}.") from error
    if value["format"] != FORMAT:
        raise DataError(f"{path} has format {value['format']}, this version reads {FORMAT}: {mend}.")
    return value
