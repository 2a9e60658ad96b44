"""Adding documents to a finished corpus: the same corpus that all sources together would have made with its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from andromeda.config.data import BuildConfig
from andromeda.data.build import SKIPPED, build
from andromeda.data.corpus import CorpusManifest
from andromeda.utils.errors import ConfigError, DataError
from andromeda.utils.files import write_whole
from andromeda.utils.progress_callback import ProgressCallback, no_progress

FIXED = ("tokenizer", "vocab_size", "max_digits", "special_tokens", "pre_tokenizer", "validation_fraction", "shard_tokens")
"""Settings that a corpus keeps."""


def append(
    sources: list[str], corpus: Path, config: BuildConfig, *, workers: int = 1, report: ProgressCallback = no_progress
) -> CorpusManifest:
    """Add the documents of `sources` to a corpus folder; those that it holds already are skipped as duplicates.

    Its documents stay in their splits, since a document is held out by its content alone. The enlarged corpus is built beside the
    folder and takes its place when it is whole; an interrupted call is resumed by the same one. Raises DataError or ConfigError.
    """
    temporary, replaced = (corpus.with_name(f".{corpus.name}.{what}") for what in ("append", "replaced"))
    _finish_replacing(corpus, temporary, replaced)
    manifest = CorpusManifest.load(corpus)
    if given := sorted(config.model_fields_set & {*FIXED, "max_bytes"}):
        raise ConfigError(f"A corpus that is appended to keeps its settings, and new sources are read whole: leave out {', '.join(given)}.")
    kept = {"validation_fraction": manifest.config.validation_fraction, "shard_tokens": manifest.config.shard_tokens}
    settings = config.model_copy(update=kept | {"tokenizer": str(corpus)})
    new = build([str(corpus), *sources], temporary, settings, workers=workers, report=report, extend=True)
    documents = sum(split.documents for split in manifest.splits.values())
    if sum(split.documents for split in new.splits.values()) < documents:
        raise DataError(f"{corpus} does not hold the documents of its manifest: run `andromeda data show {corpus} --verify`.")
    if new.config.tokenizer == str(corpus):  # not yet joined by a call that was interrupted since
        _join_logs(corpus / SKIPPED, temporary / SKIPPED)
        new = new.model_copy(update={"sources": (*manifest.sources, *new.sources[1:]), "config": manifest.config})
        new.save(temporary)
    corpus.rename(replaced)
    _finish_replacing(corpus, temporary, replaced)
    return new


def _join_logs(old: Path, new: Path) -> None:
    """Put what was skipped before in front of what was skipped now."""
    before, now = (path.read_bytes() if path.is_file() else b"" for path in (old, new))
    if not now.startswith(before) or not before:
        write_whole(new, before + now)


def _finish_replacing(corpus: Path, temporary: Path, replaced: Path) -> None:
    """Put the enlarged corpus into the place of the old one, which was moved away; does nothing where none was."""
    if replaced.is_dir():
        if not corpus.exists():
            temporary.rename(corpus)
        shutil.rmtree(replaced)
