"""Loss by position, and loss of the same tokens given more and more context: what a long context is worth to a model.

By position, all bins average over the same windows, so that a fall of the loss is the work of the context and not of other
text. Yet tokens at other positions are other tokens; the second measure removes that too: the very same targets, with 64,
128, ... tokens before them. A model that uses its whole context falls to the end; one that cannot rises where it was not
trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from andromeda.evaluate.held_out_text import EvalText
from andromeda.evaluate.token_loss import batch_size_for, token_losses
from andromeda.generate.engine import eval_mode
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import RequestError
from andromeda.utils.progress_callback import ProgressCallback, no_progress


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss of each position of a window of L tokens."""

    nats: Tensor
    """float64 (L,): mean over the windows of the target that has 1, 2, ... L tokens before it."""
    windows: int
    crossing: bool
    """Whether windows hold several documents, because no document is long enough."""


def loss_by_position(
    model: Transformer, text: EvalText, *, length: int, windows: int, report: ProgressCallback = no_progress
) -> PositionLoss:
    """Measure at most `windows` windows of `length` tokens, spread evenly over the text.

    Windows lie within documents where there are long enough ones. Raises RequestError for a text that is too short.
    """
    begins, crossing = _begins(text, length)
    if not begins:
        raise RequestError(f"The text has {len(text.ids)} tokens, too few for windows of {length}: give more text or shorter --lengths.")
    begins = evenly_spaced(begins, windows)
    total = torch.zeros(length, dtype=torch.float64)
    batch = batch_size_for(model, length)
    with eval_mode(model):
        for start in range(0, len(begins), batch):
            rows = torch.stack([text.ids[begin : begin + length + 1] for begin in begins[start : start + batch]])
            total += token_losses(model, rows[:, :-1], rows[:, 1:]).sum(0)
            report("loss by position", start + len(rows), len(begins))
    return PositionLoss(total / len(begins), len(begins), crossing)


def _begins(text: EvalText, length: int) -> tuple[list[int], bool]:
    """Where windows of length + 1 tokens can begin without overlap, and whether they cross documents."""
    inside = [begin for first, end in text.places(length + 1) for begin in range(first, end - length, length)]
    return (inside, False) if inside else (list(range(0, len(text.ids) - length, length)), True)


def bin_by_position(curve: PositionLoss) -> tuple[list[int], list[float], list[int]]:
    """Edges, means and token counts in bins that double: bin i holds the targets with edges[i] <= tokens before < edges[i + 1]."""
    length = len(curve.nats)
    edges = [*(1 << i for i in range(length.bit_length()) if i == 0 or 1 << i < length), length + 1]
    parts = [curve.nats[begin - 1 : end - 1] for begin, end in pairwise(edges)]
    return edges, [float(part.mean()) for part in parts], [len(part) * curve.windows for part in parts]


def loss_by_context(
    model: Transformer, text: EvalText, *, contexts: tuple[int, ...], targets: int, places: int, report: ProgressCallback = no_progress
) -> Tensor:
    """Mean loss of the same targets after contexts of different lengths: float64 (contexts, places).

    Each place is a run of `targets` tokens inside a document; the first of them has exactly `contexts[i]` tokens before it,
    all of them of the same document. Raises RequestError where no document is long enough.
    """
    longest = max(contexts)
    begins = [at for first, end in text.places(longest + targets) for at in range(first + longest, end - targets + 1, targets)]
    if not begins:
        raise RequestError(
            f"No document has the {longest + targets} tokens that a context of {longest} needs: give a longer text with --text, "
            "or shorter --lengths."
        )
    begins = evenly_spaced(begins, places)
    found = torch.zeros(len(contexts), len(begins), dtype=torch.float64)
    with eval_mode(model):
        for row, count in enumerate(contexts):
            _fill(model, text, begins, count, targets, found[row])
            report("loss by context", row + 1, len(contexts))
    return found


def _fill(model: Transformer, text: EvalText, begins: list[int], count: int, targets: int, found: Tensor) -> None:
    """Mean loss of each place's targets after `count` tokens."""
    length = count + targets - 1
    batch = batch_size_for(model, length)
    for start in range(0, len(begins), batch):
        rows = torch.stack([text.ids[at - count : at + targets] for at in begins[start : start + batch]])
        wanted = rows[:, 1:].clone()
        wanted[:, : count - 1] = -100
        found[start : start + len(rows)] = token_losses(model, rows[:, :-1], wanted).sum(1) / targets


def evenly_spaced(items: list[int], count: int) -> list[int]:
    """At most `count` of the items, evenly spaced."""
    if len(items) <= count:
        return items
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
