"""Parameters by part, and the arithmetic of a token and of the run."""

from __future__ import annotations

from andromeda.model.flops import forward_flops_per_token, training_flops_per_token
from andromeda.model.meta_model import meta_model
from andromeda.plan.memory import cache_bytes
from andromeda.plan.parameters import Parameters, count
from andromeda.plan.tables import size as byte_size
from andromeda.report.parts import empty
from andromeda.report.record import Record
from andromeda.utils.errors import AndromedaError
from andromeda.utils.formatting import short
from andromeda.utils.html import Bar, Section, bars, facts, grid, join


def parameters(record: Record) -> Parameters | None:
    """Counted on the model built without numbers; None where it cannot be built here (a user's own class that is not installed)."""
    try:
        return count(meta_model(record.config.model))
    except AndromedaError:
        return None


def size(record: Record, counted: Parameters | None) -> Section:
    """The section."""
    lead = "Counted on the model itself; FLOPs are those of matrix products, attention by its mask."
    if counted is None:
        return Section("size", "Parameters and FLOPs", lead, empty("The model names a class that is not installed here."))
    model, train = record.config.model, record.config.train
    sequence = train.seq_len or model.max_seq_len
    forward = forward_flops_per_token(model, sequence)
    step = training_flops_per_token(model, sequence)
    tokens = record.metrics.last("tokens")
    total = sum(counted.parts.values())
    drawn = grid(
        bars("Parameters", [Bar(name, number, 1) for name, number in counted.parts.items()], unit=f"{total:,} in all", show=_whole),
        bars(
            "Forward FLOPs of a token",
            [Bar(name, number, 3) for name, number in forward.items()],
            unit=short(sum(forward.values())),
            show=_flops,
        ),
    )
    known = facts(
        [
            ("Parameters", f"{total:,}, of which {counted.active:,} take part in computing one token"),
            ("Training FLOPs of a token", f"{_flops(step)} in rows of {sequence:,} tokens (three times the forward pass)"),
            ("Training FLOPs so far", f"{_flops(step * tokens)} on {tokens:,.0f} tokens" if tokens else ""),
            ("Tokens per parameter", f"{tokens / total:.2f}" if tokens else ""),
            (
                "Cache of one token",
                f"{byte_size(cache_bytes(model))}, of a full context {byte_size(cache_bytes(model, model.max_seq_len))}, in bf16",
            ),
        ]
    )
    return Section("size", "Parameters and FLOPs", lead, join(drawn, known))


def _whole(value: float | None) -> str:
    return f"{value:,.0f}"


def _flops(value: float | None) -> str:
    return short(value).replace("B", "G")
