"""Window warm-up: short attention first, longer as the run goes on (modded-nanogpt)."""

from __future__ import annotations

import math
from collections.abc import Callable

from andromeda.config.train import Window


def build_window(config: Window, steps: int) -> Callable[[int], int]:
    """The window at each step, in tokens: linear from `start` at step 0 to `end` at the last step, rounded up to a multiple of
    `step`; always 0 (as configured) when `end` is 0."""
    if not config.end:
        return lambda step: 0

    def window(step: int) -> int:
        exact = config.start + (config.end - config.start) * min(1.0, step / max(1, steps - 1))
        return max(1, math.ceil(exact / config.step)) * config.step

    return window
