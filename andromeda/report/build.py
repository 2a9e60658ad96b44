"""The page, section by section."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from andromeda.report.context_use import position, retrieval
from andromeda.report.curves import curves
from andromeda.report.evaluations import evaluations
from andromeda.report.model_card import card
from andromeda.report.parts import command, quoted
from andromeda.report.probes import probes
from andromeda.report.provenance import provenance
from andromeda.report.record import read_record
from andromeda.report.samples import samples
from andromeda.report.size import parameters, size
from andromeda.report.summary import key_figures, subtitle
from andromeda.utils.errors import ConfigError
from andromeda.utils.files import write_whole
from andromeda.utils.html import page

NAME = "report.html"


def build_report(run: str | Path) -> str:
    """The page of a run folder as HTML. Raises CheckpointError or ConfigError, one sentence, when it is none."""
    record = read_record(run)
    counted = parameters(record)
    sections = [
        curves(record),
        probes(record),
        evaluations(record),
        position(record),
        retrieval(record),
        samples(record),
        size(record, counted),
        provenance(record),
        card(record, counted),
    ]
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    foot = ["Made by ", command(f"andromeda report {quoted(record.path)}"), f", {made}. One file; nothing is loaded from anywhere."]
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
