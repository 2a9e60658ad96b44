"""Windows, losses and bins, against the definitions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from andromeda.config.data import DataConfig
from andromeda.data.tokenizer import Tokenizer
from andromeda.evaluate.context_loss import (
    context_lengths,
    evenly_spaced_windows,
    held_out_tokens,
    measure_long_context,
    position_edges,
    summarize_by_position,
)
from andromeda.model.transformer import Transformer
from andromeda.train.precision import build_precision
from andromeda.utils.errors import DataError

from .conftest import Make


def test_the_held_out_tokens_are_the_held_out_text(corpus: Path) -> None:
    tokens = held_out_tokens(DataConfig(corpus=str(corpus), packing="documents"), 0)
    assert Tokenizer.load(corpus).decode_bytes(tokens.tolist()) == (corpus / "val.txt").read_bytes()


def test_scored_targets_never_overlap() -> None:
    rows = evenly_spaced_windows(torch.arange(1000), 100, 50, 30)
    tails = rows[:, -30:].flatten().tolist()
    assert len(set(tails)) == len(tails)
    assert rows.shape == (30, 101)
    assert (rows.diff(dim=1) == 1).all()
    assert rows.max() == 999


def test_one_window_of_just_enough_text() -> None:
    assert evenly_spaced_windows(torch.arange(101), 100, 8, 30).shape == (1, 101)
    with pytest.raises(DataError, match="101 tokens, fewer than a context of 101"):
        evenly_spaced_windows(torch.arange(101), 101, 8, 30)


def test_lengths() -> None:
    assert context_lengths(2048, 16384, 256) == [1024, 2048, 4096, 8192, 16384]
    assert context_lengths(2048, 5000, 2048) == [2048, 4096, 5000]
    assert context_lengths(100, 101, 64) == [100, 101]


@pytest.mark.parametrize("length", [1, 16, 17, 100, 4096])
def test_bins_cover_every_position_once(length: int) -> None:
    edges = position_edges(length)
    assert edges[0] == 0
    assert edges[-1] == length
    assert edges == sorted(set(edges))


def test_bins_hold_their_means() -> None:
    nats = torch.arange(40.0, dtype=torch.float64).repeat(3, 1)
    found = summarize_by_position(nats)
    assert found["edges"] == [0, 16, 23, 32, 40]
    assert found["tokens"] == [48, 21, 27, 24]
    assert found["nats"] == [7.5, 19.0, 27.0, 35.5]


@torch.no_grad()
def test_losses_are_those_of_each_context_alone(make: Make) -> None:
    model = Transformer(make(max_seq_len=64).model, seed=3).double()
    torch.manual_seed(0)
    rows = torch.randint(0, 257, (3, 41))
    found = measure_long_context(model, rows, [10, 20, 40], 5, build_precision("fp32", torch.device("cpu")))
    for length, nats, error in zip([10, 20, 40], found["context"]["nats"], found["context"]["error"], strict=True):
        means = []
        for row in rows:
            chances = model(row[None, 40 - length : 40]).log_softmax(-1)[0]
            means.append(-sum(float(chances[length - 5 + i, row[36 + i]]) for i in range(5)) / 5)
        assert nats == pytest.approx(sum(means) / 3, abs=1e-6)
        spread = math.sqrt(sum((m - sum(means) / 3) ** 2 for m in means) / 2)
        assert error == pytest.approx(spread / math.sqrt(3), abs=1e-6)
    assert found["context"]["tokens"] == 15
    whole = model(rows[:, :-1]).log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
    assert found["position"]["nats"][0] == pytest.approx(-float(whole[:, :16].mean()), abs=1e-6)
