"""What a part computes, as small frozen values that fused kernels are matched against.

A part answers `fused_spec()`: the spec of what its forward pass computes, or None. Kernels are matched once, when a model is
built or its layers are converted, and the matched function is stored; the forward pass only calls it. A part of a user's own
that returns the spec of a built-in one gets the same kernel; one that returns None is computed by its own forward pass, and
`describe` says so.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any, Literal, NamedTuple

from torch import nn


class NormSpec(NamedTuple):
    """Normalization over the last dimension; with `gain`, times the parameter `weight` (C,) of the part."""

    kind: Literal["rms", "layer"]
    """RMS norm, or layer norm without a bias."""
    eps: float
    gain: bool


class ShiftSpec(NamedTuple):
    """Token shift by chunks of channels; `tokens` 0 is no shift."""

    tokens: int = 0
    """Channels [i C', (i + 1) C') for C' = C // (tokens + 1) come from i tokens before."""
    slot: str = ""
    """Name of its decode state."""


class QKNormSpec(NamedTuple):
    """Normalization of each head's queries and keys, times the learned factors that the part gives as `scales`."""

    kind: Literal["none", "rms", "l2"]


class RotarySpec(NamedTuple):
    """Rotation of pairs of dimensions, the same in all heads: none, (i, i + R/2) or (2i, 2i + 1)."""

    layout: Literal["none", "half", "interleaved"]


class LinearSpec(NamedTuple):
    """x W^T + b, and how its matmul is computed in training."""

    compute: Literal["plain", "master_weight", "float8"]
    """In the compute dtype, with weights cast once a step, or in 8 bits."""


class MLPSpec(NamedTuple):
    """W_out act(W_in x) with the linear layers `inner` and `out`."""

    activation: str
    """Its name among ACTIVATIONS."""


class MixerSpec(NamedTuple):
    """Token mixer of a layer."""

    kind: Literal["softmax_attention"]


class BlockSpec(NamedTuple):
    """How a layer joins its branches."""

    kind: Literal["serial_prenorm"]


NEUTRAL = {
    "__init__",
    "describe",
    "flops",
    "cache_bytes",
    "init_weights",
    "extra_repr",
    "idle_parameters",
    "saved_per_token",
    "fused_spec",
    "tensor_plan",
}
"""Methods that a subclass may override without computing something else."""


def spec_of(part: Any) -> Any:
    """The spec of a part; None for a part without `fused_spec`, and where a subclass changes what the spec was stated for.

    A subclass that overrides `forward`, or any method besides NEUTRAL, and inherits `fused_spec` computes something that the
    inherited spec does not describe: it gets no kernel until it states a spec of its own.
    """
    return part.fused_spec() if states(part, "fused_spec") else None


def states(part: Any, method: str) -> bool:
    """Whether `method`, by which a part says something of what it computes, was stated for this class or one that computes the same."""
    if not hasattr(part, method) or "forward" in vars(part):
        return False
    for kind in type(part).__mro__:
        if method in vars(kind):
            return True
        if any(isinstance(value, FunctionType | property) and name not in NEUTRAL for name, value in vars(kind).items()):
            return False
    return False


class FusableModule(nn.Module):
    """A module whose forward pass calls kernels that were matched to its parts.

    Subclasses call `match_kernels` at the end of their constructor. Exchanging a part afterwards matches again.
    """

    def match_kernels(self) -> None:
        """Choose the functions that the forward pass calls, from the specs of the parts."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a part that takes the place of another is matched again."""
        exchanged = isinstance(value, nn.Module) and name in self.__dict__.get("_modules", ())
        super().__setattr__(name, value)
        if exchanged:
            self.match_kernels()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a child module; one that takes the place of another is matched again."""
        exchanged = name in self._modules
        super().add_module(name, module)
        if exchanged:
            self.match_kernels()


def match_kernels(root: nn.Module) -> None:
    """Match the kernels of all modules below `root` again, after parts were changed in place."""
    for module in root.modules():
        if isinstance(module, FusableModule):
            module.match_kernels()
