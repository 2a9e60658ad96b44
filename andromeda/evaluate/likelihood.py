"""Log-likelihood of continuations after contexts: what multiple choice and lm-evaluation-harness ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from andromeda.evaluate.score import padded, rows_at_once
from andromeda.generate.engine import eval_mode
from andromeda.model.transformer import Transformer
from andromeda.ops.cross_entropy import IGNORE_INDEX
from andromeda.utils.progress_callback import ProgressCallback, no_progress

Pair = tuple[Sequence[int], Sequence[int]]
"""Context, at least one token, and continuation."""


class Likelihood(NamedTuple):
    """Of one continuation."""

    log: float
    """Sum of the log-probabilities of its tokens, in nats."""
    greedy: bool
    """Whether every token is the likeliest one."""


def likelihoods(model: Transformer, pairs: Sequence[Pair], report: ProgressCallback = no_progress) -> list[Likelihood]:
    """The likelihood of each continuation, in the order given. Long ones are read first, so that a lack of memory shows at once."""
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    found: dict[int, Likelihood] = {}
    with eval_mode(model):
        while len(found) < len(order):
            length = sum(map(len, pairs[order[len(found)]]))
            group = order[len(found) : len(found) + rows_at_once(model, length)]
            found |= dict(zip(group, _group(model, [pairs[i] for i in group]), strict=True))
            report("likelihoods", len(found), len(order))
    return [found[i] for i in range(len(pairs))]


@torch.no_grad()
def _group(model: Transformer, pairs: list[Pair]) -> list[Likelihood]:
    whole = [[*context, *continuation] for context, continuation in pairs]
    ids, targets = padded(whole)
    for row, (context, _) in enumerate(pairs):
        targets[row, : len(context)] = IGNORE_INDEX
    ids, targets = ids[:, :-1], targets[:, 1:].to(model.head.weight.device)
    asked = targets != IGNORE_INDEX
    # Only what is asked for goes through the head.
    logits = model.head(model.hidden(ids.to(targets.device))[asked])
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    right = targets[asked]
    picked, first = logs.gather(1, right[:, None])[:, 0].double().cpu(), (logs.argmax(-1) == right).cpu()
    counts = asked.sum(1).tolist()
    return [Likelihood(float(log.sum()), bool(hit.all())) for log, hit in zip(picked.split(counts), first.split(counts), strict=True)]
