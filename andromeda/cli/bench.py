"""`andromeda bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Measure speed beside a peer, both sides in one run.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure speed beside a peer, both sides in one run."""


@app.command()
def cpu(
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each side.")] = 15,
    out: Annotated[Path | None, typer.Option(help="Keep the result as JSON here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """A training step of a small model: Andromeda beside transformers' Llama."""
    from andromeda.study.bench.cpu import measure
    from andromeda.study.bench.record import record, save

    result = record(f"andromeda bench cpu --rounds {rounds}", measure(rounds))
    if out:
        save(out, result)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "side",
        "parameters",
        "eager tok/s",
        "compiled tok/s",
        "GFLOP/s",
        "ratio",
        title="Training step, 6 x 256, vocabulary 4096",
        title_justify="left",
    )
    for name, known in result["tokens_per_second"].items():
        speeds = [f"{known[way]:,.0f}" if way in known else "-" for way in ("eager", "compiled")]
        ratio = result["ratio"].get(name)
        table.add_row(name, f"{known['parameters']:,}", *speeds, f"{known['gflops']:,.0f}", f"{ratio:.2f}" if ratio else "1")
    Console().print(table)
    print(f"a large float32 product runs at {result['floor_gflops']:,.0f} GFLOP/s here")
