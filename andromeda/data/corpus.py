"""A corpus folder: its manifest, which accounts for every document, byte and token; opening one split; verifying all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field, ValidationError

from andromeda.config.base import BaseConfig, as_tuple
from andromeda.config.data import TARGET_KINDS, BuildConfig, translate_build_keys
from andromeda.data.packing import TokenizedDocuments
from andromeda.data.shards import TokenArray, open_shard
from andromeda.data.targets import TargetColumn, TargetReport
from andromeda.data.tokenizer import Tokenizer
from andromeda.utils.errors import DataError
from andromeda.utils.files import sha256_of, write_whole
from andromeda.utils.untrusted import is_plain_name, open_regular, read_json_object

MANIFEST_NAME = "manifest.json"
HELD_OUT_TEXT = "val.txt"
"""The held-out documents' UTF-8 bytes one after the other, for compressors to be compared on the very same bytes."""
FORMAT = 1
EMPTY_ARRAY = 128
"""Bytes of a .npy file that holds no values: nothing can be mapped into memory."""
FEW_TOKENS = 50_000
"""Held-out tokens below which a corpus of at least four times as many says so."""


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
    """Files and linked folders of a folder that were not read."""
    not_read: dict[str, int] = Field(default_factory=dict)
    """Their numbers by extension or kind; empty in manifests of version 0.1."""
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
    targets: dict[str, str] = Field(default_factory=dict)
    """sha256 of the file of each target."""
    loss_mask: str = ""
    """sha256 of the file that says which tokens are learned; empty where all are."""

    @property
    def content_hashes(self) -> tuple[str, ...]:
        """Of document borders, of targets in order of their names, and of the loss mask."""
        targets = (f"{name}:{sha256}" for name, sha256 in sorted(self.targets.items()))
        return self.offsets_sha256, *targets, *([f"loss_mask:{self.loss_mask}"] if self.loss_mask else [])


class CorpusManifest(BaseConfig):
    """Everything that `andromeda data build` did; a corpus folder without it is not finished."""

    format: int
    fingerprint: str
    """sha256 of the tokenizer and of every token and document border; equal for equal text and settings, whatever the
    order of files, the number of workers, or interruptions."""
    tokenizer: TokenizerReport
    splits: dict[str, SplitReport]
    targets: dict[str, TargetReport] = Field(default_factory=dict)
    """What the documents have besides their tokens, by name."""
    sources: Annotated[tuple[SourceReport, ...], BeforeValidator(as_tuple)]
    config: BuildConfig
    made_with: dict[str, str]

    def save(self, folder: Path) -> None:
        write_whole(folder / MANIFEST_NAME, (self.model_dump_json(indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> CorpusManifest:
        """Read a corpus folder's manifest. Raises DataError when there is none or it is damaged."""
        return cls.model_validate(_parse(folder))


def few_held_out(manifest: CorpusManifest) -> str:
    """A sentence where little text is held out, so that losses on it depend on which text that is; empty where there is enough."""
    val, train = manifest.splits["val"], manifest.splits["train"]
    if val.tokens >= FEW_TOKENS or train.tokens < 4 * FEW_TOKENS:
        return ""
    return (
        f"only {val.tokens:,} tokens in {val.documents:,} documents are held out, few for a steady validation loss: "
        "build again with a larger --validation-fraction."
    )


def target_file(split: str, name: str) -> str:
    """Name of the file that holds a target of a split."""
    return f"{split}-target-{name}.npy"


def loss_mask_file(split: str) -> str:
    """Name of the file that says which tokens of a split are learned: uint8 (tokens,), 0 or 1."""
    return f"{split}-loss-mask.npy"


def corpus_fingerprint(tokenizer: str, splits: Mapping[str, tuple[str, ...]]) -> str:
    """sha256 that names the data: the tokenizer's fingerprint and, for each split, the sha256 of its tokens, offsets and targets.

    Tokens are hashed without shard headers, so that the size of the shards does not matter.
    """
    return hashlib.sha256(json.dumps([tokenizer, *sorted((k, *v) for k, v in splits.items())]).encode()).hexdigest()


def _parse(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    fix = "build it again with `andromeda data build`"
    if not path.is_file():
        raise DataError(f"{folder} is no finished corpus (it has no {MANIFEST_NAME}): {fix}.")
    try:
        value = read_json_object(path)
        if isinstance(value, dict) and isinstance(value.get("config"), dict):
            value["config"] = translate_build_keys(value["config"])
        CorpusManifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{path} is damaged or of another version ({place}: {first['msg'].lower()}): {fix}.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON ({error}): {fix}.") from error
    if value["format"] != FORMAT:
        raise DataError(f"{path} has format {value['format']}, this version reads {FORMAT}: {fix}.")
    checked: dict[str, Any] = value
    return checked


@dataclass(frozen=True)
class Corpus:
    """One split of one corpus. Shards made elsewhere may come without a tokenizer; then bytes cannot be counted."""

    documents: TokenizedDocuments
    tokenizer: Tokenizer | None
    vocab_size: int
    fingerprint: str
    targets: Mapping[str, TargetColumn] = field(default_factory=dict)
    """What its documents have besides their tokens, by name."""
    loss_mask: np.ndarray | None = None
    """uint8 (tokens,): 1 where a token is learned, such as those of answers; None where all are."""


def open_corpus(path: Path | str, split: str) -> Corpus:
    """Open one split. `path` is a corpus folder, a folder of *train*.bin and *val*.bin shards, or one .bin (training only)."""
    path = Path(path).expanduser()
    if (path / MANIFEST_NAME).is_file():
        return _open_built(path, split)
    if path.is_dir():
        shards = sorted(path.glob(f"*{split}*.bin"))
        if not shards:
            raise DataError(f"{path} is no corpus (no {MANIFEST_NAME}, no *{split}*.bin): build one with `andromeda data build`.")
        return _open_foreign(shards)
    if not path.is_file():
        raise DataError(f"There is no corpus at {path}: build one with `andromeda data build`.")
    if split != "train":
        raise DataError(f"{path} is a single shard without a {split} split: name a folder with *train*.bin and *val*.bin files.")
    return _open_foreign([path])


def _open_built(folder: Path, split: str) -> Corpus:
    """A folder made by `andromeda data build`; sizes are checked here, hashes by `andromeda data show --verify`."""
    manifest = CorpusManifest.load(folder)
    if split not in manifest.splits:
        raise DataError(f"The manifest of {folder} names no {split} split: build the corpus again.")
    report = manifest.splits[split]
    if not all(is_plain_name(s.file) for s in report.shards):
        raise DataError(f"The manifest of {folder} names a shard outside of it: build the corpus again.")
    shards = [open_shard(folder / s.file) for s in report.shards]
    for shard, expected in zip(shards, report.shards, strict=True):
        if shard.tokens != expected.tokens:
            raise DataError(
                f"The shard {shard.path} has {shard.tokens} tokens, the manifest says {expected.tokens}: build the corpus again."
            )
    tokens = TokenArray(shards)
    offsets = _load_array(folder / f"{split}-documents.npy", f"The document offsets of {folder}")
    if not _cuts(offsets, report.documents, tokens.size):
        raise DataError(f"The document offsets of {folder} do not match its shards: build the corpus again.")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
        raise DataError(
            f"The tokenizer of {folder} is not the one its tokens were made with: put that one back, or build the corpus again."
        )
    documents = TokenizedDocuments(tokens, offsets, tokenizer.eos)
    targets, mask = _open_targets(folder, split, manifest), _open_loss_mask(folder, split, report)
    return Corpus(documents, tokenizer, tokenizer.vocab_size, manifest.fingerprint, targets, mask)


def _open_loss_mask(folder: Path, split: str, report: SplitReport) -> np.ndarray | None:
    if not report.loss_mask:
        return None
    mask = _load_array(folder / loss_mask_file(split), f"The loss mask of {folder}")
    if mask.shape != (report.tokens,) or mask.dtype != np.uint8:
        raise DataError(f"The loss mask of {folder} does not match its tokens: build the corpus again.")
    return mask


def _open_targets(folder: Path, split: str, manifest: CorpusManifest) -> dict[str, TargetColumn]:
    """The targets of a split. Raises DataError where an array is missing or is not that of its kind."""
    report, found = manifest.splits[split], {}
    for name, target in manifest.targets.items():
        what = f"The target {name!r} of {folder}"
        if not is_plain_name(target_file(split, name)) or target.kind not in TARGET_KINDS:
            raise DataError(f"{what} is of no known kind: build the corpus again.")
        found[name] = TargetColumn(target, _load_array(folder / target_file(split, name), what))
        if not found[name].check(report.documents, report.tokens):
            raise DataError(f"{what} does not match its documents: build the corpus again.")
    return found


def _load_array(path: Path, what: str) -> np.ndarray:
    """An array of a .npy file, memory-mapped. Raises DataError."""
    try:
        open_regular(path).close()  # before numpy opens it, which would wait for a named pipe
        found: np.ndarray = np.load(path, mmap_mode="r" if path.stat().st_size > EMPTY_ARRAY else None)
    except (OSError, ValueError, EOFError, SyntaxError, OverflowError) as error:
        raise DataError(f"{what} cannot be read ({error}): build the corpus again.") from error
    return found


def _cuts(offsets: Any, documents: int, tokens: int) -> bool:
    """Whether these are the borders of so many documents in so many tokens: integers that rise from 0."""
    if not (isinstance(offsets, np.ndarray) and offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) == documents + 1):
        return False
    return bool(offsets[0] == 0 and offsets[-1] == tokens and (offsets[1:] >= offsets[:-1]).all())


def _open_foreign(paths: list[Path]) -> Corpus:
    """Shards made elsewhere: documents begin at each token that equals the first one, as llm.c writes them.

    Reads every shard once, for the document borders, the largest id and the fingerprint.
    """
    shards = [open_shard(path) for path in paths]
    separator = int(shards[0].view()[0])
    digest, starts, before, largest = hashlib.sha256(), [], 0, separator
    for shard in shards:
        view = shard.view()
        starts.append(np.flatnonzero(view == separator) + before)
        largest = max(largest, int(view.max()))
        digest.update(view.tobytes())
        before += shard.tokens
    tokenizer = _tokenizer_beside(paths[0].parent, separator)
    vocab_size = max(largest + 1, tokenizer.vocab_size if tokenizer else 0)
    offsets = np.concatenate([*starts, [before]])
    return Corpus(TokenizedDocuments(TokenArray(shards), offsets, separator), tokenizer, vocab_size, digest.hexdigest())


def _tokenizer_beside(folder: Path, separator: int) -> Tokenizer | None:
    if not any((folder / name).exists() for name in ("tokenizer", "tokenizer.json")):
        return None
    return Tokenizer.load(folder, eos=separator)


def verify_corpus(folder: Path) -> CorpusManifest:
    """Hash everything again and decode the held-out split. Raises DataError naming the first file that differs."""
    manifest = CorpusManifest.load(folder)
    content: dict[str, tuple[str, ...]] = {}
    for split, report in manifest.splits.items():
        corpus = open_corpus(folder, split)
        for shard in report.shards:
            _expect(folder / shard.file, shard.sha256)
        _expect(folder / f"{split}-documents.npy", report.offsets_sha256)
        for name, sha256 in report.targets.items():
            _expect(folder / target_file(split, name), sha256)
        if report.loss_mask:
            _expect(folder / loss_mask_file(split), report.loss_mask)
        content[split] = (_tokens_sha256(corpus), *report.content_hashes)
        _refuse_other_bytes(folder, split, corpus, report.bytes)
    tokenizer = corpus.tokenizer.fingerprint if corpus.tokenizer else ""
    if corpus_fingerprint(tokenizer, content) != manifest.fingerprint:
        raise DataError(f"The fingerprint in the manifest of {folder} is not that of what the folder holds: build the corpus again.")
    return manifest


def _expect(path: Path, sha256: str) -> None:
    if sha256_of(path) != sha256:
        raise DataError(f"{path} does not match its sha256 in the manifest: it was changed or damaged; build the corpus again.")


def _blocks(corpus: Corpus, size: int = 1 << 22) -> list[tuple[int, int]]:
    return [(start, min(start + size, corpus.documents.tokens.size)) for start in range(0, corpus.documents.tokens.size, size)]


def _tokens_sha256(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    for start, stop in _blocks(corpus):
        digest.update(corpus.documents.tokens.read(start, stop).astype(corpus.documents.tokens.dtype).tobytes())
    return digest.hexdigest()


def _refuse_other_bytes(folder: Path, split: str, corpus: Corpus, expected: int) -> None:
    """Tokens must stand for the number of bytes reported, and the held-out ones for the held-out text."""
    tokenizer, tokens = corpus.tokenizer, corpus.documents.tokens
    assert tokenizer is not None
    lengths = tokenizer.byte_lengths()
    if sum(int(lengths[tokens.read(a, b)].sum()) for a, b in _blocks(corpus)) != expected:
        raise DataError(f"The {split} tokens of {folder} do not stand for the {expected} bytes reported: build the corpus again.")
    if split == "val":
        content = b"".join(tokenizer.decode_bytes(tokens.read(a, b).tolist()) for a, b in _blocks(corpus))
        if not (folder / HELD_OUT_TEXT).is_file() or (folder / HELD_OUT_TEXT).read_bytes() != content:
            raise DataError(f"{folder / HELD_OUT_TEXT} is not the text of the held-out tokens: build the corpus again.")
