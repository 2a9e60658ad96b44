"""Linear head and cross-entropy, forward and backward: ours, compiled PyTorch with full logits, and libraries that fuse them.

The inputs are 32,768 tokens of hidden size 2,560 and a vocabulary of 50,432, in bfloat16. The bound counts the three required matmuls
(logits, gradient of the hidden states, gradient of the weight) at the measured rate. Memory is the peak above the inputs,
including the gradients, whose size is reported. Errors are those of the gradient of the hidden states against float64, on the
last 256 tokens. Ours is also measured with other chunk sizes than its default.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.bench.timing import measured_hardware, median_ms
from andromeda.ops.cross_entropy import linear_cross_entropy

TOKENS, WIDTH, VOCABULARY = 32768, 2560, 50432
CHECKED = 256
CHUNKS = (2048, 3712, 4096)
"""Chunk sizes in addition to the default, on a GPU: whole tiles that leave few of its 132 multiprocessors idle."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Hidden states (N, C), weight (V, C), targets (N,) -> summed cross-entropy."""


def ours(x: Tensor, weight: Tensor, targets: Tensor, chunk: int = 0) -> Tensor:
    """The loss of `andromeda train`. chunk: 0 chooses it automatically."""
    return linear_cross_entropy(x, weight, targets, chunk=chunk).total


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """With full logits."""
    return F.cross_entropy((x @ weight.T).float(), targets, reduction="sum")


def loss_functions(cuda: bool) -> dict[str, Loss]:
    """Implementations that are installed."""
    found: dict[str, Loss] = {"Andromeda": ours, "PyTorch, compiled": torch.compile(plain, dynamic=False)}
    if cuda:
        found |= {f"Andromeda, {chunk:,} tokens per chunk": partial(ours, chunk=chunk) for chunk in CHUNKS}
        found |= _libraries()
    return found


def _libraries() -> dict[str, Loss]:
    """Fused implementations of libraries that can be imported."""
    found: dict[str, Loss] = {}
    for name, make in (("Liger", _liger), ("cut-cross-entropy", _cut), ("quack", _quack)):
        with suppress(Exception):
            found[name] = make()
    return found


def _liger() -> Loss:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    return lambda x, weight, targets: Liger.apply(x, weight, targets, None, None, -100, 0.0, 0.0, "sum")[0]


def _cut() -> Loss:
    from cut_cross_entropy import linear_cross_entropy as cut

    return lambda x, weight, targets: cut(x, weight, targets, reduction="sum")


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

    return lambda x, weight, targets: quack(x, weight, targets, reduction="sum")


def measure(device: torch.device, tokens: int = TOKENS, vocabulary: int = VOCABULARY, width: int = WIDTH, rep: int = 300) -> dict[str, Any]:
    """Milliseconds, memory and error of every implementation."""
    g = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, width, device=device, generator=g).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device, generator=g) * width**-0.5).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device, generator=g)
    known = measured_hardware(device)
    rate = known.rate("bf16") if known else None
    return {
        "shape": {"tokens": tokens, "width": width, "vocabulary": vocabulary, "dtype": "bfloat16"},
        "floor_ms": 6e3 * tokens * width * vocabulary / rate if rate else None,
        "gradients": 2 * (x.numel() + weight.numel()),
        "implementations": {name: _side(loss, x, weight, targets, rep) for name, loss in loss_functions(x.is_cuda).items()},
    }


def _side(loss: Loss, x: Tensor, weight: Tensor, targets: Tensor, rep: int) -> dict[str, Any]:
    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(x, weight, targets), (x, weight))

    try:
        forward_backward()
        peak, gradients = _peak(forward_backward) if x.is_cuda else (None, forward_backward())
        return {"ms": median_ms(forward_backward, x.device.type, rep), "peak": peak, "error": _error(gradients[0], x, weight, targets)}
    except Exception as error:
        # A library that fails on this machine is reported, and does not end the benchmark.
        return {"failed": f"{type(error).__name__}: {str(error)[:200]}"}


def _peak(forward_backward: Callable[[], tuple[Tensor, ...]]) -> tuple[int, tuple[Tensor, ...]]:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = forward_backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, gradients


@torch.no_grad()
def _error(found: Tensor, x: Tensor, weight: Tensor, targets: Tensor) -> float:
    few, exact = slice(-CHECKED, None), weight.double()
    p = (x[few].double() @ exact.T).softmax(-1)
    p[torch.arange(len(p)), targets[few]] -= 1
    gradient = p @ exact
    return float((found[few].double() - gradient).norm() / gradient.norm())
