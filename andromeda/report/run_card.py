"""The model card as the README.md of a run folder."""

from __future__ import annotations

from pathlib import Path

from andromeda.report.fragments import shell_quote
from andromeda.report.hub_card import literal
from andromeda.report.model_sections import first_command, model_card_facts, parameter_count
from andromeda.report.run_data import RunData, read_run
from andromeda.utils.files import write_whole
from andromeda.utils.untrusted import MalformedFile, read_text

NAME = "README.md"
MARK = "<!-- Written by andromeda: a README.md without this line is never replaced. -->"


def run_card(record: RunData) -> str:
    """The card of a run in Markdown: how to use it, and the facts of its model card."""
    folder = shell_quote(record.path)
    lines = [
        MARK,
        f"# {literal(record.config.name)}",
        "",
        "```bash",
        f'andromeda generate {folder} "..."',
        f"andromeda report {folder}",
        "```",
    ]
    for name, text in model_card_facts(record, parameter_count(record)):
        lines += ["", f"## {name}", "", literal(text)]
    if again := first_command(record):
        lines += ["", "## Trained by", "", "```bash", again.replace("```", ""), "```"]
    return "\n".join(lines) + "\n"


def write_run_card(run: str | Path) -> Path | None:
    """Write the card into the run folder; returns its path, or None where a README.md of somebody's own is there."""
    path = Path(run) / NAME
    try:
        if not read_text(path).startswith(MARK):
            return None
    except FileNotFoundError:
        pass
    except (MalformedFile, OSError):
        return None
    write_whole(path, run_card(read_run(run)).encode("utf-8", "replace"))
    return path
