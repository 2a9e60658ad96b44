"""How FlashAttention-4 is called, against a stand-in for its library that computes the library's documented contract.

The stand-in knows only sequences, windows to the left and masks aligned to the last key, as the library does. The real
kernels are compared with the reference on a GPU, in test_attention.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from andromeda.ops.attention import AttentionSpec, eager, fa4
from andromeda.utils.errors import DataError


def sequence(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, window_size: tuple[int | None, int | None], softcap: float) -> Tensor:
    """One sequence, q (T, H, D), k (S, G, D) -> (T, H, Dv): keys from `left` before to `right` after each query, aligned at the end."""
    left, right = window_size
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = torch.einsum("thd,shd->hts", q, k) * softmax_scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    offset = torch.arange(k.shape[0]) - (torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0])
    hidden = (offset > (0 if right is None else right)) | (offset < -(len(k) if left is None else left))
    return torch.einsum("hts,shd->thd", logits.masked_fill(hidden, float("-inf")).softmax(-1), v)


class Library:
    """The functions that are used, and how often documents were measured."""

    def __init__(self) -> None:
        self.bounds: list[list[int]] = []

    def flash_attn_func(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, return_lse: bool, **options: Any) -> tuple[Tensor, Tensor]:
        assert causal
        assert return_lse
        B, T, H, _ = q.shape
        return torch.stack([sequence(*row, **options) for row in zip(q, k, v, strict=True)]), q.new_zeros(B, H, T, dtype=torch.float32)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        return_lse: bool,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        self.bounds.append(cu_seqlens_q.tolist())
        lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert max_seqlen_q >= max(lengths_q)
        assert max_seqlen_k >= max(lengths_k)
        rows = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
        return torch.cat([sequence(*row, **options) for row in rows]), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32)

    def _flash_attn_bwd(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        *,
        window_size_left: int | None,
        window_size_right: int | None,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        function = self.flash_attn_varlen_func if "cu_seqlens_q" in options else self.flash_attn_func

        def differentiate() -> tuple[Tensor, ...]:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            again, _ = function(*leaves, return_lse=True, window_size=(window_size_left, window_size_right), **options)
            assert torch.equal(again, out)
            return torch.autograd.grad(again, leaves, dout)

        # Inside an operator autograd is off; another thread knows nothing of that.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(differentiate).result()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    stand_in = Library()
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
        module = ModuleType(name)
        for function in ("flash_attn_func", "flash_attn_varlen_func", "_flash_attn_bwd"):
            setattr(module, function, getattr(stand_in, function))
        monkeypatch.setitem(sys.modules, name, module)
    return stand_in


NUMBERS = torch.tensor([[0, 0, 0, 1, 1, 3, 3], [4, 4, 4, 4, 4, 4, 4]])
BOUNDS = [0, 3, 5, 7, 14]


def call(T: int = 7, S: int = 7) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, n, heads, D, generator=g, dtype=torch.float64).requires_grad_() for n, heads, D in ((T, 4, 8), (S, 2, 8), (S, 2, 16))
    ]


def check(attend: Callable[..., Tensor], pattern: AttentionSpec, T: int) -> None:
    """Output and gradients equal the reference's."""
    leaves = call(T)
    out, expected = attend(*leaves, pattern), eager.attend(*leaves, pattern)
    torch.testing.assert_close(out, expected)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    for ours, theirs in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(("T", "documents"), [(7, None), (3, None), (1, None), (7, (NUMBERS, NUMBERS))])
def test_forward_and_backward(library: Library, window: int, softcap: float, T: int, documents: tuple[Tensor, Tensor] | None) -> None:
    check(fa4.attend, AttentionSpec(0.3, window, documents, None, softcap), T)


@pytest.mark.parametrize("documents", [None, (NUMBERS, NUMBERS)])
def test_compiled_whole(library: Library, documents: tuple[Tensor, Tensor] | None) -> None:
    torch._dynamo.reset()
    check(torch.compile(fa4.attend, fullgraph=True, backend="aot_eager"), AttentionSpec(0.3, 3, documents), 7)


def test_document_bounds_are_found_once_for_all_layers(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    boundaries = fa4._cu_seqlens
    monkeypatch.setattr(fa4, "_cu_seqlens", lambda numbers: made.append(numbers) or boundaries(numbers))
    numbers = NUMBERS.clone()
    out = sum(fa4.attend(*call(), AttentionSpec(0.3, documents=(numbers, numbers))) for _ in range(3))
    out.sum().backward()
    assert library.bounds == [BOUNDS] * 6
    assert len(made) == 1


def test_bounds_found_on_the_host_are_those_of_the_device(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = NUMBERS.clone()
    fa4.cache_document_bounds(numbers, NUMBERS)
    monkeypatch.setattr(fa4, "_cu_seqlens", lambda numbers: pytest.fail("the bounds are known"))
    check(fa4.attend, AttentionSpec(0.3, documents=(numbers, numbers)), 7)
    assert library.bounds == [BOUNDS] * 2
    with pytest.raises(pytest.fail.Exception):
        fa4.attend(*call(), AttentionSpec(0.3, documents=(NUMBERS.clone(),) * 2))


def test_the_first_document_of_a_row_never_joins_the_last_of_the_row_before(library: Library) -> None:
    numbers = torch.zeros(2, 7, dtype=torch.int32)
    fa4.attend(*call(), AttentionSpec(0.3, documents=(numbers, numbers)))
    assert library.bounds == [[0, 7, 14]]


def test_numbers_that_fall_are_an_error_not_another_mask(library: Library) -> None:
    numbers = torch.tensor([[0, 1, 1, 0, 0, 2, 2]] * 2)
    message = r"Document numbers decrease along a sequence.*: number documents in increasing order, or set attention.backend to flex"
    with pytest.raises(DataError, match=message):
        fa4.attend(*call(), AttentionSpec(0.3, documents=(numbers, numbers)))


@pytest.mark.parametrize("documents", [False, True])
def test_the_operator_tells_the_compiler_its_true_shapes(library: Library, documents: bool) -> None:
    q, k, v = (x.detach() for x in call())
    arguments = (q, k, v, NUMBERS if documents else None, 0.3, 3, 0.0)
    torch.library.opcheck(torch.ops.andromeda.fa4.default, arguments, test_utils=("test_schema", "test_faketensor"))
