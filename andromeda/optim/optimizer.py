"""The optimizer of a run: built from the configuration; stepped, scheduled and saved as one object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.config.base import BaseConfig
from andromeda.config.own_code import import_class
from andromeda.config.train import OPTIMIZERS, OptimizerConfig
from andromeda.config.validation_errors import validate
from andromeda.optim import optimizer_state
from andromeda.optim.adamw import AdamW
from andromeda.optim.optimizer_kind import Compile, OptimizerKind, ParamGroups
from andromeda.optim.param_groups import ROLES, Role, parameter_roles
from andromeda.utils.errors import ConfigError


class OptimizerContainer:
    """One or two torch optimizers that together hold every trainable parameter exactly once: the one that was asked for, and AdamW for
    the parameters that it does not handle.

    Each of their param groups has, besides torch's own entries, `role` and `base_lr`.
    """

    def __init__(
        self,
        config: OptimizerConfig,
        kind: type[OptimizerKind],
        options: BaseConfig,
        main: torch.optim.Optimizer | None,
        others: torch.optim.Optimizer | None,
        names: dict[nn.Parameter, str],
    ) -> None:
        self.kind_name = config.kind
        self.optimizers = [optimizer for optimizer in (main, others) if optimizer is not None]
        self._kind, self._options, self._main, self._names = kind, options, main, names

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter that is updated, in the order of the model."""
        return list(self._names)

    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for optimizer in self.optimizers:
            optimizer.step()
        # torch's fused steps do not increment the version of the parameters, by which caches of cast weights notice a change.
        torch.autograd.graph.increment_version(self.parameters())

    def share_work(self, process_group: Any) -> None:
        """Let the processes of a group, all of which hold the same plain parameters, share what of a step they can share."""
        for optimizer in self.optimizers:
            if hasattr(optimizer, "process_group"):
                optimizer.process_group = process_group

    def zero_grad(self) -> None:
        """Set all gradients to None, which frees their memory."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def set_lr_factor(self, factor: float, step: int) -> None:
        """Before update `step`: multiply every base learning rate by `factor`, and set what else depends on the step."""
        for group in self._param_groups():
            lr = group["base_lr"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        if self._main is not None:
            self._kind.before_step(self._main, self._options, step)

    def learning_rates(self) -> dict[str, float]:
        """The current learning rate of each role that the model has, for the log."""
        return {group["role"]: float(group["lr"]) for group in self._param_groups()}

    def state_tensors(self) -> dict[str, Tensor]:
        """All state as plain tensors, `<parameter name>/<entry>`; live, not copied."""
        return optimizer_state.tensors(self._kind, self.optimizers, self._names)

    def state_metadata(self) -> dict[str, Any]:
        """Description of the state tensors, for JSON."""
        return {"kind": self.kind_name, **optimizer_state.metadata(self._kind, self.optimizers, self._names)}

    def load_state(self, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        """Restore what `state_tensors` and `state_metadata` returned, by parameter name and in any order; the tensors are copied.

        Learning rates are not part of it: they follow from the configuration and the step. Raises CheckpointError, before
        anything changes, when the state is of another optimizer or model, or incomplete.
        """
        optimizer_state.check_kind(self.kind_name, metadata)
        optimizer_state.load(self._kind, self.optimizers, self._names, tensors, metadata)

    def _param_groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self.optimizers:
            yield from optimizer.param_groups


def find_optimizer(config: OptimizerConfig) -> tuple[type[OptimizerKind], BaseConfig]:
    """The class that `train.optim.kind` names, and its checked keys: `[train.optim.options]`, or `[train.optim]` for a built-in one.

    Raises ConfigError, one sentence, for a class that cannot be imported and for unknown keys.
    """
    kind = import_class(OPTIMIZERS.get(config.kind, config.kind), "train.optim.kind")
    if not (isinstance(kind, type) and issubclass(kind, OptimizerKind)):
        raise ConfigError(f"train.optim.kind = {config.kind!r} is no optimizer: derive the class from andromeda.optim.OptimizerKind.")
    if kind.Config is OptimizerConfig:
        if config.options:
            raise ConfigError(f"train.optim.options has no effect with kind {config.kind!r}, whose keys are in train.optim itself.")
        return kind, config
    return kind, validate(kind.Config, config.options, "train.optim.options")


def build_optimizer(model: nn.Module, config: OptimizerConfig, compile: Compile = "auto") -> OptimizerContainer:
    """The optimizer that `config` names, over the trainable parameters of `model` (not of its compiled wrapper).

    - `adamw`: AdamW (arXiv 1711.05101) for everything.
    - `adamw8bit`: 8-bit moments for matrices and the head; embeddings and small tensors keep 32 bits.
    - `muon`: Muon for matrices, AdamW for the rest.
    - `package.module:Class`: an OptimizerKind of your own.

    `compile` is `train.compile`; only `adamw8bit` uses it. Weight decay is decoupled and applied to matrices only.
    Raises MissingExtra without torchao, ConfigError for a role or an optimizer that does not exist.
    """
    kind, options = find_optimizer(config)
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    roles = parameter_roles(model)
    by_role: dict[Role, list[nn.Parameter]] = {role: [] for role in ROLES}
    for parameter, name in names.items():
        by_role[roles[name]].append(parameter)
    handled: ParamGroups = []
    others: ParamGroups = []
    for role, params in by_role.items():
        group = _param_group(role, kind, config)
        for groups, wanted in ((handled, True), (others, False)):
            chosen = [p for p in params if kind.handles(p, role) is wanted]
            # torch's optimizers update no mixture of plain parameters and such that are sharded over one or another mesh.
            meshes = dict.fromkeys(getattr(p, "device_mesh", None) for p in chosen)
            groups += [{"params": [p for p in chosen if getattr(p, "device_mesh", None) == mesh], **group} for mesh in meshes]
    return OptimizerContainer(
        config,
        kind,
        options,
        kind.build(handled, options, compile) if handled else None,
        AdamW.build(others, config, compile) if others else None,
        names,
    )


def optimizer_state_bytes(model: nn.Module, config: OptimizerConfig) -> int:
    """Bytes of the optimizer's state after its first step; `model` may be on the meta device."""
    kind, options = find_optimizer(config)
    roles = parameter_roles(model)
    trained = [(p, roles[name]) for name, p in model.named_parameters() if p.requires_grad]
    return sum(kind.state_bytes(p, options) if kind.handles(p, role) else AdamW.state_bytes(p, config) for p, role in trained)


def default_lr(kind: type[OptimizerKind], role: Role, config: OptimizerConfig) -> float:
    """The learning rate of a role whose own key is 0."""
    return kind.default_lrs.get(role, config.lr)


def _param_group(role: Role, kind: type[OptimizerKind], config: OptimizerConfig) -> dict[str, Any]:
    explicit = {"matrix": config.lr, "embedding": config.embedding_lr, "head": config.head_lr, "scalar": config.scalar_lr}[role]
    lr = explicit or default_lr(kind, role, config)
    return {"role": role, "lr": lr, "base_lr": lr, "weight_decay": config.weight_decay if role == "matrix" else 0.0}
