"""docs/evidence.md, from the results of the ablation grids and of the context extensions:
`python -m tools.evidence_page benchmarks/results/{evidence,extension}-*.json > docs/evidence.md`.

Every figure and every verdict in the page comes from those files; `benchmarks/evidence/reading.md` is its only handwritten text.
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
from andromeda.ablate.ablation_tables import HEAD as TABLE_HEAD
from andromeda.extend.results import ORIGINAL, table
from andromeda.extend.results import verdicts as extension_verdicts
from andromeda.utils.errors import ConfigError
from tools import clipping_table
from tools.markdown_lines import wrap

TITLES = {
    "A7": "Positional encodings and QK normalization",
    "A8": "Multi-query and grouped-query attention",
    "A21": "Alternative token mixers",
    "A2": "Attention backends",
    "A9": "Parallel blocks",
    "A14": "DeepNorm",
    "A10": "Token shift and no positional encoding",
    "A16": "Value embeddings",
    "A15": "Factorized and tied embeddings",
    "A17": "Model of the nanoGPT speedrun",
    "A18": "Training of the nanoGPT speedrun",
    "A19": "Llama-style model",
    "A20": "Mixture of experts",
    "A13": "Z-loss",
    "A6": "Gradient clipping and learning rates",
    "A5": "8-bit optimizer",
    "A3": "Mixed precision",
}
"""Techniques in the order of the page, by the label that older results give to their variants; newer ones give the title itself."""
READING = Path("benchmarks/evidence/reading.md")
HEAD = tuple(title.replace("{metric}", "{metric} (runs)") for title in TABLE_HEAD)


def page(every: Sequence[dict[str, Any]], reading: str, extended: Sequence[str] = ()) -> str:
    """The whole page, from the results of grids and the lines of the extension sections."""
    measured = [finished(results) for results in every]
    parts = ["# Evidence", "", reading.strip(), "", *_coverage(every, measured)]
    for results in measured:
        parts += [*_where(results), "", *_tables(results), *clipping_table.section(results), *_equal_loss(results)]
    return "\n".join([*parts, *extended]).rstrip() + "\n"


def finished(results: dict[str, Any]) -> dict[str, Any]:
    """The results without the variants that have neither a run nor a measured cost."""
    base, *variants = results["variants"]
    return {**results, "variants": [base, *(row for row in variants if row["runs"] or (not row["train"] and row["cost"]))]}


def _coverage(every: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Which techniques were measured at which size."""
    sizes = [size(results) for results in measured]
    found = [{title(row) for row in results["variants"][1:]} for results in measured]
    yield from lines(
        ("technique", *sizes),
        ([name, *("measured" if name in titles else DASH for titles in found)] for name in TITLES.values()),
    )
    yield ""
    planned = [
        f"{size(whole)}: {'; '.join(missing)}"
        for whole, kept in zip(every, measured, strict=True)
        if (missing := [row["name"] for row in whole["variants"] if row["name"] not in {one["name"] for one in kept["variants"]}])
    ]
    if planned:
        yield f"Variants of the grids without a run in these results: {'. '.join(planned)}."
        yield ""


def title(row: dict[str, Any]) -> str:
    """The technique that a variant belongs to."""
    return TITLES.get(row["label"], row["label"])


def size(results: dict[str, Any]) -> str:
    """Size of a grid's baseline."""
    return f"{results['variants'][0]['parameters'] / 1e6:.1f} M"


def _where(results: dict[str, Any]) -> Iterator[str]:
    """What was measured, on which machine, by which command."""
    base = results["variants"][0]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if name in ("python", "torch", "andromeda"))
    trained = [run for row in results["variants"] for run in row["runs"].values()]
    tokens = base["runs"] and next(iter(base["runs"].values()))["tokens"]
    yield f"## {size(results)} parameters"
    yield ""
    yield (
        f"{len(trained)} runs, the baseline with {base['steps']} steps and {tokens / 1e6:.2f} M tokens, seeds "
        f"{', '.join(map(str, results['seeds']))}, on {results['machine']['gpu'] or results['machine']['cpu']}; "
        f"{versions}; {results['date']}."
    )
    yield f"Equal {results['budget']}{evenness(results)}. Command: `{results['command']}`."
    yield ""
    yield legend(results)


def _tables(results: dict[str, Any]) -> Iterator[str]:
    """All verdicts in words, and a table per technique."""
    head = [title.format(metric=UNITS[results["metric"]]) for title in HEAD]
    base = results["variants"][0]
    unit, deviation = UNITS[results["metric"]], _number(base["deviation"])
    yield f"The baseline ends at {mean(base)} {unit}, with a standard deviation of {deviation} between seeds."
    yield ""
    yield verdicts(results)
    yield ""
    found = dict.fromkeys(title(row) for row in results["variants"][1:])
    for name in [*(name for name in TITLES.values() if name in found), *(name for name in found if name not in TITLES.values())]:
        yield f"### {name}"
        yield ""
        yield from lines(head, (cells(row) for row in results["variants"][1:] if title(row) == name))
        yield ""


def _equal_loss(results: dict[str, Any]) -> Iterator[str]:
    """Value embeddings with fewer steps, and the share of the steps at which they reach the baseline's loss."""
    rows = [row for row in results["variants"] if row["name"].startswith("value embeddings") and row["mean"] is not None]
    base = results["variants"][0]["mean"]
    if len(rows) < 2 or base is None:
        return
    yield f"### Value embeddings: steps to equal loss, at {size(results)} parameters"
    yield ""
    yield f"Each share is a separate run with its whole schedule. The baseline's loss of {base:.4f} is reached with {met_at(rows, base)}."
    yield ""
    yield from lines(
        ("share of the steps", "mean loss (runs)", "effect", "95 % interval", "verdict"),
        ([f"{100 * row['budget_share']:g} %", mean(row), *cells(row)[3:5], row["verdict"]] for row in rows),
    )
    yield ""


def met_at(rows: Sequence[dict[str, Any]], target: float) -> str:
    """Where the mean loss crosses `target`, interpolated between shares on a logarithmic scale."""
    points = sorted((row["budget_share"], row["mean"]) for row in rows)
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
            results["variants"][0]["parameters"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ConfigError(f"{path} is neither the results.json of `andromeda ablate` nor what benchmarks/extension.py writes.") from None
    return results


def extension_section(result: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown: what was trained, a table per extended length, and the longest evaluation."""
    training = result["training"]
    trained, device = training["model"]["max_seq_len"], result["machine"]["gpu"] or result["machine"]["cpu"]
    yield f"## Extension of {training['parameters'] / 1e6:.1f} M parameters"
    yield ""
    yield (
        f"Trained on {training['tokens'] / 1e6:.1f} M tokens in sequences of {trained:,}, on {device}; "
        f"{result['date']}. Command: `{result['command']}`. Nats of the same held-out targets with more and more text before them; "
        "retrieval is the share of hidden notes found, over 16 depths of the longest sequence."
    )
    yield ""
    for to, values in sorted(result.get("extension", {}).items(), key=lambda pair: int(pair[0])):
        yield from _extension_table(f"From {trained:,} to {int(to):,} tokens", values)
    if far := result.get("far"):
        yield from _extension_table(
            f"The model with the longest context, at up to {far['request']['to']:,} tokens, without further training", far
        )


def _extension_table(title: str, values: dict[str, Any]) -> Iterator[str]:
    columns, rows = table(values)
    yield f"### {title}"
    yield ""
    yield f"| {' | '.join(columns)} |"
    yield f"|{'|'.join('---' for _ in columns)}|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""
    yield f"With the whole sequence compared with the trained length, paired by window: {'; '.join(extension_verdicts(values))}."
    yield ""
    if found := list(_worst_depths(values)):
        yield f"Retrieval at the worst depth: {'; '.join(found)}."
        yield ""


def _worst_depths(values: dict[str, Any]) -> Iterator[str]:
    measured = [("original", values.get(ORIGINAL))]
    for name, stages in values["methods"].items():
        measured.append((f"{name}, trained", stages["after"]) if "after" in stages else (f"{name}, untrained", stages["untrained"]))
    for name, each in measured:
        if each and (found := each.get("retrieval")):
            worst = ", ".join(f"{min(row):.0%} at {length:,}" for length, row in zip(found["lengths"], found["accuracy"], strict=True))
            yield f"{name} {worst}"


def main() -> None:
    """Print the page."""
    try:
        if len(sys.argv) < 2:
            raise ConfigError("Name the results: python -m tools.evidence_page benchmarks/results/evidence-*.json.")
        every = [read(path) for path in sys.argv[1:]]
    except ConfigError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    grids = sorted((one for one in every if "variants" in one), key=lambda results: results["variants"][0]["parameters"])
    extended = sorted((one for one in every if "training" in one), key=lambda results: max(map(int, results["extension"]), default=0))
    sections = [line for one in extended for line in extension_section(one)]
    print(wrap(page(grids, READING.read_text("utf-8") if READING.exists() else "", sections)), end="")


if __name__ == "__main__":
    main()
