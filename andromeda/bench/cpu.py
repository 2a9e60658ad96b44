"""Speed of a training step of a small model on the CPU, beside transformers' Llama, each side at its best way of computing."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from andromeda.bench.competitors import CONTEXT, CPU, PEER, ROWS, SIDES, VOCABULARY, Side, Way, build_side
from andromeda.bench.timing import alternate
from andromeda.train.precision import fast_bfloat16
from andromeda.utils.hardware import product_rate

WARMUP = 3

Key = tuple[str, Way]


def ways() -> list[Way]:
    """All that can be anyone's best here: compiled where there is a compiler, bfloat16 where it is not emulated."""
    compiled = (False, True) if shutil.which("g++") or shutil.which("clang++") else (False,)
    precisions = ("fp32", "bf16") if fast_bfloat16(CPU) else ("fp32",)
    return [Way(way, precision) for precision in precisions for way in compiled]


def measure(rounds: int = 15, chosen: list[Way] | None = None) -> dict[str, Any]:
    """Tokens per second of every side in every way, and the ratio of each side's best to the peer's best."""
    sides: dict[Key, Side] = {(name, way): build_side(name, way) for way in chosen or ways() for name in SIDES}
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, VOCABULARY, (ROWS, CONTEXT + 1), generator=generator) for _ in range(WARMUP + rounds)]
    seconds = alternate({key: partial(_step, side.step, rows) for key, side in sides.items()}, WARMUP, rounds)
    return summary(seconds, sides)


def _step(step: Callable[[Tensor, Tensor, float], Tensor], rows: list[Tensor], number: int) -> None:
    step(rows[number][:, :-1].contiguous(), rows[number][:, 1:].contiguous(), 1.0)


def summary(seconds: dict[Key, list[float]], sides: dict[Key, Side]) -> dict[str, Any]:
    """Medians as tokens per second, and what follows from them."""
    found: dict[str, dict[str, Any]] = {}
    for (name, way), times in seconds.items():
        side = sides[name, way]
        known = found.setdefault(name, {"parameters": side.parameters, "flops_per_token": side.flops_per_token, "tokens_per_second": {}})
        known["tokens_per_second"][str(way)] = ROWS * CONTEXT / statistics.median(times)
    for known in found.values():
        known["best"] = max(known["tokens_per_second"].values())
        known["gflops"] = known["best"] * known["flops_per_token"] / 1e9
        known["ratio"] = known["best"] / max(found[PEER]["tokens_per_second"].values())
    return {"tokens_per_step": ROWS * CONTEXT, "product_gflops": product_rate("fp32") / 1e9, "sides": found}
