"""The operations of training in 16 bits in plain PyTorch, as definitions to test kernels against; importing it puts them on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.ops import master_weight_linear, mlp


@mlp.gelu.register_kernel("cpu")
def gelu(u: Tensor, bias: Tensor) -> Tensor:
    """GELU of the sum."""
    return F.gelu(u.to(bias.dtype) + bias).to(u.dtype)


@mlp.gelu_gradients.register_kernel("cpu")
def gelu_gradients(da: Tensor, u: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the sum, GELU, gradient of the bias."""
    z = u.to(bias.dtype) + bias
    dz = torch.ops.aten.gelu_backward(da.to(bias.dtype), z)
    return dz.to(u.dtype), F.gelu(z).to(u.dtype), dz.sum(0)


@master_weight_linear.weight_grad_matmul.register_kernel("cpu")
def weight_grad_matmul(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of factors that were widened before."""
    return dy.T.to(dtype) @ x.to(dtype)


@master_weight_linear.weight_grad_addmm.register_kernel("cpu")
def weight_grad_addmm(total: Tensor, dy: Tensor, x: Tensor) -> None:
    """The same, added."""
    total.addmm_(dy.T.to(total.dtype), x.to(total.dtype))
