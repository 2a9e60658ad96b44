"""`andromeda export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from andromeda.cli.arguments import AllowCode, check_exists
from andromeda.utils.errors import ConfigError

DTYPES = ("fp32", "bf16", "fp16", "int8", "fp8")


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[Path, typer.Option(help="The folder that is written, empty or new; with --gguf the file.")],
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, bf16, fp16, int8 or fp8.")] = "fp32",
    gguf: Annotated[str, typer.Option(help="Write a GGUF file for llama.cpp instead: F32, F16, Q8_0 or Q4_0.")] = "",
    step: Annotated[int | None, typer.Option(help="Export the checkpoint of this step; the newest by default.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Export the moving average of the weights.")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Write a model as a Hugging Face folder that transformers loads (weights, configuration, tokenizer, model card), or as GGUF."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    if gguf and dtype != "fp32":
        raise ConfigError("--dtype is of a Hugging Face folder: leave it out with --gguf, which names the file's type.")
    check_exists(run)
    if gguf:
        _gguf(run, to, gguf, step, ema)
    else:
        _folder(run, to, dtype, step, ema)


def _folder(run: Path, to: Path, dtype: str, step: int | None, ema: bool) -> None:
    from andromeda.evaluate.rounding_loss import rounding_loss
    from andromeda.hub.export_folder import export_run, push_command, usage
    from andromeda.hub.parameter_names import hub_name
    from andromeda.hub.quantize import KINDS, rounding
    from andromeda.report.hub_card import hub_card
    from andromeda.report.model_sections import parameter_count
    from andromeda.report.run_data import read_run

    record = read_run(run)
    measured: list[tuple[str, str]] = []

    def card(remote_code: bool) -> str:
        if dtype in KINDS:
            loss = rounding_loss(run, rounding(dtype, hub_name), step=step, average=ema)
            measured.append((f"Weights in {dtype}", str(loss)))
        return hub_card(record, parameter_count(record), usage(to, remote_code), measured)

    exported = export_run(run, to, dtype=dtype, step=step, average=ema, card=card)
    code = f" with its modeling file, for {exported.reason}" if exported.reason else ""
    name = exported.config["architectures"][0]
    print(f"{to}: {'an' if name[0] == 'A' else 'a'} {name}{code}")
    for title, text in measured:
        print(f"{title}: {text}")
    print(f"publish it: {push_command(to)}")


def _gguf(run: Path, to: Path, kind: str, step: int | None, ema: bool) -> None:
    from andromeda.evaluate.rounding_loss import rounding_loss
    from andromeda.hub.gguf_file import export_gguf, gguf_rounding

    export_gguf(run, to, kind, step=step, average=ema)
    print(f"{to}: {to.stat().st_size:,} bytes")
    if kind.startswith("Q"):
        print(f"Weights in {kind}: {rounding_loss(run, gguf_rounding(kind), step=step, average=ema)}")
