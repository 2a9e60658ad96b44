"""Tokens per second and MFU from times and counts that are given by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from andromeda.config.run import RunConfig
from andromeda.train import metrics
from andromeda.train.checkpoint import Cursor
from andromeda.train.metrics import Speed
from andromeda.train.precision import Precision


def test_figures(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds for 8 rows of 32, and the FLOPs of the products counted here by hand: six for every weight and token."""
    clock = iter([10.0, 11.5, 20.0, 20.5, 30.0, 31.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(metrics, "peak_flops", lambda device, precision: 1e9)
    watch, cursor = Speed(tiny().model, 32, Precision(torch.device("cpu"))), Cursor(seconds=5.0)
    assert watch.take() == {}
    for _ in range(2):
        with watch.running(cursor):
            pass
    watch.count(8, 0)
    figures = watch.take()
    assert figures["tokens_per_second"] == 8 * 32 / 2.0
    assert cursor.seconds == 7.0
    weights = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 32 * 64) + 257 * 32
    attention = 2 * 2 * 2 * 16 * (32 + 1) / 2 * 2  # layers, q k and p v, heads, dim, mean keys, multiply and add
    assert figures["mfu"] == pytest.approx(8 * 32 * (6 * weights + 3 * attention) / 2.0 / 1e9)
    assert figures["memory_gib"] > 0.01


def test_no_peak_no_mfu(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "peak_flops", lambda device, precision: None)
    watch = Speed(tiny().model, 32, Precision(torch.device("cpu")))
    with watch.running(Cursor()):
        pass
    watch.count(1, 0)
    assert "mfu" not in watch.take()


def test_a_narrow_window_counts_less(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "peak_flops", lambda device, precision: 1e9)
    config = tiny(model__attention={"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "sliding_window": 24})
    watch = Speed(config.model, 32, Precision(torch.device("cpu")))
    found = []
    for window in (0, 8):
        clock = iter([0.0, 1.0])
        monkeypatch.setattr(metrics.time, "perf_counter", lambda clock=clock: next(clock))
        with watch.running(Cursor()):
            pass
        watch.count(1, window)
        found.append(watch.take()["mfu"] * 1e9)
    wide, narrow = 24 * 25 / 2 + 8 * 24, 8 * 9 / 2 + 24 * 8
    assert found[0] - found[1] == pytest.approx(3 * 2 * 2 * 2 * 2 * 16 * (wide - narrow))
