"""Positions against closed forms: ALiBi's slopes, its folded form, xPos's decay and range, frequency scaling."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.config.model import MAX_LENGTH, AlibiConfig, AttentionConfig, ModelConfig, RopeScalingConfig, RotaryConfig
from andromeda.model.position import build_alibi, build_rotary
from andromeda.model.position.alibi import slopes
from andromeda.model.position.rotary import RoPE as RotaryPart
from andromeda.ops.attention import AttentionSpec
from andromeda.ops.attention.eager import attend as eager

CPU = torch.device("cpu")


def config(context: int = 4096, head_dim: int = 128, alibi: AlibiConfig | None = None, **rotary: Any) -> ModelConfig:
    attention = AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=head_dim)
    return ModelConfig(max_seq_len=context, attention=attention, rotary=RotaryConfig(**rotary), alibi=alibi or AlibiConfig())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def turned(c: ModelConfig, q: Tensor, k: Tensor, queries: list[int], keys: list[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Dot products (n,) of q (n, D) at the given positions and k (n, D) at theirs, after their rotation in `dtype`."""
    part = build_rotary(c)
    span = max(queries + keys) + 1
    q_turned, _ = part(torch.tensor([queries]), span, dtype)(q[None, :, None].to(dtype), k[None, :, None].to(dtype))
    _, k_turned = part(torch.tensor([keys]), span, dtype)(q[None, :, None].to(dtype), k[None, :, None].to(dtype))
    return (q_turned * k_turned).sum(-1).flatten()


# --- ALiBi ---

HALVES = [2.0**-n for n in range(1, 9)]
TWELVE = [*HALVES, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
TWENTY_FOUR = [
    *(2 ** (-n / 2) for n in range(1, 17)),
    *(0.8408964152537145, 0.5946035575013605, 0.42044820762685725, 0.29730177875068026),
    *(0.21022410381342863, 0.14865088937534013, 0.10511205190671431, 0.07432544468767006),
]


@pytest.mark.parametrize(("heads", "expected"), [(1, [2**-8]), (8, HALVES), (12, TWELVE), (24, TWENTY_FOUR)])
def test_slopes_are_those_of_the_paper(heads: int, expected: list[float]) -> None:
    assert slopes(heads).tolist() == pytest.approx(expected, rel=1e-15)


def test_slopes_of_powers_of_two_are_exact() -> None:
    assert slopes(8).tolist() == HALVES


def test_only_the_first_heads_are_biased_and_stretching_divides() -> None:
    c = ModelConfig(attention=AttentionConfig(num_heads=24, num_kv_heads=1), alibi=AlibiConfig(num_heads=12, scale=4.0))
    found = build_alibi(c)(0, 1, CPU).slopes
    assert found is not None
    assert found.tolist() == pytest.approx([slope / 4 for slope in TWELVE] + [0.0] * 12, rel=1e-15)


def folded(c: ModelConfig, q: Tensor, k: Tensor, scale: float, start: int = 0) -> tuple[Tensor, Tensor]:
    return build_alibi(c)(start, k.shape[1], CPU).fold(q, k, scale)


def test_folded_alibi_is_the_bias_up_to_262144_positions() -> None:
    c, S, T, scale = config(head_dim=12, alibi=AlibiConfig(num_heads=3, fold_into_qk=True)), 262144, 3, 0.3
    q, k, v = normal(1, T, 4, 8), normal(1, S, 1, 8, seed=1), normal(1, S, 1, 6, seed=2)
    q_folded, _ = folded(c, q, k[:, :T], scale)
    _, k_folded = folded(c, q, k, scale)
    bias = build_alibi(c.model_copy(update={"alibi": AlibiConfig(num_heads=3)}))(0, S, CPU).slopes
    plain, biased = eager(q_folded, k_folded, v, AttentionSpec(scale)), eager(q, k, v, AttentionSpec(scale, slopes=bias))
    torch.testing.assert_close(plain, biased, rtol=1e-9, atol=1e-9)


def test_folded_keys_of_a_later_pass_have_later_digits() -> None:
    c = config(head_dim=12, alibi=AlibiConfig(num_heads=3, fold_into_qk=True))
    _, k = folded(c, normal(1, 3, 4, 8), normal(1, 3, 1, 8), 1.0, start=3 * 65536 + 2 * 256 + 254)
    assert k[0, :, 0, 8:].tolist() == [[3, 2, 254, 0], [3, 2, 255, 0], [3, 3, 0, 0]]


def test_folded_alibi_in_bfloat16_is_within_the_kernels_own_error() -> None:
    """Error against float64 of a plain bf16 kernel on folded operands, compared with that of bf16 operands with a float32 bias."""
    c, S, T, D = config(head_dim=64, alibi=AlibiConfig(num_heads=4, fold_into_qk=True)), 20000, 32, 60
    scale = D**-0.5
    q, k, v = (x.bfloat16() for x in (normal(1, T, 4, D), normal(1, S, 1, D, seed=1), normal(1, S, 1, 64, seed=2)))
    seen = (slopes(4) / scale).bfloat16().double() * scale
    assert ((seen - slopes(4)) / slopes(4)).abs().max() < 2**-8
    exact = eager(q.double(), k.double(), v.double(), AttentionSpec(scale, slopes=seen))
    biased = eager(q, k, v, AttentionSpec(scale, slopes=seen))
    q_folded, _ = folded(c, q, k[:, :T], scale)
    _, k_folded = folded(c, q, k, scale)
    assert q_folded.dtype == k_folded.dtype == torch.bfloat16
    assert k_folded[0, :, 0, D:].double() @ torch.tensor([65536.0, 256.0, 1.0, 0.0], dtype=torch.float64) == pytest.approx(range(S))
    mask = AttentionSpec(scale).mask(T, S, CPU)
    plain = F.scaled_dot_product_attention(
        q_folded.transpose(1, 2), k_folded.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale, enable_gqa=True
    ).transpose(1, 2)
    errors = [float((x.double() - exact).norm() / exact.norm()) for x in (plain, biased)]
    assert errors[0] < 2 * errors[1]
    assert errors[0] < 4e-3


# --- xPos ---


def amplitude(c: ModelConfig, pair: int, distance: int) -> float:
    """What is left of a pair's share of the logit at a distance: the root of both quadratures' squares."""
    D = c.attention.head_dim
    one, other = torch.zeros(1, D, dtype=torch.float64), torch.zeros(1, D, dtype=torch.float64)
    one[0, pair] = other[0, pair + D // 2] = 1.0
    return math.hypot(*(float(turned(c, one, k, [distance], [0])[0]) for k in (one, other)))


RETENTION = {
    512: (0.286, 0.643, 0.989, 0.637),
    2048: (0.0067, 0.171, 0.956, 0.272),
    4096: (4e-5, 0.029, 0.914, 0.148),
    8192: (2e-9, 8.5e-4, 0.836, 0.075),
    16384: (4e-18, 7e-7, 0.698, 0.035),
}
"""zeta^(distance / 512) for D = 128: pairs 0, 32 and 63, and the mean of all."""


@pytest.mark.parametrize("distance", RETENTION)
def test_xpos_keeps_what_the_formula_says(distance: int) -> None:
    c = config(context=16384)
    kept = [amplitude(c, pair, distance) for pair in range(64)]
    found = (kept[0], kept[32], kept[63], sum(kept) / 64)
    for value, expected in zip(found, RETENTION[distance], strict=True):
        assert value == pytest.approx(expected, rel=0.15 if expected < 1e-4 else 0.03)
    zeta = [(2 * i / 128 + 0.4) / 1.4 for i in range(64)]
    assert kept == pytest.approx([z ** (distance / 512) for z in zeta], rel=1e-9)


def test_xpos_depends_on_the_distance_alone_and_not_on_the_center() -> None:
    q, k = normal(3, 128), normal(3, 128, seed=1)
    keys = [0, 40, 99]
    first = turned(config(), q, k, [100] * 3, keys)
    moved = turned(config(), q, k, [2600] * 3, [key + 2500 for key in keys])
    other_center = turned(config(context=1000), q, k, [100] * 3, keys)
    for found in (moved, other_center):
        torch.testing.assert_close(found, first, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("base", [10**6, MAX_LENGTH])
def test_xpos_with_a_long_base_is_rope_but_for_what_decays_on_the_way(base: int) -> None:
    """The fastest pair keeps zeta^(distance / base) with zeta = 0.4 / 1.4, all others more."""
    q, k = normal(3, 128), normal(3, 128, seed=1)
    places = ([1000, 500, 3], [10, 499, 0])
    lost = 1.0 - (0.4 / 1.4) ** ((torch.tensor(places[0]) - torch.tensor(places[1])) / base).double()
    for layout in ("half", "interleaved"):
        far = turned(config(scale_base=base, layout=layout), q, k, *places)
        rope = turned(config(kind="rope", layout=layout), q, k, *places)
        assert ((far - rope).abs() <= lost * q.norm(dim=-1) * k.norm(dim=-1) + 1e-12).all()


def test_heads_with_alibi_can_stay_unturned_while_the_others_turn_as_ever() -> None:
    attention = AttentionConfig(num_heads=6, num_kv_heads=3, head_dim=16)
    whole = ModelConfig(max_seq_len=64, attention=attention, rotary=RotaryConfig(kind="xpos"), alibi=AlibiConfig(num_heads=2))
    shared = ModelConfig(
        max_seq_len=64, attention=attention, rotary=RotaryConfig(kind="xpos", heads="non_alibi"), alibi=AlibiConfig(num_heads=2)
    )
    q, k, places = normal(1, 9, 6, 16), normal(1, 9, 3, 16, seed=1), torch.arange(9)[None]
    every_q, every_k = build_rotary(whole)(places, 9, torch.float64)(q, k)
    some_q, some_k = build_rotary(shared)(places, 9, torch.float64)(q, k)
    assert some_q[:, :, :2].equal(q[:, :, :2])
    assert some_k[:, :, :1].equal(k[:, :, :1])  # the key head that query heads 0 and 1 read
    assert some_q[:, :, 2:].equal(every_q[:, :, 2:])
    assert some_k[:, :, 1:].equal(every_k[:, :, 1:])


def test_a_share_of_the_heads_can_turn_as_ever_while_the_others_do_not() -> None:
    """A third of three key heads: the last one, and the last two of six query heads, which read it."""
    attention = AttentionConfig(num_heads=6, num_kv_heads=3, head_dim=16)
    whole = ModelConfig(max_seq_len=64, attention=attention, rotary=RotaryConfig(kind="rope"))
    third = ModelConfig(max_seq_len=64, attention=attention, rotary=RotaryConfig(kind="rope", head_fraction=0.333))
    q, k, places = normal(1, 9, 6, 16), normal(1, 9, 3, 16, seed=1), torch.arange(9)[None]
    every_q, every_k = build_rotary(whole)(places, 9, torch.float64)(q, k)
    some_q, some_k = build_rotary(third)(places, 9, torch.float64)(q, k)
    assert some_q[:, :, :4].equal(q[:, :, :4])
    assert some_k[:, :, :2].equal(k[:, :, :2])
    assert some_q[:, :, 4:].equal(every_q[:, :, 4:])
    assert some_k[:, :, 2:].equal(every_k[:, :, 2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_xpos_is_right_at_200000_tokens_with_a_base_of_a_quarter(dtype: torch.dtype) -> None:
    """Near pairs at the end of the context, with operands in `dtype`, against float64 at its start."""
    c = config(context=200_000, scale_base=50_000)
    q, k = normal(50, 128).to(dtype), normal(50, 128, seed=1).to(dtype)
    distances = list(range(50))
    near = turned(c, q.double(), k.double(), distances, [0] * 50)
    part = build_rotary(c)
    end = torch.tensor([[199_999 - 49 + d for d in distances]]), torch.tensor([[199_999 - 49] * 50])
    found_q, _ = part(end[0], 200_000, torch.float32)(q[None, :, None], k[None, :, None])
    _, found_k = part(end[1], 200_000, torch.float32)(q[None, :, None], k[None, :, None])
    assert found_q.dtype == dtype
    assert found_q.isfinite().all()
    assert found_k.isfinite().all()
    error = (found_q.double() * found_k.double()).sum(-1).flatten() - near
    assert error.norm() / near.norm() < (1e-6 if dtype == torch.float32 else 5e-3)


def test_xpos_factors_stay_below_12_3_with_a_base_of_a_quarter() -> None:
    c = config(context=200_000, scale_base=50_000)
    table = build_rotary(c)(torch.tensor([[0, 100_000, 199_999]]), 200_000, torch.float64)
    largest = max(float(torch.hypot(*side).max()) for side in (table.query, table.key))
    assert largest == pytest.approx((1.4 / 0.4) ** 2, rel=1e-3)


# --- frequency scaling ---


def scaled(kind: str, span: int = 64, dim: int = 64, **scaling: Any) -> Tensor:
    c = config(context=4096, head_dim=dim, kind="rope", scaling=RopeScalingConfig(kind=kind, **scaling))
    part = build_rotary(c)
    assert isinstance(part, RotaryPart)
    return part.scaled(span, CPU).inverse


PLAIN = torch.tensor([10000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["none", "linear", "ntk", "dynamic", "yarn"])
def test_a_factor_of_one_changes_nothing(kind: str) -> None:
    torch.testing.assert_close(scaled(kind, factor=1.0), PLAIN, rtol=1e-14, atol=0)


def test_ntk_stretches_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all() -> None:
    ratio = PLAIN / scaled("ntk", factor=8.0)
    assert ratio[[0, -1]].tolist() == pytest.approx([1.0, 8.0], rel=1e-12)
    assert (ratio.diff() > 0).all()


def test_dynamic_scaling_begins_beyond_the_original_context() -> None:
    short, long = (scaled("dynamic", span=span, factor=4.0, original_max_seq_len=1024) for span in (1024, 2048))
    torch.testing.assert_close(short, PLAIN, rtol=1e-14, atol=0)
    # factor x length / original - (factor - 1) = 4 x 2 - 3
    torch.testing.assert_close(long, scaled("ntk", factor=5.0), rtol=1e-12, atol=0)


def test_yarn_over_rotations_is_the_papers_formula() -> None:
    found = scaled("yarn", factor=8.0, original_max_seq_len=2048, ramp="rotations")
    for inverse, plain in zip(found.tolist(), PLAIN.tolist(), strict=True):
        rotations = 2048 * plain / (2 * math.pi)
        gamma = min(max((rotations - 1) / (32 - 1), 0.0), 1.0)
        assert inverse == pytest.approx((1 - gamma) * plain / 8 + gamma * plain, rel=1e-12)


def test_yarn_sharpens_the_logits_once() -> None:
    assert build_rotary(config(kind="rope", scaling=RopeScalingConfig(kind="yarn", factor=16.0))).logit_factor == pytest.approx(
        (0.1 * math.log(16) + 1) ** 2
    )


@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic", "yarn"])
def test_interpolation_stretches_the_decay_of_xpos(kind: str) -> None:
    c = config(context=4096, scaling=RopeScalingConfig(kind=kind, factor=4.0, original_max_seq_len=1024))
    factor = 4.0 * 4096 / 1024 - 3 if kind == "dynamic" else 4.0
    q = torch.zeros(1, 128, dtype=torch.float64)
    q[0, 0] = q[0, 64] = 1.0
    part = build_rotary(c)
    query = part(torch.tensor([[4095]]), 4096, torch.float64).query
    zeta = torch.tensor([(2 * i / 128 + 0.4) / 1.4 for i in range(64)], dtype=torch.float64)
    expected = zeta ** ((4095 - 2048) / (512 * factor))
    torch.testing.assert_close(torch.hypot(*query).flatten(), expected, rtol=1e-10, atol=0)


def test_dynamic_scaling_leaves_xpos_alone_within_the_original_context() -> None:
    scaling = RopeScalingConfig(kind="dynamic", factor=4.0, original_max_seq_len=1024)
    q, k = normal(2, 128), normal(2, 128, seed=1)
    assert torch.equal(turned(config(scaling=scaling), q, k, [900, 30], [5, 29]), turned(config(), q, k, [900, 30], [5, 29]))
