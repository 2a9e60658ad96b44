"""The kernel that prepares queries and keys against the model's own parts in float64: every norm, rotation and bias, on views
of one projection, forward and backward, in every type."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from andromeda.config.model import AlibiConfig, AttentionConfig, ModelConfig, RotaryConfig
from andromeda.model import qk_preprocess as seam
from andromeda.model.position import build_alibi, build_rotary
from andromeda.model.position.alibi import NoPositionBias
from andromeda.model.position.rotary import Rotation
from andromeda.model.qk_norm import NoQKNorm, build_qk_norm
from andromeda.ops import qk_preprocess
from tests.ops import interpreted

NORMS = ("none", "rms", "l2", "l2_head_scale", "l2_dim_scale")
ROTARIES = {
    "none": RotaryConfig(kind="none"),
    "rope": RotaryConfig(kind="rope"),
    "interleaved": RotaryConfig(kind="rope", layout="interleaved"),
    "xpos": RotaryConfig(kind="xpos", scale_base=8),
    "xpos, part": RotaryConfig(kind="xpos", scale_base=8, fraction=0.5),
    "interleaved, part": RotaryConfig(kind="xpos", scale_base=8, fraction=0.5, layout="interleaved"),
}
SCALE = 0.3


class Parts(NamedTuple):
    """A layer's parts for one pass."""

    norm: NoQKNorm
    rotation: Rotation
    bias: NoPositionBias


def configure(norm: str, rotary: str, fold: bool, head_dim: int = 16, heads: int = 3, kv_heads: int = 1) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "max_seq_len": 64,
            "hidden_size": 32,
            "num_layers": 1,
            "attention": AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, qk_norm=norm),  # type: ignore[arg-type]
            "rotary": ROTARIES[rotary],
            "alibi": AlibiConfig(num_heads=2 if fold else 0, fold_into_qk=fold),
        }
    )


def build(config: ModelConfig, positions: Tensor, start: int, wide: torch.dtype, seed: int = 0) -> Parts:
    """Parts whose scales are not all alike, with tables in `wide`."""
    norm = build_qk_norm(config).to(positions.device, torch.promote_types(wide, torch.float32))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in norm.parameters():
            p *= 0.5 + torch.rand(p.shape, generator=generator).to(p)
    span = int(positions.max()) + 1
    rotation = build_rotary(config)(positions, span, wide)
    return Parts(norm, rotation, build_alibi(config)(start, positions.shape[-1], positions.device))


def project(config: ModelConfig, B: int, T: int, dtype: torch.dtype, device: torch.device, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """One projection with gradients, and the queries and keys that are views of it; other columns lie around and between them."""
    a = config.attention
    D = a.head_dim - (4 if config.alibi.fold_into_qk else 0)
    q_end, k_start = 2 + a.num_heads * D, 4 + a.num_heads * D
    whole = (
        torch.randn(B, T, k_start + a.num_kv_heads * D + 2, generator=torch.Generator().manual_seed(seed))
        .to(device, dtype)
        .requires_grad_()
    )
    q = whole[..., 2:q_end].unflatten(-1, (a.num_heads, D))
    k = whole[..., k_start:-2].unflatten(-1, (a.num_kv_heads, D))
    return whole, q, k


def kernel(q: Tensor, k: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
    """The kernel, wherever it can run, through the form that the model gives it."""
    matched = seam.match(parts.norm.fused_spec(), parts.rotation.fused_spec())
    assert matched is not None
    tables = () if matched.layout == "none" else (*parts.rotation.query, *parts.rotation.key)
    form = qk_preprocess.QKPreprocessSpec(
        matched.norm,
        matched.layout,
        tables,
        *parts.norm.scales,
        parts.bias.tails(SCALE, q.dtype),
    )
    return qk_preprocess.preprocess_qk(q, k, form)


Function = Callable[[Tensor, Tensor, Parts], tuple[Tensor, Tensor]]


def reference(q: Tensor, k: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
    return seam.reference(q, k, *parts, SCALE)


def results(
    function: Function, config: ModelConfig, positions: Tensor, dtype: torch.dtype, wide: torch.dtype, seed: int = 1
) -> list[Tensor]:
    """Queries, keys, and the gradients of the projection and of the scales for one random gradient; inputs are the same in all types."""
    B, T = (2, positions.shape[1])
    parts = build(config, positions, 3, wide)
    whole, q, k = project(config, B, T, dtype, positions.device, seed)
    out = function(q, k, parts)
    generator = torch.Generator().manual_seed(seed + 1)
    gradients = [torch.randn(x.shape, generator=generator).to(x) for x in out]
    leaves = [whole, *parts.norm.parameters()]
    return [x.detach() for x in (*out, *torch.autograd.grad(out, leaves, gradients))]


def positions_of(T: int, B: int, device: torch.device) -> Tensor:
    """Rows alike (1, T), or a second document that begins in the middle of one row (2, T)."""
    plain_row = torch.arange(3, 3 + T, device=device)
    if B == 1:
        return plain_row[None]
    return torch.stack([plain_row, torch.cat([plain_row[: T // 2], torch.arange(T - T // 2, device=device)])])


def exact(config: ModelConfig, positions: Tensor) -> list[Tensor]:
    return results(reference, config, positions, torch.float64, torch.float64)


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize("rotary", ROTARIES)
@pytest.mark.parametrize("norm", NORMS)
def test_is_the_parts_in_float64(norm: str, rotary: str) -> None:
    # Every norm and every rotation meets both biases.
    fold = (NORMS.index(norm) + list(ROTARIES).index(rotary)) % 2 == 1
    config = configure(norm, rotary, fold)
    positions = positions_of(5, 1 + fold, interpreted.device())
    for found, wanted in zip(results(kernel, config, positions, torch.float32, torch.float32), exact(config, positions), strict=True):
        assert found.shape == wanted.shape
        assert error(found, wanted) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(7, 7), (8, 2), (24, 1)], ids=str)
@pytest.mark.parametrize("rotary", ["rope", "interleaved, part"])
def test_any_number_of_heads(rotary: str, heads: tuple[int, int]) -> None:
    config = configure("l2_dim_scale", rotary, True, 16, *heads)
    positions = positions_of(2, 2, interpreted.device())
    for found, wanted in zip(results(kernel, config, positions, torch.float32, torch.float32), exact(config, positions), strict=True):
        assert error(found, wanted) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [8, 9, 13], ids=str)
@pytest.mark.parametrize("norm", ["l2_head_scale", "l2_dim_scale"])
def test_walks_over_blocks_of_tokens(norm: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last walk may have fewer blocks than the others, the last block fewer tokens, and rows may end within either."""
    from andromeda.ops.triton import qk_preprocess as device

    monkeypatch.setattr(device, "BACKWARD_SCALED", device.QKLaunchConfig(4, 1, 4))
    monkeypatch.setattr(device, "MAX_BLOCKS_PER_PROGRAM", 3)
    monkeypatch.setattr(device, "MIN_PROGRAMS", 1)
    config = configure(norm, "interleaved, part", True, heads=4, kv_heads=2)
    positions = positions_of(tokens, 2, interpreted.device())
    for found, wanted in zip(results(kernel, config, positions, torch.float32, torch.float32), exact(config, positions), strict=True):
        assert error(found, wanted) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_in_16_bits_no_worse_than_the_parts(norm: str, dtype: torch.dtype) -> None:
    config = configure(norm, "xpos" if NORMS.index(norm) % 2 else "interleaved", dtype == torch.bfloat16)
    positions = positions_of(5, 2, interpreted.device())
    found = results(kernel, config, positions, dtype, torch.float32)
    parts = results(reference, config, positions, dtype, torch.float32)
    ulp = 2.0 ** {torch.bfloat16: -7, torch.float16: -10}[dtype]
    # The interpreter cuts bits off where a GPU rounds, which is twice as far off.
    slack = 2.5 if interpreted.INTERPRETED else 1.2
    for a, b, wanted in zip(found, parts, exact(config, positions), strict=True):
        assert a.dtype == b.dtype
        assert error(a, wanted) < slack * max(error(b, wanted), ulp / 5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_bias_is_exact(dtype: torch.dtype) -> None:
    """Its columns are powers of one rounded slope, and digits: bit for bit those of the part."""
    config = configure("rms", "rope", True)
    positions = positions_of(20, 1, interpreted.device())
    for found, wanted in zip(*(results(f, config, positions, dtype, torch.float32)[:2] for f in (kernel, reference)), strict=True):
        assert torch.equal(found[..., -4:], wanted[..., -4:])


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["rms", "l2_dim_scale"])
def test_vectors_of_zeros_and_tiny_ones(norm: str) -> None:
    """Nothing is divided by zero, forward or backward."""
    config = configure(norm, "rope", False)
    device = interpreted.device()
    parts = build(config, positions_of(4, 1, device), 3, torch.float32)
    q, k = (torch.zeros(1, 4, heads, 16, device=device) for heads in (3, 1))
    q[:, 1] = 1e-15
    q.requires_grad_(), k.requires_grad_()
    out = kernel(q, k, parts)
    wanted = reference(q, k, parts)
    gradients = [torch.ones_like(x) for x in out]
    for found, expected in zip(
        (*out, *torch.autograd.grad(out, (q, k), gradients)), (*wanted, *torch.autograd.grad(wanted, (q, k), gradients)), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.gpu
def test_what_is_registered_is_true() -> None:
    """PyTorch's own checks: schema, shapes without data, autograd, tracing."""
    config, device = configure("l2_dim_scale", "xpos", True), interpreted.device()
    parts = build(config, positions_of(3, 1, device), 3, torch.float32)
    _, q, k = project(config, 2, 3, torch.float32, device)
    tables, tails = [*parts.rotation.query, *parts.rotation.key], list(parts.bias.tails(SCALE, q.dtype))
    inputs = (q.detach().requires_grad_(), k.detach().requires_grad_(), *parts.norm.scales, tables, tails, "l2", "half")
    torch.library.opcheck(qk_preprocess._preprocess_qk_op, inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("rotary", ["none", "rope", "interleaved, part"])
@pytest.mark.parametrize("norm", ["none", "l2_head_scale", "l2_dim_scale"])
def test_a_joined_projection(norm: str, rotary: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, values and keys side by side, with columns at the end that nothing reads: all of it, and all its gradients."""
    monkeypatch.setattr(qk_preprocess, "is_supported", lambda q, k, form: q.dtype == torch.float32)
    config = configure(norm, rotary, True, heads=4, kv_heads=2)
    positions, sizes = positions_of(5, 2, interpreted.device()), qk_preprocess.QKVLayout(4, 2, 12, 6)
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(2, 5, 4 * 12 + 2 * 6 + 2 * 12 + 5, generator=generator)
    gradients = [torch.randn(2, 5, *shape, generator=generator) for shape in ((4, 16), (2, 16), (2, 6))]

    def outcome(dtype: torch.dtype) -> list[Tensor]:
        parts, whole = build(config, positions, 3, dtype), start.to(positions.device, dtype).requires_grad_()
        out = seam.preprocess_qkv(whole, sizes, seam.match(parts.norm.fused_spec(), parts.rotation.fused_spec()), *parts, SCALE)
        assert all(x.is_contiguous() for x in out)
        leaves = [whole, *parts.norm.parameters()]
        return [*out, *torch.autograd.grad(out, leaves, [g.to(x) for g, x in zip(gradients, out, strict=True)])]

    found, wanted = outcome(torch.float32), outcome(torch.float64)
    assert not found[3][..., -5:].any()
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b) < 1e-6


@pytest.mark.gpu
def test_what_is_registered_for_a_joined_projection_is_true() -> None:
    config, device = configure("l2_dim_scale", "xpos", True), interpreted.device()
    parts = build(config, positions_of(3, 1, device), 3, torch.float32)
    whole = torch.randn(2, 3, 64, device=device, requires_grad=True)
    tables, tails = [*parts.rotation.query, *parts.rotation.key], list(parts.bias.tails(SCALE, whole.dtype))
    torch.library.opcheck(qk_preprocess._preprocess_qkv_op, (whole, [3, 1, 12, 16], *parts.norm.scales, tables, tails, "l2", "half"))


@pytest.mark.gpu
@pytest.mark.parametrize("norm", ["none", "l2_dim_scale"])
def test_inside_torch_compile(norm: str) -> None:
    """One graph, with autocast around it as in training, and the same results."""
    config, positions = configure(norm, "xpos", True), positions_of(6, 2, interpreted.device())
    compiled = torch.compile(kernel, fullgraph=True, backend="aot_eager" if interpreted.INTERPRETED else "inductor")
    with torch.autocast(positions.device.type, torch.bfloat16):
        pairs = zip(*(results(f, config, positions, torch.bfloat16, torch.float32) for f in (compiled, kernel)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.gpu
def test_gradients_of_any_layout() -> None:
    """Attention kernels return gradients (B, T, H, D) that lie as (B, H, T, D), or with columns apart."""
    config, device = configure("l2_dim_scale", "interleaved", True), interpreted.device()
    parts = build(config, positions_of(5, 1, device), 3, torch.float32)
    whole, q, k = project(config, 2, 5, torch.float32, device)
    out = kernel(q, k, parts)
    gradients = [torch.randn_like(x) for x in out]
    (wanted,) = torch.autograd.grad(out, whole, gradients, retain_graph=True)
    for order in ((0, 2, 1, 3), (0, 1, 3, 2)):
        moved = [g.permute(order).contiguous().permute(order) for g in gradients]
        (found,) = torch.autograd.grad(out, whole, moved, retain_graph=True)
        assert torch.equal(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rotary", ["xpos", "interleaved", "xpos, part"])
def test_a_whole_layer_of_tokens_twice(rotary: str) -> None:
    """Many blocks, real widths: right, and the same bits in every run, learned scales included."""
    config = configure("l2_dim_scale", rotary, True, 128, 24, 2)
    positions = positions_of(50, 1, torch.device("cuda")).repeat(1, 60)
    first, second = (results(kernel, config, positions, torch.bfloat16, torch.float32) for _ in range(2))
    for a, b, wanted in zip(first, second, exact(config, positions), strict=True):
        assert torch.equal(a, b)
        assert error(a, wanted) < 3e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_model_takes_it_on_a_gpu_unless_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(qk_preprocess, "preprocess_qk", lambda q, k, form: (calls.append(q.dtype), (q, k))[1])
    config = configure("rms", "rope", False)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        parts = build(config, positions_of(4, 1, torch.device("cuda")), 0, torch.promote_types(dtype, torch.float32))
        _, q, k = project(config, 1, 4, dtype, torch.device("cuda"))
        seam.apply(q, k, *parts, SCALE)
    assert calls == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("norm", NORMS)
def test_a_cpu_has_the_parts(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qk_preprocess, "preprocess_qk", None)
    config = configure(norm, "xpos", True)
    parts = build(config, positions_of(4, 1, torch.device("cpu")), 0, torch.float32)
    _, q, k = project(config, 1, 4, torch.float32, torch.device("cpu"))
    for found, wanted in zip(seam.apply(q, k, *parts, SCALE), reference(q, k, parts), strict=True):
        assert torch.equal(found, wanted)


def test_under_the_interpreter() -> None:
    interpreted.run(__file__)
