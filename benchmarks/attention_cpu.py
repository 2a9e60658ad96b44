"""What the choices inside the `sdpa` backend save on one CPU core: forward and backward pass of rows packed with documents.

`python benchmarks/attention_cpu.py [seconds] > benchmarks/results/attention-cpu.json`
CPU time of one thread, the least of many interleaved rounds, so that other work on the machine changes little. Two query
heads of 64 on one key head, as preset nano has them; `whole` is one mask of T x T a call, `bfloat16` the kernel's own backward.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.bench.record import record
from andromeda.ops.attention import AttentionSpec, eager, sdpa

SHAPES = ((32, 256), (16, 512), (4, 2048))
"""Rows and tokens of each."""


def main(seconds: float) -> None:
    """Print all figures as JSON."""
    torch.set_num_threads(1)
    cases: dict[str, Callable[[], object]] = {}
    for rows, tokens in SHAPES:
        cases |= {f"{rows} x {tokens}, {name}": run for name, run in variants(rows, tokens)}
    for run in cases.values():
        run()
    least = dict.fromkeys(cases, float("inf"))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, run in cases.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    figures = {"milliseconds": {name: round(1e3 * value, 1) for name, value in least.items()}}
    print(json.dumps(record("python benchmarks/attention_cpu.py", figures), indent=1))


def variants(B: int, T: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """The same attention in several ways."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(B, T, heads, 64, generator=g).requires_grad_() for heads in (2, 1, 1)]
    half = [x.detach().bfloat16().requires_grad_() for x in leaves]
    grad = torch.randn(B, T, 2, 64, generator=g)
    numbers = (torch.rand(B, T, generator=g) < 3 / T).cumsum(1)
    causal, packed = AttentionSpec(0.125), AttentionSpec(0.125, documents=(numbers, numbers))

    def both(attend: Callable[..., Tensor], inputs: list[Tensor], pattern: AttentionSpec) -> object:
        return torch.autograd.grad(attend(*inputs, pattern), inputs, grad.to(inputs[0].dtype))

    yield "causal", partial(both, sdpa.attend, leaves, causal)
    yield "documents, strips of 256", partial(both, sdpa.attend, leaves, packed)
    yield "documents, whole", partial(both, whole, leaves, packed)
    yield "documents, eager", partial(both, eager.attend, leaves, packed)
    yield "causal, bfloat16 through float32", partial(both, sdpa.attend, half, causal)
    yield "causal, bfloat16", partial(both, native, half, causal)


def whole(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionSpec) -> Tensor:
    """PyTorch's function with the whole boolean mask, made for this call."""
    mask = pattern.mask(q.shape[1], k.shape[1], q.device)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=pattern.scale, enable_gqa=True).transpose(1, 2)


def native(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionSpec) -> Tensor:
    """PyTorch's function in the queries' own type."""
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=pattern.scale, enable_gqa=True).transpose(1, 2)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
