"""The kernels of a decoding step compile for Hopper as `test_compiled_ahead` demands; those that start early wait for the ones before,
and ask for their weights first."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from andromeda.ops.triton import decode_attention, gemv, qk_preprocess
from tests.ops.test_compiled_ahead import (
    Hopper,  # noqa: F401 (the fixture's driver)
    empty,
    launched,  # noqa: F401 (a fixture)
    one_query,
    pytestmark,  # noqa: F401
)
from tests.ops.test_compiled_ahead import (
    test_a_kernel_fits_into_registers as check,
)

WIDTH, KEYS = 2560, 33024


def number() -> Tensor:
    return torch.empty((), dtype=torch.long, device="meta")


def rows(M: int, K: int) -> gemv.GemvInput:
    """Rows with all that may be done to them first."""
    numbers = (empty(M, 1, dtype=torch.long), empty(M, KEYS, dtype=torch.long), number())
    return gemv.GemvInput(empty(M, K), "layer", 1e-5, empty(K), empty(M, 1, K), *numbers)


def project(M: int) -> None:
    cache = gemv.CacheSlotPointers(empty(M, KEYS, 1, 128), number(), 2976, 3104, KEYS * 128, 128)
    gemv.gemv(rows(M, WIDTH), empty(3228, WIDTH), empty(M, 3228), normalized=empty(M, WIDTH), slot=cache)


def plain(M: int, N: int, K: int, activation: str = "none") -> None:
    keep = gemv.PendingShiftPointers(empty(M, 1, WIDTH), empty(M, WIDTH))
    gemv.gemv(gemv.GemvInput(empty(M, K)), empty(N, K), empty(M, N), gemv.GemvEpilogue(empty(N), empty(M, N)), activation, pending=keep)


def inner(M: int) -> None:
    gemv.gemv(rows(M, WIDTH), empty(4 * WIDTH, WIDTH), empty(M, 4 * WIDTH), gemv.GemvEpilogue(empty(4 * WIDTH)), "gelu", empty(M, WIDTH))


def norm(M: int) -> None:
    gemv.normalize(rows(M, WIDTH))


def heads(M: int) -> None:
    raw = [empty(M, 1, count * 124).unflatten(-1, (count, 124)) for count in (24, 1)]
    tables = [empty(1, 1, 1, 31, dtype=torch.float32) for _ in range(4)]
    scales = (empty(24, 124, dtype=torch.float32), empty(1, 124, dtype=torch.float32))
    tails = [empty(24), empty(1, 4, dtype=torch.long)]
    place = (empty(M, KEYS, 1, 128), number())
    qk_preprocess.preprocess_qk((raw[0], raw[1]), scales, tables, tails, "l2", "interleaved", cache=place)


WORKS: dict[str, Callable[[], None]] = {
    **{f"queries, keys and values, {M} rows": lambda M=M: project(M) for M in (1, 2)},  # type: ignore[misc]
    **{f"feed-forward input matmul, {M} rows": lambda M=M: inner(M) for M in (1, 2)},  # type: ignore[misc]
    **{f"attention output matmul, {M} rows": lambda M=M: plain(M, WIDTH, 3072) for M in (1, 8)},  # type: ignore[misc]
    **{f"feed-forward output matmul, {M} rows": lambda M=M: plain(M, WIDTH, 4 * WIDTH) for M in (1, 8)},  # type: ignore[misc]
    "feed-forward input matmul, 8 rows": lambda: plain(8, 4 * WIDTH, WIDTH, "gelu"),
    "sizes that are not round": lambda: plain(3, 1001, 1100),
    "norm and shift": lambda: norm(8),
    "norm and shift, no documents": lambda: gemv.normalize(
        gemv.GemvInput(empty(8, WIDTH), "layer", 1e-5, empty(WIDTH), empty(8, 1, WIDTH))
    ),
    "heads": lambda: heads(1),
    "one query": lambda: one_query(1, KEYS, 24, 1, 128, numbered=True),
}


@pytest.mark.parametrize("name", WORKS)
def test_a_kernel_of_a_step(name: str, launched: list[tuple[int, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for module in (gemv, decode_attention, qk_preprocess):
        monkeypatch.setattr(module, "supports_pdl", lambda x: True)
    check(WORKS[name], launched, tmp_path)
    for _, kernel in launched:
        assert kernel.metadata.launch_pdl
        code = kernel.asm["ptx"]
        before, waits, _ = code.partition("griddepcontrol.wait")
        assert waits
        assert "griddepcontrol.launch_dependents" in before
        # Nothing is written before, and nothing read but by matmuls: their weights.
        assert "st.global" not in before
        loads = re.findall(r"ld\.global\S*", before)
        assert bool(loads) == ("matmul" in name or "values" in name or "sizes" in name)
        assert kernel.metadata.name != "_gemv_kernel" or any("v4.b32" in load for load in loads) or "sizes" in name
