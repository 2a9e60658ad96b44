"""A table's gradient against one_hot(ids)^T dY in float64: any ids, hot ones too, any cut of the work; and the same bits twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from andromeda.config.model import AttentionConfig, ModelConfig
from andromeda.config.model import ValueEmbeddingConfig as ValueConfig
from andromeda.model.value_embedding import LayeredValueEmbedding
from andromeda.ops import embedding
from andromeda.ops.embedding import embed, embed_split
from tests.ops import interpreted

V = 6


def hot(id: int) -> st.SearchStrategy[list[int]]:
    """Ids most of which are one, as padding makes them."""
    return st.lists(st.one_of(st.just(id), st.just(id), st.just(id), st.integers(0, V - 1)), max_size=40)


IDS = st.one_of(
    st.lists(st.integers(0, V - 1), max_size=40),
    hot(0),
    hot(3),
    hot(V - 1),
    st.permutations(range(V)),
    st.integers(0, 40).map(lambda count: [2] * count),
    st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda n: [1] * n[0] + [4] * n[1]),
)


def wanted(ids: Tensor, dy: Tensor, rows: int = V) -> Tensor:
    """The definition."""
    return F.one_hot(ids, rows).double().T @ dy.double()


def gradient(ids: Tensor, dys: list[Tensor], rows: int, dtype: torch.dtype, *cut: Any) -> Tensor:
    """The kernel with small pieces: imported late, when Triton's interpreter has been chosen."""
    from andromeda.ops.triton import embedding as device
    from andromeda.ops.triton.common import TileConfig

    tokens, columns, read, piece = cut
    assert tokens == len(ids)
    return device.embedding_weight_grad(ids, dys, rows, dtype, TileConfig(read, columns, 1), piece)


@pytest.mark.gpu
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    ids=IDS,
    widths=st.lists(st.integers(1, 20), min_size=1, max_size=2),
    columns=st.sampled_from([8, 32]),
    read=st.sampled_from([1, 4]),
    piece=st.sampled_from([3, 4, 8, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_is_the_definition(ids: list[int], widths: list[int], columns: int, read: int, piece: int, dtype: torch.dtype) -> None:
    device = interpreted.device()
    numbers = torch.tensor(ids, dtype=torch.long, device=device)
    generator = torch.Generator().manual_seed(len(ids))
    dys = [torch.randn(len(ids), width, generator=generator).to(device, dtype) for width in widths]
    found = gradient(numbers, dys, V, torch.float32, len(ids), columns, read, piece)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted(numbers, torch.cat(dys, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_are_in_float32(dtype: torch.dtype) -> None:
    """A thousand numbers one of which is large: in 16 bits the small ones would be lost. Rounded once, into the table's type."""
    device = interpreted.device()
    dy = torch.full((1000, 2), 2.0**-6, device=device)
    dy[0] = 16.0
    found = gradient(torch.zeros(1000, dtype=torch.long, device=device), [dy.to(dtype)], 2, dtype, 1000, 4, 4, 64)
    assert found.dtype == dtype
    assert found[0].tolist() == pytest.approx([16 + 999 / 64] * 2, rel=2.0**-7 if dtype == torch.bfloat16 else 2.0**-10)
    assert found[1].tolist() == [0.0, 0.0]


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_autograd(parts: int, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public function: views, gradients that do not lie densely, and a part that nobody used."""
    device = interpreted.device()
    monkeypatch.setattr(embedding, "is_supported", lambda weight: True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, 12, generator=generator).to(device).requires_grad_()
    ids = torch.randint(V, (2, 9), generator=generator).to(device)
    pieces = embed_split(ids, weight, parts, dtype)
    plain = F.embedding(ids, weight).to(dtype or weight.dtype).chunk(parts, -1)
    assert all(torch.equal(a, b) for a, b in zip(pieces, plain, strict=True))
    dys = [torch.randn(12 // parts, 9, 2, generator=generator).to(device, x.dtype).permute(2, 1, 0) for x in pieces]
    used = slice(0, max(1, parts - 1))
    (found,) = torch.autograd.grad(pieces[used], weight, dys[used])
    zeros = [dy if i < used.stop else torch.zeros_like(dy) for i, dy in enumerate(dys)]
    assert found.dtype == weight.dtype
    torch.testing.assert_close(found.double(), wanted(ids.flatten(), torch.cat(zeros, -1).flatten(0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_expanded_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a sum has no memory of its own: its strides are zero."""
    monkeypatch.setattr(embedding, "is_supported", lambda weight: True)
    device = interpreted.device()
    weight = torch.randn(V, 3, device=device, requires_grad=True)
    ids = torch.tensor([[1, 1, 2]], device=device)
    embed(ids, weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[count] * 3 for count in (0, 2, 1, 0, 0, 0)]


@pytest.mark.gpu
def test_inside_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "is_supported", lambda weight: True)
    device = interpreted.device()
    weight = torch.randn(V, 8, device=device, requires_grad=True)
    ids = torch.tensor([[0, 5, 5, 1]], device=device)

    def loss(ids: Tensor, weight: Tensor) -> Tensor:
        a, b = embed_split(ids, weight, 2)
        return (a * b.sin()).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager" if interpreted.INTERPRETED else "inductor")
    found, plain = (torch.autograd.grad(f(ids, weight), weight)[0] for f in (compiled, loss))
    torch.testing.assert_close(found, plain)


@pytest.mark.gpu
def test_what_is_registered_is_true() -> None:
    device = interpreted.device()
    dys = [torch.randn(5, width, device=device) for width in (2, 4)]
    torch.library.opcheck(embedding.embedding_weight_grad, (torch.tensor([3, 0, 3, 3, 1], device=device), dys, V, torch.float32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [9216, 2560, 768, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_with_hot_tokens_twice(width: int, dtype: torch.dtype) -> None:
    """As many tokens as a step has, a third of them one id: right, and the same bits in every run."""
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(5000, (20000,), device="cuda", generator=generator)
    ids[torch.rand(20000, device="cuda", generator=generator) < 0.3] = 77
    dy = torch.randn(20000, width, device="cuda", generator=generator).bfloat16()
    first, second = (embedding.embedding_weight_grad(ids, [dy], 5000, dtype) for _ in range(2))
    exact = torch.zeros(5000, width, dtype=torch.float64, device="cuda").index_add_(0, ids, dy.double())
    assert torch.equal(first, second)
    torch.testing.assert_close(first.double(), exact, rtol=1e-4 if dtype == torch.float32 else 2.0**-8, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_cpu_has_pytorchs(dtype: torch.dtype | None) -> None:
    ids = torch.tensor([[0, 5, 5, 1]])
    weight = torch.randn(V, 8, requires_grad=True)
    assert not embedding.is_supported(weight)
    pieces = embed_split(ids, weight, 2, dtype)
    assert torch.equal(torch.cat(pieces, -1), F.embedding(ids, weight).to(dtype or torch.float32))
    (found,) = torch.autograd.grad(torch.cat(pieces, -1).double().square().sum(), weight)
    table = weight.detach().clone().requires_grad_()
    (plain,) = torch.autograd.grad(F.embedding(ids, table).to(dtype or torch.float32).double().square().sum(), table)
    torch.testing.assert_close(found, plain)


def test_value_embeddings_are_of_the_layers_type() -> None:
    """Under autocast each layer gets its own values in 16 bits: the columns of the row, layer by layer."""
    config = ModelConfig(
        vocab_size=11,
        hidden_size=8,
        num_layers=3,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
        value_embedding=ValueConfig(kind="layered"),
    )
    part = LayeredValueEmbedding(config)
    torch.nn.init.normal_(part.table.weight)
    ids = torch.tensor([[1, 10, 1]])
    plain = part(ids)
    with torch.autocast("cpu", torch.bfloat16):
        cast = part(ids)
    assert [x.shape for x in plain] == [(1, 3, 2, 4)] * 3
    for layer, (x, y) in enumerate(zip(plain, cast, strict=True)):
        row = part.table.weight[ids[0]].reshape(3, 3, 2, 4)[:, layer]
        assert torch.equal(x[0], row)
        assert torch.equal(y[0], row.bfloat16())


def test_under_the_interpreter() -> None:
    interpreted.run(__file__)
