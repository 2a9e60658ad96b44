"""`andromeda plan`: parameters, FLOPs, memory, time and cost of a run before it is started."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from andromeda.utils.errors import ConfigError

if TYPE_CHECKING:
    from andromeda.config.run import RunConfig
    from andromeda.plan import HardwareSetup, RunPlan


def plan(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="PRESET|FILE|RUN... [KEY=VALUE...]", help="Configurations side by side, and changes to all of them."),
    ],
    seq: Annotated[int | None, typer.Option(help="Tokens of a row (train.seq_len); a shorter model.max_seq_len is raised to it.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Rows of one step (train.batch_size); a train.micro_batch_size that does not divide it is lowered.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, b200, 4090, or cpu (this one, measured now).")] = "h200",
    parallel: Annotated[str, typer.Option(help="How many GPUs, such as dp=8,fsdp=4,tp=2.")] = "",
    tokens: Annotated[float, typer.Option(help="Tokens of the whole run, such as 20e9 (0: as configured).")] = 0.0,
    price: Annotated[float, typer.Option(help="Dollars of one GPU for one hour.")] = 0.0,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="Share of the vendor's peak that training is taken to reach.")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a run needs: parameters, FLOPs by part, memory, time, cost, and how it divides over GPUs.

    Beside presets and files, gpt3-175b, llama-7b and llama-65b can be named.
    """
    from andromeda.plan import HardwareSetup
    from andromeda.plan.device_mesh import parse_mesh
    from andromeda.utils.hardware import find_hardware

    _check(seq, batch, tokens, price)
    changes = [word for word in sources if "=" in word]
    place = HardwareSetup(find_hardware(gpu), gpu.lower() != "cpu", parse_mesh(parallel), price, mfu)
    configs = {word: _load(word, changes, seq, batch) for word in sources if "=" not in word}
    if not configs:
        raise ConfigError(f"{' '.join(sources)} names no configuration: give a preset or a file first, such as `andromeda plan andromeda`.")
    plans = [_plan(name, config, place, int(tokens)) for name, config in configs.items()]
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps({"gpu": asdict(place.hardware), "mesh": asdict(place.mesh), "plans": [asdict(p) for p in plans]}, indent=2))
        return
    _print(plans, place)


def _check(seq: int | None, batch: int | None, tokens: float, price: float) -> None:
    """Refuse figures that are none."""
    for option, value, least in (("--seq", seq, 1), ("--batch", batch, 1), ("--tokens", tokens, 0), ("--price", price, 0)):
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"{option} must be a number of at least {least}, not {value}.")


def _load(source: str, changes: list[str], seq: int | None, batch: int | None) -> RunConfig:
    """A configuration with the changes; --seq and --batch take along what they would not fit with, unless a change names it."""
    from importlib.resources import files

    from andromeda.config.load import load

    peer = files("andromeda.plan") / "peers" / f"{source}.toml"
    path = str(peer) if peer.is_file() else source
    plain = load(path)
    wished: dict[str, int] = {}
    if seq:
        wished |= {"train.seq_len": seq, "model.max_seq_len": max(seq, plain.model.max_seq_len)}
    if batch:
        wished |= {"train.batch_size": batch, "train.micro_batch_size": math.gcd(batch, plain.train.micro_batch_size)}
    return load(path, [*(f"{key}={value}" for key, value in wished.items()), *changes])


def _plan(name: str, config: RunConfig, place: HardwareSetup, tokens: int) -> RunPlan:
    from andromeda.plan import plan

    if sys.stderr.isatty():
        print(f"planning {name} ...", end="\r", file=sys.stderr)
    return plan(name, config, place, tokens)


def _print(plans: list[RunPlan], place: HardwareSetup) -> None:
    from andromeda.cli.tables import show
    from andromeda.plan.plan_tables import sections

    names = [plan.name for plan in plans]
    for title, lines in sections(plans, place.mesh.gpus, place.mfu):
        show(title, ("", *names), lines, right=range(1, len(names) + 1))
    device = place.hardware
    for plan in plans:
        share = plan.memory.peak / device.memory
        print(f"{plan.name}: {'needs' if share <= 1 else 'does not fit, it needs'} {share:.0%} of the memory of one {device.name}.")
    rates = ", ".join(f"{rate / 1e12:,.0f} in {kind}" for kind in ("fp32", "bf16", "fp8") if (rate := device.rate(kind)))
    print(f"Least times are at {rates} TFLOP/s and {device.bandwidth / 1e12:.2f} TB/s ({device.source}).")
