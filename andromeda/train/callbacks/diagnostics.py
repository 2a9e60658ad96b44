"""Early signs of divergence: how far a step moves the weights, and how large activations and attention logits can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.model.attention import Attention
from andromeda.model.transformer import Transformer
from andromeda.optim import parameter_roles
from andromeda.parallel.one_process import ALONE, Collectives
from andromeda.train.objective import MicroBatch
from andromeda.train.precision import Precision
from andromeda.utils.dtensor import total_norm


class Diagnostics:
    """Measures one step and one forward pass; costs a copy of the weights and that forward pass, on the steps that ask for it."""

    def __init__(self, model: Transformer, precision: Precision, collectives: Collectives = ALONE) -> None:
        self._model, self._precision, self._collectives = model, precision, collectives
        self._by_role: dict[str, list[nn.Parameter]] = {}
        parameters = dict(model.named_parameters())
        for name, role in parameter_roles(model).items():
            self._by_role.setdefault(role, []).append(parameters[name])
        self.metrics: dict[str, float] = {}
        """Results of the last `measure` block."""

    @contextmanager
    def measure(self, batch: MicroBatch) -> Iterator[None]:
        """Measures the optimizer step over `batch` that the block makes."""
        before = {role: [p.detach().clone() for p in params] for role, params in self._by_role.items()}
        yield
        self.metrics = {f"update_ratio/{role}": _update_ratio(before[role], params) for role, params in self._by_role.items()}
        self.metrics |= self._largest_values(batch.to(self._precision.device))

    @torch.no_grad()
    def _largest_values(self, batch: MicroBatch) -> dict[str, float]:
        """Largest |activation| after any block, and the largest |attention logit| that queries and keys allow (Cauchy-Schwarz)."""
        outputs: list[Tensor] = []
        lengths: list[Tensor] = []

        def record_output(block: nn.Module, args: Any, x: Tensor) -> None:
            outputs.append(x.abs().max())

        def record_logit_bound(scale: float, q: Tensor, k: Tensor) -> None:
            lengths.append(torch.stack([scale * q.float().norm(dim=-1).max(), k.float().norm(dim=-1).max()]))

        with ExitStack() as hooks, torch.compiler.set_stance("force_eager"), self._precision.autocast():
            for block in self._model.decoder.blocks:
                hooks.enter_context(_forward_hook(block, record_output))
            for module in self._model.modules():
                if isinstance(module, Attention):
                    hooks.enter_context(_forward_hook(module.qk_norm, lambda _, __, qk, scale=module.scale: record_logit_bound(scale, *qk)))
            self._model.eval()
            self._collectives.hidden(self._model, batch.ids, batch.documents)
            self._model.train()
        self._collectives.after_evaluation()
        metrics = {"activation_max": float(self._collectives.max_(torch.stack(outputs).max()))}
        if lengths:
            query, key = self._collectives.max_(torch.stack(lengths)).unbind(1)
            metrics["attention_logit_bound"] = float((query * key).max())
        return metrics


def _update_ratio(before: list[Tensor], after: list[nn.Parameter]) -> float:
    """|w_new - w| / |w| over all weights of a role."""
    update = total_norm([p.detach() - old for p, old in zip(after, before, strict=True)])
    return float(update / total_norm(before).clamp(min=1e-12))


@contextmanager
def _forward_hook(module: nn.Module, hook: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
