"""What a side of the CPU benchmark learns: loss after equal tokens, and time until the peer's final loss.

Every side sees the same rows of a corpus, each row once, so that the loss on a row before it is learned from is a loss on
unseen text. Steps of all sides alternate; the clock of a side runs during its own steps alone.
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
"""Share of the steps over which a loss is averaged."""
WARMUP = 20


def measure(corpus: str, steps: int, way: ComputeMode) -> dict[str, Any]:
    """Train all sides for `steps` steps on a corpus folder. Raises DataError when its vocabulary is too large."""
    stream = open_stream(DataConfig(corpus=corpus), CONTEXT, 0)
    if stream.vocab_size > VOCABULARY:
        raise DataError(f"The corpus {corpus} has {stream.vocab_size} tokens: build one with --vocab-size {VOCABULARY}.")
    sides = {name: build_competitor(name, way) for name in COMPETITORS}
    losses: dict[str, list[float]] = {name: [] for name in COMPETITORS}
    works = {name: partial(_learn, side, stream, lr_schedule(steps), losses[name]) for name, side in sides.items()}
    seconds = time_alternately(works, 0, steps)
    return {"way": str(way), "steps": steps, "corpus": stream.fingerprint, "sides": compare(losses, seconds, sides)}


def lr_schedule(steps: int) -> LRFactor:
    """A short warm-up, then a cosine down to a tenth."""
    return build_schedule(ScheduleConfig(kind="cosine", warmup=min(WARMUP, steps), min_lr_ratio=0.1), steps)


def _learn(side: Competitor, stream: TokenStream, schedule: LRFactor, losses: list[float], step: int) -> None:
    batch = stream.batch(step * ROWS, ROWS)
    losses.append(float(side.step(batch.ids, batch.targets, schedule(step))))


def compare(losses: dict[str, list[float]], seconds: dict[str, list[float]], sides: dict[str, Competitor]) -> dict[str, Any]:
    """Each side's final loss, its time, and the time at which its running loss first was at the peer's final one."""
    smooth = {name: running_mean(values, max(1, int(len(values) * WINDOW))) for name, values in losses.items()}
    goal = smooth[BASELINE][-1]
    found: dict[str, Any] = {}
    for name, means in smooth.items():
        clock = list(accumulate(seconds[name]))
        reached = next((when for when, mean in zip(clock, means, strict=True) if mean <= goal), None)
        found[name] = {
            "parameters": sides[name].parameters,
            "final_loss": means[-1],
            "seconds": clock[-1],
            "seconds_to_peers_loss": reached,
            "losses": losses[name],
        }
    return found


def running_mean(values: list[float], width: int) -> list[float]:
    """At every place the mean of the last `width` values; infinite before there are as many."""
    sums = [0.0, *accumulate(values)]
    return [math.inf if i < width else (sums[i] - sums[i - width]) / width for i in range(1, len(sums))]
