"""Validation measures what all of the held-out text is like, whatever is read at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from andromeda.config.data import BuildConfig
from andromeda.config.run import RunConfig
from andromeda.data.build import build
from andromeda.data.loader import TokenStream, open_stream
from andromeda.train.callbacks.validation import Validation
from andromeda.train.objective import MicroBatch, ObjectiveSums
from andromeda.train.precision import Precision

LENGTH = 32
BIGRAM = torch.rand(257, 257, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
"""A loss of each byte after each other, as no model would give it."""


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> TokenStream:
    """Long held-out documents, half of them of one letter, the others of another."""
    place = tmp_path_factory.mktemp("sorted")
    (place / "text").mkdir()
    for number in range(60):
        (place / "text" / f"{number:03}.txt").write_text(f"{number} " + "ab"[number % 2] * 2000)
    build([str(place / "text")], place / "corpus", BuildConfig(tokenizer="bytes", validation_fraction=0.3))
    return open_stream(RunConfig.model_validate({"data": {"corpus": str(place / "corpus")}}).data, LENGTH, 0, "val")


def bigrams(seen: list[torch.Tensor]) -> Callable[[MicroBatch, int], ObjectiveSums]:
    """The loss above, and what was read."""

    def objective(rows: MicroBatch, step: int) -> ObjectiveSums:
        seen.append(rows.ids)
        losses = BIGRAM[rows.ids, rows.targets.clamp(min=0)] * (rows.targets >= 0)
        return ObjectiveSums(losses.sum(), losses.sum())

    return objective


def measured(stream: TokenStream, rows: int, at_once: int) -> tuple[dict[str, float], torch.Tensor]:
    seen: list[torch.Tensor] = []
    figures = Validation(stream, rows * LENGTH, LENGTH, at_once, False)(nn.Module(), bigrams(seen), Precision(torch.device("cpu")))
    return figures, torch.cat(seen)


@pytest.mark.parametrize("at_once", [1, 3, 7, 1000])
def test_all_rows_are_all_the_held_out_text(stream: TokenStream, at_once: int) -> None:
    """Every target once, by a plain sum over rows read one by one."""
    assert stream.num_sequences
    every = [stream.batch(number, 1) for number in range(stream.num_sequences)]
    nll = math.fsum(float((BIGRAM[b.ids, b.targets.clamp(min=0)] * (b.targets >= 0)).sum()) for b in every)
    figures, seen = measured(stream, 10**6, at_once)
    assert figures["validation/loss"] == pytest.approx(nll / sum(b.tokens for b in every), rel=1e-12)
    assert figures["validation/bits_per_byte"] == pytest.approx(nll / math.log(2) / sum(b.bytes for b in every), rel=1e-12)
    assert torch.equal(seen, torch.cat([b.ids for b in every]))


def test_a_part_is_like_the_whole(stream: TokenStream) -> None:
    """The first rows would be of one document."""

    def share(ids: torch.Tensor) -> float:
        a, b = (int((ids == ord(letter)).sum()) for letter in "ab")
        return a / (a + b)

    whole = share(measured(stream, 10**6, 8)[1])
    assert 0.3 < whole < 0.7
    assert share(stream.batch(0, 50).ids) in (0.0, 1.0)
    figures, seen = measured(stream, 50, 8)
    assert len(seen) == 50
    assert abs(share(seen) - whole) < 0.05
    for at_once in (1, 3, 50):
        again, same = measured(stream, 50, at_once)
        assert torch.equal(same, seen)
        assert again["validation/loss"] == pytest.approx(figures["validation/loss"], rel=1e-12)
