"""A corpus folder of conversations: tokens, document borders, and a loss mask, so that the trainer reads it like any other corpus.

Every example is one document. They are ordered by the sha256 of their tokens, and the first of that order are held out, so that the result
does not depend on the order of the files.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import andromeda
from andromeda.config.data import BuildConfig
from andromeda.data.corpus import (
    FORMAT,
    HELD_OUT_TEXT,
    MANIFEST_NAME,
    CorpusManifest,
    SourceReport,
    TokenizerReport,
    corpus_fingerprint,
    loss_mask_file,
)
from andromeda.data.encode import EncodedSplit, write_shards
from andromeda.data.shards import token_dtype
from andromeda.data.tokenizer import Tokenizer
from andromeda.tune.examples import ChatExample, ChatStatistics, example_key
from andromeda.utils.errors import ConfigError, DataError
from andromeda.utils.files import sha256_of, whole_file, write_whole
from andromeda.utils.untrusted import MalformedFile, refuse_links

SHARD_TOKENS = 1 << 24


def write_chat_corpus(
    examples: Sequence[ChatExample],
    statistics: ChatStatistics,
    sources: Sequence[Path],
    tokenizer: Tokenizer,
    out: Path,
    validation_fraction: float,
) -> CorpusManifest:
    """Write a corpus folder; an unfinished or older one of this kind is replaced. Of equal examples one is kept.

    Raises DataError where fewer than two examples are left, of which one is held out.
    """
    distinct = dict(sorted({example_key(example): example for example in examples}.items()))
    if len(distinct) < 2:
        raise DataError(f"The data has {len(distinct)} different examples, and needs one to learn from and one to hold out: give more.")
    ordered = list(distinct.values())
    held_out = min(max(1, round(validation_fraction * len(ordered))), len(ordered) - 1)
    _prepare(out)
    tokenizer.save(out / "tokenizer")
    splits = {"train": ordered[held_out:], "val": ordered[:held_out]}
    written = {split: _write_split(split, chosen, tokenizer, out) for split, chosen in splits.items()}
    write_whole(out / HELD_OUT_TEXT, b"".join(tokenizer.decode_bytes(example.ids.tolist()) for example in splits["val"]))
    skipped = {"duplicate": len(examples) - len(ordered), "cut before its first answer": statistics.unlearned}
    reports = [one.report for one in written.values()]
    manifest = CorpusManifest(
        format=FORMAT,
        fingerprint=corpus_fingerprint(tokenizer.fingerprint, {split: one.hashes for split, one in written.items()}),
        tokenizer=TokenizerReport(
            kind=tokenizer.kind, vocab_size=tokenizer.vocab_size, eos=tokenizer.eos, fingerprint=tokenizer.fingerprint
        ),
        splits={split: one.report for split, one in written.items()},
        sources=(
            SourceReport(
                name=", ".join(map(str, sources)),
                read=len(examples) + statistics.unlearned,
                kept=len(ordered),
                skipped={reason: count for reason, count in skipped.items() if count},
                ignored_files=0,
                bytes=sum(report.bytes for report in reports),
                tokens=sum(report.tokens for report in reports),
                inputs=" ".join(sha256_of(path) for path in sources),
            ),
        ),
        config=BuildConfig(validation_fraction=validation_fraction),
        made_with={"andromeda": andromeda.__version__, "python": platform.python_version()},
    )
    manifest.save(out)
    return manifest


def _prepare(out: Path) -> None:
    """An empty corpus folder; what a kill leaves of the writing is no corpus, since the manifest comes last."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (".", "tokenizer"):
            refuse_links(out.parent, out / name)
        (out / MANIFEST_NAME).unlink(missing_ok=True)
    except MalformedFile as error:
        raise DataError(f"{out.parent} {error}: remove it, or give another folder with --out.") from None
    except OSError as error:
        raise ConfigError(f"The folder {out} cannot be made ({error.strerror}): give another one with --out.") from None


def _write_split(split: str, examples: Sequence[ChatExample], tokenizer: Tokenizer, out: Path) -> EncodedSplit:
    tokens = np.concatenate([example.ids for example in examples]).astype(token_dtype(tokenizer.vocab_size))
    counts = np.array([len(example.ids) for example in examples])
    arrays = (tokens[start : start + SHARD_TOKENS] for start in range(0, len(tokens), SHARD_TOKENS))
    encoded = write_shards(split, arrays, [counts], int(tokenizer.byte_lengths()[tokens].sum()), out)
    path = out / loss_mask_file(split)
    with whole_file(path) as file:
        np.save(file, np.concatenate([example.learned for example in examples]))
    report = encoded.report.model_copy(update={"loss_mask": sha256_of(path)})
    return EncodedSplit(report, encoded.sha256, encoded.counts)
