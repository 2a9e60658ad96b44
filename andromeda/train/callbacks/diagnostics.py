"""Signs that a run is about to go wrong: how far a step moves the weights, how large activations and attention logits can be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.model.attention import Attention
from andromeda.model.transformer import Transformer
from andromeda.optim import roles
from andromeda.train.objective import Rows
from andromeda.train.precision import Precision


class Health:
    """Measures one step and one forward pass; costs a copy of the weights and that pass, on the steps that ask for it."""

    def __init__(self, model: Transformer, precision: Precision) -> None:
        self._model, self._precision = model, precision
        by_role: dict[str, list[nn.Parameter]] = {}
        named = dict(model.named_parameters())
        for name, role in roles(model).items():
            by_role.setdefault(role, []).append(named[name])
        self._by_role = by_role
        self.figures: dict[str, float] = {}
        """What the last block of `watching` measured."""

    @contextmanager
    def watching(self, rows: Rows) -> Iterator[None]:
        """Around one step over `rows`."""
        before = {role: [p.detach().clone() for p in held] for role, held in self._by_role.items()}
        yield
        self.figures = {f"update_ratio/{role}": _ratio(before[role], held) for role, held in self._by_role.items()}
        self.figures |= self._largest(rows.to(self._precision.device))

    @torch.no_grad()
    def _largest(self, rows: Rows) -> dict[str, float]:
        """Largest |activation| after any block, and the largest |attention logit| that queries and keys allow (Cauchy-Schwarz)."""
        outputs: list[Tensor] = []
        logits: list[Tensor] = []

        def keep_output(block: nn.Module, given: Any, x: Tensor) -> None:
            outputs.append(x.abs().max())

        def keep_logits(scale: float, q: Tensor, k: Tensor) -> None:
            logits.append(scale * q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max())

        with ExitStack() as hooks, torch.compiler.set_stance("force_eager"), self._precision.autocast():
            for block in self._model.decoder.blocks:
                hooks.enter_context(_hooked(block, keep_output))
            for module in self._model.modules():
                if isinstance(module, Attention):
                    hooks.enter_context(_hooked(module.qk_norm, lambda _, __, qk, scale=module.scale: keep_logits(scale, *qk)))
            self._model.eval()
            self._model.hidden(rows.ids, documents=rows.documents)
            self._model.train()
        figures = {"activation_max": float(torch.stack(outputs).max())}
        return figures | ({"attention_logit_bound": float(torch.stack(logits).max())} if logits else {})


def _ratio(before: list[Tensor], after: list[nn.Parameter]) -> float:
    """|w_new - w| / |w| over all weights of a role."""
    moved = torch.nn.utils.get_total_norm(torch._foreach_sub([p.detach() for p in after], before))
    return float(moved / torch.nn.utils.get_total_norm(before).clamp(min=1e-12))


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
