"""Performance targets of the GPU benchmarks compared with their results: one line per target, from the result of one job.

A target is a number and a direction. The line says so if the job has no result, or did not measure the quantity.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from andromeda.bench.models import ANDROMEDA_UNFUSED, LLAMA

Result = dict[str, Any]
GIB = 1 << 30


class Goal(NamedTuple):
    """One line of the table."""

    what: str
    job: str
    """The result is gpu-JOB.json."""
    value: Callable[[Result], float]
    """Measured; raises KeyError, IndexError or StopIteration where the result does not hold it."""
    goal: float
    most: bool = False
    """Whether the goal is the most that is allowed, not the least."""

    def met(self, value: float) -> bool:
        """Whether this value reaches the goal."""
        return value <= self.goal if self.most else value >= self.goal


def attention(case: str, baseline: str, passes: str) -> Callable[[Result], float]:
    """Time of a work over that of another, each with its best backend."""
    return lambda result: _best(result, case, passes) / _best(result, baseline, passes)


def _best(result: Result, case: str, passes: str) -> float:
    times = [row[f"{passes}_ms"] for row in result["rows"] if row["case"] == case and not row["refused"] and row["backend"] != "flex"]
    times = times or [row[f"{passes}_ms"] for row in result["rows"] if row["case"] == case and not row["refused"]]
    return float(sorted(times)[0])


def entry(name: str, figure: str, scale: float = 1.0) -> Callable[[Result], float]:
    """A figure of one side of a training or loss benchmark."""
    return lambda result: result["implementations"][name][figure] / scale


def ratio(figure: str, of: str, to: str) -> Callable[[Result], float]:
    """A side's figure over another's."""
    return lambda result: result["implementations"][of][figure] / result["implementations"][to][figure]


def row(figure: str, scale: float = 1.0, number: int = 0, **fits: Any) -> Callable[[Result], float]:
    """A figure of the row with these values, the `number`-th where several have them."""
    return lambda result: [r for r in result["rows"] if all(r.get(k) == v for k, v in fits.items())][number][figure] / scale


def faster(result: Result) -> float:
    """PyTorch's time for the gradient of a table over the kernel's, on ids as words are, in the least favorable case."""
    found = {(r["case"], r["ids"], r["table"], r["implementation"]): r["ms"] for r in result["rows"] if r["case"].startswith("gradient")}
    return min(ms / found[(*key[:3], "kernel")] for key, ms in found.items() if key[3] == "pytorch")


def repeats(result: Result) -> float:
    """Share of the kernel's rows that gave the same bits twice."""
    rows = [r["repeats"] for r in result["rows"] if r["implementation"] == "kernel"]
    return sum(rows) / len(rows)


def cost(result: Result) -> float:
    """Loss in 8 bits above that in bfloat16."""
    return entry("fp8", "final_loss")(result) - entry("bf16", "final_loss")(result)


PREPARED, PACKED = "causal, QK norm + xPos + ALiBi folded", "window, documents, ALiBi folded"
OURS: dict[str, Any] = {"implementation": "Andromeda"}

GOALS = (
    Goal("attention: QK norm, xPos, ALiBi vs. plain causal, forward", "attention", attention(PREPARED, "causal", "forward"), 1.05, True),
    Goal("  forward and backward", "attention", attention(PREPARED, "causal", "forward_backward"), 1.05, True),
    Goal("window, documents, ALiBi vs. window alone, forward", "attention", attention(PACKED, "window", "forward"), 1.15, True),
    Goal("  forward and backward", "attention", attention(PACKED, "window", "forward_backward"), 1.15, True),
    Goal("training andromeda, 8,192 tokens, bf16, tokens/s", "train-bf16", entry("Andromeda", "tokens_per_second"), 30_000),
    Goal("  batch size 1, times transformers' Llama", "train-bf16-batch-1", ratio("tokens_per_second", "Andromeda", LLAMA), 1.7),
    Goal("  batch size 1, peak memory, GiB", "train-bf16-batch-1", entry("Andromeda", "peak", GIB), 45, True),
    Goal("  fp8, tokens/s", "train-fp8", entry("Andromeda", "tokens_per_second"), 38_000),
    Goal("training andromeda-360m, 8,192 tokens, fraction of roofline", "train-360m-8k", entry("Andromeda", "of_ceiling"), 0.65),
    Goal("  32,768 tokens", "train-360m-32k", entry("Andromeda", "of_ceiling"), 0.65),
    Goal("prefill andromeda, 32,768 tokens, bf16, ms", "prefill-bf16", row("ms", **OURS), 540, True),
    Goal("  fp8, one layer in 8 full, ms", "prefill-fp8-windows", row("ms", **OURS), 165, True),
    Goal("prefill andromeda-360m-long, fp8, 32,768 tokens, ms", "prefill-long", row("ms", tokens=32768, **OURS), 100, True),
    Goal("  100,352 tokens, ms", "prefill-long", row("ms", tokens=100352, **OURS), 300, True),
    Goal("200,000 tokens through andromeda, finite", "prefill-200k", row("finite", tokens=200000, **OURS), 1),
    Goal("  at once, s", "prefill-200k", row("ms", 1e3, **OURS), float("inf"), True),
    Goal("  peak memory, GiB", "prefill-200k", row("peak", GIB, **OURS), float("inf"), True),
    Goal("  in chunks, relative difference of the logits", "prefill-200k", row("difference", number=1, **OURS), 0.03, True),
    Goal("decoding andromeda after 2,048 tokens, bound / time", "decode", row("of_floor", number=0), 0.75),
    Goal("  after 32,768 tokens", "decode", row("of_floor", number=1), 0.75),
    Goal("  tuned, after 2,048 tokens", "decode-tuned", row("of_floor", number=0), 0.75),
    Goal("  tuned, after 32,768 tokens", "decode-tuned", row("of_floor", number=1), 0.75),
    Goal("embedding gradient, speedup over PyTorch, at least", "embedding", faster, 2.0),
    Goal("  bitwise repeatable", "embedding", repeats, 1.0),
    Goal("linear cross-entropy, peak above the inputs, GiB", "loss", entry("Andromeda", "peak", GIB), 1.0, True),
    Goal("  time over compiled PyTorch's with all logits", "loss", ratio("ms", "Andromeda", "PyTorch, compiled"), 1.0, True),
    Goal("flash attention on over off, training, times", "train-flash", ratio("tokens_per_second", "Andromeda", ANDROMEDA_UNFUSED), 1.0),
    Goal("fp8: loss minus bfloat16, nats/byte", "precision", cost, 0.02, True),
)  # fmt: skip


def table(folder: Path) -> str:
    """Targets with the results of a folder."""
    lines = [f"{'':62s} {'measured':>10s} {'target':>10s}"]
    for goal in GOALS:
        bound = "" if goal.goal == float("inf") else f"{'<=' if goal.most else '>='} {goal.goal:,g}"
        lines.append(f"{goal.what:62s} {_measured(goal, folder, bound)}")
    return "\n".join(lines)


def _measured(goal: Goal, folder: Path, bound: str) -> str:
    file = folder / f"gpu-{goal.job}.json"
    if not file.exists():
        return f"{'no result':>10s} {bound:>10s}"
    try:
        value = goal.value(json.loads(file.read_text()))
    except (KeyError, IndexError, TypeError, ZeroDivisionError):
        return f"{'not there':>10s} {bound:>10s}"
    word = "" if not bound else "met" if goal.met(value) else "MISSED"
    return f"{value:10,.4g} {bound:>10s} {word}".rstrip()
