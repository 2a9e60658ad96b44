"""The worker process: compiled code of one variant does not count against the recompile limit of the next."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from andromeda.ablate import worker
from andromeda.ablate.worker import _answer
from andromeda.config.load import load
from andromeda.config.run import RunConfig


def test_an_arm_is_compiled_however_many_were_before(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounter()

    def step(x: torch.Tensor, width: int) -> torch.Tensor:
        return x * width if width else x

    def measure(config: RunConfig, steps: int) -> worker.StepCost:
        torch.compile(step, backend=counter, dynamic=False)(torch.ones(2), steps)
        return worker.StepCost(0.0, 0, 1)

    monkeypatch.setattr(worker, "measure_cost", measure)
    config = load("nano").model_dump(mode="json")
    with torch._dynamo.config.patch(recompile_limit=2):
        for variant in range(1, 6):
            assert _answer({"do": "cost", "config": config, "steps": variant})["done"]
            assert counter.frame_count == variant
