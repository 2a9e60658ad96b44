"""Loss by position, and loss of the same targets after contexts of different lengths: what a long context is worth to a model.

By position, all bins average over the same windows, so that a falling loss is due to the context and not to other text. Yet tokens at
other positions are other tokens. The loss by context removes that too: the targets stay the same, and only the number of tokens before
them changes. A model that uses its whole context improves up to the full length; one that was not trained on it gets worse there.

`andromeda eval` measures windows that lie within documents (`loss_by_position`, `loss_by_context`). `andromeda extend` compares models
on windows over the whole held-out text, whose last `tail` targets are scored at each length in one pass (`measure_long_context`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor

from andromeda.config.data import DataConfig
from andromeda.data.loader import open_stream
from andromeda.evaluate.held_out_text import EvalText
from andromeda.evaluate.token_loss import batch_size_for, token_losses
from andromeda.generate.engine import eval_mode
from andromeda.model.transformer import Transformer
from andromeda.ops.cross_entropy import linear_cross_entropy
from andromeda.train.precision import Precision
from andromeda.utils.errors import DataError, RequestError
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


TOKENS_PER_PASS = {"cpu": 1 << 12, "cuda": 1 << 16}
"""Tokens of one forward pass over several windows."""
TokenCallback = Callable[[int], None]
"""Called with the number of tokens of each pass."""


def held_out_tokens(data: DataConfig, seed: int) -> Tensor:
    """All tokens of the held-out text (N,), documents one after the other."""
    stream = open_stream(data.model_copy(update={"packing": "stream", "workers": 0}), 1024, seed, "val", all_tokens=True)
    rows = stream.batch(0, stream.num_sequences or 0)
    kept = rows.targets.flatten() != -100
    return torch.cat([rows.ids.flatten()[:1], rows.targets.flatten()[kept]])


def evenly_spaced_windows(tokens: Tensor, length: int, samples: int, tail: int) -> Tensor:
    """Up to `samples` windows (n, length + 1) at even distances, whose last `tail` targets do not overlap.

    Raises DataError when the text is shorter than one.
    """
    if len(tokens) < length + 1:
        raise DataError(
            f"The held-out text has {len(tokens):,} tokens, fewer than a context of {length:,}: "
            "build the corpus with a larger --validation-fraction, or name another with --eval-corpus."
        )
    spare = len(tokens) - length - 1
    count = max(1, min(samples, 1 + spare // tail))
    starts = [i * spare // max(1, count - 1) for i in range(count)]
    return torch.stack([tokens[start : start + length + 1] for start in starts])


def context_lengths(trained: int, to: int, tail: int) -> list[int]:
    """Half the trained context, the trained one, and doubled up to `to`; none shorter than the scored tail."""
    doubled = takewhile(lambda n: n < to, (trained << i for i in range(64)))
    return sorted({n for n in (trained // 2, *doubled, to) if n >= tail})


def position_edges(length: int, first: int = 16) -> list[int]:
    """Borders of bins of positions, half an octave wide from `first` on: 0, 16, 23, 32, ... length."""
    count = max(1, math.ceil(2 * math.log2(max(length / first, 1.0))))
    inner = [round(first * 2 ** (i / 2)) for i in range(count)]
    return [0, *sorted({n for n in inner if n < length}), length]


@torch.inference_mode()
def window_losses(model: Transformer, ids: Tensor, targets: Tensor, precision: Precision, tail: int = 0) -> Tensor:
    """Nats of each target (B, T) in float64 on the CPU, or of the last `tail` alone (B, tail)."""
    with precision.autocast():
        hidden = model.hidden(ids.to(precision.device))[:, -tail:]
        wanted = targets[:, -tail:].to(precision.device)
        found = linear_cross_entropy(
            hidden, model.head.weight, wanted, bias=model.head.bias, softcap=model.head.softcap, reduction="none", shard=model.head.shard
        )
    return found.nll.double().cpu()


def measure_long_context(
    model: Transformer, rows: Tensor, lengths: list[int], tail: int, precision: Precision, report: TokenCallback = lambda tokens: None
) -> dict[str, Any]:
    """Both measurements of a model on windows (n, T + 1): {"context": ..., "position": ...} as evaluate/result.py describes them.

    lengths: contexts of at most T tokens, T itself for the loss by position.
    """
    model.eval()
    longest = rows.shape[1] - 1
    nats: dict[int, Tensor] = {}
    position: dict[str, Any] | None = None
    for length in lengths:
        at_once = max(1, TOKENS_PER_PASS[precision.device.type] // length)
        found = []
        for some in rows[:, longest - length :].split(at_once):
            found.append(window_losses(model, some[:, :-1], some[:, 1:], precision, 0 if length == longest else tail))
            report(some[:, 1:].numel())
        each = torch.cat(found)
        nats[length] = each[:, -tail:]
        if length == longest:
            position = summarize_by_position(each)
    return {"context": summarize_by_context(nats), "position": position}


def summarize_by_context(nats: dict[int, Tensor]) -> dict[str, Any]:
    """Mean and standard error, over windows, of the same targets' nats (n, tail) at each length; and each window's own mean."""
    means = {length: each.mean(1) for length, each in nats.items()}
    return {
        "context": list(nats),
        "nats": [float(each.mean()) for each in means.values()],
        "error": [float(each.std() / math.sqrt(len(each))) if len(each) > 1 else None for each in means.values()],
        "windows": [each.tolist() for each in means.values()],
        "tokens": next(iter(nats.values())).numel(),
    }


def summarize_by_position(nats: Tensor) -> dict[str, Any]:
    """Mean nats (n, T) in bins of positions."""
    edges = position_edges(nats.shape[1])
    bins = [nats[:, low:high] for low, high in pairwise(edges)]
    return {"edges": edges, "nats": [float(one.mean()) for one in bins], "tokens": [one.numel() for one in bins]}
