"""Tokens per second and MFU from times and counts that are given by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from andromeda.config.run import RunConfig
from andromeda.train import metrics
from andromeda.train.metrics import ThroughputMonitor
from andromeda.train.precision import Precision
from andromeda.train.progress import Progress


def test_figures(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seconds for 8 rows of 32, and the FLOPs of the matmuls counted here by hand: six for every weight and token."""
    clock = iter([10.0, 11.5, 20.0, 20.5, 30.0, 31.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(metrics, "peak_flops", lambda device, precision: 1e9)
    watch, cursor = ThroughputMonitor(tiny().model, 32, Precision(torch.device("cpu"))), Progress(seconds=5.0)
    assert watch.compute_and_reset() == {}
    for _ in range(2):
        with watch.measure(cursor):
            pass
    watch.add_sequences(8, 0)
    figures = watch.compute_and_reset()
    assert figures["tokens_per_second"] == 8 * 32 / 2.0
    assert cursor.seconds == 7.0
    weights = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 2 * 32 * 64) + 257 * 32
    attention = 2 * 2 * 2 * 16 * (32 + 1) / 2 * 2  # layers, q k and p v, heads, dim, mean keys, multiply and add
    assert figures["mfu"] == pytest.approx(8 * 32 * (6 * weights + 3 * attention) / 2.0 / 1e9)
    assert figures["memory_gib"] > 0.01


def test_no_peak_no_mfu(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "peak_flops", lambda device, precision: None)
    watch = ThroughputMonitor(tiny().model, 32, Precision(torch.device("cpu")))
    with watch.measure(Progress()):
        pass
    watch.add_sequences(1, 0)
    assert "mfu" not in watch.compute_and_reset()


def test_a_narrow_window_counts_less(tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "peak_flops", lambda device, precision: 1e9)
    config = tiny(model__attention={"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "sliding_window": 24})
    watch = ThroughputMonitor(config.model, 32, Precision(torch.device("cpu")))
    found = []
    for window in (0, 8):
        clock = iter([0.0, 1.0])
        monkeypatch.setattr(metrics.time, "perf_counter", lambda clock=clock: next(clock))
        with watch.measure(Progress()):
            pass
        watch.add_sequences(1, window)
        found.append(watch.compute_and_reset()["mfu"] * 1e9)
    wide, narrow = 24 * 25 / 2 + 8 * 24, 8 * 9 / 2 + 24 * 8
    assert found[0] - found[1] == pytest.approx(3 * 2 * 2 * 2 * 2 * 16 * (wide - narrow))
