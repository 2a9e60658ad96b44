"""Mixture of experts: a router, and grouped matmuls over tokens sorted by expert.

Shapes: B batch, T time, N tokens, C width, F inner width, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.config.derived import intermediate_size
from andromeda.config.model import ModelConfig
from andromeda.model.feedforward.dense import ACTIVATIONS, GATES, build_mlp
from andromeda.model.flops_of import flops_of
from andromeda.model.init import InitScheme
from andromeda.model.layers import Linear
from andromeda.model.tensor_plan import TensorPlan, check_divides

ALIGNMENT = 16
"""Bytes to which PyTorch's grouped matmul wants rows aligned."""


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (N, C) times weight (E, F, C) transposed: rows up to ends[0] with the first matrix, up to ends[1] with the second, ...

    ends (E,) int32, the last one N. Follows autocast, as `linear` does. Gives (N, F).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
    aligned = all(size * x.element_size() % ALIGNMENT == 0 for size in weight.shape[1:])
    if x.dtype == torch.bfloat16 and aligned:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    # PyTorch's kernel is for bfloat16; elsewhere the lengths must be known to the host.
    groups = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    return torch.cat([F.linear(rows, matrix) for rows, matrix in zip(groups, weight, strict=True)])


ROUTER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "softmax": partial(torch.softmax, dim=-1)}


class AttachLoss(torch.autograd.Function):
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
    """Scores every expert for every token, chooses the top k, and keeps their load balanced: by a bias on the scores that follows the load
    (arXiv 2408.15664), or by the auxiliary loss of Switch Transformer (arXiv 2101.03961)."""

    votes: Tensor
    """Votes for each expert (E,) since the start: one a step, for the idle and against the busy."""
    load: Tensor
    """(token, expert) pairs since the last `step` (E,)."""
    loss_scale: Tensor
    """What the trainer multiplies this pass's loss with; the auxiliary loss is multiplied alike."""
    step_load: Tensor
    """(token, expert) pairs of the whole optimizer step (E,), which the trainer counts beforehand where this pass sees only a part
    of its tokens; zeros where it sees them all. The sum of `load` over micro-batches, and over ranks where each has its own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e = config.experts
        self.count, self.active, self.normalize, self.balance = e.num_experts, e.top_k, e.normalize, e.balance
        self.bias_update_rate, self.aux_loss_coef = e.bias_update_rate, e.aux_loss_coef
        self.score = ROUTER_ACTIVATIONS[e.router_activation]
        self.project = Linear(config.hidden_size, e.num_experts, bias=False, init="unit_gain")
        # Both are whole numbers, which no change of the model's precision rounds.
        self.register_buffer("votes", torch.zeros(e.num_experts, dtype=torch.int64))
        self.register_buffer("load", torch.zeros(e.num_experts, dtype=torch.int64))
        self.register_buffer("loss_scale", torch.ones(()), persistent=False)
        self.register_buffer("step_load", torch.zeros(e.num_experts, dtype=torch.int64), persistent=False)

    @property
    def bias(self) -> Tensor:
        """What is added to the scores (E,) before experts are chosen: `rate` for each vote, with a mean of zero."""
        votes = self.votes.float()
        return self.bias_update_rate * (votes - votes.mean())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, C) -> gates (N, k) and the experts chosen (N, k)."""
        # In float32 whatever the precision (arXiv 2101.03961, section 2.4): a rounded score sends the token to another expert.
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            scores = self.score(F.linear(x.to(wide), self.project.weight.to(wide)))
        chosen = (scores + self.bias).topk(self.active, -1).indices
        gates = scores.gather(-1, chosen)
        if self.normalize:
            gates = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
        if self.training:
            gates = self._account(gates, scores, chosen)
        return gates, chosen

    def _account(self, gates: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
        load = torch.zeros_like(self.load).scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        # In place and not `+=`, which sets the attribute too: a graph may hold the one and not the other. What is computed
        # again in the backward pass may count twice, for all experts alike.
        self.load.add_(load)
        if self.balance != "loss":
            return gates
        loss = self.aux_loss_coef * balance_loss(scores, torch.where(self.step_load.any(), self.step_load, load), self.active)
        return AttachLoss.apply(gates, loss, self.loss_scale.to(loss.dtype))

    @torch.no_grad()
    def step(self) -> None:
        """After an optimizer step: one vote for each expert below the mean load and against each above it, then count from zero."""
        if self.balance == "bias":
            self.votes += torch.sign(self.load.sum() - self.load * self.count)
        self.load.zero_()


def balance_loss(scores: Tensor, load: Tensor, active: int) -> Tensor:
    """The share that these tokens have in (E/k) sum_i f_i P_i (arXiv 2101.03961): 1 when balanced, E/k collapsed.

    scores (N, E): of these tokens, all of a step or some. load (E,): how often each expert was chosen by all tokens of the step, k times
    for each. f is the fraction of the step's tokens that chose an expert, P its mean normalized score over them. So the shares add up to
    the loss of the step, however its tokens are split.
    """
    fraction = load.to(scores.dtype)
    fraction = fraction / (num_tokens := fraction.sum() / active)
    probability = (scores / scores.sum(-1, keepdim=True)).sum(0) / num_tokens
    return scores.shape[-1] / active * (fraction * probability).sum()


class Experts(nn.Module):
    """The experts' weights, stacked: (E, hidden, C) in, (E, C, hidden) out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e, width, hidden = config.experts, config.hidden_size, intermediate_size(config)
        self.num_experts, self.top_k = e.num_experts, e.top_k
        self.activation = {**ACTIVATIONS, **GATES}[e.kind]
        self.inner = nn.Parameter(torch.empty(e.num_experts, hidden, width))
        self.gate = nn.Parameter(torch.empty(e.num_experts, hidden, width)) if e.kind in GATES else None
        self.out = nn.Parameter(torch.empty(e.num_experts, width, hidden))

    def init_weights(self, scheme: InitScheme) -> None:
        """Draw the matrices of all experts, each as a layer of its own shape."""
        scheme.fill(self.inner, "input")
        if self.gate is not None:
            scheme.fill(self.gate, "input")
        scheme.fill(self.out, "output")

    def idle_parameters(self) -> int:
        """Numbers of the experts that a token is not sent to."""
        count = self.num_experts
        return sum(p.numel() for p in self.parameters()) // count * (count - self.top_k)

    def flops(self) -> float:
        """Of one token in one expert."""
        return 2.0 * sum(p[0].numel() for p in self.parameters())

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (N, C) sorted by expert -> (N, C); the tokens of expert i end at ends[i], ends (E,) int32. Not weighted by gates yet."""
        inner = grouped_linear(x, self.inner, ends)
        hidden = self.activation(inner) if self.gate is None else self.activation(grouped_linear(x, self.gate, ends)) * inner
        return grouped_linear(hidden, self.out, ends)


class MoE(nn.Module):
    """Shared experts for all tokens, and the top k of the routed ones for each, weighted by their gates (arXiv 2101.03961, 2401.06066).
    Dropless: no expert has a capacity."""

    supports_cuda_graph = False  # the host asks for the number of tokens of each expert

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        e = config.experts
        self.router, self.experts = Router(config), Experts(config)
        self.shared = nn.ModuleList(build_mlp(config, e.kind, bias=False) for _ in range(e.num_shared_experts))

    def flops(self, keys: Callable[[int], float]) -> dict[str, float]:
        """Of one token: the router, the experts that it passes through, and the shared ones."""
        shared = sum(flops for expert in self.shared for flops in flops_of(expert, keys).values())
        return {"router": self.router.project.flops(), "experts": self.router.active * self.experts.flops(), "shared experts": shared}

    def tensor_plan(self, count: int) -> TensorPlan:
        """Each process has a share of every expert's inner features, so that all have the same work whatever the router chooses."""
        check_divides(count, self.experts.inner.shape[1], "the inner features of an expert")
        plan = TensorPlan({"experts.inner": 1, "experts.gate": 1, "experts.out": 2}, ("router.aux_loss_coef",))
        for index, expert in enumerate(self.shared):
            plan |= expert.tensor_plan(count).below(f"shared.{index}")  # type: ignore[operator]
        return plan

    def saved_per_token(self) -> int:
        """Numbers that the backward pass keeps at least: the inner activations of the experts that a token passes through."""
        return self.router.active * self.experts.inner.shape[1] + sum(expert.saved_per_token() for expert in self.shared)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        flat = x.flatten(0, -2)
        gates, chosen = self.router(flat)
        # Sorting the (token, expert) pairs by expert makes each expert's tokens one contiguous run.
        sorted_experts, order = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(sorted_experts, torch.arange(self.router.count, device=x.device), right=True, out_int32=True)
        routed = self.experts(flat.index_select(0, order // chosen.shape[-1]), ends)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        y = (routed.index_select(0, back).unflatten(0, chosen.shape) * gates[..., None].to(routed.dtype)).sum(1)
        for expert in self.shared:
            y = y + expert(flat)
        return y.view_as(x)
