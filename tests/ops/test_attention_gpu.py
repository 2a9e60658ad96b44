"""What only a GPU can show: no waiting for the device, no T x S memory, graphs, torch.compile around real kernels, the folded bias."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from andromeda.ops.attention import AttentionSpec, attend, eager
from andromeda.train.objective import MicroBatch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


def inputs(T: int, S: int | None = None, B: int = 1, H: int = 4, G: int = 2, D: int = 64, gradients: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = ((T, H), (S or T, G), (S or T, G))
    return [torch.randn(B, n, heads, D, generator=g).to(CUDA, torch.bfloat16).requires_grad_(gradients) for n, heads in sizes]


def numbers(B: int, S: int, seed: int = 0) -> Tensor:
    return (torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 0.01).cumsum(1).to(CUDA)


def available(name: str) -> str:
    if name == "fa4":
        pytest.importorskip("flash_attn.cute", reason="needs flash-attn-4")
    return name


@pytest.fixture
def no_waiting() -> Iterator[Callable[[], Any]]:
    """Called, it makes every wait for the device an error until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["flex", "flash", "cudnn", "fa4", "sdpa"])
def test_nothing_waits_for_the_device(name: str, no_waiting: Callable[[], Any]) -> None:
    documents = name in ("flex", "sdpa")
    leaves = inputs(512, gradients=True)
    for round in range(2):
        keys = numbers(1, 512, round)
        pattern = AttentionSpec(0.125, 200 if documents else 0, (keys, keys) if documents else None)
        torch.cuda.synchronize()
        if round:
            no_waiting()
        attend(*leaves, pattern, available(name)).sum().backward()


def test_documents_of_fa4_are_waited_for_once_a_pass(no_waiting: Callable[[], Any]) -> None:
    leaves, keys = inputs(512, gradients=True), numbers(1, 512)
    pattern = AttentionSpec(0.125, 200, (keys, keys))
    attend(*leaves, pattern, available("fa4")).sum().backward()
    no_waiting()
    attend(*leaves, pattern, "fa4").sum().backward()


def test_a_micro_batch_and_its_documents_reach_the_device_without_waiting(no_waiting: Callable[[], Any]) -> None:
    on_host = numbers(1, 512).cpu()
    batch = MicroBatch(on_host.long(), on_host.long(), on_host)
    leaves = inputs(512, gradients=True)
    attend(*leaves, AttentionSpec(0.125, 200, (on_host.to(CUDA),) * 2), available("fa4")).sum().backward()
    batch.to(CUDA)  # the first pinned buffers are allocated, which waits
    no_waiting()
    documents = batch.to(CUDA).documents
    assert documents is not None
    attend(*leaves, AttentionSpec(0.125, 200, (documents, documents)), "fa4").sum().backward()


@pytest.mark.parametrize("name", ["flex", "fa4"])
def test_long_sequences_need_memory_for_their_tokens_only(name: str) -> None:
    T = 65536
    q, k, v = inputs(T, H=2, G=1)
    keys = numbers(1, T)
    pattern = AttentionSpec(0.125, 1000, (keys, keys))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attend(q, k, v, pattern, available(name))
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20 < T * T / 20


@pytest.mark.parametrize(
    ("name", "options"),
    [("flex", {"window": 200, "documents": 1, "slopes": 1}), ("flash", {}), ("cudnn", {}), ("fa4", {"window": 200, "documents": 1})],
)
def test_compiled_whole_with_its_backward_pass(name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    keys = numbers(2, 320)
    slopes = torch.tensor([0.5, 0.01, 0.0, 0.1], device=CUDA)

    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, slopes: Tensor) -> Tensor:
        documents = (keys, keys) if "documents" in options else None
        pattern = AttentionSpec(0.125, options.get("window", 0), documents, slopes if "slopes" in options else None)
        return attend(q * 1.0, k, v, pattern, name) * 2.0

    available(name)
    leaves = inputs(320, B=2, gradients=True)
    plain, compiled = (f(*leaves, keys, slopes) for f in (function, torch.compile(function, fullgraph=True)))
    grad = torch.randn(plain.shape, generator=torch.Generator().manual_seed(1)).to(plain)
    torch.testing.assert_close(compiled, plain, atol=1e-2, rtol=2e-2)
    for a, b in zip(torch.autograd.grad(compiled, leaves, grad), torch.autograd.grad(plain, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, atol=2e-2 * b.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", ["flash", "cudnn", "fa4", "flex", "decode"])
def test_the_folded_bias_is_alibi_with_one_rounded_slope(name: str) -> None:
    from andromeda.model.position.alibi import FoldedBias

    T, H, content, scale = 20_000, 4, 60, 64**-0.5
    queries = 1 if name == "decode" else T
    q, k, v = inputs(queries, T, H=H, G=1)
    slopes = torch.tensor([0.5, 0.0110, 2**-8, 0.0], dtype=torch.float64, device=CUDA)
    index = torch.arange(T, device=CUDA)
    digits = torch.stack([index // 65536, index // 256 % 256, index % 256, 0 * index], -1)
    folded_q, _ = FoldedBias(slopes, digits[-queries:]).fold(q[..., :content], k[:, -queries:, :, :content], scale)
    _, folded_k = FoldedBias(slopes, digits).fold(q[..., :content], k[..., :content], scale)
    last = slice(-64, None)
    rounded = (slopes / scale).to(torch.bfloat16).double() * scale
    exact = eager.attend(q[:, last, :, :content].double(), k[..., :content].double(), v.double(), AttentionSpec(scale, slopes=rounded))
    same_type = exact.to(torch.bfloat16).double()
    actual = attend(folded_q, folded_k, v, AttentionSpec(scale), available(name))[:, last].double()
    for head in range(H):
        own, floor = ((x[:, :, head] - exact[:, :, head]).norm() / exact[:, :, head].norm() for x in (actual, same_type))
        assert own <= 2 * floor, f"head {head}: {own:.2e} is {own / floor:.2f} times the rounding of the output alone"


@pytest.mark.parametrize("name", ["decode", "sdpa", "flex"])
def test_decoding_can_be_recorded_as_a_graph(name: str) -> None:
    with torch.inference_mode():
        q, k, v = inputs(1, 700, B=2)
        keys = numbers(2, 700)
        pattern = AttentionSpec(0.125, 0, (keys[:, -1:], keys))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            attend(q, k, v, pattern, name)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attend(q, k, v, pattern, name)
        keys.copy_(numbers(2, 700, 5))
        k.copy_(torch.randn_like(k))
        graph.replay()
        torch.testing.assert_close(out, eager.attend(q, k, v, pattern), atol=2e-2, rtol=2e-2)
