"""Tables of benchmark results, for the terminal and for docs/performance.md: a head and one line per measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from andromeda.plan.plan_tables import size

Rows = Sequence[Sequence[str]]


def training_rows(result: dict[str, Any]) -> Rows:
    """One line per implementation."""
    head = ["implementation", "tokens/s", "TFLOP/s", "of roofline", "peak memory", "first step"]
    return [head, *([name, *_training(entry)] for name, entry in result["implementations"].items())]


def _training(entry: dict[str, Any]) -> list[str]:
    if "failed" in entry:
        return [entry["failed"], "", "", "", ""]
    return [
        f"{entry['tokens_per_second']:,.0f}",
        f"{entry['tflops']:,.0f}",
        _share(entry["of_ceiling"]),
        size(entry["peak"]) if entry["peak"] else "",
        f"{entry['first_step_seconds']:.0f} s",
    ]


def precision_rows(result: dict[str, Any]) -> Rows:
    """One line per precision."""
    head = ["precision", "final loss", "step", "first step"]
    return [head, *([name, *_precision(entry)] for name, entry in result["implementations"].items())]


def _precision(entry: dict[str, Any]) -> list[str]:
    if "failed" in entry:
        return [entry["failed"], "", ""]
    return [f"{entry['final_loss']:.4f}", _ms(1e3 * entry["seconds"]), f"{entry['first_step_seconds']:.0f} s"]


def prefill_rows(result: dict[str, Any]) -> Rows:
    """One line per implementation, length and chunk size."""
    head = [
        "implementation",
        "tokens",
        "chunk",
        "time",
        "bound",
        "bound / time",
        "peak memory",
        "first call",
        "logits vs. first row",
    ]
    return [head, *([row["implementation"], f"{row['tokens']:,}", *_prefill(row)] for row in result["rows"])]


def _prefill(row: dict[str, Any]) -> list[str]:
    chunk = f"{row['chunk']:,}" if row["chunk"] else "all"
    if "failed" in row:
        return [chunk, row["failed"], _ms(row["floor_ms"]), "", "", "", ""]
    difference = "not finite" if not row["finite"] else "" if row["difference"] is None else f"relative difference {row['difference']:.1e}"
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
    """One line per context."""
    head = ["context", "time per token", "bound", "bound / time", "tokens/s", "cache", "until captured"]
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
    """One line per implementation."""
    head = ["implementation", "forward and backward", "bound", "bound / time", "peak above the inputs", "error"]
    return [head, *([name, *_loss(entry, result["floor_ms"])] for name, entry in result["implementations"].items())]


def _loss(entry: dict[str, Any], floor: float | None) -> list[str]:
    if "failed" in entry:
        return [entry["failed"], "", "", "", ""]
    return [
        _ms(entry["ms"]),
        _ms(floor),
        _ratio(floor, entry["ms"]),
        size(entry["peak"]) if entry["peak"] else "",
        f"{entry['error']:.1e}",
    ]


def attention_rows(result: dict[str, Any]) -> Rows:
    """One line per backend and pattern, forward, and forward and backward."""
    head = [
        "pattern",
        "tokens",
        "backend",
        "forward",
        "bound",
        "bound / time",
        "forward + backward",
        "bound",
        "bound / time",
        "error / PyTorch's",
    ]
    rows = [head]
    for row in result["rows"]:
        if row["refused"] or row["error"] is None:
            continue
        forward, both = (
            [_ms(row[f"{name}_ms"]), _ms(row[f"{name}_floor_ms"]), _ratio(row[f"{name}_floor_ms"], row[f"{name}_ms"])]
            for name in ("forward", "forward_backward")
        )
        rows.append([row["case"], f"{row['tokens']:,}", row["backend"], *forward, *both, f"{row['error'] / row['reference_error']:.2f}"])
    return rows


def qk_rows(result: dict[str, Any]) -> Rows:
    """One line per implementation and case."""
    head = ["case", "implementation", "forward", "bound", "bound / time", "forward + backward", "bound", "bound / time"]
    return [
        head,
        *(
            [
                row["case"],
                row["implementation"],
                *(
                    text
                    for name in ("forward", "forward_backward")
                    for text in (_ms(row[f"{name}_ms"]), _ms(row[f"{name}_floor_ms"]), _ratio(row[f"{name}_floor_ms"], row[f"{name}_ms"]))
                ),
            ]
            for row in result["rows"]
        ),
    ]


def embedding_rows(result: dict[str, Any]) -> Rows:
    """One line per implementation and case."""
    head = ["case", "ids", "table", "implementation", "time", "bound", "bound / time", "bitwise repeatable"]
    return [
        head,
        *(
            [
                *(row[name] for name in ("case", "ids", "table", "implementation")),
                _ms(row["ms"]),
                _ms(row["floor_ms"]),
                _ratio(row["floor_ms"], row["ms"]),
                {True: "yes", False: "no", None: ""}[row["repeats"]],
            ]
            for row in result["rows"]
        ),
    ]


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:,.3g} ms" if value < 100 else f"{value:,.0f} ms"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _ratio(floor: float | None, value: float | None) -> str:
    return _share(floor / value) if floor and value else ""
