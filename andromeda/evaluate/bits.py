"""Bits per byte of held-out text, every token scored once and with much context.

Rows cut one after the other would leave the first tokens of each without any context. Windows that overlap by all but
`stride` tokens give every token (of all windows but the first) at least context - stride tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from andromeda.data.loader import Stream
from andromeda.errors import DataError
from andromeda.kernels.cross_entropy import linear_cross_entropy
from andromeda.model.transformer import Transformer


@dataclass(frozen=True)
class Bits:
    """A measurement on held-out text."""

    nats: float
    """Sum over all tokens."""
    tokens: int
    bytes: int
    """UTF-8 bytes of the text that the tokens spell."""

    @property
    def per_byte(self) -> float:
        """Bits per byte: what an ideal coder driven by the model would need. A uniform model of bytes scores 8."""
        return self.nats / math.log(2) / self.bytes

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first scored, end) of windows of at most `context` tokens that score each of `length` tokens once, in order."""
    end = min(context, length)
    yield 0, 0, end
    while end < length:
        scored, end = end, min(end + stride, length)
        yield end - context, scored, end


@torch.inference_mode()
def held_out_bits(model: Transformer, stream: Stream, *, context: int, stride: int, batch: int = 16) -> Bits:
    """Measure `model` on a whole held-out stream whose rows follow one another (data.packing `stream`).

    context: tokens of a window; stride: tokens that each window but the first scores, at most `context`. The cost is
    context / stride times that of one pass.
    """
    rows = stream.rows(0, stream.rows_available or 0)
    if not rows.bytes:
        raise DataError("The corpus has no tokenizer beside it, so that its bytes are unknown: build it with `andromeda data build`.")
    kept = rows.targets.flatten() != -100
    ids, targets = rows.ids.flatten()[kept], rows.targets.flatten()[kept]
    todo = list(windows(len(ids), context, stride))
    nats = torch.zeros((), dtype=torch.float64)
    was_training = model.training
    model.eval()
    for group in [todo[:1], *(todo[i : i + batch] for i in range(1, len(todo), batch))]:
        nats += _score(model, ids, targets, group)
    model.train(was_training)
    return Bits(float(nats), len(targets), rows.bytes)


def _score(model: Transformer, ids: Tensor, targets: Tensor, group: list[tuple[int, int, int]]) -> Tensor:
    """Nats of the scored tokens of some windows of equal length."""
    device = model.head.weight.device
    hidden = model.hidden(torch.stack([ids[begin:end] for begin, _, end in group]).to(device))
    wanted = torch.stack([targets[begin:end] for begin, _, end in group])
    for row, (begin, scored, _) in enumerate(group):
        wanted[row, : scored - begin] = -100
    head = model.head
    return linear_cross_entropy(hidden, head.weight, wanted.to(device), bias=head.bias, softcap=head.softcap).nll.double().cpu()
