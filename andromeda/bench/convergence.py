"""Convergence of the models of the CPU benchmark: loss after equal tokens, and time to the baseline's final loss.

All models see the same sequences, each once, so that every training loss is one on unseen text. Steps of all models alternate;
a model's time counts its own steps only.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import accumulate
from typing import Any

from andromeda.bench.competitors import BASELINE, COMPETITORS, CONTEXT, ROWS, VOCABULARY, Competitor, ComputeMode, build_competitor
from andromeda.bench.timing import time_alternately
from andromeda.config.data import DataConfig
from andromeda.config.train import ScheduleConfig
from andromeda.data.loader import TokenStream, open_stream
from andromeda.optim import build_schedule
from andromeda.optim.schedules import LRFactor
from andromeda.utils.errors import DataError

WINDOW = 0.1
"""Fraction of the steps over which a loss is averaged."""
WARMUP = 20


def measure(corpus: str, steps: int, mode: ComputeMode) -> dict[str, Any]:
    """Train all models for `steps` steps on a corpus folder. Raises DataError if its vocabulary is too large."""
    stream = open_stream(DataConfig(corpus=corpus), CONTEXT, 0)
    if stream.vocab_size > VOCABULARY:
        raise DataError(f"The corpus {corpus} has {stream.vocab_size} tokens: build one with --vocab-size {VOCABULARY}.")
    implementations = {name: build_competitor(name, mode) for name in COMPETITORS}
    losses: dict[str, list[float]] = {name: [] for name in COMPETITORS}
    functions = {
        name: partial(_learn, implementation, stream, lr_schedule(steps), losses[name]) for name, implementation in implementations.items()
    }
    seconds = time_alternately(functions, 0, steps)
    return {"mode": str(mode), "steps": steps, "corpus": stream.fingerprint, "implementations": compare(losses, seconds, implementations)}


def lr_schedule(steps: int) -> LRFactor:
    """A short warm-up, then a cosine down to a tenth."""
    return build_schedule(ScheduleConfig(kind="cosine", warmup=min(WARMUP, steps), min_lr_ratio=0.1), steps)


def _learn(implementation: Competitor, stream: TokenStream, schedule: LRFactor, losses: list[float], step: int) -> None:
    batch = stream.batch(step * ROWS, ROWS)
    losses.append(float(implementation.step(batch.ids, batch.targets, schedule(step))))


def compare(losses: dict[str, list[float]], seconds: dict[str, list[float]], implementations: dict[str, Competitor]) -> dict[str, Any]:
    """Each model's final loss, its time, and the time at which its running loss first reached the baseline's final loss."""
    smooth = {name: running_mean(values, max(1, int(len(values) * WINDOW))) for name, values in losses.items()}
    goal = smooth[BASELINE][-1]
    found: dict[str, Any] = {}
    for name, means in smooth.items():
        clock = list(accumulate(seconds[name]))
        reached = next((when for when, mean in zip(clock, means, strict=True) if mean <= goal), None)
        found[name] = {
            "parameters": implementations[name].parameters,
            "final_loss": means[-1],
            "seconds": clock[-1],
            "seconds_to_baseline_loss": reached,
            "losses": losses[name],
        }
    return found


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of the last `width` values at every position; infinite where there are fewer."""
    sums = [0.0, *accumulate(values)]
    return [math.inf if i < width else (sums[i] - sums[i - width]) / width for i in range(1, len(sums))]
