"""The page, section by section."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from andromeda.data.files import write_whole
from andromeda.errors import ConfigError
from andromeda.study.page import page
from andromeda.study.report.card import card
from andromeda.study.report.curves import curves
from andromeda.study.report.evaluations import evaluations
from andromeda.study.report.parts import command, quoted
from andromeda.study.report.probes import probes
from andromeda.study.report.provenance import provenance
from andromeda.study.report.reach import position, retrieval
from andromeda.study.report.record import read_record
from andromeda.study.report.samples import samples
from andromeda.study.report.size import parameters, size
from andromeda.study.report.summary import key_figures, subtitle

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
