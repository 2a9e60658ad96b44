"""The head of the page: what this is and how it stands, in a sentence and a few figures."""

from __future__ import annotations

from andromeda.model.flops import training_flops_per_token
from andromeda.plan.parameters import Parameters
from andromeda.report.architecture_text import architecture
from andromeda.report.record import Record
from andromeda.utils.formatting import duration, figure, short
from andromeda.utils.html import Child, Html, tiles


def standing(record: Record) -> str:
    """How far the run is."""
    step, steps = record.metrics.step, record.config.train.steps
    if not record.metrics.lines:
        return f"saved at step {record.newest:,}" if record.newest is not None else "not begun"
    return f"training finished after {steps:,} steps" if record.finished else f"at step {step:,} of {steps:,} of its training"


def subtitle(record: Record, counted: Parameters | None) -> Child:
    """The run in a paragraph that a stranger understands: what it is, what it learned from, how far it came, how good it is."""
    size = f" of {short(counted.total)} parameters" if counted else ""
    tokens, bits = record.metrics.last("tokens"), held_out_bits(record)
    sources = ", ".join(dict.fromkeys(source.name for corpus in record.corpora.values() for source in corpus.sources))
    learned = f" It has learned from {short(tokens)} tokens{f' of {sources}' if sources else ''}." if tokens else ""
    score = f" Of text that it never saw, it needs {figure(bits)} bits for a byte; guessing bytes takes 8." if bits is not None else ""
    return f"A language model{size}: {standing(record)}.{learned}{score} Built of {architecture(record.config.model)}."


def held_out_bits(record: Record) -> float | None:
    """Bits per byte of the held-out text, by the newest evaluation."""
    return next((r.result.get("bits_per_byte") for r in record.of_kind("bits") if r.name == r.kind), None)


def key_figures(record: Record, counted: Parameters | None) -> Html:
    """Tiles; those that are not known are left out."""
    metrics = record.metrics
    held_out = held_out_bits(record)
    tokens, seconds, loss = metrics.last("tokens"), metrics.last("seconds"), metrics.last("loss")
    shown: list[tuple[str, Child, Child]] = []
    if held_out is not None:
        beside = ", ".join(f"{name} -9 {figure(v, 3)}" for name, v in record.compressors.items())
        shown.append(("Held-out text", figure(held_out), "bits per byte" + (f"; {beside}" if beside else "")))
    elif bits := metrics.last("validation/bits_per_byte"):
        shown.append(("Validation", figure(bits), "bits per byte"))
    if loss is not None:
        validation = metrics.last("validation/loss")
        shown.append(
            ("Training loss", figure(loss), f"nats per token; validation {figure(validation)}" if validation else "nats per token")
        )
    if counted is not None:
        shown.append(("Parameters", short(counted.total), f"{short(counted.active)} active for a token"))
    if tokens:
        shown.append(("Tokens", short(tokens), "learned from"))
    if seconds and tokens:
        shown.append(("Time in steps", duration(seconds), f"{tokens / seconds:,.0f} tokens per second"))
        train = record.config.train
        flops = training_flops_per_token(record.config.model, train.seq_len or record.config.model.max_seq_len) * tokens
        shown.append(("Training FLOPs", short(flops).replace("B", "G"), "matrix products"))
    return tiles(shown)
