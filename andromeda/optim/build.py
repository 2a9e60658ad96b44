"""One optimizer for a run: built from the configuration, stepped, scheduled and saved as one thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.config.train import OptimizerConfig
from andromeda.optim import state
from andromeda.optim.adamw_8bit import Compile, adamw8bit, quantizable
from andromeda.optim.muon import Muon
from andromeda.optim.param_groups import ROLES, Role, roles

Groups = list[dict[str, Any]]


class Optimizer:
    """One or several torch optimizers that together hold every trainable parameter exactly once.

    `parts` are the torch optimizers; each of their groups has, beside torch's own entries, `role` and `base_lr`.
    """

    def __init__(
        self, kind: str, parts: list[torch.optim.Optimizer], names: dict[nn.Parameter, str], momentum: Callable[[int], float]
    ) -> None:
        self.kind = kind
        self.parts = parts
        self._names = names
        self._momentum = momentum

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter that is updated, in the order of the model."""
        return list(self._names)

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for part in self.parts:
            part.step()
        # torch's fused steps change parameters without counting it, which whoever keeps something made of them must see.
        torch.autograd.graph.increment_version(self.parameters())

    def zero_grad(self) -> None:
        """Drop all gradients (they become None, so their memory is free)."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def set_factor(self, factor: float, step: int) -> None:
        """Before update `step`: every learning rate is its base times `factor`; Muon's momentum follows its warm-up."""
        for group in self._groups():
            rate = group["base_lr"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
            if "momentum" in group:
                group["momentum"] = self._momentum(step)

    def learning_rates(self) -> dict[str, float]:
        """The current rate of each role that the model has, for the log."""
        return {group["role"]: float(group["lr"]) for group in self._groups()}

    def tensors(self) -> dict[str, Tensor]:
        """All state as plain tensors, `<parameter name>/<entry>`; live, not copied."""
        return state.tensors(self.parts, self._names)

    def values(self) -> dict[str, Any]:
        """What the tensors are, in plain values for JSON."""
        return {"kind": self.kind, **state.values(self.parts, self._names)}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take back what `tensors` and `values` gave, by parameter name and in any order; the tensors are copied.

        Learning rates are not part of it: they follow from the configuration and the step. Raises CheckpointError, before
        anything changes, when the state is of another optimizer or model, or incomplete.
        """
        state.load(self.kind, self.parts, self._names, tensors, values)

    def _groups(self) -> Iterator[dict[str, Any]]:
        for part in self.parts:
            yield from part.param_groups


def build_optimizer(model: nn.Module, config: OptimizerConfig, compile: Compile = "auto") -> Optimizer:
    """The optimizer that `config` names, over the trainable parameters of `model` (not of its compiled wrapper).

    - `adamw`: AdamW (arXiv 1711.05101) for everything.
    - `adamw8bit`: 8-bit moments for matrices and the head; embeddings and small tensors keep 32 bits.
    - `muon`: Muon for matrices, AdamW for the rest.

    `compile` is `train.compile`, for `adamw8bit` alone: the others are kernels or matrix products already.
    Weight decay is decoupled and applied to matrices only. Raises MissingExtra without torchao, ConfigError for a role
    that does not exist.
    """
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    by_role: dict[Role, list[nn.Parameter]] = {role: [] for role in ROLES}
    every_role = roles(model)
    for parameter, name in names.items():
        by_role[every_role[name]].append(parameter)
    groups = [_group(role, params, config) for role, params in by_role.items() if params]
    makers: dict[str, Callable[[Groups, OptimizerConfig], list[torch.optim.Optimizer]]] = {
        "adamw": _adamw,
        "adamw8bit": partial(_adamw8bit, compile=compile),
        "muon": _muon,
    }
    return Optimizer(config.kind, makers[config.kind](groups, config), names, momentum_warmup(config))


def momentum_warmup(config: OptimizerConfig) -> Callable[[int], float]:
    """Muon's momentum at each step: linear from `momentum_start` at step 0 to `momentum` at step `momentum_warmup`."""

    def momentum(step: int) -> float:
        share = min(1.0, step / config.momentum_warmup) if config.momentum_warmup else 1.0
        return (1.0 - share) * config.momentum_start + share * config.momentum

    return momentum


def _group(role: Role, params: list[nn.Parameter], config: OptimizerConfig) -> dict[str, Any]:
    """The rates beside Muon are those of the 2024-12-04 speedrun record, whose embeddings learn 75 times faster than its head."""
    muon = config.kind == "muon"
    rate = {
        "matrix": config.lr,
        "embedding": config.embedding_lr or (0.3 if muon else config.lr),
        "head": config.head_lr or (0.004 if muon else config.lr),
        "scalar": config.scalar_lr or (0.04 if muon else config.lr),
    }[role]
    decay = config.weight_decay if role == "matrix" else 0.0
    return {"params": params, "role": role, "lr": rate, "base_lr": rate, "weight_decay": decay}


def _adamw(groups: Groups, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    if not groups:
        return []
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return [torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=fused)]


def _adamw8bit(groups: Groups, config: OptimizerConfig, compile: Compile) -> list[torch.optim.Optimizer]:
    large: Groups = []
    small: Groups = []
    for group in groups:
        fits = [group["role"] != "embedding" and quantizable(p) for p in group["params"]]
        for target, wanted in ((large, True), (small, False)):
            params = [p for p, fit in zip(group["params"], fits, strict=True) if fit is wanted]
            if params:
                target.append({**group, "params": params})
    eight = [adamw8bit(large, compile, betas=config.betas, eps=config.eps)] if large else []
    return [*eight, *_adamw(small, config)]


def _muon(groups: Groups, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    matrices = [group for group in groups if group["role"] == "matrix"]
    others = [group for group in groups if group["role"] != "matrix"]
    muon: list[torch.optim.Optimizer] = []
    if matrices:
        muon = [Muon(matrices, momentum=config.momentum, steps=config.newton_schulz_steps)]
    return [*muon, *_adamw(others, config)]
