"""An activation over a tensor, and a product that is added to what is there: what stands around the products of a feed-forward.

For inference: there are no gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("andromeda::activate", mutates_args=())
def activate(x: Tensor, activation: str) -> Tensor:
    """The activation of x (..., K) on a GPU; in 16 bits at the speed of memory, where a compiler's erf takes twice as long.

    `fp8.activates` says whether it can.
    """
    from andromeda.ops.triton import activation as kernels

    return kernels.activate(x.contiguous(), activation)


@activate.register_fake
def _(x: Tensor, activation: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("andromeda::add_product", mutates_args=("total",))
def residual_addmm(total: Tensor, x: Tensor, weight: Tensor) -> None:
    """total (M, N) += x (M, K) weight^T, weight (N, K): the sum is part of the product, and costs no pass of its own."""
    total.addmm_(x, weight.T)


@residual_addmm.register_fake
def _(total: Tensor, x: Tensor, weight: Tensor) -> None:
    return None
