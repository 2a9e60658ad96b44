"""The operations of training in 8 bits in plain PyTorch, as definitions to test kernels against; importing it puts them on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.ops import float8, mlp


def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x over scale as PyTorch rounds it, once."""
    largest = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-largest, largest).to(dtype)


@float8.amax_and_norm_partials.register_kernel("cpu")
def measure(x: Tensor) -> Tensor:
    """Largest absolute values and norms of 16 rows each."""
    pieces = [(piece.abs().amax(), torch.linalg.vector_norm(piece, dim=1).amax()) for piece in x.float().split(float8.ROWS_PER_PARTIAL)]
    return torch.tensor(pieces).T.contiguous()


@float8.cast_to_float8.register_kernel("cpu")
def cast(x: Tensor, scale: Tensor, dtype: torch.dtype, columns: bool, total: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns, sum of the rows."""
    rows = rounded(x, scale, dtype)
    transposed = rows.T.contiguous() if columns else rows.new_empty(0)
    return rows, transposed, x.float().sum(0) if total else scale.new_empty(0)


@float8._quantize_weights_op.register_kernel("cpu")
def cast_weights(weights: list[Tensor]) -> list[Tensor]:
    """Rows and columns of each, scales, norms of rows and of rounded columns."""
    scales = torch.stack([float8.power_of_two_scale(weight.float().abs().amax(), float8.FORWARD_DTYPE) for weight in weights])
    rows = [rounded(weight, scale, float8.FORWARD_DTYPE) for weight, scale in zip(weights, scales, strict=True)]
    largest = [torch.linalg.vector_norm(weight.float(), dim=1).amax() for weight in weights]
    columns = [torch.linalg.vector_norm(row.float(), dim=0).amax() * scale for row, scale in zip(rows, scales, strict=True)]
    norms = torch.stack([torch.stack(largest), torch.stack(columns)], 1)
    return [*(part for row in rows for part in (row, row.T.contiguous())), F.pad(scales[:, None], (0, 3)), norms]


@mlp.gelu_fp8.register_kernel("cpu")
def gelu8(u: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    """GELU(u + bias)."""
    return rounded(F.gelu(u.float() + bias), scale, float8.FORWARD_DTYPE)


@mlp.gelu_fp8_gradients.register_kernel("cpu")
def gelu8_gradients(da: Tensor, u: Tensor, bias: Tensor, a_scale: Tensor, du_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """du, du^T, GELU^T, the bias's gradient."""
    z = u.float() + bias
    dz = torch.ops.aten.gelu_backward(da.float(), z)
    rows = rounded(dz, du_scale, float8.GRAD_DTYPE)
    return rows, rows.T.contiguous(), rounded(F.gelu(z), a_scale, float8.FORWARD_DTYPE).T.contiguous(), dz.sum(0)
