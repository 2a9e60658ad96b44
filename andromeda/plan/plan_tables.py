"""Tables of plans: one line per quantity, one column per configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from andromeda.plan.estimate import RunPlan
from andromeda.plan.memory import HALF

if TYPE_CHECKING:
    from andromeda.plan.simulation import StepPrediction

GIB = 1 << 30
Line = tuple[str, ...]
Reader = Callable[[RunPlan], str]


def sections(plans: Sequence[RunPlan], gpus: int, mfu: float) -> list[tuple[str, list[Line]]]:
    """All tables, each a title and its lines; quantities that no plan has are left out."""
    built = [
        ("Parameters", _parameters(plans)),
        ("Forward FLOPs per token, by part", _forward(plans)),
        ("Training FLOPs per token", _lines(plans, TRAINING)),
        ("Training memory per GPU", _lines(plans, MEMORY)),
        ("Checkpoint", _lines(plans, CHECKPOINT)),
        ("Serving one sequence on one GPU, in bf16", _lines(plans, SERVING) + _relative(plans)),
        (f"Time and cost on {gpus} GPU{'s' if gpus > 1 else ''}", _lines(plans, _time(mfu))),
    ]
    if gpus > 1:
        built.append(("Bytes that one GPU sends in a step (computed, not measured)", _sent(plans)))
    return built


def count(number: float) -> str:
    """6.9 M, 2.33 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:.0f}"


def flops(number: float) -> str:
    """With an SI prefix: 6.27 G."""
    return count(number).replace("B", "G")


def size(number: float) -> str:
    """In GiB, MiB or KiB."""
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= unit:
            return f"{number / unit:,.2f} {name}"
    return f"{number:.0f} B"


def duration(seconds: float | None) -> str:
    """In the largest suitable unit."""
    if seconds is None:
        return "unknown"
    for unit, name in ((86400 * 365.25, "years"), (86400, "days"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= (2 if unit > 1 else 1) * unit or name == "µs":
            return f"{seconds / unit:,.2f} {name}"
    return ""


def _hours(hours: float | None) -> str:
    return duration(None if hours is None else hours * 3600)


def _lines(plans: Sequence[RunPlan], readers: dict[str, Reader]) -> list[Line]:
    return [(label, *(read(plan) for plan in plans)) for label, read in readers.items()]


def _table(labels: Sequence[str], columns: Sequence[dict[str, float]], show: Callable[[float], str]) -> list[Line]:
    return [(label, *(show(column[label]) if label in column else "" for column in columns)) for label in labels]


def _sent(plans: Sequence[RunPlan]) -> list[Line]:
    columns = [plan.sent for plan in plans]
    return _lines(plans, {"layout": lambda p: p.layout.describe()}) + _table(_union(columns), columns, size)


def simulation_lines(steps: Sequence[StepPrediction]) -> list[Line]:
    """Lines of the table of simulations, one column each."""
    columns = [{kind: float(sent) for kind, sent in step.step.sent.items()} for step in steps]

    def line(label: str, read: Callable[[StepPrediction], str]) -> Line:
        return label, *(read(step) for step in steps)

    return [
        line("GPUs", lambda s: f"{s.layout.world_size:,}"),
        line("layout", lambda s: s.layout.describe()),
        line("state between steps", lambda s: size(s.step.state)),
        line("peak memory within the step", lambda s: size(s.step.peak)),
        *((f"sent by {label}", *values) for label, *values in _table(_union(columns), columns, size)),
        line("  of which within a host", lambda s: size(s.step.within_host)),
        line("computing", lambda s: duration(s.computing)),
        line("exchanging", lambda s: duration(s.exchanging)),
        line("step, if all exchange is hidden", lambda s: duration(s.fastest)),
        line("step, if none is", lambda s: duration(s.slowest)),
        line("tokens/s of all GPUs", lambda s: f"{count(s.tokens / s.slowest)} to {count(s.tokens / s.fastest)}"),
    ]


def _union(columns: Sequence[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(label for column in columns for label in column))


def _parameters(plans: Sequence[RunPlan]) -> list[Line]:
    columns = [{k: float(v) for k, v in plan.parameters.parts.items()} for plan in plans]
    totals = _lines(plans, {"total": lambda p: f"{p.parameters.total:,}", "active for one token": lambda p: f"{p.parameters.active:,}"})
    return _table(_union(columns), columns, lambda n: f"{n:,.0f}") + totals


def _forward(plans: Sequence[RunPlan]) -> list[Line]:
    columns = [plan.flops.forward for plan in plans]
    return [*_table(_union(columns), columns, flops), ("all", *(flops(sum(column.values())) for column in columns))]


def _relative(plans: Sequence[RunPlan]) -> list[Line]:
    """Serving memory relative to the first configuration."""
    first = plans[0]
    ratios: dict[str, Reader] = {
        f"weights, relative to {first.name}": lambda p: f"{p.parameters.total / first.parameters.total:.1f}",
        f"KV cache per token, relative to {first.name}": lambda p: f"{p.cache_per_token / first.cache_per_token:.1f}",
        f"weights and full KV cache, relative to {first.name}": lambda p: f"{_served_bytes(p) / _served_bytes(first):.1f}",
    }
    return _lines(plans, ratios) if len(plans) > 1 else []


def _served_bytes(plan: RunPlan) -> int:
    return HALF * plan.parameters.total + plan.cache_full


def _served(figure: str) -> Reader:
    return lambda plan: duration(getattr(plan.serving, figure, None))


def summary(plans: Sequence[RunPlan], mfu: float) -> list[Line]:
    """The answer in short: size, peak memory, time and cost."""
    return _lines(plans, SUMMARY | _summary_time(mfu))


SUMMARY: dict[str, Reader] = {
    "parameters": lambda p: f"{p.parameters.total:,}",
    "training FLOPs per token": lambda p: flops(p.flops.training),
    "KV cache per token, bf16": lambda p: size(p.cache_per_token),
    "training state per GPU": lambda p: size(p.memory.state.total),
    "peak memory per GPU": lambda p: f"{'about ' if p.memory_is_estimate else ''}{size(p.memory.peak)}",
    "tokens": lambda p: f"{count(p.budget.tokens)} in {p.budget.steps:,} steps",
}


def _summary_time(mfu: float) -> dict[str, Reader]:
    *_, (time, read_time), (cost, read_cost) = _time(mfu).items()
    return {time: read_time, cost: lambda p: read_cost(p) or "give --price"}


TRAINING: dict[str, Reader] = {
    "sequence length": lambda p: f"{p.sequence:,}",
    "model FLOPs (attention by its mask)": lambda p: flops(p.flops.training),
    "model FLOPs (full attention)": lambda p: flops(p.flops.training_full),
    "hardware FLOPs (with recomputation)": lambda p: flops(p.flops.hardware),
}

MEMORY: dict[str, Reader] = {
    "micro-batch": lambda p: f"{p.micro_rows} x {p.sequence:,}",
    "compute dtype": lambda p: p.precision + (", compiled" if p.compiled else ""),
    "weights": lambda p: size(p.memory.state.weights),
    "weights in the compute dtype": lambda p: size(p.memory.passing.casts),
    "gradients": lambda p: size(p.memory.state.gradients),
    "optimizer": lambda p: f"{size(p.memory.state.optimizer)} ({p.optimizer})",
    "moving average": lambda p: size(p.memory.state.average),
    "activations saved for backward": lambda p: f"{size(p.memory.passing.saved)} (checkpointing {p.checkpointing})",
    "  of which copies of weights": lambda p: size(p.memory.passing.saved_copies),
    "  of which by the loss": lambda p: size(p.memory.passing.loss),
    "gathered weights (FSDP)": lambda p: size(p.memory.gathered),
    "peak": lambda p: size(p.memory.peak),
}

CHECKPOINT: dict[str, Reader] = {
    "on disk": lambda p: size(p.checkpoint.disk),
    "on disk while the next is written": lambda p: size(p.checkpoint.disk_peak),
    "host memory while saving from a GPU": lambda p: size(p.checkpoint.host),
}

SERVING: dict[str, Reader] = {
    "weights": lambda p: size(HALF * p.parameters.total),
    "KV cache per token": lambda p: size(p.cache_per_token),
    "context": lambda p: f"{p.context:,}",
    "KV cache of a full context": lambda p: size(p.cache_full),
    "weights and full KV cache": lambda p: size(_served_bytes(p)),
    "prefill of a full context (roofline)": _served("prefill"),
    "decoding, short context (roofline)": _served("token"),
    "decoding, full context (roofline)": _served("token_full"),
}


def _time(mfu: float) -> dict[str, Reader]:
    return {
        "tokens per step": lambda p: f"{p.rows * p.sequence:,}",
        "step (roofline)": lambda p: duration(p.step_floor),
        "steps": lambda p: f"{p.budget.steps:,}",
        "tokens": lambda p: count(p.budget.tokens),
        "run (roofline)": lambda p: _hours(p.budget.floor_hours),
        f"run at an MFU of {mfu:.0%}": lambda p: _hours(p.budget.hours),
        f"cost at an MFU of {mfu:.0%}": lambda p: "" if p.budget.cost is None else f"${p.budget.cost:,.0f}",
    }
