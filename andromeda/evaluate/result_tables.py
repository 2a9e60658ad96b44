"""Results as tables of words, for a terminal: (title, columns, rows, columns aligned to the right)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from andromeda.evaluate.result import EvalResult

Table = tuple[str, list[str], list[list[str]], range]


def table(result: EvalResult) -> Table:
    """The figures of one result."""
    columns, rows = LAYOUTS[result.kind](result.result)
    title = f"{result.name}, step {result.step}, weights {result.weights[:12]}" + (f", data {result.data[:12]}" if result.data else "")
    return title, columns, rows, range(1, len(columns))


Layout = Callable[[dict[str, Any]], tuple[list[str], list[list[str]]]]


def _bits(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    row = [f"{found['bits_per_byte']:.4f}", f"{found['loss']:.4f}", f"{found['tokens']:,}", f"{found['bytes']:,}"]
    return ["bits/byte", "loss", "tokens", "bytes"], [row]


def _position(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    bins = [f"{first:,}" if last == first + 1 else f"{first:,} to {last - 1:,}" for first, last in pairwise(found["edges"])]
    return ["tokens before", "loss", "tokens"], [
        [name, f"{nats:.4f}", f"{tokens:,}"] for name, nats, tokens in zip(bins, found["nats"], found["tokens"], strict=True)
    ]


def _context(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = zip(found["context"], found["nats"], found["gain"], found["gain_error"], strict=True)
    return ["context", "loss of the same targets", "gain over the first", "standard error"], [
        [f"{length:,}", f"{nats:.4f}", f"{gain:.4f}", f"{error:.4f}"] for length, nats, gain, error in rows
    ]


def _retrieval(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    depths = ["anywhere"] if found["everywhere"] else [f"{depth:.0%}" for depth in found["depths"]]
    columns = [f"tokens (chance {found['chance']:.0%}, {found['samples']} a cell)", *depths, "match"]
    rows = zip(found["lengths"], found["accuracy"], found["match"], strict=True)
    return columns, [[f"{n:,}", *(f"{a:.0%}" for a in row), f"{sum(match) / len(match):.0%}"] for n, row, match in rows]


def _reasoning(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    def share(value: float | None) -> str:
        return "too long" if value is None else f"{value:.0%}"

    return ["task", "in distribution", "chance", "out of distribution", "chance"], [
        [task, share(one["in"]), f"{one['chance']:.1%}", share(one["out"]), f"{one['chance_out']:.1%}"] for task, one in found.items()
    ]


def _figures(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    return ["figure", "value"], [[name, f"{value:.4f}" if isinstance(value, float) else f"{value:,}"] for name, value in found.items()]


def _harness(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    return ["task", "metric", "value"], [
        [task, metric, f"{value:.4f}"] for task, metrics in found.items() for metric, value in metrics.items()
    ]


def _heads(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [head, metric, f"{value:,}" if metric == "targets" else f"{value:.4f}"] for head, f in found.items() for metric, value in f.items()
    ]
    return ["head", "metric", "value"], rows


LAYOUTS: dict[str, Layout] = {
    "bits": _bits,
    "position": _position,
    "context": _context,
    "retrieval": _retrieval,
    "reasoning": _reasoning,
    "fewshot": _figures,
    "gsm8k": _figures,
    "harness": _harness,
    "heads": _heads,
}
