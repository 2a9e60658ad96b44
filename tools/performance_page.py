"""docs/performance.md from the results: `python -m tools.performance_page > docs/performance.md`.

Every table has the command, the machine and the versions of its file; every row has its roofline bound.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from andromeda.bench.benchmark_tables import (
    Rows,
    attention_rows,
    decode_rows,
    embedding_rows,
    loss_rows,
    precision_rows,
    prefill_rows,
    qk_rows,
    training_rows,
)
from tools import arithmetic_table
from tools.markdown_lines import wrap

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
INTRODUCTION = RESULTS.parent / "performance.md"
"""The handwritten text before the tables: what the figures mean and what follows from them."""

SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], Rows]]] = {
    "attention": ("Attention", attention_rows),
    "qk": ("QK preprocessing", qk_rows),
    "loss": ("Linear cross-entropy", loss_rows),
    "embedding": ("Embedding gradient", embedding_rows),
    "train": ("Training", training_rows),
    "precision": ("fp8 compared with bfloat16", precision_rows),
    "prefill": ("Prefill", prefill_rows),
    "decode": ("Decoding", decode_rows),
}
"""Sections by the prefix of their files' names: gpu-train-360m.json belongs to `train`."""
PICTURES = {"precision": "![Loss in fp8 and in bfloat16, and the difference](images/precision.png)"}
"""What follows a section's tables."""


def document(folder: Path = RESULTS) -> str:
    """The whole page."""
    parts = [INTRODUCTION.read_text().rstrip(), "## Compute bounds of long prompts", _lines(arithmetic_table.rows())]
    for kind, (title, rows) in SECTIONS.items():
        files = sorted(folder.glob(f"gpu-{kind}*.json"))
        if files:
            parts.append(f"## {title}")
        parts += [section(json.loads(file.read_text()), rows) for file in files]
        parts += [PICTURES[kind]] if files and kind in PICTURES else []
    return wrap("\n\n".join(parts) + "\n")


def section(result: dict[str, Any], rows: Callable[[dict[str, Any]], Rows]) -> str:
    """One result as a table below the command that made it."""
    machine, versions = result["machine"], result["versions"]
    known = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "flash-attn-4") if name in versions)
    reached = result.get("ceilings")
    rates = reached and ", ".join(f"{name} {rate:,.0f} TFLOP/s" for name, rate in reached["tflops"].items())
    measured = f"; measured roofline: {rates}, copy {reached['copy_tb_per_s']:.2f} TB/s" if reached else ""
    source = f"{machine['gpu'] or machine['cpu']}, {known}, {result['date']}{measured}"
    return "\n\n".join([f"`{result['command']}`", source, _lines(rows(result))])


def _lines(rows: Rows) -> str:
    """A table in Markdown."""
    head, *body = rows
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


if __name__ == "__main__":
    print(document(), end="")
