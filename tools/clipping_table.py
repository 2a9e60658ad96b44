"""Learning rates with and without gradient clipping, from the results of a grid: which stay stable, and steps to equal loss.

The variants are pairs `OPTIMIZER RATE` and `OPTIMIZER RATE, clipped`, the second compared with the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from andromeda.ablate.ablation_tables import DASH, cells, lines, mean

MARK = ", clipped"
HEAD = ("learning rate", "without clipping", "clipped", "effect of clipping", "95 % interval", "verdict", "steps to the loss without")
Row = dict[str, Any]


def section(results: dict[str, Any]) -> Iterator[str]:
    """Lines of the section; none where the grid has no such pairs that were run."""
    found = pairs(results)
    if not found:
        return
    base = results["variants"][0]
    yield f"### Clipping and the learning rate, at {base['parameters'] / 1e6:.1f} M parameters"
    yield ""
    yield (
        "Without a loss spike guard; clipping is by the global norm at 1. The last column is the step at which the clipped runs' mean "
        "held-out loss first reaches the final loss of the unclipped runs with the same learning rate, interpolated linearly between "
        f"validations, which are {_distance(base)} steps apart."
    )
    yield ""
    yield from lines(HEAD, (_cells(plain, clipped) for plain, clipped in found))
    yield ""
    yield best(found)
    yield ""


def pairs(results: dict[str, Any]) -> list[tuple[Row, Row]]:
    """(unclipped, clipped) of each rate that was run both ways, the lowest rate first."""
    rows = {row["name"]: row for row in results["variants"]}
    both = [(rows[name.removesuffix(MARK)], row) for name, row in rows.items() if name.endswith(MARK) and name.removesuffix(MARK) in rows]
    return sorted(((plain, clipped) for plain, clipped in both if plain["runs"] and clipped["runs"]), key=lambda pair: float(rate(pair[0])))


def best(found: Sequence[tuple[Row, Row]]) -> str:
    """Each side at its own best learning rate, and the highest rate at which all of its runs stay finite."""
    sides = list(zip(*found, strict=True))
    told = []
    winners = []
    for rows, side in zip(sides, ("without clipping", "clipped"), strict=True):
        finite = [row for row in rows if row["mean"] is not None and not _fallen(row)]
        if not finite:
            return f"No learning rate ends with a finite loss in every run {side}."
        winner = min(finite, key=lambda row: row["mean"])
        winners.append(winner)
        edge = " (the lowest tried)" if winner is rows[0] else " (the highest tried)" if winner is rows[-1] else ""
        end = " (the highest tried)" if finite[-1] is rows[-1] else ""
        told.append(
            f"{side}, the best learning rate is {rate(winner)}{edge} with {mean(winner)}, and all runs stay finite up to "
            f"{rate(finite[-1])}{end}"
        )
    plain, clipped = winners
    steps = reached(clipped, plain["mean"])
    met = f"after {steps:.0f} of {clipped['steps']} steps" if steps else f"not within {clipped['steps']} steps"
    text = f"{'; '.join(told)}. The best clipped runs reach the best loss without clipping {met}."
    return text[0].upper() + text[1:]


def reached(row: Row, target: float) -> float | None:
    """The step at which a variant's mean held-out loss first reaches `target`, interpolated linearly; None if never."""
    curve = mean_curve(row)
    for (step, loss), (later, lower) in pairwise(curve):
        if loss > target >= lower:
            return step + (loss - target) / (loss - lower) * (later - step)
    return float(curve[0][0]) if curve and curve[0][1] <= target else None


def mean_curve(row: Row) -> list[tuple[int, float]]:
    """Mean held-out loss over the runs by step, where all are finite."""
    curves = [dict(map(tuple, run["curve"])) for run in row["runs"].values()]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    points = [(step, [curve[step] for curve in curves]) for step in steps]
    finite = [(step, losses) for step, losses in points if all(loss is not None and math.isfinite(loss) for loss in losses)]
    return [(step, sum(losses) / len(losses)) for step, losses in finite]


def rate(row: Row) -> str:
    """The learning rate in a variant's name."""
    return str(row["name"]).removesuffix(MARK).rpartition(" ")[2]


def _cells(plain: Row, clipped: Row) -> list[str]:
    shown = cells(clipped)
    steps = reached(clipped, plain["mean"]) if plain["mean"] is not None else None
    met = DASH if plain["mean"] is None else f"{steps:.0f} of {clipped['steps']}" if steps else "not reached"
    return [rate(plain), _state(plain), _state(clipped), shown[3], shown[4], clipped["verdict"], met]


def _state(row: Row) -> str:
    fallen = _fallen(row)
    return mean(row) + (f", {fallen} diverged" if fallen else "")


def _fallen(row: Row) -> int:
    return sum(run["loss"] is None for run in row["runs"].values())


def _distance(base: Row) -> int | str:
    curves = [run["curve"] for run in base["runs"].values() if len(run["curve"]) > 1]
    return curves[0][1][0] - curves[0][0][0] if curves else base["steps"]
