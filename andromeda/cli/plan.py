"""`andromeda plan`: parameters, FLOPs, memory, time and cost of a run before it is started."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from andromeda.cli.arguments import AllowCode
from andromeda.utils.errors import ConfigError

if TYPE_CHECKING:
    from andromeda.config.run import RunConfig
    from andromeda.plan import HardwareSetup, RunPlan
    from andromeda.plan.simulation import StepPrediction

UNCERTAIN = (0.6, 1.7)
"""Shares of a device's memory between which an estimate does not decide whether a run fits."""


def plan(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="PRESET|FILE|RUN|KEY=VALUE", help="Configurations to compare, and changes to all of them."),
    ],
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per sequence (train.seq_len); a shorter model.max_seq_len is raised to it.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Sequences per step (train.batch_size); a train.micro_batch_size that does not divide it is lowered."),
    ] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, b200, 4090, or cpu (this one, measured now).")] = "h200",
    parallel: Annotated[str, typer.Option(help="Device mesh, such as replicate=8,shard=4,tensor=2; by default that of [parallel].")] = "",
    tokens: Annotated[float, typer.Option(help="Tokens of the whole run, such as 20e9; 0 takes the configuration's.")] = 0.0,
    price: Annotated[float, typer.Option(help="Dollars per GPU-hour.")] = 0.0,
    mfu: Annotated[float, typer.Option(min=0.01, max=1.0, help="Model FLOPs utilization to assume for training.")] = 0.4,
    details: Annotated[bool, typer.Option("--details", help="All tables, and exact memory (some seconds more).")] = False,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Also run one step of the first process on fake tensors: what it sends and holds.")
    ] = False,
    allow_code: AllowCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Estimate a run before it is started: whether it fits, time and cost; parameters, FLOPs and memory by part with --details.

    Besides presets and files, gpt3-175b, llama-7b and llama-65b can be planned.
    """
    _check(seq_len, batch_size, tokens, price)
    changes = [word for word in sources if "=" in word]
    configs = {word: _load(word, changes, seq_len, batch_size) for word in sources if "=" not in word}
    if not configs:
        raise ConfigError(f"{' '.join(sources)} names no configuration: give a preset or a file first, such as `andromeda plan andromeda`.")

    from andromeda.plan import HardwareSetup
    from andromeda.plan.communication import parse_layout
    from andromeda.utils.hardware import find_hardware

    counted = {name: config for name, config in configs.items() if _is_countable(name, config)}
    if not counted:
        return
    hardware, is_gpu = find_hardware(gpu), gpu.lower() != "cpu"
    places = {
        name: HardwareSetup(hardware, is_gpu, parse_layout(parallel, config.parallel), price, mfu) for name, config in counted.items()
    }
    plans = [_plan(name, config, places[name], int(tokens), quick=not (details or as_json)) for name, config in counted.items()]
    simulations = [_simulated(plan, counted[plan.name], places[plan.name]) for plan in plans] if simulate else []
    place = next(iter(places.values()))
    if as_json:
        import json
        from dataclasses import asdict

        found = {"plans": [asdict(p) for p in plans], "simulations": [asdict(s) for s in simulations]}
        print(json.dumps({"gpu": asdict(place.hardware), **found}, indent=2))
        return
    _print(plans, place, details)
    if simulations:
        _print_simulations(plans, simulations, place)


def _check(seq_len: int | None, batch_size: int | None, tokens: float, price: float) -> None:
    """Refuse numbers that are out of range, not finite or not numbers."""
    for option, value, least in (
        ("--seq-len", seq_len, 1),
        ("--batch-size", batch_size, 1),
        ("--tokens", tokens, 0),
        ("--price", price, 0),
    ):
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"{option} must be a number of at least {least}, not {value}.")


def _load(source: str, changes: list[str], seq_len: int | None, batch_size: int | None) -> RunConfig:
    """A configuration with the changes; --seq-len and --batch-size adjust the keys that depend on them, unless a change sets those."""
    from importlib.resources import files

    from andromeda.config.load import load

    peer = files("andromeda") / "plan" / "peers" / f"{source}.toml"
    path = str(peer) if peer.is_file() else source
    plain = load(path)
    adjusted: dict[str, int] = {}
    if seq_len:
        adjusted |= {"train.seq_len": seq_len, "model.max_seq_len": max(seq_len, plain.model.max_seq_len)}
    if batch_size:
        adjusted |= {"train.batch_size": batch_size, "train.micro_batch_size": math.gcd(batch_size, plain.train.micro_batch_size)}
    return load(path, [*(f"{key}={value}" for key, value in adjusted.items()), *changes])


def _is_countable(name: str, config: RunConfig) -> bool:
    """Whether all of a configuration can be counted; otherwise what is known without its own classes is told, on stderr."""
    from andromeda.config.own_code import FLAG, is_allowed
    from andromeda.config.parts import own_classes
    from andromeda.utils.untrusted import printable

    own = [f"{key} = {path!r}" for key, path in own_classes(config).items() if not is_allowed(path)]
    if not own:
        return True
    model, train = config.model, config.train
    tokens = train.batch_size * (train.seq_len or model.max_seq_len)
    known = (
        f"{model.num_layers:,} layers of hidden size {model.hidden_size:,}, vocabulary {model.vocab_size:,}, "
        f"{train.steps:,} steps of {tokens:,} tokens, {train.steps * tokens:,} in all"
    )
    what = "parameters, FLOPs, memory, time and cost cannot be counted without importing"
    print(printable(f"{name}: {known}; {what} {' and '.join(own)}: if you trust that code, add {FLAG}."), file=sys.stderr)
    return False


def _plan(name: str, config: RunConfig, place: HardwareSetup, tokens: int, quick: bool) -> RunPlan:
    """The plan of one configuration; quick: with an estimate of memory, unless that is near what the device has."""
    from andromeda.plan import plan

    if sys.stderr.isatty():
        print(f"planning {name} ...", end="\r", file=sys.stderr)
    planned = plan(name, config, place, tokens, quick)
    if planned.memory_is_estimate and UNCERTAIN[0] < planned.memory.peak / place.hardware.memory < UNCERTAIN[1]:
        return plan(name, config, place, tokens)
    return planned


def _simulated(plan: RunPlan, config: RunConfig, place: HardwareSetup) -> StepPrediction:
    from andromeda.plan.simulation import predict_step

    if sys.stderr.isatty():
        print(f"simulating {plan.name} ...", end="\r", file=sys.stderr)
    return predict_step(config, place, plan.precision)


def _print_simulations(plans: list[RunPlan], simulations: list[StepPrediction], place: HardwareSetup) -> None:
    from andromeda.cli.tables import show
    from andromeda.plan.plan_tables import simulation_lines
    from andromeda.plan.simulation import NETWORK

    lines = simulation_lines(simulations)
    show("One step of one process, simulated on paper", ("", *(plan.name for plan in plans)), lines, right=range(1, len(plans) + 1))
    print(
        f"Nothing was run on a GPU: {place.hardware.link / 2e9:,.0f} GB/s a direction are assumed within a host of 8, "
        f"{NETWORK / 1e9:,.0f} GB/s for each GPU between hosts, and an MFU of {place.mfu:.0%} without exchange."
    )


def _print(plans: list[RunPlan], place: HardwareSetup, details: bool) -> None:
    from andromeda.cli.tables import show
    from andromeda.plan.plan_tables import sections, summary

    names, device, gpus = [plan.name for plan in plans], place.hardware, max(plan.layout.world_size for plan in plans)
    title = f"{gpus} x {device.name}" if gpus > 1 else device.name
    tables = sections(plans, gpus, place.mfu) if details else [(title, summary(plans, place.mfu))]
    for title, lines in tables:
        show(title, ("", *names), lines, right=range(1, len(names) + 1))
    for plan in plans:
        print(f"{plan.name}: {_verdict(plan, device.memory)} of the memory of one {device.name}.")
    if not details:
        exact = ", exact peak memory" * any(plan.memory_is_estimate for plan in plans)
        print(f"--details: parameters, FLOPs and memory by part{exact}, roofline times, serving.")
        return
    rates = ", ".join(f"{rate / 1e12:,.0f} in {kind}" for kind in ("fp32", "bf16", "fp8") if (rate := device.rate(kind)))
    print(f"Roofline: {rates} TFLOP/s and {device.bandwidth / 1e12:.2f} TB/s ({device.source}).")


def _verdict(plan: RunPlan, memory: float) -> str:
    share = plan.memory.peak / memory
    about = "about " if plan.memory_is_estimate else ""
    return f"{'fits' if share <= 1 else 'does not fit'}, needs {about}{max(share, 0.01):.0%}"
