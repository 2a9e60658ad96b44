"""Which document is better: Bradley-Terry for pairs and Plackett-Luce for longer rankings.

Bradley and Terry (Biometrika 39, 1952): P(a before b) = sigmoid(s_a - s_b). Plackett (1975) and Luce (1959): the best of those left is
drawn with probability softmax(s). For two documents they are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from andromeda.loss.likelihoods import head_outputs
from andromeda.loss.loss_task import LossHead, LossSums
from andromeda.ops.cross_entropy import IGNORE_INDEX

RANK_STRIDE = 64
"""A target is RANK_STRIDE * group + rank; rank 0 is the best of its group, and groups are numbered within their sequence."""
MISSING = -1e30
"""Score of a document that is not there: finite, so that no gradient is NaN."""


@dataclass(frozen=True)
class PlackettLuce:
    """Rankings of up to `max_items` documents; target (B, T), -100 where no ranked document ends.

    Of a group of which only a part is in the sequence, that part is ranked, which is exact: a ranking's restriction has the same law.
    """

    max_items: int = 2

    def count(self, target: Tensor) -> Tensor:
        """Choices that are made, shape (): the documents of each group but its last one."""
        return self._choices(self._table(target, torch.zeros_like(target, dtype=torch.float32))[1]).sum()

    def __call__(self, head: LossHead, hidden: Tensor, target: Tensor) -> LossSums:
        """The sums over all choices."""
        scores, present = self._table(target, head_outputs(head, hidden)[..., 0])
        left = torch.where(present, scores, MISSING)
        nll = left.flip(-1).logcumsumexp(-1).flip(-1) - left
        choices = self._choices(present)
        total = torch.where(choices, nll, 0.0).sum()
        return LossSums(total, total.detach(), choices.sum())

    def scores(self, target: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Scores by group and rank (G, max_items) of outputs (B, T, 1), and which are there; groups of fewer than two are left out."""
        scores, present = self._table(target, outputs[..., 0])
        several = present.sum(-1) > 1
        return scores[several], present[several]

    def _choices(self, present: Tensor) -> Tensor:
        """Where a document is chosen before another one of its group."""
        after = present.flip(-1).long().cumsum(-1).flip(-1) - present.long()
        return present & (after > 0)

    def _table(self, target: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """scores (B, T) by group and rank (B, G, R), and which documents are there."""
        batch, length = target.shape
        groups = length // 2 + 1
        ranked = (target != IGNORE_INDEX) & (target % RANK_STRIDE < self.max_items) & (target < groups * RANK_STRIDE)
        slot = torch.where(ranked, target // RANK_STRIDE * self.max_items + target % RANK_STRIDE, groups * self.max_items)
        shape = batch, groups * self.max_items + 1
        # Every slot but the last, which is dropped, receives one number: the sum does not depend on an order.
        table = scores.new_zeros(shape).scatter_add(1, slot, torch.where(ranked, scores, 0.0))
        present = torch.zeros(shape, dtype=torch.bool, device=scores.device).scatter(1, slot, ranked)
        cut = groups * self.max_items
        return table[:, :cut].unflatten(1, (groups, -1)), present[:, :cut].unflatten(1, (groups, -1))
