"""`andromeda data build`: raw text to a corpus folder, in stages that each keep what they finished.

The stages are list, read, tokenizer, encode, write. Each piece of work is one file in `.work/` that appears whole or not at
all, so that a build that was killed at any moment resumes there. Documents are ordered by the sha256 of their text: the
result does not depend on the order or names of files, on the number of workers, or on interruptions.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import andromeda
from andromeda.config.data import RANKED, TOKENIZER_KINDS, BuildConfig, translate_build_keys
from andromeda.data.corpus import (
    FORMAT,
    HELD_OUT_TEXT,
    MANIFEST_NAME,
    CorpusManifest,
    SourceReport,
    TokenizerReport,
    corpus_fingerprint,
    target_file,
)
from andromeda.data.encode import EncodedSplit, add_targets, encode_split, write_split, write_text
from andromeda.data.ingest import DocumentSelection, DocumentTable, read_sources, select
from andromeda.data.sources import SourceListing, list_source
from andromeda.data.targets import TargetReport, describe_targets
from andromeda.data.tokenizer import META, Tokenizer, train_tokenizer
from andromeda.utils.errors import AndromedaError, ConfigError, DataError, nearest
from andromeda.utils.files import PART, write_whole
from andromeda.utils.progress_callback import ProgressCallback, no_progress
from andromeda.utils.untrusted import MalformedFile, read_json, refuse_links

WORK = ".work"
PLAN = "plan.json"
LAYOUT = 1
"""Raised when work is cut into other pieces, so that another version's pieces are never mixed with these."""
SKIPPED = "skipped.jsonl"
SAMPLE_BYTES = {"bpe": 32 << 20, "unigram": 8 << 20, "bytes": 0}
"""Bytes of text that a tokenizer is trained on: the first documents of the training split, which are a random sample of it."""


def build(
    sources: list[str],
    out: Path,
    config: BuildConfig,
    *,
    workers: int = 1,
    report: ProgressCallback = no_progress,
    force: bool = False,
    extend: bool = False,
) -> CorpusManifest:
    """Build a corpus folder, or resume an interrupted build; a finished corpus of the same settings is returned as it is.

    force: remove the corpus or unfinished build that is in the folder first. extend: the first source is a corpus whose documents are
    taken as they are, without the checks of the settings. Raises DataError or ConfigError with the cause and the fix.
    """
    if not sources:
        raise ConfigError("Nothing to build from: name files, folders, hf:NAME or `python`.")
    trained = config.model_fields_set & {"vocab_size", "max_digits", "special_tokens", "pre_tokenizer"}
    if trained and not config.trains_tokenizer:
        raise ConfigError(f"The tokenizer {config.tokenizer} is trained already: leave out {', '.join(sorted(trained))}.")
    out = Path(out)
    try:
        given = None if config.trains_tokenizer else _load_tokenizer(config.tokenizer)
        for source in sources:
            _refuse_lost_targets(source, config)
        listings = [list_source(i, source, config, as_it_is=extend and i == 0) for i, source in enumerate(sources)]
        plan = _plan(sources, config, listings, given)
        with _locked(out):
            cleared = force and _clear(out, plan)
            if not _begin(out, plan, beside_others=cleared):
                return CorpusManifest.load(out)
            return _CorpusBuilder(sources, out, config, listings, workers, report).run(given, plan)
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror or error}; fix that, then the same command resumes here.") from error


def _refuse_lost_targets(source: str, config: BuildConfig) -> None:
    """Raises DataError for a corpus as a source where its documents have, or should have, targets: only records have them."""
    folder = Path(source).expanduser()
    if not (folder / MANIFEST_NAME).is_file():
        return
    if config.targets or CorpusManifest.load(folder).targets:
        raise DataError(f"{source} is a corpus, and targets are read from records only: build from its JSONL files, all of them together.")


def _load_tokenizer(name: str) -> Tokenizer:
    """The trained tokenizer that `tokenizer` names. Raises ConfigError for a word that is neither a kind nor a path."""
    if not Path(name).expanduser().exists() and "/" not in name:
        kinds = ", ".join(TOKENIZER_KINDS)
        raise ConfigError(
            f"tokenizer = {name!r} is no kind of tokenizer{nearest(name, TOKENIZER_KINDS)} and no path: take {kinds} or a path."
        )
    return Tokenizer.load(Path(name).expanduser())


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One build at a time in a folder; the lock goes with the process, however it ends."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file: name a folder for the corpus.")
    out.mkdir(parents=True, exist_ok=True)
    try:
        for name in (WORK, "tokenizer"):
            refuse_links(out, out / name)
    except MalformedFile as error:
        raise DataError(f"{out} {error}: remove it, or name another folder.") from None
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"Another build is writing to {out}: wait for it or name another folder.") from None
    else:
        yield
    finally:
        os.close(handle)


def _plan(sources: list[str], config: BuildConfig, listings: list[SourceListing], given: Tokenizer | None) -> dict[str, Any]:
    """What makes two builds the same: settings, tokenizer, and the files as they were when listed."""
    return {
        "layout": LAYOUT,
        "config": config.model_dump(mode="json"),
        "sources": sources,
        "tokenizer": given.fingerprint if given else "",
        "inputs": [listing.inputs for listing in listings],
    }


def _clear(out: Path, plan: dict[str, Any]) -> bool:
    """Remove a corpus, or an interrupted build of another plan; nothing else that lies in the folder. Whether anything was removed."""
    started = out / WORK / PLAN
    if not (out / MANIFEST_NAME).is_file() and (not started.is_file() or started.read_bytes() == json.dumps(plan).encode()):
        return False
    (out / MANIFEST_NAME).unlink(missing_ok=True)  # first, so that what a kill leaves is no corpus
    for folder in (WORK, "tokenizer"):
        shutil.rmtree(out / folder, ignore_errors=True)
    shards = [path for split in ("train", "val") for path in out.glob(f"{split}-[0-9]*.bin")]
    targets = [path for split in ("train", "val") for path in out.glob(target_file(split, "*"))]
    for path in (*shards, *targets, *(out / name for name in (HELD_OUT_TEXT, SKIPPED, PLAN, "train-documents.npy", "val-documents.npy"))):
        path.unlink(missing_ok=True)
    return True


def _begin(out: Path, plan: dict[str, Any], beside_others: bool = False) -> bool:
    """True when there is work to do, False when this very build is finished. Refuses a folder that holds anything else."""
    finished = (out / MANIFEST_NAME).is_file()
    path = (out if finished else out / WORK) / PLAN
    if path.is_file():
        _refuse_other(out, plan, path)
        for leftover in out.rglob(f"*{PART}"):
            leftover.unlink()
        if finished:
            shutil.rmtree(out / WORK, ignore_errors=True)
        return not finished
    if not beside_others and any(entry.name != WORK for entry in out.iterdir()):
        raise DataError(f"{out} is not empty and holds no corpus of this command: name a new folder.")
    (out / WORK).mkdir(exist_ok=True)
    write_whole(path, json.dumps(plan).encode())
    return True


def _refuse_other(out: Path, plan: dict[str, Any], path: Path) -> None:
    """One sentence when the folder was begun with other settings, or its sources have changed since."""
    fix = "name another folder with --out, or replace this one with --force"
    try:
        old = read_json(path)
    except MalformedFile as error:
        raise DataError(f"{path} is not JSON ({error}): {fix}.") from error
    if not isinstance(old, dict) or old.keys() != plan.keys() or old["layout"] != LAYOUT:
        raise DataError(f"{out} holds a build of another version: {fix}.")
    defaults = BuildConfig().model_dump(mode="json")
    old["config"] = {key: translate_build_keys(old["config"]).get(key, default) for key, default in defaults.items()}
    settings = [k for k, v in plan["config"].items() if old["config"].get(k) != v]
    if plan["sources"] != old["sources"]:
        settings.insert(0, "sources")
    if settings:
        raise DataError(f"{out} holds a build with other settings ({', '.join(settings)}): {fix}.")
    if plan != old:
        changed = [s for s, a, b in zip(plan["sources"], plan["inputs"], old["inputs"], strict=True) if a != b]
        raise DataError(f"{out} was built from other content ({', '.join(changed) or 'the tokenizer'} changed since): {fix}.")


class _CorpusBuilder:
    """The stages of one build, in order."""

    def __init__(
        self, sources: list[str], out: Path, config: BuildConfig, listings: list[SourceListing], workers: int, report: ProgressCallback
    ) -> None:
        self.sources, self.out, self.config, self.listings = sources, out, config, listings
        self.workers, self.report, self.work = workers, report, out / WORK

    def run(self, given: Tokenizer | None, plan: dict[str, Any]) -> CorpusManifest:
        units = [unit for listing in self.listings for unit in listing.tasks]
        read_sources(units, self.work, self.config, self.workers, self.report)
        try:
            chosen = select(units, self.sources, self.work, self.config)
            targets = self._describe(chosen)
            tokenizer = self._tokenizer(chosen.train, given)
        except AndromedaError:  # the settings do not fit the text, so a changed command will follow: leave nothing in its way
            self._discard()
            raise
        train, val = (self._encode(split, d, tokenizer, targets) for split, d in (("train", chosen.train), ("val", chosen.val)))
        write_text(chosen.val, self.work, self.out / HELD_OUT_TEXT)
        write_whole(self.out / SKIPPED, b"".join(json.dumps(line).encode() + b"\n" for line in chosen.log))
        write_whole(self.out / PLAN, json.dumps(plan).encode())
        manifest = self._manifest(chosen, tokenizer, train, val, targets)
        manifest.save(self.out)
        shutil.rmtree(self.work)
        return manifest

    def _discard(self) -> None:
        shutil.rmtree(self.work)
        if not any(self.out.iterdir()):
            self.out.rmdir()

    def _tokenizer(self, documents: DocumentTable, given: Tokenizer | None) -> Tokenizer:
        """The given tokenizer or one trained on the beginning of the training split; kept from an interrupted run."""
        folder = self.out / "tokenizer"
        if (folder / META).is_file():
            return Tokenizer.load(folder)
        self.report("tokenizer", 0, 1)
        tokenizer = given or train_tokenizer(self._sample(documents), self.config)
        tokenizer.save(folder)
        self.report("tokenizer", 1, 1)
        return tokenizer

    def _sample(self, documents: DocumentTable) -> Iterator[str]:
        before = np.cumsum(documents.size) - documents.size
        count = int(np.searchsorted(before, SAMPLE_BYTES[self.config.tokenizer]))
        return (content.decode() for content in documents.part(0, count).contents(self.work))

    def _describe(self, chosen: DocumentSelection) -> dict[str, TargetReport]:
        if not self.config.targets:
            return {}
        return describe_targets(self.config, chosen.train.targets(self.work), chosen.val.targets(self.work))

    def _encode(self, split: str, documents: DocumentTable, tokenizer: Tokenizer, targets: dict[str, TargetReport]) -> EncodedSplit:
        ranked = next((name for name, report in targets.items() if report.kind in RANKED), "")
        blocks = encode_split(split, documents, self.work, self.out / "tokenizer", tokenizer.fingerprint, self.workers, self.report, ranked)
        encoded = write_split(split, documents, blocks, self.out, self.config.shard_tokens)
        return add_targets(split, encoded, documents, self.work, self.out, tokenizer, targets)

    def _manifest(
        self,
        chosen: DocumentSelection,
        tokenizer: Tokenizer,
        train: EncodedSplit,
        val: EncodedSplit,
        targets: dict[str, TargetReport],
    ) -> CorpusManifest:
        splits = {"train": train, "val": val}
        return CorpusManifest(
            format=FORMAT,
            fingerprint=corpus_fingerprint(tokenizer.fingerprint, {k: w.hashes for k, w in splits.items()}),
            tokenizer=TokenizerReport(
                kind=tokenizer.kind, vocab_size=tokenizer.vocab_size, eos=tokenizer.eos, fingerprint=tokenizer.fingerprint
            ),
            splits={k: w.report for k, w in splits.items()},
            targets=targets,
            sources=tuple(self._source(i, chosen, train, val) for i in range(len(self.sources))),
            config=self.config,
            made_with={
                "andromeda": andromeda.__version__,
                "python": platform.python_version(),
                **{name: version(name) for name in ("numpy", "tokenizers", "tiktoken", "sentencepiece")},
            },
        )

    def _source(self, i: int, chosen: DocumentSelection, train: EncodedSplit, val: EncodedSplit) -> SourceReport:
        ours = [(d.source == i, d.size, w.counts) for d, w in ((chosen.train, train), (chosen.val, val))]
        return SourceReport(
            name=self.sources[i],
            read=chosen.read[i],
            kept=sum(int(mask.sum()) for mask, _, _ in ours),
            skipped=dict(sorted(chosen.skipped[i].items())),
            ignored_files=sum(self.listings[i].not_read.values()),
            not_read=self.listings[i].not_read,
            bytes=sum(int(size[mask].sum()) for mask, size, _ in ours),
            tokens=sum(int(counts[mask].sum()) for mask, _, counts in ours),
            inputs=self.listings[i].inputs,
        )
