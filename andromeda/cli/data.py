"""`andromeda data`: build a corpus from raw text, and look at one."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from andromeda.utils.errors import Interrupted

if TYPE_CHECKING:
    from andromeda.data.corpus import CorpusManifest
    from andromeda.utils.progress_callback import ProgressCallback

app = typer.Typer(help="Build a corpus from raw text, and look at one.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")]


@app.command()
def build(
    sources: Annotated[list[str], typer.Argument(metavar="SRC", help="Files, folders, hf:NAME[:CONFIG][:SPLIT], or `python`.")],
    out: Annotated[Path, typer.Option(help="Folder of the corpus.")],
    tokenizer: Annotated[str | None, typer.Option(help="bpe (default), unigram, bytes, or the path of a trained tokenizer.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Vocabulary size (4096; bytes: 257).")] = None,
    special_token: Annotated[list[str] | None, typer.Option(help="A further special token; may be repeated.")] = None,
    pre_tokenizer: Annotated[str | None, typer.Option(help="How bpe cuts text: andromeda, or gpt-2, llama-bpe, qwen2 for GGUF.")] = None,
    max_digits: Annotated[int | None, typer.Option(help="Longest run of digits in one token (bpe; 2).")] = None,
    validation_fraction: Annotated[float | None, typer.Option(help="Fraction of the documents held out (0.01).")] = None,
    text_field: Annotated[str | None, typer.Option(help="Key of the text in .jsonl, .parquet and datasets (text).")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="A target of the records as NAME=KIND, such as stars=number; repeatable.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="A file extension to read, such as .py; may be repeated.")] = None,
    min_document_bytes: Annotated[int | None, typer.Option(help="Skip shorter documents.")] = None,
    max_document_bytes: Annotated[int | None, typer.Option(help="Skip longer documents.")] = None,
    split_documents_at: Annotated[
        int | None, typer.Option(help="Split longer documents at line ends, at most this many bytes each.")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Read this many bytes of each source.")] = None,
    shard_tokens: Annotated[int | None, typer.Option(help="Tokens of one shard (16 Mi).")] = None,
    append: Annotated[bool, typer.Option("--append", help="Add the documents to the corpus that is in the folder.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the corpus that is in the folder.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes; 0 starts one per core.")] = 0,
    as_json: Json = False,
) -> None:
    """Read, check, deduplicate, split and tokenize text into a corpus folder. After an interruption the same command resumes."""
    given: dict[str, Any] = {
        "tokenizer": tokenizer,
        "vocab_size": vocab_size,
        "special_tokens": tuple(special_token) if special_token else None,
        "pre_tokenizer": pre_tokenizer,
        "max_digits": max_digits,
        "validation_fraction": validation_fraction,
        "text_field": text_field,
        "targets": tuple(target) if target else None,
        "include": tuple(include) if include else None,
        "min_document_bytes": min_document_bytes,
        "max_document_bytes": max_document_bytes,
        "split_documents_at": split_documents_at,
        "max_bytes": max_bytes,
        "shard_tokens": shard_tokens,
    }
    config = _config({k: v for k, v in given.items() if v is not None})

    from andromeda.data.append import append as add
    from andromeda.data.build import build as run
    from andromeda.utils.errors import RequestError

    if append and force:
        raise RequestError("--append keeps the corpus and --force replaces it: give one of them.")
    try:
        with progress() as report:
            if append:
                manifest = add(sources, out, config, workers=workers or _cores(), report=report)
            else:
                manifest = run(sources, out, config, workers=workers or _cores(), report=report, force=force)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; the same command resumes here.") from None
    _print(manifest, out, as_json)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="A corpus folder.")],
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file again and compare.")] = False,
    as_json: Json = False,
) -> None:
    """Print what a corpus holds and where it came from."""
    from andromeda.data.corpus import CorpusManifest
    from andromeda.data.corpus import verify_corpus as check

    manifest = check(folder) if verify else CorpusManifest.load(folder)
    _print(manifest, folder, as_json)
    if verify and not as_json:
        print("verified    every shard, the document borders, the tokenizer and the held-out text")


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="Corpora of the same documents with different tokenizers.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Measure the tokenizers of corpora on the same held-out bytes."""
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from andromeda.data.compare_tokenizers import compare as measure

    figures = measure(folders)
    if as_json:
        print(json.dumps([asdict(f) for f in figures], indent=2))
        return
    table = Table("corpus", "tokenizer", "entries", "bytes/token", "tokens/word", "entries used")
    for f in figures:
        table.add_row(f.folder, f.kind, f"{f.vocab_size:,}", f"{f.bytes_per_token:.3f}", f"{f.tokens_per_word:.3f}", f"{f.used:.1%}")
    for column in table.columns:
        column.overflow = "fold"
    Console().print(table)


def _config(values: dict[str, Any]) -> Any:
    """The build's settings; a wrong value becomes one sentence."""
    from pydantic import ValidationError

    from andromeda.config.data import BuildConfig
    from andromeda.utils.errors import ConfigError

    try:
        return BuildConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise ConfigError(f"{name} = {values[name]!r}: {first['msg'].lower()}; see `andromeda data build --help`.") from None


def _cores() -> int:
    """Cores that this process may use, which in a container are often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class PlainProgress:
    """How far work is, as lines on stderr: of each stage that takes longer than `seconds`, one every so many seconds."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= self._seconds:
            self._last = now
            print(f"andromeda: {stage}, {done:,} of {total:,}" if total else f"andromeda: {stage}", file=sys.stderr, flush=True)


@contextmanager
def progress() -> Iterator[ProgressCallback]:
    """A progress bar on stderr when that is a terminal, else a line every few seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description:<14}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
        # Or what is printed next would stand right under the bars, as if it belonged to them.
        transient=sys.stdout.isatty(),
    )
    if not sys.stderr.isatty():
        yield PlainProgress()
        return
    tasks: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=max(total, 1))
        bar.update(tasks[stage], completed=done if total else 1)

    with bar:
        yield report


def _print(manifest: CorpusManifest, folder: Path, as_json: bool) -> None:
    if as_json:
        print(manifest.model_dump_json(indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    from andromeda.data.corpus import few_held_out
    from andromeda.data.sources import counted

    console = Console()
    splits = Table("split", "documents", "tokens", "bytes", "bytes/token", "shards", title=f"{folder}", title_justify="left")
    for name, s in manifest.splits.items():
        splits.add_row(name, f"{s.documents:,}", f"{s.tokens:,}", f"{s.bytes:,}", f"{s.bytes / s.tokens:.3f}", str(len(s.shards)))
    sources = Table("source", "read", "kept", "tokens", "bytes", "skipped")
    for r in manifest.sources:
        skipped = ", ".join(f"{reason} {n:,}" for reason, n in r.skipped.items()) or "none"
        sources.add_row(r.name, f"{r.read:,}", f"{r.kept:,}", f"{r.tokens:,}", f"{r.bytes:,}", skipped)
    for column in (*splits.columns, *sources.columns):
        column.overflow = "fold"  # a narrow terminal wraps figures instead of cutting them
    console.print(splits, sources)
    for r in manifest.sources:
        if r.not_read:
            console.print(
                f"not read    {counted(r.not_read)} in {r.name}; --include .EXT reads files of that extension",
                highlight=False,
                markup=False,
            )
    for name, target in manifest.targets.items():
        labels = f", {len(target.labels):,} labels ({', '.join(target.labels[:5])}{', ...' * (len(target.labels) > 5)})" * bool(
            target.labels
        )
        have = f"target      {name}: {target.kind}{labels}, in {target.documents:,} training documents"
        console.print(have, highlight=False, markup=False)
    t = manifest.tokenizer
    console.print(f"tokenizer   {t.kind}, {t.vocab_size:,} entries, separator {t.eos}", highlight=False)
    console.print(f"fingerprint {manifest.fingerprint}", highlight=False)
    if note := few_held_out(manifest):
        console.print(f"note        {note}", highlight=False, markup=False)
