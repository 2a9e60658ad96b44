"""The page, section by section."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from andromeda.model.flops import training_flops_per_token
from andromeda.plan.estimate import ParameterCount
from andromeda.report.evaluation_sections import evaluation_section, position_section, retrieval_section
from andromeda.report.fragments import code, shell_quote
from andromeda.report.model_sections import architecture, manifest_section, model_card_section, parameter_count, size_section
from andromeda.report.run_data import RunData, held_out_bits, read_run, training_status
from andromeda.report.training_sections import curves_section, probes_section, samples_section
from andromeda.utils.errors import ConfigError
from andromeda.utils.files import write_whole
from andromeda.utils.formatting import format_duration, format_number, format_si
from andromeda.utils.html import Child, Markup, page, tiles

NAME = "report.html"


def build_report(run: str | Path) -> str:
    """The page of a run folder as HTML. Raises CheckpointError or ConfigError, one sentence, when it is none."""
    record = read_run(run)
    counted = parameter_count(record)
    sections = [
        curves_section(record),
        probes_section(record),
        evaluation_section(record),
        position_section(record),
        retrieval_section(record),
        samples_section(record),
        size_section(record, counted),
        manifest_section(record),
        model_card_section(record, counted),
    ]
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    foot = ["Made by ", code(f"andromeda report {shell_quote(record.path)}"), f", {made}. One file; nothing is loaded from anywhere."]
    return page(record.config.name, subtitle(record, counted), sections, key_figures(record, counted), foot)


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the page (by default report.html in the run folder) and return where it is. Raises an AndromedaError, one sentence."""
    path = Path(run) / NAME if out is None else Path(out)
    text = build_report(run)
    try:
        write_whole(path, text.encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): give another place with --out.") from None
    return path


def subtitle(record: RunData, counted: ParameterCount | None) -> Child:
    """The run in a paragraph that a stranger understands: what it is, what it learned from, how far it came, how good it is."""
    size_section = f" of {format_si(counted.total)} parameters" if counted else ""
    tokens, bits = record.metrics.latest("tokens"), held_out_bits(record)
    sources = ", ".join(dict.fromkeys(source.name for corpus in record.corpora.values() for source in corpus.sources))
    learned = f" It has learned from {format_si(tokens)} tokens{f' of {sources}' if sources else ''}." if tokens else ""
    score = (
        f" Of text that it never saw, it needs {format_number(bits)} bits for a byte; guessing bytes takes 8." if bits is not None else ""
    )
    return f"A language model{size_section}: {training_status(record)}.{learned}{score} Built of {architecture(record.config.model)}."


def key_figures(record: RunData, counted: ParameterCount | None) -> Markup:
    """Tiles; those that are not known are left out."""
    metrics = record.metrics
    held_out = held_out_bits(record)
    tokens, seconds, loss = metrics.latest("tokens"), metrics.latest("seconds"), metrics.latest("loss")
    shown: list[tuple[str, Child, Child]] = []
    if held_out is not None:
        beside = ", ".join(f"{name} -9 {format_number(v, 3)}" for name, v in record.compressors.items())
        shown.append(("Held-out text", format_number(held_out), "bits per byte" + (f"; {beside}" if beside else "")))
    elif bits := metrics.latest("validation/bits_per_byte"):
        shown.append(("Validation", format_number(bits), "bits per byte"))
    if loss is not None:
        validation = metrics.latest("validation/loss")
        shown.append(
            (
                "Training loss",
                format_number(loss),
                f"nats per token; validation {format_number(validation)}" if validation else "nats per token",
            )
        )
    if counted is not None:
        shown.append(("Parameters", format_si(counted.total), f"{format_si(counted.active)} active for a token"))
    if tokens:
        shown.append(("Tokens", format_si(tokens), "learned from"))
    if seconds and tokens:
        shown.append(("Time in steps", format_duration(seconds), f"{tokens / seconds:,.0f} tokens per second"))
        train = record.config.train
        flops = training_flops_per_token(record.config.model, train.seq_len or record.config.model.max_seq_len) * tokens
        shown.append(("Training FLOPs", format_si(flops).replace("B", "G"), "matrix products"))
    return tiles(shown)
