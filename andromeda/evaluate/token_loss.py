"""Loss of every token of sequences of any length, in bounded memory.

A long sequence goes through the model a chunk at a time, each chunk reading the keys and values of those before from a
cache, and its logits are never whole. What grows with the length is the cache alone.

Shapes: B batch, T time, L prompt, A continuation, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from andromeda.config.derived import original_max_seq_len
from andromeda.generate.engine import eval_mode
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.kv_cache.protocol import KVCache, NoKVCache
from andromeda.model.transformer import Transformer
from andromeda.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from andromeda.utils.progress_callback import ProgressCallback, no_progress

CHUNK = {"cpu": 1024, "cuda": 8192}
"""Tokens of a sequence that go through the model at once. On a CPU attention over earlier keys makes a mask of chunk x keys."""
BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
"""Tokens of all sequences of a batch."""


def batch_size_for(model: Transformer, length: int) -> int:
    """How many sequences of `length` tokens make a batch."""
    return max(1, BATCH_TOKENS.get(model.head.weight.device.type, 8192) // max(1, length))


def chunk_length(model: Transformer) -> int:
    """Tokens of a sequence that go through the model at once."""
    return CHUNK.get(model.head.weight.device.type, 1024)


def span_of(model: Transformer, length: int) -> int:
    """What dynamic frequency scaling turns by: the length that a sequence has in the end, fixed from its first chunk on."""
    return max(length, original_max_seq_len(model.config))


@torch.no_grad()
def token_losses(model: Transformer, ids: Tensor, targets: Tensor, *, documents: Tensor | None = None, chunk: int = 0) -> Tensor:
    """Loss of targets (B, T) after ids (B, T), each in nats, zero where a target is -100: float64 (B, T) on the CPU.

    documents (B, T): as in `Transformer.hidden`. chunk: tokens of a sequence at once (0: what suits the device).
    """
    device, head = model.head.weight.device, model.head
    T, chunk = ids.shape[1], chunk or chunk_length(model)
    cache: KVCache = DynamicKVCache(capacity=T) if chunk < T else NoKVCache()
    found = []
    for start in range(0, T, chunk):
        part = slice(start, start + chunk)
        numbers = None if documents is None else documents[:, part].to(device)
        hidden = model.hidden(ids[:, part].to(device), documents=numbers, cache=cache, span=span_of(model, T))
        wanted = targets[:, part].to(device)
        nll = linear_cross_entropy(
            hidden, head.weight, wanted, bias=head.bias, softcap=head.softcap, reduction="none", shard=head.shard
        ).nll
        found.append(nll.double().cpu())
    return torch.cat(found, 1)


class PromptCache:
    """Prompts of equal length, read once, after which any number of continuations is scored."""

    @torch.no_grad()
    def __init__(self, model: Transformer, ids: Tensor, longest: int, *, chunk: int = 0) -> None:
        """ids (B, L); longest: tokens that may follow."""
        self.model, self.device = model, model.head.weight.device
        chunk = chunk or chunk_length(model)
        self.span = span_of(model, ids.shape[1] + longest)
        self.cache = DynamicKVCache(capacity=ids.shape[1] + longest)
        for part in ids.split(chunk, 1):
            hidden = model.hidden(part.to(self.device), cache=self.cache, span=self.span)
        self.last = hidden[:, -1:]
        self._checkpoint = self.cache.checkpoint()

    @torch.no_grad()
    def nats(self, continuations: Sequence[Sequence[int]], skip: Sequence[int]) -> Tensor:
        """Loss of one continuation of each prompt, without its first `skip` tokens: float64 (B,)."""
        ids, targets = pad_sequences(continuations)
        for row, count in enumerate(skip):
            targets[row, :count] = IGNORE_INDEX
        hidden = self.last
        if ids.shape[1] > 1:
            more = self.model.hidden(ids[:, :-1].to(self.device), cache=self.cache, span=self.span)
            hidden = torch.cat([hidden, more], 1)
            self.cache.rollback(self._checkpoint)
        head = self.model.head
        found = linear_cross_entropy(
            hidden, head.weight, targets.to(self.device), bias=head.bias, softcap=head.softcap, reduction="none", shard=head.shard
        )
        return found.nll.double().sum(1).cpu()

    @torch.no_grad()
    def greedy(self, count: int, tokens: int) -> list[list[int]]:
        """The most likely next `count` tokens of each prompt, one after the other; ids from `tokens` on are never chosen."""
        hidden, chosen = self.last, []
        for step in range(count):
            chosen.append(self.model.head(hidden)[:, :, :tokens].argmax(-1))
            if step + 1 < count:
                hidden = self.model.hidden(chosen[-1], cache=self.cache, span=self.span)
        self.cache.rollback(self._checkpoint)
        return torch.cat(chosen, 1).tolist()


def pad_sequences(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Sequences of different lengths as ids and targets (B, longest), padded at the right, where no earlier token sees it."""
    length = max(map(len, rows))
    ids, targets = torch.zeros(len(rows), length, dtype=torch.long), torch.full((len(rows), length), IGNORE_INDEX)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = targets[index, : len(row)] = torch.tensor(row)
    return ids, targets


TokenPair = tuple[Sequence[int], Sequence[int]]
"""Context, at least one token, and continuation."""


class ContinuationLikelihood(NamedTuple):
    """Of one continuation."""

    log: float
    """Sum of the log-probabilities of its tokens, in nats."""
    greedy: bool
    """Whether every token is the most likely one."""


def continuation_likelihoods(
    model: Transformer, pairs: Sequence[TokenPair], report: ProgressCallback = no_progress
) -> list[ContinuationLikelihood]:
    """The likelihood of each continuation, in the order given. Long ones are read first, so that a lack of memory shows at once."""
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    found: dict[int, ContinuationLikelihood] = {}
    with eval_mode(model):
        while len(found) < len(order):
            length = sum(map(len, pairs[order[len(found)]]))
            group = order[len(found) : len(found) + batch_size_for(model, length)]
            found |= dict(zip(group, _group(model, [pairs[i] for i in group]), strict=True))
            report("likelihoods", len(found), len(order))
    return [found[i] for i in range(len(pairs))]


@torch.no_grad()
def _group(model: Transformer, pairs: list[TokenPair]) -> list[ContinuationLikelihood]:
    whole = [[*context, *continuation] for context, continuation in pairs]
    ids, targets = pad_sequences(whole)
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
    return [
        ContinuationLikelihood(float(log.sum()), bool(hit.all()))
        for log, hit in zip(picked.split(counts), first.split(counts), strict=True)
    ]
