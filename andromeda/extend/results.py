"""Results of an extension (extension.json), their table and their plots. The file is rewritten atomically after every measurement."""

from __future__ import annotations

import io
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import FiniteFloat, NonNegativeInt, PositiveInt, TypeAdapter
from typing_extensions import TypedDict

from andromeda.utils.errors import CheckpointError, ConfigError
from andromeda.utils.files import write_whole
from andromeda.utils.untrusted import read_json_object

RESULTS_FILE = "extension.json"
ORIGINAL = "before"
STAGES = ("untrained", "after")
FORMAT = 3


class _ByContext(TypedDict):
    context: list[PositiveInt]
    nats: list[FiniteFloat | None]
    windows: list[list[FiniteFloat]]


class _ByPosition(TypedDict):
    edges: list[NonNegativeInt]
    nats: list[FiniteFloat | None]


class _Retrieval(TypedDict):
    lengths: list[PositiveInt]
    accuracy: list[list[FiniteFloat]]


class _Measurement(TypedDict):
    context: _ByContext
    position: _ByPosition
    retrieval: NotRequired[_Retrieval]


class _Values(TypedDict):
    trained: PositiveInt
    before: NotRequired[_Measurement]
    methods: dict[str, dict[Literal["untrained", "after"], _Measurement]]


_SHAPE = TypeAdapter(_Values)
"""What the table and the plots read of extension.json."""


class ExtensionResults:
    """Measurements by (method, stage); `before` is the original model, which has no method."""

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        """New results, or those in `folder`. Raises ConfigError if they are of another extension."""
        self.path = folder / RESULTS_FILE
        self.values: dict[str, Any] = {"format": FORMAT, **head, "methods": {}}
        if self.path.exists():
            self.values = read(self.path)
            differing = [key for key in head if self.values.get(key) != head[key]]
            if differing:
                names = ", ".join(differing)
                raise ConfigError(
                    f"{folder} holds another extension ({names} differs): give the same arguments to resume, or another --out."
                )

    def find(self, method: str, stage: str = "") -> dict[str, Any] | None:
        """A measurement, or None if it was not made yet."""
        return self.values.get(ORIGINAL) if method == ORIGINAL else self.values["methods"].get(method, {}).get(stage)

    def keep(self, figures: dict[str, Any], method: str, stage: str = "") -> None:
        """Add a measurement and write the file."""
        if method == ORIGINAL:
            self.values[ORIGINAL] = figures
        else:
            self.values["methods"].setdefault(method, {})[stage] = figures
        self.save()

    def save(self) -> None:
        """Write the file."""
        write_whole(self.path, (json.dumps(self.values, indent=1) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """Contents of extension.json. Raises CheckpointError if it is damaged."""
    try:
        values = read_json_object(path)
        if values.get("format") == FORMAT:
            _SHAPE.validate_python(values)
            table(values), verdicts(values)
            return values
    except (OSError, ValueError, LookupError, TypeError):  # MalformedFile and pydantic's error are ValueErrors
        pass
    raise CheckpointError(f"{path} is damaged or of another version: remove it to measure everything again.")


def table(values: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the comparison: loss of the same targets at every context length."""
    measured = [("original", values.get(ORIGINAL))]
    for method, stages in values["methods"].items():
        measured += [(f"{method}, untrained", stages.get("untrained")), (f"{method}, trained", stages.get("after"))]
    kept = [(name, each) for name, each in measured if each]
    lengths = sorted({n for _, each in kept for n in each["context"]["context"]})
    rows = []
    for name, each in kept:
        nats = dict(zip(each["context"]["context"], each["context"]["nats"], strict=True))
        cells = [f"{nats[n]:.4f}" if n in nats else "-" for n in lengths]
        found = each.get("retrieval")
        cells += [f"{mean(found):.0%}" if found else "-"] if any("retrieval" in one for _, one in kept) else []
        rows.append([name, *cells])
    retrieved = ["retrieval"] if any(each.get("retrieval") for _, each in kept) else []
    return ["method", *(f"{n:,}" for n in lengths), *retrieved], rows


def verdicts(values: dict[str, Any]) -> list[str]:
    """For each method's last stage: loss of the same targets with the whole new context minus that with the trained context."""
    trained = values["trained"]
    said = []
    for method, stages in values["methods"].items():
        stage = "after" if "after" in stages else "untrained"
        each = stages[stage]["context"]
        if trained not in each["context"]:
            continue
        longest = each["context"][-1]
        near, far = each["windows"][each["context"].index(trained)], each["windows"][-1]
        change, error = difference(near, far)
        spread = "" if error is None else f" ± {error:.4f}"
        said.append(
            f"{method}, {'trained' if stage == 'after' else stage}: {change:+.4f}{spread} nats/token from {trained:,} to {longest:,} tokens"
        )
    return said


def difference(before: list[float], after: list[float]) -> tuple[float, float | None]:
    """Mean difference per window, and its standard error; None with one window."""
    each = [b - a for a, b in zip(before, after, strict=True)]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
    return statistics.fmean(each), error


def mean(retrieval: dict[str, Any]) -> float:
    """Accuracy at the longest length, averaged over depths."""
    last: list[float] = retrieval["accuracy"][-1]
    return sum(last) / len(last)


STYLES: dict[str, dict[str, Any]] = {"untrained": {"linestyle": ":", "alpha": 0.7}, "after": {"linestyle": "-"}}
CEILING = 1.6
"""The y axis ends at this multiple of the best loss: models that have diverged would flatten all other curves."""


def draw(values: dict[str, Any], stem: Path) -> list[Path]:
    """Plot loss by context, loss by position and retrieval to `stem`.png and `stem`.svg; returns their paths."""
    from matplotlib.figure import Figure

    panels = 3 if _retrievals(values) else 2
    figure = Figure(figsize=(5.2 * panels, 4.4), layout="constrained")
    axes = figure.subplots(1, panels)
    _context(axes[0], values)
    _position(axes[1], values)
    if panels == 3:
        _retrieval(axes[2], values)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    paths = [stem.with_suffix(ending) for ending in (".png", ".svg")]
    for path in paths:
        picture = io.BytesIO()  # a file that matplotlib opens itself could be a link that leads elsewhere
        figure.savefig(picture, format=path.suffix[1:], dpi=150)
        write_whole(path, picture.getvalue())
    return paths


def curves(values: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Label, style and values of every measurement."""
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    if values.get(ORIGINAL):
        found.append(("original", {"color": "black", "linestyle": "--"}, values[ORIGINAL]))
    for number, (method, stages) in enumerate(values["methods"].items()):
        for stage, style in STYLES.items():
            if stages.get(stage):
                label = f"{method}, {'untrained' if stage == 'untrained' else 'trained'}"
                found.append((label, {"color": f"C{number}", **style}, stages[stage]))
    return found


def _context(axes: Any, values: dict[str, Any]) -> None:
    for label, style, each in curves(values):
        axes.plot(each["context"]["context"], each["context"]["nats"], marker=".", label=label, **style)
    _dress(
        axes,
        values,
        "tokens of context",
        "loss of the same targets (nats/token)",
        [n for *_, e in curves(values) for n in e["context"]["nats"]],
    )
    _name_lengths(axes, {n for *_, e in curves(values) for n in e["context"]["context"]})


def _position(axes: Any, values: dict[str, Any]) -> None:
    for _, style, each in curves(values):
        edges = each["position"]["edges"]
        middles = [math.sqrt(max(low, 1) * high) for low, high in itertools.pairwise(edges)]
        axes.plot(middles, each["position"]["nats"], linewidth=1, **style)
    late = [n for *_, e in curves(values) for n, end in zip(e["position"]["nats"], e["position"]["edges"][1:], strict=True) if end > 64]
    _dress(axes, values, "position in the sequence", "loss at that position (nats/token)", late)
    furthest = max(e["position"]["edges"][-1] for *_, e in curves(values))
    _name_lengths(axes, {16 << i for i in range(0, 40, 2) if 16 << i < 0.3 * furthest} | {furthest})


def _retrieval(axes: Any, values: dict[str, Any]) -> None:
    for _, style, each in curves(values):
        if each.get("retrieval"):
            found = each["retrieval"]
            axes.plot(found["lengths"], [100 * sum(one) / len(one) for one in found["accuracy"]], marker=".", **style)
    axes.set(ylim=(-3, 103))
    _dress(axes, values, "tokens of context", "notes retrieved (%)", [])
    _name_lengths(axes, {n for *_, e in curves(values) if e.get("retrieval") for n in e["retrieval"]["lengths"]})


def _retrievals(values: dict[str, Any]) -> bool:
    return any(each.get("retrieval") for *_, each in curves(values))


def _dress(axes: Any, values: dict[str, Any], x: str, y: str, losses: list[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.axvline(values["trained"], color="gray", linewidth=0.8)
    finite = [n for n in losses if n is not None and math.isfinite(n)]
    if finite and max(finite) > CEILING * min(finite):
        axes.set_ylim(0.96 * min(finite), CEILING * min(finite))


def _name_lengths(axes: Any, lengths: set[int]) -> None:
    axes.set_xticks(sorted(lengths), [_short(n) for n in sorted(lengths)])
    axes.minorticks_off()


def _short(tokens: int) -> str:
    return f"{tokens // 1024} Ki" if tokens % 1024 == 0 else f"{tokens:,}"
