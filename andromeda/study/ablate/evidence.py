"""docs/evidence.md, from the results of the evidence's grids:
`python -m andromeda.study.ablate.evidence benchmarks/results/evidence-*.json > docs/evidence.md`.

Every figure and every verdict in the page comes from those files; `benchmarks/evidence/reading.md` is its only prose.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from andromeda.errors import ConfigError
from andromeda.study.ablate.table import DASH, UNITS, cells, lines, mean, verdicts

ROWS = {
    "A2": "Flash attention",
    "A3": "Mixed precision",
    "A5": "8-bit optimizer",
    "A6": "Gradient clipping",
    "A7": "xPos, ALiBi, QK normalisation",
    "A8": "Multi-query attention",
    "A9": "Parallel blocks",
    "A10": "No positions, shifted tokens",
    "A13": "Nebula loss",
    "A14": "DeepNorm",
    "A15": "Embedding provider",
    "A16": "Value embeddings",
    "A17": "The speedrun's model",
    "A18": "The speedrun's training",
    "A19": "Llama-style model",
    "A20": "Mixture of experts",
    "A21": "Exchangeable attention",
}
READING = Path("benchmarks/evidence/reading.md")
HEAD = ("arm", "compared with", "{metric} (runs)", "effect", "95 % interval", "spread", "p", "p (Holm)", "time", "memory", "verdict")


def page(every: Sequence[dict[str, Any]], reading: str) -> str:
    """The whole document."""
    parts = ["# Evidence", "", reading.strip(), ""]
    for results in every:
        parts += [*_where(results), "", *_tables(results)]
    parts += [*_clipping(every[0]), *_equal_loss(every[0])]
    return "\n".join(parts).rstrip() + "\n"


def _where(results: dict[str, Any]) -> Iterator[str]:
    """What was measured, with what, by which command."""
    base = results["arms"][0]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if name in ("python", "torch", "andromeda"))
    trained = [run for row in results["arms"] for run in row["runs"].values()]
    tokens = base["runs"] and next(iter(base["runs"].values()))["tokens"]
    yield f"## {base['parameters'] / 1e6:.1f} M parameters"
    yield ""
    yield (
        f"{len(trained)} runs of {base['steps']} steps ({tokens / 1e6:.2f} M tokens each, the baseline's budget), seeds "
        f"{', '.join(map(str, results['seeds']))}, on {results['machine']['gpu'] or results['machine']['cpu']}; {versions}; {results['date']}."
    )
    yield f"Made by `{results['command']}`."


def _tables(results: dict[str, Any]) -> Iterator[str]:
    """A table for each row of the specification, and all verdicts in words."""
    head = [title.format(metric=UNITS[results["metric"]]) for title in HEAD]
    base = results["arms"][0]
    yield f"The baseline ends at {mean(base)} {UNITS[results['metric']]} with a standard deviation of {_number(base['deviation'])} between seeds."
    yield ""
    yield verdicts(results)
    yield ""
    labels = list(dict.fromkeys(row["label"] for row in results["arms"][1:]))
    for label in sorted(labels, key=lambda label: int(label[1:] or 0) if label[1:].isdigit() else 0):
        yield f"### {label} {ROWS.get(label, '')}".rstrip()
        yield ""
        yield from lines(head, (cells(row) for row in results["arms"][1:] if row["label"] == label))
        yield ""


def _clipping(results: dict[str, Any]) -> Iterator[str]:
    """C9: each learning rate of AdamW with and without clipping."""
    rows = {row["name"]: row for row in results["arms"]}
    rates = [name for name in rows if name.startswith("AdamW ") and not name.endswith("clipped")]
    if not rates:
        return
    yield "## C9: clipping and the learning rate that stays stable"
    yield ""
    yield f"AdamW at {rows['baseline']['parameters'] / 1e6:.1f} M parameters, no guard; clipping is by the global norm at 1."
    yield ""
    head = ["learning rate", "without clipping", "clipped", "effect of clipping", "95 % interval", "verdict"]
    body = []
    for name in rates:
        clipped = rows[f"{name}, clipped"]
        shown = cells(clipped)
        body.append([name.removeprefix("AdamW "), _state(rows[name]), _state(clipped), shown[3], shown[4], shown[10]])
    yield from lines(head, body)
    yield ""


def _state(row: dict[str, Any]) -> str:
    fallen = sum(run["loss"] is None for run in row["runs"].values())
    return f"{mean(row)}" + (f", {fallen} diverged" if fallen else "")


def _equal_loss(results: dict[str, Any]) -> Iterator[str]:
    """C6: value embeddings with fewer steps, and the share of the steps at which they meet the baseline's loss."""
    rows = [row for row in results["arms"] if row["name"].startswith("value embeddings") and row["mean"] is not None]
    base = results["arms"][0]["mean"]
    if not rows or base is None:
        return
    yield "## C6: value embeddings, steps to equal loss"
    yield ""
    yield f"Each share is a run of its own with its whole schedule. The baseline's {base:.4f} after all steps is met at {met_at(rows, base)}."
    yield ""
    yield from lines(
        ("share of the steps", "mean loss (runs)", "effect", "95 % interval", "verdict"),
        ([f"{100 * row['share']:g} %", mean(row), *cells(row)[3:5], cells(row)[10]] for row in rows),
    )
    yield ""


def met_at(rows: Sequence[dict[str, Any]], target: float) -> str:
    """Where the mean loss crosses `target`, on a line between the shares on both sides, over the logarithm of the share."""
    points = sorted((row["share"], row["mean"]) for row in rows)
    for (low, worse), (high, better) in zip(points, points[1:], strict=False):
        if worse >= target >= better and worse > better:
            part = (worse - target) / (worse - better)
            return f"{100 * math.exp(math.log(low) + part * (math.log(high) - math.log(low))):.0f} % of them"
    if all(loss < target for _, loss in points):
        return f"less than {100 * points[0][0]:g} % of them"
    return "none of these shares"


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"


def main() -> None:
    """Print the page."""
    if len(sys.argv) < 2:
        raise ConfigError("Name the results: python -m andromeda.study.ablate.evidence benchmarks/results/evidence-*.json.")
    every = [json.loads(Path(path).read_text("utf-8")) for path in sys.argv[1:]]
    every.sort(key=lambda results: results["arms"][0]["parameters"])
    print(page(every, READING.read_text("utf-8") if READING.exists() else ""), end="")


if __name__ == "__main__":
    main()
