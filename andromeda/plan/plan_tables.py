"""A plan as lines of text: one quantity a line, one column a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from andromeda.plan.estimate import RunPlan
from andromeda.plan.memory import HALF

GIB = 1 << 30
Line = tuple[str, ...]
Reader = Callable[[RunPlan], str]


def sections(plans: Sequence[RunPlan], gpus: int, mfu: float) -> list[tuple[str, list[Line]]]:
    """Titles with their lines; quantities that no plan has are left out."""
    built = [
        ("Parameters", _parameters(plans)),
        ("Forward FLOPs per token, by part", _forward(plans)),
        ("FLOPs per trained token", _lines(plans, TRAINING)),
        ("Memory of training, on each GPU", _lines(plans, MEMORY)),
        ("A checkpoint", _lines(plans, CHECKPOINT)),
        ("Serving one sequence on one GPU, in bf16", _lines(plans, SERVING) + _beside(plans)),
        (f"Time and cost on {gpus} GPU{'s' if gpus > 1 else ''}", _lines(plans, _time(mfu))),
    ]
    if gpus > 1:
        built.append(("Sent by each GPU in one step (computed, not measured)", _lines(plans, TRAFFIC)))
    return built


def count(number: float) -> str:
    """6.9 M, 2.33 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:.0f}"


def flops(number: float) -> str:
    """With the prefix that reads best: 6.27 G."""
    return count(number).replace("B", "G")


def size(number: float) -> str:
    """In GiB, MiB or KiB."""
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= unit:
            return f"{number / unit:,.2f} {name}"
    return f"{number:.0f} B"


def duration(seconds: float | None) -> str:
    """In the unit that reads best."""
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


def _union(columns: Sequence[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(label for column in columns for label in column))


def _parameters(plans: Sequence[RunPlan]) -> list[Line]:
    columns = [{k: float(v) for k, v in plan.parameters.parts.items()} for plan in plans]
    totals = _lines(plans, {"total": lambda p: f"{p.parameters.total:,}", "active for one token": lambda p: f"{p.parameters.active:,}"})
    return _table(_union(columns), columns, lambda n: f"{n:,.0f}") + totals


def _forward(plans: Sequence[RunPlan]) -> list[Line]:
    columns = [plan.flops.forward for plan in plans]
    return [*_table(_union(columns), columns, flops), ("all", *(flops(sum(column.values())) for column in columns))]


def _beside(plans: Sequence[RunPlan]) -> list[Line]:
    """How many times the first one's memory the others take."""
    first = plans[0]
    ratios: dict[str, Reader] = {
        f"weights, times {first.name}'s": lambda p: f"{p.parameters.total / first.parameters.total:.1f}",
        f"cache of one token, times {first.name}'s": lambda p: f"{p.cache_per_token / first.cache_per_token:.1f}",
        f"weights and full cache, times {first.name}'s": lambda p: f"{_served_bytes(p) / _served_bytes(first):.1f}",
    }
    return _lines(plans, ratios) if len(plans) > 1 else []


def _served_bytes(plan: RunPlan) -> int:
    return HALF * plan.parameters.total + plan.cache_full


def _served(figure: str) -> Reader:
    return lambda plan: duration(getattr(plan.serving, figure, None))


TRAINING: dict[str, Reader] = {
    "sequence": lambda p: f"{p.sequence:,}",
    "model FLOPs (attention by its mask)": lambda p: flops(p.flops.training),
    "model FLOPs (attention in full)": lambda p: flops(p.flops.training_full),
    "hardware FLOPs (with what is computed twice)": lambda p: flops(p.flops.hardware),
}

MEMORY: dict[str, Reader] = {
    "rows of a micro-batch": lambda p: f"{p.micro_rows} of {p.sequence:,}",
    "precision of products": lambda p: p.precision + (", compiled" if p.compiled else ""),
    "weights": lambda p: size(p.memory.state.weights),
    "weights as products read them": lambda p: size(p.memory.passing.casts),
    "gradients": lambda p: size(p.memory.state.gradients),
    "optimizer": lambda p: f"{size(p.memory.state.optimizer)} ({p.optimizer})",
    "moving average": lambda p: size(p.memory.state.average),
    "saved for the backward pass": lambda p: f"{size(p.memory.passing.saved)} (checkpointing {p.checkpointing})",
    "of that, copies of weights": lambda p: size(p.memory.passing.saved_copies),
    "of that, by the loss": lambda p: size(p.memory.passing.loss),
    "gathered weights": lambda p: size(p.memory.gathered),
    "peak": lambda p: size(p.memory.peak),
}

CHECKPOINT: dict[str, Reader] = {
    "on disk": lambda p: size(p.checkpoint.disk),
    "on disk while the next is written": lambda p: size(p.checkpoint.disk_peak),
    "host memory while saving from a GPU": lambda p: size(p.checkpoint.host),
}

SERVING: dict[str, Reader] = {
    "weights": lambda p: size(HALF * p.parameters.total),
    "cache of one token": lambda p: size(p.cache_per_token),
    "context": lambda p: f"{p.context:,}",
    "cache of a full context": lambda p: size(p.cache_full),
    "weights and full cache": lambda p: size(_served_bytes(p)),
    "prefill of a full context, at least": _served("prefill"),
    "one token at a short context, at least": _served("token"),
    "one token at a full context, at least": _served("token_full"),
}

TRAFFIC: dict[str, Reader] = {
    "gathered weights (fsdp)": lambda p: size(p.traffic.gathering),
    "gradients (fsdp, dp)": lambda p: size(p.traffic.gradients),
    "activations (tp)": lambda p: size(p.traffic.activations),
}


def _time(mfu: float) -> dict[str, Reader]:
    return {
        "tokens of a step": lambda p: f"{p.rows * p.sequence:,}",
        "one step, at least": lambda p: duration(p.step_floor),
        "steps": lambda p: f"{p.budget.steps:,}",
        "tokens": lambda p: count(p.budget.tokens),
        "run, at least": lambda p: _hours(p.budget.floor_hours),
        f"run at an MFU of {mfu:.0%}": lambda p: _hours(p.budget.hours),
        f"cost at an MFU of {mfu:.0%}": lambda p: "" if p.budget.cost is None else f"${p.budget.cost:,.0f}",
    }
