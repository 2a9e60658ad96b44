"""`andromeda generate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from andromeda.cli.arguments import AllowCode, Device, DType, Ema, RunArgument, Step, check_buildable, is_worker
from andromeda.utils.errors import RequestError

if TYPE_CHECKING:
    from andromeda.generate.sequence import Completion, StreamChunk

SETTINGS = ("max_new_tokens", "stop", "repetition_penalty", "temperature", "top_k", "top_p", "min_p", "seed")
FLAGS = {name: "--" + name.replace("_", "-") for name in SETTINGS}


def generate(
    run: RunArgument,
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input; without one a new text is generated.")] = "",
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts, one a line: .txt, or .jsonl with texts, token ids, or objects with a prompt.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Longest completion; by default 256 tokens, or what the context has left.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the most likely token; 0.8 by default.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most likely tokens; 50 by default, 0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the top tokens that reach this probability; 1 (off) by default.")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens below this fraction of the most likely one's probability; 0 (off) by default.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 makes tokens that already occur less likely; 1 (off) by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text; by default a different one each time.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the completion; may be repeated.")] = None,
    ema: Ema = False,
    step: Step = None,
    device: Device = "auto",
    dtype: DType = "auto",
    compile_model: Annotated[bool, typer.Option("--compile", help="Compile the model: a minute at first, faster afterwards.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Linear layers in fp8: for long prompts on GPUs that compute it.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of a file that are decoded at once.")] = 8,
    nproc: Annotated[
        int,
        typer.Option(min=0, help="Processes on this machine, one a GPU, that share the work on each token (docs/scale.md); 0: none."),
    ] = 0,
    allow_code: AllowCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each prompt.")] = False,
) -> None:
    """Generate text from a prompt."""
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
    }
    settings = {name: value for name, value in given.items() if value is not None}
    check_buildable(run)
    texts = _prompts(prompt, prompts, settings)

    if nproc > 1 and not is_worker():
        options = {"prompts": prompts, **given, "step": step, "device": device, "dtype": dtype, "batch_size": batch_size}
        flags = {"--ema": ema, "--compile": compile_model, "--fp8": fp8, "--allow-code": allow_code, "--json": as_json}
        raise typer.Exit(_launch(run, "" if prompts else str(texts[0]), options, flags, nproc))

    from andromeda.api import Andromeda
    from andromeda.generate.engine import Engine

    with ExitStack() as processes:
        mesh = None
        if is_worker():
            from andromeda.parallel.mesh import local_device
            from andromeda.parallel.tensor_inference import joined_processes, split
            from andromeda.train.state import resolve_device

            place = local_device(resolve_device(device, "--device").type)
            mesh, device = processes.enter_context(joined_processes(place)), str(place)
        model = Andromeda.from_run(run, device=device, dtype=dtype, ema=ema, step=step)
        if mesh is not None:
            split(model, mesh)
        model.optimize_for_inference(fp8=fp8, compile=compile_model)
        pieces = Engine(model, model.tokenizer, batch=batch_size).stream(texts, **settings)
        if mesh is not None and mesh.get_local_rank():
            for _ in pieces:  # the first process prints
                pass
        elif as_json:
            _print_json(pieces, texts)
        elif prompts:
            _print_blocks(pieces, texts)
        else:
            _print_stream(pieces)


def _launch(run: Path, prompt: str, options: dict[str, Any], flags: dict[str, bool], nproc: int) -> int:
    """The same call for each of several processes, which must draw the same tokens."""
    import secrets

    from andromeda.parallel.launch import launch

    options["seed"] = secrets.randbits(32) if options["seed"] is None else options["seed"]
    named = [(f"--{name.replace('_', '-')}", value) for name, value in options.items() if name != "stop" and value is not None]
    named += [("--stop", text) for text in options["stop"] or ()]
    given = [f"{name}={value}" for name, value in named]
    return launch(["generate", *given, *(flag for flag, wanted in flags.items() if wanted), "--", str(run), prompt], nproc)


def _prompts(prompt: str, file: Path | None, settings: dict[str, Any]) -> Sequence[str | list[int]]:
    """The prompts. They and the settings are checked before the model is loaded."""
    from andromeda.generate.generation_config import parse_generation_config
    from andromeda.generate.prompts import read_prompts, read_stdin

    parse_generation_config(FLAGS, **settings)
    if file and prompt:
        raise RequestError("Give a prompt or --prompts, not both.")
    if file:
        return read_prompts(file)
    return [read_stdin() if prompt == "-" else prompt]


def _print_stream(pieces: Iterator[StreamChunk]) -> None:
    """Text on stdout as it is generated, statistics on stderr."""
    for piece in pieces:
        sys.stdout.write(_printable(piece.text))
        sys.stdout.flush()
        if piece.completion:
            sys.stdout.write("\n")
            sys.stdout.flush()
            _print_figures(piece.completion)


def _print_blocks(pieces: Iterator[StreamChunk], prompts: Sequence[str | list[int]]) -> None:
    """A heading and an answer for each prompt, in their order."""
    for completion in _in_order(pieces, len(prompts)):
        prompt = prompts[completion.index]
        heading = json.dumps(prompt, ensure_ascii=False)
        print(f"{completion.index + 1}. {heading if len(heading) <= 100 else heading[:97] + '...'}")
        print(_printable(completion.text) or completion.ids, end="\n\n", flush=True)


def _print_json(pieces: Iterator[StreamChunk], prompts: Sequence[str | list[int]]) -> None:
    from dataclasses import asdict

    for completion in _in_order(pieces, len(prompts)):
        answer = {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(completion).items()}
        figures = {"new_tokens": len(completion.ids), "tokens_per_second": round(completion.tokens_per_second, 2)}
        print(json.dumps({"prompt": prompts[completion.index], **answer, **figures}, ensure_ascii=False), flush=True)


def _in_order(pieces: Iterator[StreamChunk], count: int) -> Iterator[Completion]:
    """Completions in the order of their prompts, each as soon as those before it are done; a progress bar on stderr counts them."""
    from rich.console import Console
    from rich.progress import Progress

    waiting: dict[int, Completion] = {}
    following = 0
    with Progress(console=Console(stderr=True), disable=count == 1 or not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("prompts", total=count)
        for piece in pieces:
            if piece.completion:
                waiting[piece.index] = piece.completion
                bar.advance(task)
            while following in waiting:
                yield waiting.pop(following)
                following += 1


def _print_figures(completion: Completion) -> None:
    from rich.console import Console

    c = completion
    Console(stderr=True, highlight=False).print(
        f"{len(c.ids)} tokens after a prompt of {c.prompt_tokens}, {c.tokens_per_second:.1f} tokens/s, ended by {c.finish}, "
        f"KV cache {c.cache_bytes / 2**20:.2f} MiB, seed {c.seed}",
        style="dim",
        soft_wrap=True,
    )


def _printable(text: str) -> str:
    """On a terminal, control characters as visible symbols: a model may write any byte, and escape sequences would control the terminal."""
    if not sys.stdout.isatty():
        return text
    controls = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(range(127, 160), "\ufffd")
    return text.translate(controls)
