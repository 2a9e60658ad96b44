"""Block masks against PyTorch's own, which looks at every pair; strips of masks and what is remembered between layers."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from andromeda.ops.attention import AttentionSpec, decode, eager, flex, sdpa
from andromeda.ops.attention.block_mask import BLOCK, block_mask, classify_blocks
from andromeda.ops.attention.tensor_cache import TensorCache

CPU = torch.device("cpu")


def numbers(B: int, S: int, density: float, seed: int) -> Tensor:
    """Document numbers (B, S)."""
    return (torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < density).cumsum(1)


@settings(max_examples=100, deadline=None)
@given(
    T=st.integers(1, 500),
    past=st.integers(0, 300),
    window=st.sampled_from([0, 0, 0, 1, 100, 129, 400]),
    density=st.sampled_from([None, 0.0, 0.005, 0.01, 0.3]),
    seed=st.integers(0, 99),
)
def test_block_masks_equal_those_that_look_at_every_pair(T: int, past: int, window: int, density: float | None, seed: int) -> None:
    S = T + past
    keys = None if density is None else numbers(2, S, density, seed)
    pattern = AttentionSpec(1.0, window, None if keys is None else (keys[:, past:], keys))
    ours = block_mask(pattern, T, S, CPU)
    visible = pattern.mask(T, S, CPU).expand(1 if keys is None else 2, 1, T, S)
    theirs = create_block_mask(lambda b, h, i, j: visible[b, h, i, j], visible.shape[0], None, T, S, device="cpu", BLOCK_SIZE=BLOCK)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("kv", "full_kv", "q", "full_q"):
        # What comes after the listed blocks has no meaning.
        listed = torch.arange(getattr(ours, f"{name}_indices").shape[-1]) < getattr(ours, f"{name}_num_blocks")[..., None]
        assert torch.equal(getattr(ours, f"{name}_indices")[listed], getattr(theirs, f"{name}_indices")[listed]), name
    b, i, j = torch.meshgrid(torch.arange(visible.shape[0]), torch.arange(T), torch.arange(S), indexing="ij")
    assert torch.equal(ours.mask_mod(b, torch.zeros_like(b), i, j), visible[:, 0])


@pytest.mark.parametrize("module", [sdpa, flex, decode])
@pytest.mark.parametrize("T", [1, 5])
def test_backends_keep_to_a_window_that_was_not_trimmed(module: ModuleType, T: int) -> None:
    q, k, v = (torch.randn(1, n, 2, 16, dtype=torch.float64) for n in (T, 9, 9))
    if module is not decode or T == 1:
        torch.testing.assert_close(
            module.attend(q, k, v, AttentionSpec(0.3, window=3)), eager.attend(q, k, v, AttentionSpec(0.3, window=3))
        )


def test_documents_whose_numbers_fall_lose_no_pair() -> None:
    keys = torch.randint(3, (2, 500), generator=torch.Generator().manual_seed(0))
    pattern = AttentionSpec(1.0, 0, (keys, keys))
    some, whole = classify_blocks(pattern, 500, 500, CPU)
    padded = torch.nn.functional.pad(pattern.mask(500, 500, CPU), (0, 12, 0, 12)).unflatten(-1, (4, BLOCK)).unflatten(-3, (4, BLOCK))
    assert (some | ~padded.any(-1).any(-2)).all()
    assert (~whole | padded.all(-1).all(-2)).all()


@settings(max_examples=40, deadline=None)
@given(
    T=st.integers(1, 700),
    past=st.integers(0, 300),
    window=st.sampled_from([0, 1, 5, 255, 256, 257, 600]),
    density=st.sampled_from([None, 0.0, 0.01]),
    slopes=st.booleans(),
)
def test_strips_cover_every_query_once(T: int, past: int, window: int, density: float | None, slopes: bool) -> None:
    S, g = T + past, torch.Generator().manual_seed(T)
    q, k, v = (torch.randn(2, n, heads, 4, generator=g, dtype=torch.float64) for n, heads in ((T, 4), (S, 2), (S, 2)))
    keys = None if density is None else numbers(2, S, density, T)
    documents = None if keys is None else (keys[:, past:], keys)
    pattern = AttentionSpec(0.5, window, documents, torch.tensor([0.5, 0.25, 0.01, 0.0]).double() if slopes else None)
    torch.testing.assert_close(sdpa.attend(q, k, v, pattern), eager.attend(q, k, v, pattern), atol=1e-12, rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(T=st.integers(1, 40), past=st.integers(0, 40), window=st.integers(0, 90))
def test_trimming_hides_only_what_no_query_sees(T: int, past: int, window: int) -> None:
    S = T + past
    keys = numbers(2, S, 0.1, T)
    pattern = AttentionSpec(1.0, window, (keys[:, past:], keys))
    trimmed, first = pattern.crop_to_window(T, S)
    whole = pattern.mask(T, S, CPU)
    assert not whole[..., :first].any()
    assert torch.equal(whole[..., first:], trimmed.mask(T, S - first, CPU))
    assert AttentionSpec(1.0, window).mask(T, S, CPU)[:, first].any()
    assert bool(trimmed.window) == (0 < window < S - first)


class TestMemo:
    def test_the_same_tensors_are_answered_from_memory(self) -> None:
        memo, made, t = TensorCache[int](2), [], torch.zeros(3)
        assert [memo.get((t,), "a", lambda: made.append(1) or len(made)) for _ in range(3)] == [1, 1, 1]

    @pytest.mark.parametrize("change", ["another key", "another tensor", "in place", "in place through a view"])
    def test_what_changed_is_made_again(self, change: str) -> None:
        memo, t = TensorCache[int](4), torch.zeros(3)
        assert memo.get((t,), "a", lambda: 1) == 1
        if change == "in place":
            t.add_(1)
        elif change == "in place through a view":
            t[:1].add_(1)
        other = t.clone() if change == "another tensor" else t
        assert memo.get((other,), "b" if change == "another key" else "a", lambda: 2) == 2

    def test_as_many_tensors_are_compared_as_there_are(self) -> None:
        memo, t = TensorCache[int](4), torch.zeros(3)
        assert [memo.get(tensors, None, lambda n=n: n) for n, tensors in enumerate([(t,), (), (t, t), (t,), ()])] == [0, 1, 2, 0, 1]

    def test_a_dead_tensor_is_not_mistaken_for_a_new_one_at_its_address(self) -> None:
        memo = TensorCache[float](4)
        for value in range(20):
            assert memo.get((torch.full((1000,), float(value)),), None, lambda value=value: float(value)) == value

    def test_inference_tensors_are_never_remembered(self) -> None:
        memo = TensorCache[int](4)
        with torch.inference_mode():
            t = torch.zeros(3)
            assert [memo.get((t,), None, lambda n=n: n) for n in range(3)] == [0, 1, 2]

    def test_training_goes_on_after_inference_with_the_same_masks(self) -> None:
        q, k, v = (torch.randn(1, 6, 2, 4, requires_grad=True) for _ in range(3))
        with torch.inference_mode():
            sdpa.attend(q, k, v, AttentionSpec(1.0, window=3))
        sdpa.attend(q, k, v, AttentionSpec(1.0, window=3)).sum().backward()

    def test_only_the_last_few_are_kept(self) -> None:
        memo, tensors = TensorCache[int](2), [torch.zeros(1) for _ in range(3)]
        for n, t in enumerate(tensors):
            memo.get((t,), None, lambda n=n: n)
        assert [memo.get((t,), None, lambda: -1) for t in tensors[1:]] == [1, 2]
        assert memo.get((tensors[0],), None, lambda: -1) == -1


def test_changed_lengths_and_windows_do_not_recompile() -> None:
    torch._dynamo.reset()
    flex._compiled_flex_attention.cache_clear()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for T in range(150, 270, 10):
            q, k, v = (torch.randn(2, T, heads, 16) for heads in (2, 1, 1))
            pattern = AttentionSpec(0.3, window=T // 2)
            torch.testing.assert_close(flex.attend(q, k, v, pattern), eager.attend(q, k, v, pattern))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
