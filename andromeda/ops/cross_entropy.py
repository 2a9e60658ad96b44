"""Cross entropy of a language-model head without the logits of all tokens in memory.

The logits of a long batch are the largest tensor of a training step: 65,536 tokens x a vocabulary of 50,304 are 13 GB in float32,
and their gradient as much again. Here the head is applied to a chunk of tokens at a time. The loss of a token depends on no
other token, so that the gradient is computed in the forward pass too, and only its sums are kept, as in Cut Cross-Entropy (arXiv
2411.09009) and Liger (arXiv 2410.10989), in plain torch operations.

With the vocabulary split over processes, each computes its columns of the logits of a chunk, and the processes exchange three numbers a
token: the largest logit, the sum of exponentials and the logit of the target (as in Megatron-LM, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from andromeda.ops import collectives
from andromeda.ops.compute_dtype import compute_dtype

IGNORE_INDEX = -100
"""Target of a token that is left out of the loss."""

TRITON = find_spec("triton") is not None

_CHUNK_LOGITS = {"cpu": 1 << 20, "cuda": 5 << 25}
"""Logits of one chunk: on a CPU as many as its caches hold (measured: docs/optim.md), on a GPU 320 MiB in 16 bits."""
_CHUNK_TOKENS = 256
"""Least tokens of one chunk, so that its matmuls are efficient."""
_TILE = 128
"""Chunks are multiples of this, the tile of a matmul: a partial tile costs as much as a full one."""
_SCALE_ROWS = 4096
"""Rows of a gradient that are scaled at once on a CPU."""


class CrossEntropy(NamedTuple):
    """Losses in nats, summed, or one per token with reduction "none" (zero where the target is ignored)."""

    total: Tensor
    """Cross entropy plus z-loss, with gradients."""
    nll: Tensor
    """Cross entropy alone, without gradients."""
    tokens: Tensor
    """Number of targets that are not ignored, shape (), int64."""


class VocabularyShard(NamedTuple):
    """Which rows of the head's matrix a process has, where `group` splits the vocabulary into equal pieces in the order of the ranks."""

    group: collectives.Group


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 0,
    reduction: Literal["sum", "none"] = "sum",
    shard: VocabularyShard | None = None,
) -> CrossEntropy:
    """Cross entropy of softmax(cap(x W^T + b)) against `targets`, `chunk` tokens at a time.

    x (..., C); weight (V, C); bias (V,); targets (...) of token ids, -100 where a token is ignored. cap(z) = softcap
    tanh(z / softcap), or z when softcap is 0 (arXiv 2408.00118). z_loss adds z_loss log(Z)^2 per token (PaLM, arXiv
    2204.02311, section 5). Softmax and sums are in float32 at least, matmuls in the compute dtype of x. chunk: 0 selects a
    size for the device. Gradients, of the sum only, are of first order. shard: weight and bias are this piece of the vocabulary; all
    processes call this together with equal x and targets, and get equal losses and gradients of x.
    """
    flat, labels = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    group = None if shard is None else shard.group
    options = (softcap, z_loss, chunk or chunk_tokens(x.device.type, len(flat), weight.shape[0]), compute_dtype(x), group)
    tokens = (labels != IGNORE_INDEX).sum()
    if reduction == "sum" and torch.is_grad_enabled():
        total, nll = _LinearCrossEntropy.apply(flat, weight, bias, labels, options)
        return CrossEntropy(total, nll, tokens)
    with torch.no_grad():
        total, nll, _ = _chunked_loss(flat, weight, bias, labels, options, (False, False, False))
    if reduction == "sum":
        return CrossEntropy(total.sum(), nll.sum(), tokens)
    return CrossEntropy(total.view(targets.shape), nll.view(targets.shape), tokens)


def reference(
    x: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, softcap: float = 0.0, z_loss: float = 0.0
) -> CrossEntropy:
    """Reference: the same sums by definition, on all logits at once, in float64, with gradients by autograd."""
    logits = F.linear(x.double(), weight.double(), None if bias is None else bias.double()).flatten(0, -2)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    labels = targets.flatten()
    valid = labels != IGNORE_INDEX
    nll = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return CrossEntropy(nll + z_loss * logits.logsumexp(-1)[valid].square().sum(), nll.detach(), valid.sum())


LossOptions = tuple[float, float, int, torch.dtype, collectives.Group | None]
"""softcap, z_loss, tokens of a chunk, compute dtype, processes that split the vocabulary: plain values, so that torch.compile can trace
them."""
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _LinearCrossEntropy(torch.autograd.Function):
    """The sums; gradients of x, weight and bias are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
        total, nll, gradients = _chunked_loss(x, weight, bias, labels, options, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)
        ctx.dtypes = (x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        nll_sum = nll.sum()
        ctx.mark_non_differentiable(nll_sum)
        return total.sum(), nll_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _grad_nll: Tensor) -> tuple[Tensor | None, ...]:
        last = _is_last_backward()
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return (*(None if g is None else _scale_grad(g, grad_total, dtype, last) for g, dtype in pairs), None, None)


def _chunked_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, options: LossOptions, needs_grad: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Gradients]:
    """Losses of x (N, C), each (N,), and those gradients of their sum that are needed: that of x in its dtype, the others as summed."""
    softcap, z_loss, chunk, dtype, group = options
    accumulate_dtype, head = _accumulate_dtype(dtype), weight.to(dtype)
    totals, nlls = [], []
    d_x = torch.empty_like(x) if needs_grad[0] else None
    d_weight: Tensor | None = None
    d_bias = torch.zeros_like(bias, dtype=accumulate_dtype) if bias is not None and needs_grad[2] else None
    for start in range(0, max(1, len(x)), chunk):
        tokens = slice(start, start + chunk)
        x_n = x[tokens].to(dtype)
        total, nll, d_logits = _logits_loss(_logits(x_n, head, bias), labels[tokens], softcap, z_loss, any(needs_grad), group)
        totals.append(total)
        nlls.append(nll)
        if d_bias is not None:
            d_bias += d_logits.sum(0, dtype=accumulate_dtype)
        d_logits = d_logits.to(dtype)
        if d_x is not None:
            _matmul_into(d_x[tokens], d_logits, head)
        if needs_grad[1]:
            d_weight = _accumulate_weight_grad(d_weight, d_logits, x_n, accumulate_dtype)
        # Freed before the next chunk allocates its own.
        del d_logits
    if d_x is not None and group is not None:
        d_x = collectives.all_reduce(d_x, group)
    return torch.cat(totals), torch.cat(nlls), (d_x, d_weight, d_bias)


def _logits(x: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    return x @ head.T if bias is None else torch.addmm(bias.to(x.dtype), x, head.T)


def _logits_loss(
    logits: Tensor, labels: Tensor, softcap: float, z_loss: float, gradient: bool, group: collectives.Group | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`_logits_loss_reference`, on a GPU by a kernel that reads the logits in their own dtype and overwrites them with the gradient."""
    if group is not None:
        return _logits_loss_sharded(logits.to(_accumulate_dtype(logits.dtype)), labels, softcap, z_loss, group)
    if TRITON and logits.is_cuda and logits.dtype != torch.float64:
        from andromeda.ops.triton import cross_entropy as kernels

        return kernels.logits_loss(logits, labels, softcap, z_loss, gradient, IGNORE_INDEX)
    return _logits_loss_reference(logits.to(_accumulate_dtype(logits.dtype)), labels, softcap, z_loss, gradient)


def _logits_loss_reference(logits: Tensor, labels: Tensor, softcap: float, z_loss: float, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    """logits (n, V), labels (n,) -> total loss and cross entropy, each (n,), and the gradient of the total by the logits (n, V).

    Without `gradient` the last has no meaning. In-place operations keep at most two tensors of the size of the logits.
    """
    z = softcap * torch.tanh(logits / softcap) if softcap else logits
    valid = labels != IGNORE_INDEX
    index = torch.where(valid, labels, 0)[:, None]
    p = F.log_softmax(z, dim=-1)
    nll = -p.gather(1, index)[:, 0]
    log_z = z.gather(1, index)[:, 0] + nll
    total = nll + z_loss * log_z.square()
    if gradient:
        p = p.exp_()
        if z_loss:
            p = p.mul_(1.0 + 2.0 * z_loss * log_z[:, None])
        p = p.scatter_add_(1, index, torch.full_like(nll, -1.0)[:, None])
        if softcap:
            p = p.mul_(1.0 - (z / softcap).square())
        p = p.masked_fill_(~valid[:, None], 0.0)
    return torch.where(valid, total, 0.0), torch.where(valid, nll, 0.0), p


def _logits_loss_sharded(
    logits: Tensor, labels: Tensor, softcap: float, z_loss: float, group: collectives.Group
) -> tuple[Tensor, Tensor, Tensor]:
    """The same with the columns (n, V / processes) of this process: losses are equal everywhere, the gradient is of these columns."""
    z = softcap * torch.tanh(logits / softcap) if softcap else logits
    valid, column = labels != IGNORE_INDEX, labels - group.rank * logits.shape[1]
    here = valid & (column >= 0) & (column < logits.shape[1])
    index, one = torch.where(here, column, 0)[:, None], here.to(z.dtype)
    largest = collectives.all_reduce(z.amax(-1), group, "max")
    sums = torch.stack([(z - largest[:, None]).exp_().sum(-1), z.gather(1, index)[:, 0] * one])
    exponentials, target = collectives.all_reduce(sums, group)
    log_z = largest + exponentials.log()
    nll = log_z - target
    p = (z - log_z[:, None]).exp_().mul_((1.0 + 2.0 * z_loss * log_z)[:, None])
    p = p.scatter_add_(1, index, -one[:, None])
    if softcap:
        p = p.mul_(1.0 - (z / softcap).square())
    total = nll + z_loss * log_z.square()
    return torch.where(valid, total, 0.0), torch.where(valid, nll, 0.0), p.masked_fill_(~valid[:, None], 0.0)


def _matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b, without a temporary where the dtypes agree."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _accumulate_weight_grad(d_weight: Tensor | None, d_logits: Tensor, x: Tensor, accumulate_dtype: torch.dtype) -> Tensor:
    """d_weight (None for zero) plus d_logits^T x, accumulated over chunks in at least float32."""
    mixed = d_logits.is_cuda and d_logits.dtype != accumulate_dtype
    if d_weight is None:
        return torch.mm(d_logits.T, x, out_dtype=accumulate_dtype) if mixed else (d_logits.T @ x).to(accumulate_dtype)
    if mixed:
        # The matmul accumulates into the sum without rounding in between and without a temporary.
        return torch.addmm(d_weight, d_logits.T, x, out_dtype=accumulate_dtype, out=d_weight)
    return d_weight.addmm_(d_logits.T, x) if d_logits.dtype == accumulate_dtype else d_weight.add_(d_logits.T @ x)


def _is_last_backward() -> bool:
    """Whether the running backward pass frees the graph, so that saved tensors are read for the last time."""
    return not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()


def _scale_grad(gradient: Tensor, factor: Tensor, dtype: torch.dtype, last: bool) -> Tensor:
    """gradient * factor in `dtype`, multiplied in float32 at least: 1 / tokens rounded to bfloat16 would scale it all by up to 0.4 %.

    last: `gradient` is not read again, and may be overwritten.
    """
    if TRITON and gradient.is_cuda and gradient.dtype != torch.float64:
        from andromeda.ops.triton import cross_entropy as kernels

        return kernels.scale_grad(gradient, factor, dtype, last and gradient.dtype == dtype)
    out = torch.empty_like(gradient, dtype=dtype)
    for part, to in zip(gradient.split(_SCALE_ROWS), out.split(_SCALE_ROWS), strict=True):
        # A zero-dimensional factor would be rounded to the dtype of the gradient first.
        torch.mul(part, factor.reshape(1), out=to)
    return out


def chunk_tokens(device: str, tokens: int, vocabulary: int) -> int:
    """Tokens of a chunk, a multiple of the tile: chunks as equal as possible, within the device's number of logits."""
    given = _CHUNK_LOGITS.get(device, _CHUNK_LOGITS["cuda"]) / vocabulary
    most = max(_CHUNK_TOKENS, round(given / _TILE) * _TILE)
    chunks = -(-max(1, tokens) // most)
    return -(-max(1, tokens) // (chunks * _TILE)) * _TILE


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
