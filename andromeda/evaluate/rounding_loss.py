"""What rounding a model's weights costs: bits per byte of held-out text before and after."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from andromeda.evaluate.bits_per_byte import text_nats
from andromeda.evaluate.held_out_text import open_text
from andromeda.evaluate.loaded_model import load_model as open_run
from andromeda.train.state import load_model, model_tensors
from andromeda.utils.errors import AndromedaError

MOST_TOKENS = 1 << 16
"""Of held-out text that is read, from its beginning; enough for the fourth digit of a difference of the same tokens."""


@dataclass(frozen=True)
class RoundingLoss:
    """Bits per byte of the same text."""

    before: float
    after: float
    tokens: int

    def __str__(self) -> str:
        """In words, for a model card."""
        change = self.after / self.before - 1
        return f"{self.after:.4f} bits per byte of {self.tokens:,} held-out tokens, compared with {self.before:.4f} before ({change:+.2%})"


def rounding_loss(
    run: Path, rounded: Callable[[str, Tensor], Tensor], *, step: int | None = None, average: bool = False
) -> RoundingLoss | str:
    """The loss of the run's held-out text with each weight (name, tensor) replaced by `rounded` of it; or why it cannot be measured."""
    loaded = open_run(run, step=step, average=average, device="cpu", dtype="fp32")
    try:
        text = open_text(loaded)
        ids, targets = text.ids[:-1][:MOST_TOKENS], text.ids[1:][:MOST_TOKENS]
        size = text.bytes_of(targets)
    except AndromedaError as error:
        return str(error)
    numbers = text.numbers()
    documents = None if numbers is None else numbers[:-1][:MOST_TOKENS]
    context = loaded.context

    def bits() -> float:
        nats = text_nats(loaded.model, ids, targets, context=context, stride=max(1, context // 2), documents=documents)
        return nats / math.log(2) / size

    before = bits()
    load_model(loaded.model, {name: rounded(name, tensor) for name, tensor in model_tensors(loaded.model).items()})
    return RoundingLoss(before, bits(), len(targets))
