"""Sum, norm, token shift and 8 bits in one kernel, compared with the same in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.ops import float8_inference
from andromeda.ops.add_norm_shift import AddNormShiftOutput, add_norm_shift
from tests.ops import interpreted

EPS = 1e-5
DTYPE = torch.float32 if interpreted.INTERPRETED else torch.bfloat16
"""Triton's interpreter cuts numbers off where they are rounded to 16 bits."""


def inputs(T: int, C: int) -> list[Tensor]:
    """x, delta, weight, bias and past."""
    g = torch.Generator().manual_seed(T * C)
    shapes = ((2, T, C), (2, T, C), (C,), (C,), (2, 1, C))
    return [torch.randn(shape, generator=g).to(interpreted.device(), DTYPE) for shape in shapes]


def reference(x: Tensor, weight: Tensor | None, past: Tensor, layer: bool, moved: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """y and the normalized last vector in float64."""
    x, w = x.double(), None if weight is None else weight.double()
    normal = F.layer_norm(x, x.shape[-1:], w, None, EPS) if layer else F.rms_norm(x, x.shape[-1:], w, EPS)
    before = torch.cat([past.double(), normal], 1)[:, :-1]
    y = normal.clone()
    y[..., slice(*moved)] = before[..., slice(*moved)]
    return y, normal[:, -1:]


def close(actual: Tensor, wanted: Tensor, bits: int = 8) -> bool:
    return bool(((actual.double() - wanted.double()).abs() <= 2.0**-bits * wanted.double().abs() + 1e-4).all())


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize(("T", "C", "moved"), [(1, 64, (32, 64)), (19, 96, (48, 96)), (8, 40, (20, 33)), (17, 64, (0, 0))])
def test_sum_norm_and_shift(T: int, C: int, moved: tuple[int, int], layer: bool) -> None:
    x, delta, weight, bias, past = inputs(T, C)
    made = add_norm_shift(x, delta, weight, bias, past if moved[1] else None, layer_norm=layer, eps=EPS, shift_channels=moved)
    summed = (x.double() + delta.double()).to(DTYPE)
    y, last = reference(summed, weight, past, layer, moved)
    assert close(made.y, y)
    assert close(made.residual, x.double() + delta.double() + bias.double())
    assert close(made.last, last) if moved[1] else not made.last.numel()
    assert not made.scale.numel()


@pytest.mark.gpu
def test_nothing_is_added_and_no_gain() -> None:
    x, _, _, _, past = inputs(13, 48)
    made = add_norm_shift(x, None, None, None, past, layer_norm=False, eps=EPS, shift_channels=(24, 48))
    assert close(made.y, reference(x, None, past, False, (24, 48))[0])
    assert made.residual is x


@pytest.mark.gpu
def test_eight_bits_are_those_of_the_shifted_rows() -> None:
    x, delta, weight, _, past = inputs(11, 64)
    plain = add_norm_shift(x, delta, weight, None, past, layer_norm=True, eps=EPS, shift_channels=(32, 64))
    eight = add_norm_shift(x, delta, weight, None, past, layer_norm=True, eps=EPS, shift_channels=(32, 64), fp8=True)
    rows, scale = float8_inference.quantize(plain.y.flatten(0, 1))
    assert torch.equal(eight.scale, scale)
    assert torch.equal(eight.residual, plain.residual)
    if not interpreted.INTERPRETED:  # whose rounding to 8 bits loses carries
        assert torch.equal(eight.y.flatten(0, 1).view(torch.uint8), rows.view(torch.uint8))


@pytest.mark.gpu
def test_a_sequence_in_two_passes_is_that_in_one() -> None:
    x, _, weight, _, past = inputs(20, 64)

    def read(x: Tensor, past: Tensor) -> AddNormShiftOutput:
        return add_norm_shift(x, None, weight, None, past, layer_norm=True, eps=EPS, shift_channels=(32, 64))

    whole, first = read(x, past), read(x[:, :9].contiguous(), past)
    second = read(x[:, 9:].contiguous(), first.last)
    assert torch.equal(torch.cat([first.y, second.y], 1), whole.y)
    assert torch.equal(second.last, whole.last)


def shifted(x: Tensor, weight: Tensor, documents: Tensor | None, layer: bool, moved: tuple[int, int]) -> Tensor:
    """y of packed documents in float64, with zeros before the first token."""
    C = x.shape[-1]
    normal = F.layer_norm(x, (C,), weight, None, EPS) if layer else F.rms_norm(x, (C,), weight, EPS)
    before = F.pad(normal, (0, 0, 1, 0))[:, :-1]
    if documents is not None:
        before = before * (F.pad(documents, (1, 0))[:, :-1] == documents)[..., None]
    return torch.cat([normal[..., : moved[0]], before[..., slice(*moved)], normal[..., moved[1] :]], -1)


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize(("T", "C", "moved", "packed"), [(70, 64, (32, 64), True), (33, 96, (48, 96), False), (5, 40, (0, 0), False)])
def test_gradients(T: int, C: int, moved: tuple[int, int], packed: bool, layer: bool) -> None:
    """Of both results of the sum, compared with autograd in float64; documents of three tokens and more."""
    x, delta, weight, _, past = inputs(T, C)
    past = torch.zeros_like(past)
    documents = (torch.arange(T, device=x.device) // 3).clamp(max=9).expand(2, -1).contiguous() if packed else None
    leaves = [t.requires_grad_() for t in (x, delta, weight)]
    made = add_norm_shift(*leaves, None, past if moved[1] else None, documents, layer_norm=layer, eps=EPS, shift_channels=moved)
    g = torch.Generator().manual_seed(7)
    dy, dtotal = (torch.randn(2, T, C, generator=g).to(x) for _ in range(2))
    grads = torch.autograd.grad((made.y, made.residual), leaves, (dy, dtotal))
    exact = [t.detach().double().requires_grad_() for t in leaves]
    summed = exact[0] + exact[1]
    # As rounded as the kernel had it.
    summed = summed + ((summed.to(DTYPE).double() - summed).detach())
    y = shifted(summed, exact[2], documents, layer, moved)
    assert close(made.y, y)
    wanted = torch.autograd.grad((y, summed), exact, (dy.double(), dtotal.double()))
    for actual, right in zip(grads, wanted, strict=True):
        assert (actual.double() - right).norm() / right.norm() < 2.0**-8


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_of_x_where_nothing_is_added(compiled: bool) -> None:
    """Those of the norm and of whoever reads x besides, from one pass; in a compiler's graph too."""
    x, _, weight, _, past = inputs(9, 64)
    past, moved, leaves = torch.zeros_like(past), (32, 64), [t.requires_grad_() for t in (x, weight)]

    def read(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        made = add_norm_shift(x, None, weight, None, past, layer_norm=True, eps=EPS, shift_channels=moved)
        return made.y, made.residual * 2

    function = torch.compile(read, fullgraph=True, backend="aot_eager" if interpreted.INTERPRETED else "inductor") if compiled else read
    g = torch.Generator().manual_seed(7)
    gradients = [torch.randn(x.shape, generator=g).to(x) for _ in range(2)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = (shifted(exact[0], exact[1], None, True, moved), exact[0] * 2)
    found = function(*leaves)
    for actual, right in zip(found, wanted, strict=True):
        assert close(actual, right)
    pairs = zip(
        torch.autograd.grad(found, leaves, gradients), torch.autograd.grad(wanted, exact, [d.double() for d in gradients]), strict=True
    )
    for actual, right in pairs:
        assert (actual.double() - right).norm() / right.norm() < 2.0**-8


def test_under_the_interpreter() -> None:
    interpreted.run(__file__)
