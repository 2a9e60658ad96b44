"""Loss of the same held-out targets with more and more context before them, and loss by position in long rows.

The first tells what far tokens are worth, because nothing but the context changes; the second where a model breaks down.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from andromeda.config.data import DataConfig
from andromeda.data.loader import open_stream
from andromeda.model.transformer import Transformer
from andromeda.ops.cross_entropy import linear_cross_entropy
from andromeda.train.precision import Precision
from andromeda.utils.errors import DataError

PASS_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 16}
"""Tokens of one forward pass where several rows fit into it."""
Report = Callable[[int], None]
"""Told of every so many tokens that have been read."""


def held_out_tokens(data: DataConfig, seed: int) -> Tensor:
    """All tokens of the held-out text (N,), documents one after the other."""
    stream = open_stream(data.model_copy(update={"packing": "stream", "workers": 0}), 1024, seed, "val")
    rows = stream.batch(0, stream.num_sequences or 0)
    kept = rows.targets.flatten() != -100
    return torch.cat([rows.ids.flatten()[:1], rows.targets.flatten()[kept]])


def windows(tokens: Tensor, length: int, samples: int, tail: int) -> Tensor:
    """Up to `samples` windows (n, length + 1) at even distances, whose last `tail` targets do not overlap.

    Raises DataError when the text is shorter than one.
    """
    if len(tokens) < length + 1:
        raise DataError(
            f"The held-out text has {len(tokens):,} tokens, fewer than a context of {length:,}: "
            "build the corpus with a larger --validation-fraction, or name another with --held-out."
        )
    spare = len(tokens) - length - 1
    count = max(1, min(samples, 1 + spare // tail))
    starts = [i * spare // max(1, count - 1) for i in range(count)]
    return torch.stack([tokens[start : start + length + 1] for start in starts])


def context_lengths(trained: int, to: int, tail: int) -> list[int]:
    """Half the trained context, the trained one, and doubled up to `to`; none shorter than the scored tail."""
    doubled = itertools.takewhile(lambda n: n < to, (trained << i for i in range(64)))
    return sorted({n for n in (trained // 2, *doubled, to) if n >= tail})


def position_edges(length: int, first: int = 16) -> list[int]:
    """Borders of bins of positions, half an octave wide from `first` on: 0, 16, 23, 32, ... length."""
    count = max(1, math.ceil(2 * math.log2(max(length / first, 1.0))))
    inner = [round(first * 2 ** (i / 2)) for i in range(count)]
    return [0, *sorted({n for n in inner if n < length}), length]


@torch.inference_mode()
def losses(model: Transformer, ids: Tensor, targets: Tensor, precision: Precision, tail: int = 0) -> Tensor:
    """Nats of each target (B, T) in float64 on the CPU, or of the last `tail` alone (B, tail)."""
    with precision.autocast():
        hidden = model.hidden(ids.to(precision.device))[:, -tail:]
        wanted = targets[:, -tail:].to(precision.device)
        found = linear_cross_entropy(hidden, model.head.weight, wanted, bias=model.head.bias, softcap=model.head.softcap, reduction="none")
    return found.nll.double().cpu()


def measure(
    model: Transformer, rows: Tensor, lengths: list[int], tail: int, precision: Precision, report: Report = lambda tokens: None
) -> dict[str, Any]:
    """Both measurements of a model on windows (n, T + 1): {"context": ..., "position": ...} as evaluate/result.py describes them.

    lengths: contexts of at most T tokens, T itself for the loss by position.
    """
    model.eval()
    longest = rows.shape[1] - 1
    nats: dict[int, Tensor] = {}
    position: dict[str, Any] | None = None
    for length in lengths:
        at_once = max(1, PASS_TOKENS[precision.device.type] // length)
        found = []
        for some in rows[:, longest - length :].split(at_once):
            found.append(losses(model, some[:, :-1], some[:, 1:], precision, 0 if length == longest else tail))
            report(some[:, 1:].numel())
        each = torch.cat(found)
        nats[length] = each[:, -tail:]
        if length == longest:
            position = by_position(each)
    return {"context": by_context(nats), "position": position}


def by_context(nats: dict[int, Tensor]) -> dict[str, Any]:
    """Mean and standard error, over windows, of the same targets' nats (n, tail) at each length; and each window's own mean."""
    means = {length: each.mean(1) for length, each in nats.items()}
    return {
        "context": list(nats),
        "nats": [float(each.mean()) for each in means.values()],
        "error": [float(each.std() / math.sqrt(len(each))) if len(each) > 1 else None for each in means.values()],
        "windows": [each.tolist() for each in means.values()],
        "tokens": next(iter(nats.values())).numel(),
    }


def by_position(nats: Tensor) -> dict[str, Any]:
    """Mean nats (n, T) in bins of positions."""
    edges = position_edges(nats.shape[1])
    bins = [nats[:, low:high] for low, high in itertools.pairwise(edges)]
    return {"edges": edges, "nats": [float(one.mean()) for one in bins], "tokens": [one.numel() for one in bins]}
