"""What an optimizer says of itself: its own keys, the parameters it updates, its learning rates and the bytes of its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from andromeda.config.base import BaseConfig
from andromeda.optim.param_groups import Role

ParamGroups = list[dict[str, Any]]
"""As torch.optim takes them, each with `role`, `lr`, `base_lr` and `weight_decay`."""
Compile = Literal["auto", "on", "off"]
FLOAT_BYTES = 4
"""Bytes of a float32, the dtype of weights, gradients, moments and step counts."""


class OptimizerKind:
    """Base class of what `train.optim.kind` names; all its methods are class methods, called before and around the optimizer's life.

    An optimizer of your own is one class that derives from torch.optim.Optimizer and this one: its `step`, its `Config` with the keys of
    `[train.optim.options]`, and `state_bytes` (examples/add_an_optimizer.py). Training, checkpoints, memory checks and `andromeda plan`
    ask it; nothing else has to be changed. State values are tensors, so that safetensors can hold them.
    """

    Config: ClassVar[type[BaseConfig]] = BaseConfig
    """Keys of `[train.optim.options]`."""
    default_lrs: ClassVar[Mapping[Role, float]] = {}
    """Learning rates of the roles whose own key is 0; a role that is not listed takes `train.optim.lr`."""
    updates_in_place: ClassVar[bool] = False
    """Whether a step allocates nothing worth counting. Otherwise `andromeda plan` runs it on fake tensors and counts."""

    @classmethod
    def handles(cls, parameter: Tensor, role: Role) -> bool:
        """Whether this optimizer updates a parameter; AdamW updates the others."""
        del parameter, role
        return True

    @classmethod
    def build(cls, groups: ParamGroups, config: Any, compile: Compile) -> torch.optim.Optimizer:
        """The torch optimizer over `groups`. config: a `Config`; compile: `train.compile`."""
        del compile
        optimizer = cls(groups, **dict(config))  # type: ignore[call-arg]
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    @classmethod
    def state_bytes(cls, parameter: Tensor, config: Any) -> int:
        """Bytes of the state of one parameter, which may be on the meta device, after the first step."""
        raise NotImplementedError(f"{cls.__name__} must define state_bytes(parameter, config)")

    @classmethod
    def before_step(cls, optimizer: torch.optim.Optimizer, config: Any, step: int) -> None:
        """Set what depends on the step, besides the learning rate, in the param groups of `optimizer`."""

    packed_names: ClassVar[tuple[str, ...]] = ()
    """Names of the plain tensors that `pack` takes a state tensor apart into."""

    @classmethod
    def state_shape(cls, parameter: Tensor, entry: str) -> torch.Size:
        """Shape of the state tensor `entry` of a parameter, which a checkpoint's must have."""
        return torch.Size() if entry == "step" else parameter.shape

    @classmethod
    def pack(cls, value: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A state tensor as plain tensors by name ("" where it is plain already), and values for JSON that `unpack` needs."""
        return {"": value.detach()}, {}

    @classmethod
    def unpack(cls, pieces: dict[str, Tensor], values: dict[str, Any], dtype: torch.dtype) -> Tensor:
        """The state tensor that `pack` took apart, of a parameter of `dtype`."""
        raise NotImplementedError(f"{cls.__name__} packs its state and must define unpack")
