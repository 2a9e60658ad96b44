"""Products of a matrix with a few vectors, with what lies before and after them: what a decoding step is made of.

One kernel reads a weight once at the bandwidth of the device and does the norm and token shift before its product and the bias,
activation and residual sum after it (`ops/triton/gemv.py`). The plain reference is the model's own parts, one after the other.
Nothing waits for the device. For inference: there are no gradients.

Shapes: M rows, one token each, K inputs, N outputs, J tokens of the shift, S keys.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

TRITON = find_spec("triton") is not None
ROWS = 8
"""Most rows."""
ALONE = 2
"""Up to here every program normalizes the rows for itself; more rows are normalized once, by a kernel of their own."""
TYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 1 << 15
"""Inputs."""


class Norm(NamedTuple):
    """Layer or RMS norm of the rows (`kind` layer, rms)."""

    kind: str
    eps: float
    gain: Tensor | None = None
    """(K,)."""


class Shift(NamedTuple):
    """Token shift by chunks: channels [i C, (i + 1) C) for C = K // (J + 1) are of i tokens before, zero across documents."""

    past: Tensor
    """Normalized rows of the tokens before (M, J, K), the newest last; moved on by one token."""
    documents: tuple[Tensor, Tensor] | None = None
    """Numbers of the rows' documents (M, 1) and of those of all keys (M, S)."""
    at: Tensor | None = None
    """Where the token of this pass lies among the keys, a number () on the device; None is the last."""


class Keep(NamedTuple):
    """A past that is still to be moved on: programs of the product that read it may not have come to it yet.

    The next product is given it and does it; none may come between that reads `past`.
    """

    past: Tensor
    fresh: Tensor
    """Normalized rows (M, K)."""


class Place(NamedTuple):
    """Where some outputs go as well: into a cache."""

    cache: Tensor
    """(M, S, ...), whose last dimensions are outputs."""
    at: Tensor
    """Where in it, a number () on the device."""
    begin: int
    """The first of those outputs."""


def refuse(x: Tensor, *weights: Tensor) -> str | None:
    """Why the kernels do not compute products of x (M, K) with these matrices (N, K), or None."""
    if not (TRITON and x.is_cuda):
        return "they need a CUDA GPU and Triton"
    if x.dtype not in TYPES or any(w.dtype != x.dtype for w in weights):
        return "they compute in 32 and 16 bits, rows and weights alike"
    if x.shape[0] > ROWS or any(max(w.shape[1], x.shape[1]) > WIDEST for w in weights):
        return f"they take {ROWS} rows of {WIDEST} inputs at most"
    if any(type(w) not in (Tensor, torch.nn.Parameter) or not w.is_contiguous() for w in weights):
        return "they read plain matrices that lie in one piece"
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
    return "they have no backward pass" if trained else None


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    shift: Shift | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    keep: Keep | None = None,
    place: Place | None = None,
) -> tuple[Tensor, Keep | None]:
    """activation(x' W^T + b) + residual (M, N) for x (M, K), weight (N, K), bias (N,), residual (M, N); x' is x normed and shifted.

    activation: none, gelu, gelu_tanh, relu, relu2 or silu. What comes back beside it, if anything, is the `keep` of the next product.
    """
    if norm and len(x) > ALONE:
        x, norm, shift = normalize(x, norm, shift), None, None
    kind, eps, gain = norm or ("none", 0.0, None)
    past, documents, at = shift or (None, None, None)
    own, numbers = documents or (None, None)
    asked = (*(keep or (None, None)), *(place or (None, None, 0)), kind, eps, activation)
    y, fresh = _product(x, weight, bias, residual, gain, past, own, numbers, at, *asked)
    return y, None if past is None else Keep(past, fresh)


def normalize(x: Tensor, norm: Norm, shift: Shift | None = None) -> Tensor:
    """x (M, K) normed and shifted; the shift's past is moved on."""
    past, documents, at = shift or (None, None, None)
    own, numbers = documents or (None, None)
    return _normalize(x, norm.gain, past, own, numbers, at, norm.kind, norm.eps)


@torch.library.custom_op("andromeda::gemv", mutates_args=("old", "cache"))
def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gain: Tensor | None,
    past: Tensor | None,
    own: Tensor | None,
    numbers: Tensor | None,
    index: Tensor | None,
    old: Tensor | None,
    row: Tensor | None,
    cache: Tensor | None,
    at: Tensor | None,
    begin: int,
    kind: str,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The product, and the normalized rows if `past` is given. old, row: what is kept for an earlier product."""
    from andromeda.ops.triton import gemv as device

    y, fresh = _outputs(x, weight, past)
    place = device.Place()
    if cache is not None:
        place = device.Place(cache, at, begin, begin + cache[0, 0].numel(), cache.stride(0), cache.stride(1))
    device.product(
        device.Input(x, kind, eps, gain, past, own, numbers, index),
        *(weight, y, device.After(bias, residual), activation),
        *(None if past is None else fresh, device.Keep(old, row), place),
    )
    return y, fresh


@_product.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gain: Tensor | None, past: Tensor | None,
    own: Tensor | None, numbers: Tensor | None, index: Tensor | None, old: Tensor | None, row: Tensor | None, cache: Tensor | None,
    at: Tensor | None, begin: int, kind: str, eps: float, activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _outputs(x, weight, past)


def _outputs(x: Tensor, weight: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), len(weight)), x.new_empty(0) if past is None else torch.empty_like(x)


@torch.library.custom_op("andromeda::gemv_normalize", mutates_args=("past",))
def _normalize(
    x: Tensor,
    gain: Tensor | None,
    past: Tensor | None,
    own: Tensor | None,
    numbers: Tensor | None,
    index: Tensor | None,
    kind: str,
    eps: float,
) -> Tensor:
    from andromeda.ops.triton import gemv as device

    return device.normalize(device.Input(x, kind, eps, gain, past, own, numbers, index))


@_normalize.register_fake
def _(
    x: Tensor, gain: Tensor | None, past: Tensor | None, own: Tensor | None, numbers: Tensor | None, index: Tensor | None,
    kind: str, eps: float,
) -> Tensor:  # fmt: skip
    return torch.empty_like(x)
