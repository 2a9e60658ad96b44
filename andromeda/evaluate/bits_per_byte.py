"""Bits per byte of a text, every token scored once and with much context.

Consecutive sequences would leave the first tokens of each without context. Windows that overlap by all but
`stride` tokens give every token (of all windows but the first) at least context - stride tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from andromeda.data.loader import TokenStream
from andromeda.evaluate.token_loss import batch_size_for, token_losses
from andromeda.generate.engine import eval_mode
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import DataError
from andromeda.utils.progress_callback import ProgressCallback, no_progress


@dataclass(frozen=True)
class BitsPerByte:
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


def text_nats(
    model: Transformer,
    ids: Tensor,
    targets: Tensor,
    *,
    context: int,
    stride: int,
    documents: Tensor | None = None,
    batch: int = 0,
    report: ProgressCallback = no_progress,
) -> float:
    """Sum of the losses of targets (N,) after ids (N,), in windows of `context` tokens of which `stride` are scored.

    documents (N,): numbers of documents that attention does not cross. batch: windows at once (0: what suits the device).
    The cost is context / stride times that of one pass.
    """
    todo = list(windows(len(ids), context, stride))
    batch = batch or batch_size_for(model, context)
    nats = 0.0
    with eval_mode(model):
        # The first window alone may be shorter than the others.
        for group in [todo[:1], *(todo[i : i + batch] for i in range(1, len(todo), batch))]:
            rows, wanted = (torch.stack([x[begin:end] for begin, _, end in group]) for x in (ids, targets))
            numbers = None if documents is None else torch.stack([documents[begin:end] for begin, _, end in group])
            for row, (begin, scored, _) in enumerate(group):
                wanted[row, : scored - begin] = -100
            nats += float(token_losses(model, rows, wanted, documents=numbers).sum())
            report("bits per byte", group[-1][2], len(ids))
    return nats


def held_out_bits(model: Transformer, stream: TokenStream, *, context: int, stride: int, batch: int = 0) -> BitsPerByte:
    """Measure `model` on a whole held-out stream whose sequences follow one another (data.packing `stream`).

    context: tokens of a window; stride: tokens that each window but the first scores, at most `context`.
    """
    rows = stream.batch(0, stream.num_sequences or 0)
    if not rows.bytes:
        raise DataError("The corpus has no tokenizer beside it, so that its bytes are unknown: build it with `andromeda data build`.")
    kept = rows.targets.flatten() != -100
    ids, targets = rows.ids.flatten()[kept], rows.targets.flatten()[kept]
    return BitsPerByte(text_nats(model, ids, targets, context=context, stride=stride, batch=batch), len(targets), rows.bytes)
