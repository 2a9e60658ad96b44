"""`andromeda bench`: one command per benchmark; each prints a table or JSON, and can save its result."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from andromeda.cli.arguments import AllowCode, Overrides, Source, load_config, parse_ints

app = typer.Typer(help="Benchmarks against other implementations, interleaved in one run.", no_args_is_help=True)


def _writable(path: Path | None) -> Path | None:
    """Refuse a path that cannot be written before minutes of measuring."""
    if path is None:
        return None
    from andromeda.utils.files import takes_files

    if path.is_dir() or not path.name or not takes_files(path.absolute().parent):
        raise typer.BadParameter(f"{path} cannot be written: give another file.")
    return path


Out = Annotated[Path | None, typer.Option(callback=_writable, help="Save the result as JSON in this file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Rows = Sequence[Sequence[str]]


@app.callback()
def bench() -> None:
    """Benchmarks against other implementations, interleaved in one run."""
    # A line for each round on stderr: minutes pass before the first result.
    lines = logging.StreamHandler()
    lines.setFormatter(logging.Formatter("andromeda: %(message)s"))
    from andromeda.utils.log import get_logger

    log = get_logger("andromeda.bench")
    log.handlers, log.level, log.propagate = [lines], logging.INFO, False


@app.command()
def cpu(
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps of each model.")] = 15, out: Out = None, as_json: Json = False
) -> None:
    """Speed of a training step of a small model on the CPU, compared with transformers' Llama."""
    from andromeda.bench.competitors import measure

    def rows(result: dict[str, Any]) -> Rows:
        modes = next(iter(result["implementations"].values()))["tokens_per_second"]
        head = ["model", "parameters", *(f"{mode}, tokens/s" for mode in modes), "GFLOP/s", "ratio"]
        body = [
            [
                name,
                f"{known['parameters']:,}",
                *(f"{speed:,.0f}" for speed in known["tokens_per_second"].values()),
                f"{known['gflops']:,.0f}",
                f"{known['ratio']:.2f}",
            ]
            for name, known in result["implementations"].items()
        ]
        return [head, *body, ["a matmul of 1024 x 1024", *[""] * (len(head) - 3), f"{result['matmul_gflops']:,.0f}", ""]]

    _finish(f"andromeda bench cpu --rounds {rounds}", measure(rounds), rows, out, as_json)


@app.command()
def convergence(
    corpus: Annotated[str, typer.Argument(metavar="CORPUS", help="A corpus folder with a vocabulary of at most 4096.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps of each model.")] = 600,
    compile_models: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile all models.")] = True,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Loss of the same small models on the CPU after equal tokens, and the time to Llama's loss."""
    from andromeda.bench.competitors import BASELINE, ComputeMode
    from andromeda.bench.convergence import measure

    def rows(result: dict[str, Any]) -> Rows:
        peer = result["implementations"][BASELINE]["seconds"]
        body = []
        for name, known in result["implementations"].items():
            reached = known["seconds_to_baseline_loss"]
            faster = [f"{reached:,.0f} s", f"{peer / reached:.2f}"] if reached else ["not reached", ""]
            body.append([name, f"{known['parameters']:,}", f"{known['final_loss']:.4f}", f"{known['seconds']:,.0f} s", *faster])
        return [["model", "parameters", "final loss", "time", "time to Llama's loss", "ratio"], *body]

    command = f"andromeda bench convergence {corpus} --steps {steps} --{'' if compile_models else 'no-'}compile"
    _finish(command, measure(corpus, steps, ComputeMode(compile_models)), rows, out, as_json)


@app.command()
def memory(
    source: Source,
    changes: Overrides = None,
    allow_code: AllowCode = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Memory and speed of a training step on this device, compared with `andromeda plan`."""
    load_config(source, changes)

    from andromeda.bench.step_memory import measure
    from andromeda.plan.plan_tables import size

    def rows(result: dict[str, Any]) -> Rows:
        planned, real = result["planned"], result["measured"]
        return [
            ["", "planned", "measured"],
            ["weights and optimizer between steps", size(planned["between_steps"]), size(real["between_steps"])],
            ["peak of a step", size(planned["peak"]), size(real["peak"])],
            ["tokens/s", "", f"{real['tokens_per_second']:,.0f}"],
            *([name.upper(), "", f"{result[name]:.1%}"] for name in ("mfu", "hfu") if result[name]),
        ]

    changed = changes or []
    _finish(" ".join(["andromeda bench memory", source, *changed]), measure(source, changed), rows, out, as_json)


Peers = Annotated[str, typer.Option(help="Compared with it: llama, x-transformers, x-transformers-alibi, with commas between, or all.")]
Unfused = Annotated[bool, typer.Option(help="Also without flash attention, with all T x T attention logits in memory.")]
Lengths = Annotated[str, typer.Option(help="Tokens, with commas between.")]


@app.command()
def train(
    source: Source,
    changes: Overrides = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step; train.micro_batch_size at a time.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 6,
    peers: Peers = "",
    unfused: Unfused = False,
    allow_code: AllowCode = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Training steps at full size on this device, compared with the peers."""
    load_config(source, changes)

    from andromeda.bench import models
    from andromeda.bench.benchmark_tables import training_rows
    from andromeda.bench.training_step import measure

    changed, compared = changes or [], models.parse_peers(peers)
    command = _command(
        "train", source, *changed, f"--batch-size {batch_size} --steps {steps}", f"--peers {peers}" * bool(peers), "--unfused" * unfused
    )
    _finish(command, measure(source, changed, batch_size, steps, compared, unfused), training_rows, out, as_json)


@app.command()
def prefill(
    source: Source,
    changes: Overrides = None,
    lengths: Lengths = "8192,32768",
    fp8: Annotated[bool, typer.Option("--fp8", help="Linear layers in fp8.")] = False,
    chunk_sizes: Annotated[str, typer.Option(help="Tokens per forward pass, with commas between; 0 is the whole prompt.")] = "0",
    peers: Peers = "",
    unfused: Unfused = False,
    allow_code: AllowCode = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time of a prefill up to the last position's logits, compared with the roofline and the peers."""
    load_config(source, changes)

    from andromeda.bench import models
    from andromeda.bench.benchmark_tables import prefill_rows
    from andromeda.bench.prefill import measure

    changed, compared, read = changes or [], models.parse_peers(peers), _numbers("--chunk-sizes", chunk_sizes, least=0)
    options = ["--fp8" * fp8, f"--chunk-sizes {chunk_sizes}" * (read != [0]), f"--peers {peers}" * bool(peers), "--unfused" * unfused]
    command = _command("prefill", source, *changed, f"--lengths {lengths}", *options)
    result = measure(source, changed, _numbers("--lengths", lengths), fp8=fp8, chunks=read, unfused=unfused, peers=compared)
    _finish(command, result, prefill_rows, out, as_json)


@app.command()
def decode(
    source: Source,
    changes: Overrides = None,
    contexts: Lengths = "2048,32768",
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    compile_model: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the blocks.")] = True,
    autotune: Annotated[bool, typer.Option("--autotune", help="Let the compiler time several forms of every kernel, for minutes.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Linear layers in fp8.")] = False,
    decode_kernels: Annotated[bool, typer.Option(help="Use the fused decode kernels where they support the model.")] = True,
    allow_code: AllowCode = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time per decoded token after a context, compared with the memory-bandwidth roofline."""
    load_config(source, changes)

    from andromeda.bench.benchmark_tables import decode_rows
    from andromeda.bench.decoding import measure

    changed = changes or []
    options = ["--no-compile" * (not compile_model), "--autotune" * autotune, "--fp8" * fp8, "--no-decode-kernels" * (not decode_kernels)]
    command = _command("decode", source, *changed, f"--contexts {contexts} --batch-size {batch_size}", *options)
    mode = {"compile": compile_model, "autotune": autotune, "fp8": fp8, "decode_kernels": decode_kernels}
    _finish(command, measure(source, changed, _numbers("--contexts", contexts), batch_size, **mode), decode_rows, out, as_json)


@app.command()
def precision(
    source: Source,
    changes: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each precision.")] = 600,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per step.")] = 16,
    allow_code: AllowCode = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """What fp8 matmuls cost in loss: the same training twice, in bf16 and in fp8."""
    load_config(source, changes)

    from andromeda.bench.benchmark_tables import precision_rows
    from andromeda.bench.precision_loss import measure

    changed = changes or []
    command = _command("precision", source, *changed, f"--steps {steps} --batch-size {batch_size}")
    _finish(command, measure(source, changed, steps, batch_size), precision_rows, out, as_json)


@app.command()
def loss(
    tokens: Annotated[int, typer.Option(min=0, help="Tokens; 0 is 32,768 on a GPU, 2,048 elsewhere, with smaller matrices.")] = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Linear head and cross-entropy, compared with compiled PyTorch and the libraries that fuse them."""
    import torch

    from andromeda.bench import linear_cross_entropy as bench
    from andromeda.bench.benchmark_tables import loss_rows

    gpu = torch.cuda.is_available()
    shape = (tokens or bench.TOKENS,) if gpu else (tokens or 2048, 4096, 256)
    result = bench.measure(torch.device("cuda" if gpu else "cpu"), *shape)
    _finish(_command("loss", f"--tokens {tokens}" * bool(tokens)), result, loss_rows, out, as_json)


def _numbers(option: str, text: str, least: int = 1) -> list[int]:
    """At least one whole number of at least `least`. Raises RequestError."""
    from andromeda.utils.errors import RequestError

    numbers = parse_ints(option, text, least)
    if not numbers:
        raise RequestError(f"{option} is empty: give numbers with commas between them, such as 8192,32768.")
    return list(numbers)


def _command(*parts: str) -> str:
    return " ".join(["andromeda bench", *(part for part in parts if part)])


ResultFile = Annotated[Path, typer.Option(callback=_writable, help="Save the result as JSON in this file, after every row.")]
KernelDevice = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a GPU by default where there is one.")]
Repetition = Annotated[int | None, typer.Option(min=1, help="Milliseconds for which each function is timed.")]


@app.command()
def attention(
    out: ResultFile,
    lengths: Annotated[str, typer.Option(help="Tokens per sequence, with commas between.")] = "32768,8192",
    budget: Annotated[float | None, typer.Option(min=0.0, help="Seconds after which nothing new is measured.")] = None,
    device: KernelDevice = None,
    rep: Repetition = None,
) -> None:
    """Every attention backend on every pattern: speed and error, compared with the roofline."""
    sizes = _numbers("--lengths", lengths)

    from andromeda.bench.attention import main

    main(["--out", str(out), "--lengths", *map(str, sizes), *_given(budget=budget, device=device, rep=rep)])


@app.command()
def embedding(
    out: ResultFile,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a batch.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Rows of the table.")] = None,
    device: KernelDevice = None,
    rep: Repetition = None,
) -> None:
    """The gradient of an embedding table, compared with PyTorch's."""
    from andromeda.bench.embedding import main

    main(["--out", str(out), *_given(tokens=tokens, vocabulary=vocab_size, device=device, rep=rep)])


@app.command()
def qk(
    out: ResultFile,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per sequence.")] = None,
    device: KernelDevice = None,
    rep: Repetition = None,
) -> None:
    """QK norm, rotary positions and folded ALiBi in one kernel, compared with the compiled parts."""
    from andromeda.bench.qk_preprocess import main

    main(["--out", str(out), *_given(tokens=tokens, device=device, rep=rep)])


def _given(**options: Any) -> list[str]:
    """The options that were given, as arguments."""
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def _finish(command: str, figures: dict[str, Any], rows: Callable[[dict[str, Any]], Rows], out: Path | None, as_json: bool) -> None:
    """Print a result and save it, with the machine, the versions and the command."""
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
