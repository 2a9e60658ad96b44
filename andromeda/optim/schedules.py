"""Learning-rate schedules: pure functions from a step to a factor of the base rate.

Conventions. Step k (0 to `steps` - 1) is the index of the update about to be made.
- Warm-up over W steps: (k + 1) / W, so the first update is never wasted and step W - 1 has the full rate.
- Descent from step a to the end N: the factor is 1 at step a and would be `final` at step N, one past the last update.
  With `final = 0` the last update therefore still moves, and the values equal torch's LinearLR and CosineAnnealingLR.
- At and after step N the factor stays `final`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from andromeda.config.derived import in_steps
from andromeda.config.train import ScheduleConfig, WindowWarmupConfig
from andromeda.utils.errors import ConfigError

LRFactor = Callable[[int], float]


def build_schedule(config: ScheduleConfig, steps: int) -> LRFactor:
    """The factor of the learning rate at each step of a run of `steps` updates.

    Kinds: `constant` (1), `linear`, `cosine` (half a period, arXiv 1608.03983 eq. 5), `wsd` (warm-up, stable, linear
    decay over the last `cooldown` steps, arXiv 2404.06395).

    Raises ConfigError when warm-up and cooldown do not fit in the run.
    """
    warmup, cooldown = in_steps(config.warmup, steps), in_steps(config.cooldown, steps) if config.kind == "wsd" else 0
    if warmup + cooldown > steps:
        raise ConfigError(
            f"The schedule's warm-up ({warmup}) and cooldown ({cooldown}) do not fit in {steps} steps: "
            "lower train.schedule.warmup or train.schedule.cooldown, or raise train.steps."
        )
    start, curve = {
        "constant": (steps, _constant),
        "linear": (warmup, _linear),
        "cosine": (warmup, _cosine),
        "wsd": (steps - cooldown, _linear),
    }[config.kind]
    final = config.min_lr_ratio

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if step < start:
            return 1.0
        return curve(min(1.0, (step - start) / max(1, steps - start)), final)

    return factor


def _constant(_progress: float, _final: float) -> float:
    return 1.0


def _linear(progress: float, final: float) -> float:
    return 1.0 - (1.0 - final) * progress


def _cosine(progress: float, final: float) -> float:
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_window_warmup(config: WindowWarmupConfig, steps: int) -> Callable[[int], int]:
    """The window at each step, in tokens: linear from `start` at step 0 to `end` at the last step, rounded up to a multiple of
    `step`; always 0 (as configured) when `end` is 0."""
    if not config.end:
        return lambda step: 0

    def window(step: int) -> int:
        exact = config.start + (config.end - config.start) * min(1.0, step / max(1, steps - 1))
        return max(1, math.ceil(exact / config.step)) * config.step

    return window
