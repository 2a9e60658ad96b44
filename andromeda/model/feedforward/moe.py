"""Mixture of experts, dropless: every token goes through its top-k experts, whatever their load.

Routing follows arXiv 2408.15664: experts are chosen by score + bias, weighted by the score alone; after each step the
bias moves against the load by a fixed amount. The alternative is the auxiliary loss E/k sum f_i P_i of arXiv 2101.03961.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.model.feedforward.dense import ACTIVATIONS, GATES, Dense, Gated, hidden_width


class AddGradient(torch.autograd.Function):
    """x unchanged; its backward pass also sends `scale` into `loss`, as if loss * scale were part of the total.

    The auxiliary loss thus needs no way out of the model, and recomputed activations do not count it twice.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        """x, with the loss attached."""
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradient of x, and `scale` for the loss."""
        (scale,) = ctx.saved_tensors
        return grads[0], scale, None


class Router(nn.Module):
    """Scores, choice and balance."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e = config.experts
        self.count, self.active, self.normalise, self.balance, self.rate = e.count, e.active, e.normalise, e.balance, e.rate
        self.score = {"sigmoid": torch.sigmoid, "softmax": lambda z: z.softmax(-1)}[e.score]
        self.project = nn.Linear(config.width, e.count, bias=False)
        # Kept in float32 whatever the model's precision: its steps of 1e-3 would drown in bfloat16.
        self.register_buffer("bias", torch.zeros(e.count, dtype=torch.float32))
        self.register_buffer("load", torch.zeros(e.count, dtype=torch.float32))
        self.register_buffer("loss_scale", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, C) -> gates (N, k) and the experts chosen (N, k)."""
        scores = self.score(F.linear(x, self.project.weight).to(torch.promote_types(x.dtype, torch.float32)))
        chosen = (scores + self.bias).topk(self.active, -1).indices
        gates = scores.gather(-1, chosen)
        if self.normalise:
            gates = gates / gates.sum(-1, keepdim=True)
        if self.training:
            gates = self._account(gates, scores, chosen)
        return gates, chosen

    def _account(self, gates: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        load = torch.zeros_like(self.load).scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten(), dtype=torch.float32))
        self.load += load
        if self.balance != "loss":
            return gates
        loss = self.rate * balance_loss(scores, load / load.sum() * self.active, self.active)
        return AddGradient.apply(gates, loss, self.loss_scale.to(loss.dtype))

    @torch.no_grad()
    def step(self) -> None:
        """After an optimizer step: move the bias against the load, keep its mean at zero, start counting anew."""
        if self.balance == "bias":
            self.bias += self.rate * torch.sign(self.load.mean() - self.load)
            self.bias -= self.bias.mean()
        self.load.zero_()


def balance_loss(scores: Tensor, fraction: Tensor, active: int) -> Tensor:
    """(E/k) sum_i f_i P_i for scores (N, E) and the fraction of tokens (E,) that chose each expert: 1 when balanced, E/k collapsed."""
    probability = (scores / scores.sum(-1, keepdim=True)).mean(0)
    return scores.shape[-1] / active * (fraction.to(scores.dtype) * probability).sum()


class Experts(nn.Module):
    """The experts' weights, stacked: (E, hidden, C) in, (E, C, hidden) out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, width = config.experts, config.width
        hidden = hidden_width(config.feedforward, e.kind, width)
        self.gated = e.kind in GATES
        self.activation = {**ACTIVATIONS, **GATES}[e.kind]
        self.inner = nn.Parameter(torch.empty(e.count, hidden, width))
        self.gate = nn.Parameter(torch.empty(e.count, hidden, width)) if self.gated else None
        self.out = nn.Parameter(torch.empty(e.count, width, hidden))

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """x (n, C), the tokens of one expert."""
        inner = F.linear(x, self.inner[expert])
        hidden = self.activation(inner) if self.gate is None else self.activation(F.linear(x, self.gate[expert])) * inner
        return F.linear(hidden, self.out[expert])


class MoE(nn.Module):
    """Shared experts for all tokens, and the top-k of the routed ones for each."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e = config.experts
        self.router, self.experts = Router(config), Experts(config)
        hidden = hidden_width(config.feedforward, e.kind, config.width)
        part = Gated if e.kind in GATES else Dense
        self.shared = nn.ModuleList(part(config.width, hidden, e.kind, False) for _ in range(e.shared))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C)."""
        flat = x.flatten(0, -2)
        gates, chosen = self.router(flat)
        y = sum((expert(flat) for expert in self.shared), start=torch.zeros_like(flat))
        # Sorting the (token, expert) pairs by expert makes each expert's tokens one contiguous run.
        order = chosen.flatten().argsort(stable=True)
        token = order // chosen.shape[-1]
        counts = torch.bincount(chosen.flatten(), minlength=self.router.count).tolist()
        runs = flat[token].split(counts)
        routed = torch.cat([self.experts(run, i) for i, run in enumerate(runs)])
        weighted = routed * gates.flatten()[order, None].to(routed.dtype)
        return y.index_add(0, token, weighted.to(y.dtype)).view_as(x)
