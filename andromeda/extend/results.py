"""extension.json: what an extension measured so far, written whole after every measurement, so that a kill loses none."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from andromeda.utils.errors import CheckpointError, ConfigError
from andromeda.utils.files import write_whole

NAME = "extension.json"
UNSTRETCHED = "before"
STAGES = ("untrained", "after")
FORMAT = 2


class Book:
    """Measurements by (method, stage); `before` is the old model, which has no method."""

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        """Begin a book, or go on with the one in `folder`. Raises ConfigError when that is of another extension."""
        self.path = folder / NAME
        self.values: dict[str, Any] = {"format": FORMAT, **head, "methods": {}}
        if self.path.exists():
            self.values = read(self.path)
            differing = [key for key in head if self.values.get(key) != head[key]]
            if differing:
                told = ", ".join(differing)
                raise ConfigError(f"{folder} holds another extension ({told} differs): give the same arguments to go on, or another --out.")

    def find(self, method: str, stage: str = "") -> dict[str, Any] | None:
        """A measurement that was made."""
        return self.values.get(UNSTRETCHED) if method == UNSTRETCHED else self.values["methods"].get(method, {}).get(stage)

    def keep(self, figures: dict[str, Any], method: str, stage: str = "") -> None:
        """Write a measurement."""
        if method == UNSTRETCHED:
            self.values[UNSTRETCHED] = figures
        else:
            self.values["methods"].setdefault(method, {})[stage] = figures
        self.save()

    def save(self) -> None:
        """Write everything."""
        write_whole(self.path, (json.dumps(self.values, indent=1) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """A book's values. Raises CheckpointError when it is damaged."""
    try:
        values = json.loads(path.read_text("utf-8"))
        if values["format"] == FORMAT:
            return values
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{path} is damaged or of another version: remove it, and everything is measured again.")


def table(values: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the comparison: the loss of the same targets at every context length."""
    measured = [("as it was", values.get(UNSTRETCHED))]
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
    return ["positions", *(f"{n:,}" for n in lengths), *retrieved], rows


def verdicts(values: dict[str, Any]) -> list[str]:
    """For each method's last stage: the same targets with the whole new context, against as much text as was trained."""
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
            f"{method}, {'trained' if stage == 'after' else stage}: {change:+.4f}{spread} nats from {trained:,} to {longest:,} tokens"
        )
    return said


def difference(before: list[float], after: list[float]) -> tuple[float, float | None]:
    """Mean change from window to window, and its standard error; None with one window."""
    each = [b - a for a, b in zip(before, after, strict=True)]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else None
    return statistics.fmean(each), error


def mean(retrieval: dict[str, Any]) -> float:
    """Accuracy at the longest length, over all depths."""
    last = retrieval["accuracy"][-1]
    return sum(last) / len(last)
