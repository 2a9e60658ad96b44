"""Linear layers with the same parameters whose weights are cast once for a step instead of once for a matmul.

The cast weights lie in buffers beside the parameters. They are filled outside of the compiled region and are not saved. They are cast
again when a parameter has changed, which its version counter tells: whatever writes into a parameter in place must increment it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Self, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from andromeda.model.layers import Linear, concat_weights
from andromeda.model.specs import LinearSpec, match_kernels

FUSED_GROUPS = (("query", "value", "key"), ("gate", "inner"))
"""Layers that are computed as one matmul, in the order in which attention and gated networks ask for it."""

L = TypeVar("L", bound="CachedCastLinear")


class CachedCastLinear(Linear):
    """x W^T + b by a cached cast of the weight; subclasses say what it is cast into, and for which x."""

    CACHED: ClassVar[tuple[str, ...]] = ()
    """Buffers, None until they are filled."""

    def __init__(self, linear: Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, init=linear.init, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.fused_with: tuple[Self, ...] = ()
        """Layers whose weights are cast below this one's, for one matmul."""
        self.version: Any = None
        for name in self.CACHED:
            self.register_buffer(name, None, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Moved or converted: the cached cast must not follow.
        self.version = None
        for name in self.CACHED:
            setattr(self, name, None)
        return super()._apply(fn, recurse)

    def fused_spec(self) -> LinearSpec | None:
        """A subclass states its own."""
        return None

    def accepts(self, x: Tensor) -> bool:
        """Whether x (..., K) is multiplied by the cached weight."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """x (..., K), which must be accepted -> the outputs of this layer and of those fused with it, zeros at the end (..., N)."""
        raise NotImplementedError

    @classmethod
    def cast_all(cls, layers: Sequence[Self]) -> None:
        """Cast the weights of all."""
        raise NotImplementedError

    @classmethod
    def note_inputs(cls, layers: Sequence[Self]) -> None:
        """Note what bounds the inputs of all."""

    def input_version(self) -> Any:
        """Which tensors bound the input, and how often each was written; None without."""
        return None

    def can_cast(self) -> bool:
        """Whether the weight is on a device where it can be cast."""
        return True

    @property
    def fused_group(self) -> tuple[Self, ...]:
        """This layer and those fused with it."""
        return (self, *self.fused_with)

    def fused_weight(self) -> Tensor:
        """The weights of the group, concatenated."""
        return (concat_weights(self.fused_group)[0] if self.fused_with else self.weight).detach()

    @property
    def weights(self) -> list[Tensor]:
        """The weights of the group."""
        return [linear.weight for linear in self.fused_group]

    def sources(self) -> Sequence[Tensor]:
        """What was cast."""
        return self.weights

    def current_version(self) -> list[tuple[int, int]]:
        """Which tensors these are, and how often each was written."""
        return [(x._version, x.untyped_storage()._cdata) for x in self.sources()]


@torch.inference_mode(False)
@torch.no_grad()
def refresh(layers: Sequence[CachedCastLinear]) -> None:
    """Cast again what has changed."""
    changed = [layer for layer in layers if layer.version != layer.current_version() and layer.can_cast()]
    if not changed:
        return
    type(changed[0]).cast_all(changed)
    for layer in changed:
        layer.version = layer.current_version()


def convert_linears(
    root: nn.Module,
    make: Callable[[Linear], L],
    chosen: Callable[[str], bool],
    fits: Callable[[nn.Linear], bool],
    side: int = 1,
    cached: bool = True,
) -> list[L]:
    """Convert the linear layers below `root` whose paths are chosen and which fit, alone or padded as part of a fused group that reads
    a multiple of `side` inputs; returns those that lead a group. Layers with hooks or attributes of their own stay.

    The weights are cast before each forward pass of `root` that finds them changed; unless `cached`, by each layer when it is called,
    as where a layer has its weights only then (parallel/fsdp.py).
    """
    for path, module in list(root.named_modules()):
        linears = {name: child for name, child in module.named_children() if chosen(_below(path, name)) and _bare(child)}
        groups = [group for group in FUSED_GROUPS if linears.keys() >= set(group) and _can_join([linears[name] for name in group], side)]
        fused_group = {name for group in groups for name in group}
        for name, linear in linears.items():
            if name in fused_group or fits(linear):
                setattr(module, name, make(linear))
        for first, *others in groups:
            getattr(module, first).fused_with = tuple(getattr(module, name) for name in others)
    layers: list[Any] = [module for module in root.modules() if isinstance(module, CachedCastLinear)]
    match_kernels(root)
    led = {id(other) for layer in layers for other in layer.fused_with}
    leading = [layer for layer in layers if id(layer) not in led]
    root.register_forward_pre_hook(partial(_refresh if cached else _note_inputs, leading))
    return leading


def _bare(module: nn.Module) -> TypeGuard[Linear]:
    """Whether it is a linear layer that has nothing which one in its place would lack: no hooks, no `role`."""
    return type(module) is Linear and _beside_sizes(module) == _beside_sizes(Linear(1, 1, device="meta"))


def _beside_sizes(linear: Linear) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(linear).items()
        if name not in ("_parameters", "training", "in_features", "out_features", "init")
    }


def _can_join(linears: Sequence[Linear], side: int) -> bool:
    """Whether all read vectors of one length, a multiple of `side`, and each by a weight of its own."""
    lengths, weights = {linear.in_features for linear in linears}, {id(linear.weight) for linear in linears}
    return len(lengths) == 1 and len(weights) == len(linears) and lengths.pop() % side == 0


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _refresh(layers: Sequence[CachedCastLinear], root: nn.Module, args: Any) -> None:
    refresh(layers)


@torch.no_grad()
def _note_inputs(layers: Sequence[CachedCastLinear], root: nn.Module, args: Any) -> None:
    """The part of `refresh` that reads no weights."""
    changed = [layer for layer in layers if layer.version != layer.input_version()]
    if changed:
        type(changed[0]).note_inputs(changed)
    for layer in changed:
        layer.version = layer.input_version()
