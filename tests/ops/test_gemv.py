"""Matrix-vector multiplication for a few rows against the model's own parts in float64: norms, token shift, biases, activations, caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.model.feedforward.dense import ACTIVATIONS
from andromeda.ops import gemv
from tests.ops import interpreted

EPS = 1e-5


def normed(x: Tensor, kind: str, gain: Tensor | None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], gain, None, EPS) if kind == "layer" else F.rms_norm(x, x.shape[-1:], gain, EPS)


def shifted(x: Tensor, past: Tensor, same: Tensor) -> Tensor:
    """x (M, K), past (M, J, K), same (M, J): whether the row so many tokens before is of the same document, the nearest first."""
    size, moved = x.shape[1] // (past.shape[1] + 1), x.clone()
    for distance in range(1, past.shape[1] + 1):
        group = slice(distance * size, (distance + 1) * size)
        moved[:, group] = past[:, -distance, group] * same[:, distance - 1, None]
    return moved


def numbers(M: int, S: int, device: torch.device) -> Tensor:
    """Row m's newest document begins m tokens before the last key."""
    return torch.stack([(torch.arange(S) >= S - 1 - m).long() + 3 for m in range(M)]).to(device)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Rounded once, after sums in float32 of up to some thousand numbers of about one; Triton's interpreter cuts off instead."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7 if interpreted.INTERPRETED else 2.0**-8}[dtype]
    torch.testing.assert_close(found.double().cpu(), expected.cpu(), rtol=tolerance, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 3, 8])
@pytest.mark.parametrize(("N", "K"), [(5, 7), (70, 256), (9, 1100), (2, 2560), (3, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_product(M: int, N: int, K: int, dtype: torch.dtype) -> None:
    device = interpreted.device()
    g = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (torch.randn(*shape, generator=g).to(device, dtype) for shape in ((M, K), (N, K), (N,), (M, N)))
    y, keep = gemv.gemv(x, weight, bias, residual=residual)
    assert keep is None
    assert y.dtype == dtype
    close(y, F.linear(x.double(), weight.double(), bias.double()) + residual.double(), dtype)
    close(gemv.gemv(x, weight)[0], F.linear(x.double(), weight.double()), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    g, device = torch.Generator().manual_seed(1), interpreted.device()
    x, weight, bias = (torch.randn(*shape, generator=g).to(device) for shape in ((2, 40), (33, 40), (33,)))
    y, _ = gemv.gemv(x, weight / 6, bias, activation=name)
    close(y, ACTIVATIONS[name](F.linear(x.double(), weight.double() / 6, bias.double())), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("gained", [True, False])
@pytest.mark.parametrize("K", [50, 1100])
def test_norm(M: int, kind: str, gained: bool, K: int) -> None:
    """Of rows with a large mean, which a norm by sums of squares would lose."""
    g, device = torch.Generator().manual_seed(2), interpreted.device()
    x, weight, gain = (torch.randn(*shape, generator=g).to(device) for shape in ((M, K), (6, K), (K,)))
    x += 30
    y, _ = gemv.gemv(x, weight, norm=gemv.GemvNorm(kind, EPS, gain if gained else None))
    expected = F.linear(normed(x.double(), kind, gain.double() if gained else None), weight.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 2, 3])
@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("placed", [True, False])
def test_shift_and_what_is_kept_of_it(M: int, tokens: int, numbered: bool, placed: bool) -> None:
    """Before the next matmul the past is as it was or moved on already; after it, it is moved on."""
    K, S, device = 51, 9, interpreted.device()
    g = torch.Generator().manual_seed(3)
    x, weight, gain, past = (torch.randn(*shape, generator=g).to(device) for shape in ((M, K), (6, K), (K,), (M, tokens, K)))
    before = past.clone()
    keys = numbers(M, S, device)
    index = None
    if placed:  # Room behind the token.
        keys, index = F.pad(keys, (0, 4), value=-1), torch.tensor(S - 1, device=device)
    documents = (keys[:, S - 1 : S].clone(), keys) if numbered else None
    shift = gemv.GemvTokenShift(past, documents, index)
    y, keep = gemv.gemv(x, weight, norm=gemv.GemvNorm("layer", EPS, gain), shift=shift)
    row = normed(x.double(), "layer", gain.double())
    same = torch.stack([keys[:, S - 1 - d] == keys[:, S - 1] for d in range(1, tokens + 1)], 1)
    same = same if numbered else torch.ones_like(same)
    torch.testing.assert_close(y.double(), F.linear(shifted(row, before.double(), same), weight.double()), rtol=1e-4, atol=1e-4)
    following = torch.randn(4, 30, generator=g).to(device)
    gemv.gemv(torch.ones(M, 30, device=device), following, pending=keep)
    torch.testing.assert_close(past.double(), torch.cat([before.double(), row[:, None]], 1)[:, 1:], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 4])
def test_some_outputs_go_into_a_cache_as_well(M: int) -> None:
    g, device = torch.Generator().manual_seed(4), interpreted.device()
    x, weight, cache = (torch.randn(*shape, generator=g).to(device) for shape in ((M, 40), (19, 40), (M, 5, 2, 3)))
    before = cache.clone()
    y, _ = gemv.gemv(x, weight, slot=gemv.CacheSlot(cache, torch.tensor(3, device=device), 7))
    expected = F.linear(x.double(), weight.double())
    close(y, expected, torch.float32)
    close(cache[:, 3].flatten(1), expected[:, 7:13], torch.float32)
    others = [0, 1, 2, 4]
    assert torch.equal(cache[:, others], before[:, others])


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [(1, 1, 1), (2, 2, 1), (4, 4, 2), (1, 2, 9)])
def test_every_cut_gives_the_same(cut: tuple[int, int, int]) -> None:
    from andromeda.ops.triton import gemv as kernels

    device = interpreted.device()
    g = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(*shape, generator=g).to(device) for shape in ((2, 1000), (11, 1000)))
    y = x.new_empty(2, 11)
    kernels.gemv(kernels.GemvInput(x), weight, y, config=kernels.GemvLaunchConfig(*cut))
    close(y, F.linear(x.double(), weight.double()), torch.float32)


@pytest.mark.gpu
def test_operators_keep_their_contract() -> None:
    """Shapes, mutations and aliases are those that a compiler is told."""
    device = interpreted.device()
    x, weight, past, cache = (torch.randn(*shape, device=device) for shape in ((1, 16), (12, 16), (1, 1, 16), (1, 3, 1, 4)))
    index, nothing = torch.tensor(1, device=device), [None] * 3
    given: tuple[Any, ...] = (x, weight, *nothing, past, *nothing, None, None, cache, index, 8, "layer", EPS, "gelu")
    torch.library.opcheck(torch.ops.andromeda.gemv.default, given)
    kept: tuple[Any, ...] = (x, weight, *nothing, None, *nothing, past, x.clone(), None, None, 0, "none", 0.0, "none")
    torch.library.opcheck(torch.ops.andromeda.gemv.default, kept)
    torch.library.opcheck(torch.ops.andromeda.gemv_normalize.default, (x, None, past, *nothing, "rms", EPS))


def test_what_the_kernels_cannot_compute_is_refused() -> None:
    assert "GPU" in (gemv.unsupported_reason(torch.ones(1, 4), torch.ones(3, 4)) or "")


def test_under_the_interpreter() -> None:
    interpreted.run(__file__)
