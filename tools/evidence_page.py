"""docs/evidence.md, from the results of the evidence's grids and of the extensions:
`python -m tools.evidence_page benchmarks/results/{evidence,extension}-*.json > docs/evidence.md`.

Every figure and every verdict in the page comes from those files; `benchmarks/evidence/reading.md` is its only prose.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from andromeda.ablate.ablation_tables import DASH, UNITS, cells, evenness, legend, lines, mean, verdicts
from andromeda.utils.errors import ConfigError
from tools import clipping_table
from tools.extension_section import sections as extensions

ROWS = {
    "A2": "Flash attention",
    "A3": "Mixed precision",
    "A5": "8-bit optimizer",
    "A6": "Gradient clipping",
    "A7": "xPos, ALiBi, QK normalization",
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
HEAD = (
    "arm",
    "compared with",
    "{metric} (runs)",
    "effect",
    "95 % interval",
    "spread",
    "p",
    "p (Holm)",
    "time",
    "memory",
    "weights",
    "verdict",
)


def page(every: Sequence[dict[str, Any]], reading: str, extended: Sequence[str] = ()) -> str:
    """The whole document, from the results of grids and the lines of an extension's sections."""
    measured = [finished(results) for results in every]
    parts = ["# Evidence", "", reading.strip(), "", *_coverage(every, measured)]
    for results in measured:
        parts += [*_where(results), "", *_tables(results), *clipping_table.section(results), *_equal_loss(results)]
    return "\n".join([*parts, *extended]).rstrip() + "\n"


def finished(results: dict[str, Any]) -> dict[str, Any]:
    """The results without the arms that no run and no cost was measured of."""
    base, *arms = results["arms"]
    return {**results, "arms": [base, *(row for row in arms if row["runs"] or (not row["train"] and row["cost"]))]}


def _coverage(every: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Which rows of the specification have figures at which size, and which have none."""
    sizes = [size(results) for results in measured]
    found = [{row["label"] for row in results["arms"][1:]} for results in measured]
    yield from lines(
        ("row", "technique", *sizes),
        ([label, ROWS[label], *("measured" if label in labels else DASH for labels in found)] for label in ROWS),
    )
    yield ""
    planned = [
        f"{size(whole)}: {'; '.join(missing)}"
        for whole, kept in zip(every, measured, strict=True)
        if (missing := [row["name"] for row in whole["arms"] if row["name"] not in {one["name"] for one in kept["arms"]}])
    ]
    if planned:
        yield f"Arms of the grids that these results hold no run of: {'. '.join(planned)}."
        yield ""


def size(results: dict[str, Any]) -> str:
    """A grid by the size of its baseline."""
    return f"{results['arms'][0]['parameters'] / 1e6:.1f} M"


def _where(results: dict[str, Any]) -> Iterator[str]:
    """What was measured, with what, by which command."""
    base = results["arms"][0]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if name in ("python", "torch", "andromeda"))
    trained = [run for row in results["arms"] for run in row["runs"].values()]
    tokens = base["runs"] and next(iter(base["runs"].values()))["tokens"]
    yield f"## {size(results)} parameters"
    yield ""
    yield (
        f"{len(trained)} runs, the baseline's of {base['steps']} steps and {tokens / 1e6:.2f} M tokens, seeds "
        f"{', '.join(map(str, results['seeds']))}, on {results['machine']['gpu'] or results['machine']['cpu']}; "
        f"{versions}; {results['date']}."
    )
    yield f"Equal {results['budget']}{evenness(results)}. Made by `{results['command']}`."
    yield ""
    yield legend(results)


def _tables(results: dict[str, Any]) -> Iterator[str]:
    """A table for each row of the specification, and all verdicts in words."""
    head = [title.format(metric=UNITS[results["metric"]]) for title in HEAD]
    base = results["arms"][0]
    unit, deviation = UNITS[results["metric"]], _number(base["deviation"])
    yield f"The baseline ends at {mean(base)} {unit}, with a standard deviation of {deviation} between seeds."
    yield ""
    yield verdicts(results)
    yield ""
    labels = list(dict.fromkeys(row["label"] for row in results["arms"][1:]))
    for label in sorted(labels, key=lambda label: int(label[1:] or 0) if label[1:].isdigit() else 0):
        yield f"### {label} {ROWS.get(label, '')}".rstrip()
        yield ""
        yield from lines(head, (cells(row) for row in results["arms"][1:] if row["label"] == label))
        yield ""


def _equal_loss(results: dict[str, Any]) -> Iterator[str]:
    """C6: value embeddings with fewer steps, and the share of the steps at which they meet the baseline's loss."""
    rows = [row for row in results["arms"] if row["name"].startswith("value embeddings") and row["mean"] is not None]
    base = results["arms"][0]["mean"]
    if len(rows) < 2 or base is None:
        return
    yield f"### C6: value embeddings, steps to equal loss, at {size(results)} parameters"
    yield ""
    yield f"Each share is a run of its own with its whole schedule. The baseline's {base:.4f} is met at {met_at(rows, base)}."
    yield ""
    yield from lines(
        ("share of the steps", "mean loss (runs)", "effect", "95 % interval", "verdict"),
        ([f"{100 * row['share']:g} %", mean(row), *cells(row)[3:5], row["verdict"]] for row in rows),
    )
    yield ""


def met_at(rows: Sequence[dict[str, Any]], target: float) -> str:
    """Where the mean loss crosses `target`, on a line between the shares on both sides, over the logarithm of the share."""
    points = sorted((row["share"], row["mean"]) for row in rows)
    for (low, worse), (high, better) in pairwise(points):
        if worse >= target >= better and worse > better:
            part = (worse - target) / (worse - better)
            return f"{100 * math.exp(math.log(low) + part * (math.log(high) - math.log(low))):.0f} % of them"
    if all(loss < target for _, loss in points):
        return f"less than {100 * points[0][0]:g} % of them"
    return "none of these shares"


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.4f}"


def read(path: str) -> dict[str, Any]:
    """The results of a grid, or of benchmarks/extension.py. Raises ConfigError."""
    try:
        results = json.loads(Path(path).read_text("utf-8"))
        if "training" not in results:
            results["arms"][0]["parameters"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"{path} is neither the results.json of `andromeda ablate` nor what benchmarks/extension.py writes.") from None
    return results


def main() -> None:
    """Print the page."""
    try:
        if len(sys.argv) < 2:
            raise ConfigError("Name the results: python -m tools.evidence_page benchmarks/results/evidence-*.json.")
        every = [read(path) for path in sys.argv[1:]]
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    grids = sorted((one for one in every if "arms" in one), key=lambda results: results["arms"][0]["parameters"])
    extended = sorted((one for one in every if "training" in one), key=lambda results: max(map(int, results["extension"]), default=0))
    sections = [line for one in extended for line in extensions(one)]
    print(page(grids, READING.read_text("utf-8") if READING.exists() else "", sections), end="")


if __name__ == "__main__":
    main()
