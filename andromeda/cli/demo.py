"""`andromeda demo`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from andromeda.cli.arguments import Overrides, load_config
from andromeda.cli.data import progress


def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The run folder.")] = Path("runs/demo"),
    corpus: Annotated[Path, typer.Option(help="The corpus folder, built on the first call.")] = Path("corpora/python"),
) -> None:
    """Train a small model on this machine's own Python sources and show what it generates. The same command resumes."""
    load_config("nano", overrides)  # a wrong key is refused before torch is imported

    from andromeda import demo as steps
    from andromeda.evaluate.loaded_model import load_model
    from andromeda.report import write_report
    from andromeda.train.progress import build_reporter

    config = steps.configuration(corpus, list(overrides or []))
    print(f"Corpus: the Python sources of {sys.executable}, in {corpus}", flush=True)
    with progress() as report:
        manifest = steps.build_corpus(corpus, os.cpu_count() or 1, report)
    train, held_out = (manifest.splits[name] for name in ("train", "val"))
    print(f"  {train.documents:,} documents, {train.tokens:,} tokens to learn from; {held_out.bytes:,} bytes held out")

    print(f"Training: preset {steps.PRESET}, {config.train.steps:,} steps, in {out}", flush=True)
    result = steps.train_or_resume(config, out, build_reporter(config.train.steps, False))
    if result.signal:
        print("Interrupted; the state is saved. The same command resumes.")
        raise typer.Exit(128 + result.signal)

    print("\nSamples (the prompt, then what the model generated):\n")
    loaded = load_model(out)
    steps.write_samples(loaded.model, out, lambda piece: print(piece, end="", flush=True))
    print("Evaluating", flush=True)
    with progress() as report:
        evaluations = steps.evaluate(loaded, report, lambda sentence: print(f"andromeda: {sentence}", file=sys.stderr))
    measured = steps.measure(loaded, corpus, evaluations)
    page = write_report(out)
    print(f"bits per byte: held-out {measured.held_out:.3f}, xz {measured.xz:.3f}, zlib {measured.zlib:.3f}")
    print(f"parameters: {measured.parameters:,}")
    print(f"training: {measured.tokens:,} tokens in {measured.seconds:.0f} s, {measured.tokens_per_second:,.0f} tokens/s")
    print(f"run folder: {out}")
    print(f"report: {page.resolve()}")
