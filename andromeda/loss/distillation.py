"""Divergence of a student's token probabilities from a teacher's: forward and reverse KL, and the generalized Jensen-Shannon divergence.

Hinton et al., arXiv 1503.02531 (temperature, and its square as a factor); Agarwal et al., arXiv 2306.13649 (generalized JSD:
beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q, P the teacher and Q the student).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from andromeda.loss.loss_task import LossHead, LossSums
from andromeda.ops.cross_entropy import IGNORE_INDEX, chunk_tokens


def divergence(teacher: Tensor, student: Tensor, kind: str, beta: float = 0.5) -> Tensor:
    """Divergence in nats of logits (..., V) from logits (..., V), shape (...). kind: forward_kl, reverse_kl or jsd."""
    log_p, log_q = F.log_softmax(teacher, -1), F.log_softmax(student, -1)
    if kind == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)).sum(-1)


@dataclass(frozen=True)
class Distillation:
    """The divergence at every token that has a target; logits are computed a chunk at a time and again in the backward pass."""

    kind: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0

    def __call__(self, head: LossHead, hidden: Tensor, teacher_head: LossHead, teacher_hidden: Tensor, targets: Tensor) -> LossSums:
        """hidden (B, T, C) of the student and (B, T, C') of the teacher, targets (B, T) -> the sums over the targets that count."""
        x, t, counted = hidden.flatten(0, 1), teacher_hidden.flatten(0, 1), (targets != IGNORE_INDEX).flatten()
        size = chunk_tokens(x.device.type, len(x), head.weight.shape[0])
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        for start in range(0, len(x), size):
            part = slice(start, start + size)
            total = total + checkpoint(self._chunk, head, x[part], teacher_head, t[part], counted[part], use_reentrant=False)
        return LossSums(total, total.detach(), counted.sum())

    def _chunk(self, head: LossHead, x: Tensor, teacher_head: LossHead, t: Tensor, counted: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = _logits(teacher_head, t)
        both = min(head.weight.shape[0], wanted.shape[-1])  # vocabularies may be padded differently beyond the tokenizer's entries
        found = divergence(wanted[:, :both] / self.temperature, _logits(head, x)[:, :both] / self.temperature, self.kind, self.beta)
        return self.temperature**2 * torch.where(counted, found, 0.0).sum()


def _logits(head: LossHead, x: Tensor) -> Tensor:
    """Logits (N, V) of x (N, C), in float32 at least."""
    logits = F.linear(x, head.weight.to(x.dtype), None if head.bias is None else head.bias.to(x.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits
