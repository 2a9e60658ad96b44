"""`andromeda bench`: one command a benchmark; each prints a table, or JSON, and can keep its result."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Measure beside other implementations, all sides in one run.", no_args_is_help=True)


def _writable(path: Path | None) -> Path | None:
    """Before minutes of measuring."""
    if path is None:
        return None
    from andromeda.utils.files import takes_files

    if path.is_dir() or not path.name or not takes_files(path.absolute().parent):
        raise typer.BadParameter(f"{path} cannot be written: give another file.")
    return path


Out = Annotated[Path | None, typer.Option(callback=_writable, help="Keep the result as JSON in this file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Rows = Sequence[Sequence[str]]


@app.callback()
def bench() -> None:
    """Measure beside other implementations, all sides in one run."""


@app.command()
def cpu(rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each side.")] = 15, out: Out = None, as_json: Json = False) -> None:
    """Speed of a training step of a small model on the CPU, beside transformers' Llama."""
    from andromeda.bench.competitors import measure

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
    from andromeda.bench.competitors import BASELINE, ComputeMode
    from andromeda.bench.convergence import measure

    def rows(result: dict[str, Any]) -> Rows:
        peer = result["sides"][BASELINE]["seconds"]
        body = []
        for name, known in result["sides"].items():
            reached = known["seconds_to_peers_loss"]
            faster = [f"{reached:,.0f} s", f"{peer / reached:.2f}"] if reached else ["not reached", ""]
            body.append([name, f"{known['parameters']:,}", f"{known['final_loss']:.4f}", f"{known['seconds']:,.0f} s", *faster])
        return [["side", "parameters", "final loss", "time", "time to the peer's loss", "ratio"], *body]

    command = f"andromeda bench learn {corpus} --steps {steps} --{'' if compiled else 'no-'}compiled"
    _finish(command, measure(corpus, steps, ComputeMode(compiled)), rows, out, as_json)


@app.command()
def memory(
    source: Annotated[str, typer.Argument(metavar="PRESET|FILE|RUN")],
    changes: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Memory and speed of a training step on this device, beside what `andromeda plan` says."""
    from andromeda.bench.memory import measure
    from andromeda.plan.plan_tables import size

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


Source = Annotated[str, typer.Argument(metavar="PRESET|FILE|RUN")]
Changes = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")]
Peers = Annotated[str, typer.Option(help="Measure beside it: llama, x-transformers, x-transformers-alibi, with commas between, or all.")]
Unfused = Annotated[bool, typer.Option(help="Measure it without flash attention too: all T x T logits in memory.")]
Lengths = Annotated[str, typer.Option(help="Tokens, with commas between.")]


@app.command()
def train(
    source: Source,
    changes: Changes = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a step; train.micro_batch_size at a time.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 6,
    peers: Peers = "",
    unfused: Unfused = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Training steps at full size on this device, beside the peers."""
    from andromeda.bench import models
    from andromeda.bench.training import measure
    from tools.performance_page import training_rows

    changed, beside = changes or [], models.parse_peers(peers)
    command = _command("train", source, *changed, f"--rows {rows} --steps {steps}", f"--peers {peers}" * bool(peers), "--unfused" * unfused)
    _finish(command, measure(source, changed, rows, steps, beside, unfused), training_rows, out, as_json)


@app.command()
def prefill(
    source: Source,
    changes: Changes = None,
    lengths: Lengths = "8192,32768",
    eight_bits: Annotated[bool, typer.Option(help="Linear layers in 8 bits.")] = False,
    chunks: Annotated[str, typer.Option(help="Tokens read at once, with commas between; 0 is the whole prompt.")] = "0",
    peers: Peers = "",
    unfused: Unfused = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time to read a prompt and give the last position's logits, beside the floor and the peers."""
    from andromeda.bench import models
    from andromeda.bench.prefill import measure
    from tools.performance_page import prefill_rows

    changed, beside, read = changes or [], models.parse_peers(peers), _numbers(chunks, least=0)
    options = ["--eight-bits" * eight_bits, f"--chunks {chunks}" * (read != [0]), f"--peers {peers}" * bool(peers), "--unfused" * unfused]
    command = _command("prefill", source, *changed, f"--lengths {lengths}", *options)
    result = measure(source, changed, _numbers(lengths), eight_bits=eight_bits, chunks=read, unfused=unfused, peers=beside)
    _finish(command, result, prefill_rows, out, as_json)


@app.command()
def decode(
    source: Source,
    changes: Changes = None,
    contexts: Lengths = "2048,32768",
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    compiled: Annotated[bool, typer.Option(help="Compile the blocks.")] = True,
    tuned: Annotated[bool, typer.Option(help="Let the compiler measure several forms of every kernel, which takes minutes.")] = False,
    eight_bits: Annotated[bool, typer.Option(help="Linear layers in 8 bits.")] = False,
    kernels: Annotated[bool, typer.Option(help="Steps by kernels of our own, where they can.")] = True,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time of one token more after a context, beside the bandwidth floor."""
    from andromeda.bench.decode import measure
    from tools.performance_page import decode_rows

    changed = changes or []
    options = ["--no-compiled" * (not compiled), "--tuned" * tuned, "--eight-bits" * eight_bits, "--no-kernels" * (not kernels)]
    command = _command("decode", source, *changed, f"--contexts {contexts} --batch {batch}", *options)
    way = {"compiled": compiled, "tuned": tuned, "eight_bits": eight_bits, "kernels": kernels}
    _finish(command, measure(source, changed, _numbers(contexts), batch, **way), decode_rows, out, as_json)


@app.command()
def precision(
    source: Source,
    changes: Changes = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each precision.")] = 600,
    rows: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 16,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """What products in 8 bits cost in loss: the same training twice, in bfloat16 and in 8 bits."""
    from andromeda.bench.precision import measure
    from tools.performance_page import precision_rows

    changed = changes or []
    command = _command("precision", source, *changed, f"--steps {steps} --rows {rows}")
    _finish(command, measure(source, changed, steps, rows), precision_rows, out, as_json)


@app.command()
def loss(
    tokens: Annotated[int, typer.Option(min=0, help="Tokens; 0 is 32,768 on a GPU, 2,048 elsewhere, with smaller matrices.")] = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Linear head and cross entropy, beside compiled PyTorch and the libraries that fuse them."""
    import torch

    from andromeda.bench import loss as bench
    from tools.performance_page import loss_rows

    gpu = torch.cuda.is_available()
    shape = (tokens or bench.TOKENS,) if gpu else (tokens or 2048, 4096, 256)
    result = bench.measure(torch.device("cuda" if gpu else "cpu"), *shape)
    _finish(_command("loss", f"--tokens {tokens}" * bool(tokens)), result, loss_rows, out, as_json)


def _numbers(text: str, least: int = 1) -> list[int]:
    """Numbers of at least `least` with commas between. Raises RequestError."""
    from andromeda.utils.errors import RequestError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise RequestError(f"{text!r} are no lengths: give numbers from {least} on with commas between, as 8192,32768.")
    return numbers


def _command(*parts: str) -> str:
    return " ".join(["andromeda bench", *(part for part in parts if part)])


def _forward(name: str, text: str) -> None:
    """A benchmark with a command line of its own."""

    @app.command(name, help=text, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
    def run(context: typer.Context) -> None:
        from importlib import import_module

        import_module(f"andromeda.bench.{name}").main(context.args)


_forward("attention", "Every attention backend on every pattern: speed and error, beside the floor.")
_forward("embedding", "The gradient of a table of vectors, beside PyTorch's.")
_forward("qk", "Norm, rotation and folded ALiBi in one kernel, beside the compiled parts.")


def _finish(command: str, figures: dict[str, Any], rows: Callable[[dict[str, Any]], Rows], out: Path | None, as_json: bool) -> None:
    """Print a result and keep it, with the machine, the versions and the command that made it."""
    from andromeda.bench.record import record, save
    from andromeda.cli.tables import show

    result = record(command, figures)
    if out:
        save(out, result)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    head, *body = rows(result)
    show(command, head, body, right=range(1, len(head)))
