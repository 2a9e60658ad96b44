"""`andromeda tokenizers`: kinds and sizes of tokenizers side by side."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from andromeda.cli.arguments import load_config
from andromeda.cli.data import progress

app = typer.Typer(help="Compare tokenizers by measurement.", no_args_is_help=True)


@app.callback()
def tokenizers() -> None:
    """Compare tokenizers by measurement."""


@app.command()
def compare(
    sources: Annotated[
        list[str], typer.Argument(metavar="SRC", help="Text, as `andromeda data build` takes it: files, a corpus, `python`.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A change to the models' configuration; may be repeated.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of corpora, models and results.")] = Path("runs/tokenizers"),
    kinds: Annotated[str, typer.Option(help="bpe, unigram, bytes, with commas.")] = "bpe,unigram",
    vocab_sizes: Annotated[str, typer.Option(help="Vocabulary sizes, with commas.")] = "1024,4096,16384",
    flops: Annotated[float, typer.Option(help="Training FLOPs of each model; 0 trains none.")] = 2e13,
    preset: Annotated[str, typer.Option(help="Preset or TOML file of the models.")] = "nano",
    max_bytes: Annotated[int, typer.Option(min=0, help="Read this many bytes of each source; 0 reads everything.")] = 0,
    validation_fraction: Annotated[float, typer.Option(help="Fraction of the documents held out.")] = 0.02,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Bytes per token, fertility, speed, lossless round trip, and bits/byte of models of equal compute. The same command resumes."""
    import json

    load_config(preset, overrides)

    from andromeda.bench.tokenizer_comparison import ComparisonInterrupted, ComparisonIO, TokenizerComparison, numbers, run, table, words
    from andromeda.cli.tables import show
    from andromeda.train.progress import NullReporter, build_reporter

    plan = TokenizerComparison(
        tuple(sources),
        words(kinds),
        numbers(vocab_sizes, "--vocab-sizes"),
        flops,
        preset,
        tuple(overrides or []),
        max_bytes,
        validation_fraction,
    )

    def note(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    try:
        with progress() as report:
            around = ComparisonIO(report, note, lambda steps: NullReporter() if as_json else build_reporter(steps), os.cpu_count() or 1)
            found = run(plan, out, around)
    except ComparisonInterrupted as error:
        note("interrupted; the state is saved: the same command resumes.")
        raise typer.Exit(128 + error.signal) from None
    if as_json:
        print(json.dumps(found, indent=1))
        return
    columns, rows = table(found)
    show(
        f"Tokenizers on the same held-out bytes, models of {plan.flops:.3g} FLOPs each ({out / 'tokenizers.json'})",
        columns,
        rows,
        range(1, 10),
    )
