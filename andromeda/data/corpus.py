"""A corpus opened for reading: one split of a corpus folder, or llm.c shards made elsewhere."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from andromeda.data.manifest import NAME, Manifest
from andromeda.data.packing import Texts
from andromeda.data.shards import TokenArray, open_shard
from andromeda.data.tokenizer import Tokenizer
from andromeda.utils.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """One split of one corpus. Shards made elsewhere may come without a tokenizer; then bytes cannot be counted."""

    texts: Texts
    tokenizer: Tokenizer | None
    vocab_size: int
    fingerprint: str


def open_corpus(path: Path | str, split: str) -> Corpus:
    """Open one split. `path` is a corpus folder, a folder of *train*.bin and *val*.bin shards, or one .bin (training only)."""
    path = Path(path).expanduser()
    if (path / NAME).is_file():
        return _open_built(path, split)
    if path.is_dir():
        shards = sorted(path.glob(f"*{split}*.bin"))
        if not shards:
            raise DataError(f"{path} is no corpus (no {NAME}, no *{split}*.bin): build one with `andromeda data build`.")
        return _open_foreign(shards)
    if not path.is_file():
        raise DataError(f"There is no corpus at {path}: build one with `andromeda data build`.")
    if split != "train":
        raise DataError(f"{path} is a single shard without a {split} split: name a folder with *train*.bin and *val*.bin files.")
    return _open_foreign([path])


def _open_built(folder: Path, split: str) -> Corpus:
    """A folder made by `andromeda data build`; sizes are checked here, hashes by `andromeda data show --verify`."""
    manifest = Manifest.load(folder)
    report = manifest.splits[split]
    shards = [open_shard(folder / s.file) for s in report.shards]
    for shard, expected in zip(shards, report.shards, strict=True):
        if shard.tokens != expected.tokens:
            raise DataError(
                f"The shard {shard.path} has {shard.tokens} tokens, the manifest says {expected.tokens}: build the corpus again."
            )
    tokens = TokenArray(shards)
    try:
        offsets = np.load(folder / f"{split}-documents.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"The document offsets of {folder} cannot be read ({error}): build the corpus again.") from error
    if len(offsets) != report.documents + 1 or offsets[-1] != tokens.size:
        raise DataError(f"The document offsets of {folder} do not match its shards: build the corpus again.")
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != manifest.tokenizer.fingerprint:
        raise DataError(
            f"The tokenizer of {folder} is not the one its tokens were made with: put that one back, or build the corpus again."
        )
    return Corpus(Texts(tokens, offsets, tokenizer.eos), tokenizer, tokenizer.vocab_size, manifest.fingerprint)


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
    return Corpus(Texts(TokenArray(shards), offsets, separator), tokenizer, vocab_size, digest.hexdigest())


def _tokenizer_beside(folder: Path, separator: int) -> Tokenizer | None:
    if not any((folder / name).exists() for name in ("tokenizer", "tokenizer.json")):
        return None
    return Tokenizer.load(folder, eos=separator)
