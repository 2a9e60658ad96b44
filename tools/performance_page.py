"""docs/performance.md from the results: `python -m tools.performance_page > docs/performance.md`.

Every table names the command, the machine and the versions of its file; every row has its floor and the share of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from andromeda.plan.plan_tables import size
from tools import arithmetic_table

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
INTRODUCTION = RESULTS.parent / "performance.md"
"""What stands before the tables, written by hand: what the figures mean and what they answer."""

Rows = Sequence[Sequence[str]]


def training_rows(result: dict[str, Any]) -> Rows:
    """One line a side."""
    head = ["side", "tokens/s", "TFLOP/s", "of the ceiling", "peak memory", "first step"]
    return [head, *([name, *_training(side)] for name, side in result["sides"].items())]


def _training(side: dict[str, Any]) -> list[str]:
    if "failed" in side:
        return [side["failed"], "", "", "", ""]
    return [
        f"{side['tokens_per_second']:,.0f}",
        f"{side['tflops']:,.0f}",
        _share(side["of_ceiling"]),
        size(side["peak"]) if side["peak"] else "",
        f"{side['first_step_seconds']:.0f} s",
    ]


def precision_rows(result: dict[str, Any]) -> Rows:
    """One line a precision."""
    head = ["products", "loss of the last steps", "step", "first step"]
    return [head, *([name, *_precision(side)] for name, side in result["sides"].items())]


def _precision(side: dict[str, Any]) -> list[str]:
    if "failed" in side:
        return [side["failed"], "", ""]
    return [f"{side['final_loss']:.4f}", _ms(1e3 * side["seconds"]), f"{side['first_step_seconds']:.0f} s"]


def prefill_rows(result: dict[str, Any]) -> Rows:
    """One line a side, length and way of reading."""
    head = ["side", "tokens", "at once", "time", "floor", "floor / time", "peak memory", "first call", "logits beside the first way's"]
    return [head, *([row["side"], f"{row['tokens']:,}", *_prefill(row)] for row in result["rows"])]


def _prefill(row: dict[str, Any]) -> list[str]:
    chunk = f"{row['chunk']:,}" if row["chunk"] else "all"
    if "failed" in row:
        return [chunk, row["failed"], _ms(row["floor_ms"]), "", "", "", ""]
    difference = "not finite" if not row["finite"] else "" if row["difference"] is None else f"differ by {row['difference']:.1e}"
    peak = size(row["peak"]) if row["peak"] else ""
    return [
        chunk,
        _ms(row["ms"]),
        _ms(row["floor_ms"]),
        _ratio(row["floor_ms"], row["ms"]),
        peak,
        f"{row['first_seconds']:.0f} s",
        difference,
    ]


def decode_rows(result: dict[str, Any]) -> Rows:
    """One line a context."""
    head = ["context", "time of a token", "floor", "floor / time", "tokens/s", "cache", "until recorded"]
    return [
        head,
        *(
            [
                f"{row['context']:,}",
                _ms(row["ms"]),
                _ms(row["floor_ms"]),
                _share(row["of_floor"]),
                f"{1e3 * result['batch'] / row['ms']:,.0f}",
                size(row["cache"]),
                f"{row['first_seconds']:.0f} s",
            ]
            for row in result["rows"]
        ),
    ]


def loss_rows(result: dict[str, Any]) -> Rows:
    """One line a side."""
    head = ["side", "forward and backward", "floor", "floor / time", "peak above the inputs", "error"]
    return [head, *([name, *_loss(side, result["floor_ms"])] for name, side in result["sides"].items())]


def _loss(side: dict[str, Any], floor: float | None) -> list[str]:
    if "failed" in side:
        return [side["failed"], "", "", "", ""]
    return [_ms(side["ms"]), _ms(floor), _ratio(floor, side["ms"]), size(side["peak"]) if side["peak"] else "", f"{side['error']:.1e}"]


def attention_rows(result: dict[str, Any]) -> Rows:
    """One line a backend and pattern, forward and both passes."""
    head = ["pattern", "tokens", "backend", "forward", "floor", "floor / time", "both", "floor", "floor / time", "error / PyTorch's"]
    rows = [head]
    for row in result["rows"]:
        if row["refused"] or row["error"] is None:
            continue
        forward, both = (
            [_ms(row[f"{name}_ms"]), _ms(row[f"{name}_floor_ms"]), _ratio(row[f"{name}_floor_ms"], row[f"{name}_ms"])]
            for name in ("forward", "both")
        )
        rows.append([row["work"], f"{row['tokens']:,}", row["backend"], *forward, *both, f"{row['error'] / row['reference_error']:.2f}"])
    return rows


def qk_rows(result: dict[str, Any]) -> Rows:
    """One line a side of a work."""
    head = ["work", "side", "forward", "floor", "floor / time", "both", "floor", "floor / time"]
    return [
        head,
        *(
            [
                row["work"],
                row["side"],
                *(
                    text
                    for name in ("forward", "both")
                    for text in (_ms(row[f"{name}_ms"]), _ms(row[f"{name}_floor_ms"]), _ratio(row[f"{name}_floor_ms"], row[f"{name}_ms"]))
                ),
            ]
            for row in result["rows"]
        ),
    ]


def embedding_rows(result: dict[str, Any]) -> Rows:
    """One line a side of a work."""
    head = ["work", "ids", "table", "side", "time", "floor", "floor / time", "same bits twice"]
    return [
        head,
        *(
            [
                *(row[name] for name in ("work", "ids", "table", "side")),
                _ms(row["ms"]),
                _ms(row["floor_ms"]),
                _ratio(row["floor_ms"], row["ms"]),
                {True: "yes", False: "no", None: ""}[row["repeats"]],
            ]
            for row in result["rows"]
        ),
    ]


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], Rows]]] = {
    "attention": ("Attention", attention_rows),
    "qk": ("Queries and keys", qk_rows),
    "loss": ("Head and loss", loss_rows),
    "embedding": ("Embedding", embedding_rows),
    "train": ("Training", training_rows),
    "precision": ("8 bits beside bfloat16", precision_rows),
    "prefill": ("Prefill", prefill_rows),
    "decode": ("Decoding", decode_rows),
}
"""Results by the beginning of their files' names: gpu-train-360m.json is of `train`."""
PICTURES = {"precision": "![Loss in 8 bits and in bfloat16, and the difference](images/precision.png)"}
"""What follows a section's tables."""


def document(folder: Path = RESULTS) -> str:
    """The whole page."""
    parts = [INTRODUCTION.read_text().rstrip(), "## Long prompts, by arithmetic", _lines(arithmetic_table.rows())]
    for kind, (title, rows) in SECTIONS.items():
        files = sorted(folder.glob(f"gpu-{kind}*.json"))
        if files:
            parts.append(f"## {title}")
        parts += [section(json.loads(file.read_text()), rows) for file in files]
        parts += [PICTURES[kind]] if files and kind in PICTURES else []
    return "\n\n".join(parts) + "\n"


def section(result: dict[str, Any], rows: Callable[[dict[str, Any]], Rows]) -> str:
    """One result as a table under the command that made it."""
    machine, versions = result["machine"], result["versions"]
    known = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "flash-attn-4") if name in versions)
    reached = result.get("ceilings")
    rates = reached and ", ".join(f"{name} {rate:,.0f} TFLOP/s" for name, rate in reached["tflops"].items())
    measured = f"; measured ceilings: {rates}, copy {reached['copy_tb_per_s']:.2f} TB/s" if reached else ""
    source = f"{machine['gpu'] or machine['cpu']}, {known}, {result['date']}{measured}"
    return "\n\n".join([f"`{result['command']}`", source, _lines(rows(result))])


def _lines(rows: Rows) -> str:
    """A table in Markdown."""
    head, *body = rows
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *body))


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g} ms" if value < 100 else f"{value:,.0f} ms"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _ratio(floor: float | None, value: float | None) -> str:
    return _share(floor / value) if floor and value else ""


if __name__ == "__main__":
    print(document(), end="")
