"""Which backend a call gets, what the user is told, and that torch.compile takes the choice in."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from andromeda.ops.attention import AttentionSpec, attend, backend_ranking, backends, dispatch, eager, select_backend
from andromeda.utils.errors import ConfigError


def call(T: int = 6, S: int = 6, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, heads, 8, generator=g).to(device, dtype) for n, heads in ((T, 4), (S, 2), (S, 2)))  # type: ignore[return-value]


def test_the_configuration_knows_the_same_backends() -> None:
    from andromeda.config.model import BACKENDS

    # The kernel for one query serves no other pass of a model, so that only `auto` may take it.
    assert set(BACKENDS) == {"auto", *backends()} - {"decode"}


def test_every_ranking_names_backends_once_and_ends_with_the_one_that_never_refuses() -> None:
    for key, ranked in dispatch.RANKINGS.items():
        assert set(ranked.order) <= set(backends()), key
        assert len(set(ranked.order)) == len(ranked.order), key
        assert ranked.order[-1] == "eager", key
        assert ranked.source, key


@pytest.mark.parametrize(
    ("pattern", "T", "first"),
    [
        (AttentionSpec(1.0), 6, "fa4"),
        (AttentionSpec(1.0, window=3), 6, "fa4"),
        (AttentionSpec(1.0, softcap=3.0), 6, "fa4"),
        (AttentionSpec(1.0, slopes=torch.ones(4)), 6, "flex"),
        (AttentionSpec(1.0, window=3, slopes=torch.ones(4)), 6, "flex"),
        (AttentionSpec(1.0), 1, "flash"),
    ],
)
def test_rankings_follow_the_work_on_a_gpu(pattern: AttentionSpec, T: int, first: str) -> None:
    class Queries:
        shape, device = (2, T, 4, 8), torch.device("cuda")

    assert backend_ranking(pattern, Queries()).order[0] == first  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_an_unknown_device_gets_what_runs_everywhere(device: str) -> None:
    class Queries:
        shape, device = (2, 6, 4, 8), torch.device("mps")

    assert backend_ranking(AttentionSpec(1.0), Queries()).order == ("sdpa", "eager")  # type: ignore[arg-type]


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError) as e:
        attend(*call(), AttentionSpec(1.0), "flahs")
    assert str(e.value) == "There is no attention backend 'flahs' (did you mean flash?)."


@pytest.mark.parametrize(
    ("name", "pattern", "T", "reason"),
    [
        ("sdpa", AttentionSpec(1.0, softcap=2.0), 6, "it has no soft cap"),
        ("flash", AttentionSpec(1.0), 6, "it runs on CUDA GPUs only"),
        ("flash", AttentionSpec(1.0, window=2), 6, "it has no window"),
        ("flash", AttentionSpec(1.0, slopes=torch.ones(4)), 6, "it has no ALiBi slopes (alibi.fold_into_qk = true needs none)"),
        ("cudnn", AttentionSpec(1.0), 3, "it aligns its mask to the first key, so that there must be as many queries as keys"),
        ("fa4", AttentionSpec(1.0, slopes=torch.ones(4)), 6, "it has no ALiBi slopes (alibi.fold_into_qk = true needs none)"),
        ("fa4", AttentionSpec(1.0), 6, "it runs on CUDA GPUs only"),
    ],
)
def test_a_named_backend_that_refuses_is_an_error_with_its_reason(name: str, pattern: AttentionSpec, T: int, reason: str) -> None:
    q, k, v = call(T)
    with pytest.raises(ConfigError) as e:
        attend(q, k, v, pattern, name)
    assert str(e.value) == f"Attention backend {name!r} cannot compute this call: {reason}; use backend auto or eager."


def test_flex_refuses_gradients_on_a_cpu() -> None:
    q, k, v = call()
    with pytest.raises(ConfigError, match="it has no backward pass on a CPU"):
        attend(q, k, v.requires_grad_(), AttentionSpec(1.0), "flex")


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> Any:
    """Queries that say that they are on a GPU of this compute capability."""

    class Heads:
        def __init__(self, T: int, D: int, dtype: torch.dtype) -> None:
            self.shape, self.dtype, self.device = (2, T, 4, D), dtype, torch.device("cuda:0")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return Heads


@pytest.mark.parametrize(
    ("name", "capability", "T", "D", "Dv", "dtype", "reason"),
    [
        ("flash", (9, 0), 6, 128, 128, torch.bfloat16, None),
        ("flash", (9, 0), 6, 128, 128, torch.float32, "it has no kernels in float32"),
        ("flash", (7, 5), 6, 128, 128, torch.float16, "it needs a GPU of compute capability 8.0 or newer"),
        ("flash", (9, 0), 6, 12, 12, torch.bfloat16, "it needs a head dim of 8, 16, ... or 256"),
        ("flash", (9, 0), 6, 64, 32, torch.bfloat16, "it needs values with the head dim of keys"),
        ("cudnn", (9, 0), 1, 64, 64, torch.bfloat16, "it needs at least two tokens"),
        ("cudnn", (9, 0), 6, 256, 256, torch.bfloat16, "it needs a head dim of 8, 16, ... or 128"),
        ("fa4", (8, 0), 6, 64, 64, torch.bfloat16, "it needs a GPU of compute capability 9.0 or newer"),
        ("fa4", (10, 0), 6, 192, 64, torch.bfloat16, "it needs a head dim of 8, 16, ... or 128"),
        ("fa4", (9, 0), 6, 64, 64, torch.bfloat16, "flash-attn-4 is not installed: run `pip install 'andromeda[flash]'`"),
        ("flex", (9, 0), 6, 64, 64, torch.float64, "it has no kernels in float64"),
        ("flex", (9, 0), 6, 8, 8, torch.bfloat16, "it needs a head dim of at least 16"),
        ("sdpa", (9, 0), 6, 64, 64, torch.bfloat16, None),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], T: int, D: int, Dv: int, dtype: torch.dtype, reason: str | None
) -> None:
    heads = on_a_gpu(monkeypatch, capability)
    monkeypatch.setattr("andromeda.ops.attention.fa4._is_installed", lambda: False)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    q, k, v = heads(T, D, dtype), heads(T, D, dtype), heads(T, Dv, dtype)
    assert backends()[name].unsupported_reason(AttentionSpec(1.0), q, k, v) == reason


def test_a_slower_choice_is_logged_once_for_each_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    dispatch._log_once.cache_clear()
    q, k, v = call()
    with caplog.at_level(logging.INFO, logger="andromeda"):
        for _ in range(3):
            assert select_backend("auto", AttentionSpec(1.0, softcap=2.0), q, k, v) is eager
            assert select_backend("auto", AttentionSpec(1.0), q, k, v).name == "sdpa"
        assert caplog.messages == ["Attention runs on eager; sdpa would be faster, but it has no soft cap."]
        monkeypatch.setattr(backends()["sdpa"], "unsupported_reason", lambda *_: "it is tired")
        assert select_backend("auto", AttentionSpec(1.0), q, k, v) is eager
    assert caplog.messages[1:] == ["Attention runs on eager; sdpa would be faster, but it is tired."]


PATTERNS: dict[str, dict[str, Any]] = {"causal": {}, "window": {"window": 3}, "documents": {"window": 3}, "soft cap": {"softcap": 2.0}}


@pytest.mark.parametrize("name", PATTERNS)
def test_compiled_whole_it_gives_the_same(name: str, caplog: pytest.LogCaptureFixture) -> None:
    dispatch._log_once.cache_clear()
    torch._dynamo.reset()
    q, k, v = call()
    numbers = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]])

    def function(q: Tensor, k: Tensor, v: Tensor, numbers: Tensor) -> Tensor:
        documents = (numbers, numbers) if name == "documents" else None
        return attend(q, k, v, AttentionSpec(0.3, documents=documents, **PATTERNS[name]))

    with caplog.at_level(logging.INFO, logger="andromeda"):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v, numbers)
    torch.testing.assert_close(compiled, function(q, k, v, numbers))
    assert [m for m in caplog.messages if m.startswith("Attention runs on")] == (
        ["Attention runs on eager; sdpa would be faster, but it has no soft cap."] if name == "soft cap" else []
    )
