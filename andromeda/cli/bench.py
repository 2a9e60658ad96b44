"""`andromeda bench`: one command a benchmark; each prints a table, or JSON, and can keep its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Measure beside other implementations, all sides in one run.", no_args_is_help=True)

Out = Annotated[Path | None, typer.Option(help="Keep the result as JSON in this file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Rows = Sequence[Sequence[str]]


@app.callback()
def bench() -> None:
    """Measure beside other implementations, all sides in one run."""


@app.command()
def cpu(rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each side.")] = 15, out: Out = None, as_json: Json = False) -> None:
    """Speed of a training step of a small model on the CPU, beside transformers' Llama."""
    from andromeda.study.bench.cpu import measure

    def rows(result: dict[str, Any]) -> Rows:
        ways = next(iter(result["sides"].values()))["tokens_per_second"]
        head = ["side", "parameters", *(f"{way}, tok/s" for way in ways), "GFLOP/s", "ratio"]
        body = [
            [
                name,
                f"{known['parameters']:,}",
                *(f"{speed:,.0f}" for speed in known["tokens_per_second"].values()),
                f"{known['gflops']:,.0f}",
                f"{known['ratio']:.2f}",
            ]
            for name, known in result["sides"].items()
        ]
        return [head, *body, ["a product of 1024 x 1024", *[""] * (len(head) - 3), f"{result['product_gflops']:,.0f}", ""]]

    _finish(f"andromeda bench cpu --rounds {rounds}", measure(rounds), rows, out, as_json)


@app.command()
def learn(
    corpus: Annotated[str, typer.Argument(help="A corpus folder with a vocabulary of at most 4096.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of each side.")] = 600,
    compiled: Annotated[bool, typer.Option(help="Compile all sides.")] = True,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """What the same small models learn on the CPU: loss after equal tokens, and time to the peer's loss."""
    from andromeda.study.bench.learn import measure
    from andromeda.study.bench.sides import PEER, Way

    def rows(result: dict[str, Any]) -> Rows:
        peer = result["sides"][PEER]["seconds"]
        body = []
        for name, known in result["sides"].items():
            reached = known["seconds_to_peers_loss"]
            faster = [f"{reached:,.0f} s", f"{peer / reached:.2f}"] if reached else ["not reached", ""]
            body.append([name, f"{known['parameters']:,}", f"{known['final_loss']:.4f}", f"{known['seconds']:,.0f} s", *faster])
        return [["side", "parameters", "final loss", "time", "time to the peer's loss", "ratio"], *body]

    command = f"andromeda bench learn {corpus} --steps {steps} --{'' if compiled else 'no-'}compiled"
    _finish(command, measure(corpus, steps, Way(compiled)), rows, out, as_json)


@app.command()
def memory(
    source: Annotated[str, typer.Argument(metavar="PRESET|FILE|RUN")],
    changes: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Memory and speed of a training step on this device, beside what `andromeda plan` says."""
    from andromeda.study.bench.memory import measure
    from andromeda.study.plan.sheet import size

    def rows(result: dict[str, Any]) -> Rows:
        planned, real = result["planned"], result["measured"]
        return [
            ["", "planned", "measured"],
            ["weights and optimizer between steps", size(planned["between_steps"]), size(real["between_steps"])],
            ["peak of a step", size(planned["peak"]), size(real["peak"])],
            ["tokens per second", "", f"{real['tokens_per_second']:,.0f}"],
            *([name.upper(), "", f"{result[name]:.1%}"] for name in ("mfu", "hfu") if result[name]),
        ]

    changed = changes or []
    _finish(" ".join(["andromeda bench memory", source, *changed]), measure(source, changed), rows, out, as_json)


def _finish(command: str, figures: dict[str, Any], rows: Callable[[dict[str, Any]], Rows], out: Path | None, as_json: bool) -> None:
    """Print a result and keep it, with the machine, the versions and the command that made it."""
    from andromeda.cli.tables import show
    from andromeda.study.bench.record import record, save

    result = record(command, figures)
    if out:
        save(out, result)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    head, *body = rows(result)
    show(command, head, body, right=range(1, len(head)))
