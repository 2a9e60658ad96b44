"""`andromeda export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from andromeda.cli.arguments import check_run
from andromeda.utils.errors import ConfigError

DTYPES = ("fp32", "bf16", "fp16")


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[Path, typer.Option(help="The folder that is written; it must be empty or new.")],
    dtype: Annotated[str, typer.Option(help="Of the weights: fp32, bf16 or fp16.")] = "fp32",
    step: Annotated[int | None, typer.Option(help="Export the checkpoint of this step; the newest by default.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Export the moving average of the weights.")] = False,
) -> None:
    """Write a model as a Hugging Face folder that transformers loads: weights, configuration, tokenizer, model card."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}.")
    check_run(run)

    from andromeda.hub.export_folder import export_run, push_command, usage
    from andromeda.report.hub_card import hub_card
    from andromeda.report.model_sections import parameter_count
    from andromeda.report.run_data import read_run

    record = read_run(run)

    def card(remote_code: bool) -> str:
        return hub_card(record, parameter_count(record), usage(to, remote_code))

    exported = export_run(run, to, dtype=dtype, step=step, average=ema, card=card)
    kind = exported.config["architectures"][0]
    code = f" with its modeling file, for {exported.reason}" if exported.reason else ""
    print(f"{to}: a {kind}{code}")
    print(f"publish it: {push_command(to)}")
