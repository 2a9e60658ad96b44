"""Who takes part in the CPU benchmarks: transformers' Llama, and Andromeda twice.

All have 6 layers of width 256, a vocabulary of 4096, a context of 256, 4 query heads and 1 key/value head of 64, rows of 8,
AdamW with the same rates, clipping by the global norm, and equal parameters to 2 %. Andromeda's are

- `same products`: the parameters lie where Llama's do, so that both sides owe the processor the same matrix products, and
  only what surrounds them can differ;
- `value embeddings`: a third of the blocks' parameters lie in a table of values instead, which costs no products. Whether
  they are worth as much there is another question, which `andromeda bench convergence` answers.

Andromeda takes the whole step of `andromeda train` (loss in chunks, clipping, guard, optimizer).
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from andromeda.bench.timing import time_alternately
from andromeda.config.load import from_values
from andromeda.config.run import RunConfig
from andromeda.model.flops import training_flops_per_token
from andromeda.train.objective import MicroBatch, NextTokenObjective
from andromeda.train.precision import PRECISIONS, has_fast_bf16
from andromeda.train.state import build_train_state
from andromeda.train.step import StepBatch, TrainStep
from andromeda.utils.errors import MissingExtra
from andromeda.utils.hardware import matmul_rate

ROWS, CONTEXT, VOCABULARY, LEARNING_RATE, WEIGHT_DECAY = 8, 256, 4096, 1e-3, 0.1
BASELINE = "transformers Llama"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ComputeMode:
    """How a side computes."""

    compiled: bool = False
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.precision} {'compiled' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Competitor:
    """One that takes part, ready to learn."""

    step: Callable[[Tensor, Tensor, float], Tensor]
    """Learns from ids and targets (ROWS, CONTEXT) at a share of the learning rate; returns the mean loss in nats."""
    parameters: int
    flops_per_token: float
    """Of the matrix products of one step, attention by its mask."""


def build_competitor(name: str, way: ComputeMode) -> Competitor:
    """A side by its name in SIDES."""
    return COMPETITORS[name](way)


def andromeda_config(mixed: bool, way: ComputeMode) -> RunConfig:
    """The run that one of our sides takes steps of."""
    model = {
        "vocab_size": VOCABULARY,
        "max_seq_len": CONTEXT,
        "hidden_size": 256,
        "num_layers": 6,
        "attention": {"num_heads": 4, "num_kv_heads": 1, "head_dim": 64},
        "rotary": {"kind": "rope"},
        "feedforward": {"kind": "relu2", "intermediate_size": 512 if mixed else 1024},
        "block": {"norm": "rms_plain"},
        "value_embedding": {"kind": "layered" if mixed else "none"},
    }
    train = {
        "batch_size": ROWS,
        "device": "cpu",
        "compile": "on" if way.compiled else "off",
        "precision": way.precision,
        "optim": {"kind": "adamw", "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
    }
    return from_values({"model": model, "train": train})


def _andromeda(mixed: bool, way: ComputeMode) -> Competitor:
    config = andromeda_config(mixed, way)
    session = build_train_state(config, CPU, "bench")
    stepper = TrainStep(session, NextTokenObjective(session.model), config.train)

    def step(ids: Tensor, targets: Tensor, factor: float) -> Tensor:
        session.optimizer.set_lr_factor(factor, 0)
        return stepper(StepBatch(MicroBatch(ids, targets, None), targets.numel(), (0, ROWS))).nll

    return Competitor(step, sum(p.numel() for p in session.model.parameters()), training_flops_per_token(config.model, CONTEXT))


def _llama(way: ComputeMode) -> Competitor:
    """With its own loss; fused AdamW, as ours, and weight decay on the same matrices."""
    model, run = _llama_model(way.compiled)
    precision = PRECISIONS[way.precision](CPU)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = set(map(id, matrices))
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)

    def step(ids: Tensor, targets: Tensor, factor: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        with precision.autocast():
            loss = run(input_ids=ids, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    attention = 6 * 4 * 64 * 2 * (CONTEXT + 1) / 2
    products = sum(p.numel() for p in matrices) + VOCABULARY * 256
    return Competitor(step, sum(p.numel() for p in model.parameters()), 6.0 * (products + attention))


def _llama_model(compiled: bool) -> tuple[Any, Any]:
    # transformers loads torchao where it finds it, which has much to say about what it cannot load on a CPU.
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    logging.disable(logging.WARNING)
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingExtra("transformers", "bench", "The CPU benchmarks' peer") from None
    finally:
        logging.disable(logging.NOTSET)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "intermediate_size": 683,
        "max_position_embeddings": CONTEXT,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    return model, torch.compile(model, dynamic=False) if compiled else model


COMPETITORS: dict[str, Callable[[ComputeMode], Competitor]] = {
    BASELINE: _llama,
    "Andromeda, same products": lambda way: _andromeda(False, way),
    "Andromeda, value embeddings": lambda way: _andromeda(True, way),
}


WARMUP = 3

Key = tuple[str, ComputeMode]


def compute_modes() -> list[ComputeMode]:
    """All that can be anyone's best here: compiled where there is a compiler, bfloat16 where it is not emulated."""
    compiled = (False, True) if shutil.which("g++") or shutil.which("clang++") else (False,)
    precisions = ("fp32", "bf16") if has_fast_bf16(CPU) else ("fp32",)
    return [ComputeMode(way, precision) for precision in precisions for way in compiled]


def measure(rounds: int = 15, chosen: list[ComputeMode] | None = None) -> dict[str, Any]:
    """Tokens per second of every side in every way, and the ratio of each side's best to the peer's best."""
    sides: dict[Key, Competitor] = {(name, way): build_competitor(name, way) for way in chosen or compute_modes() for name in COMPETITORS}
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, VOCABULARY, (ROWS, CONTEXT + 1), generator=generator) for _ in range(WARMUP + rounds)]
    seconds = time_alternately({key: partial(_step, side.step, rows) for key, side in sides.items()}, WARMUP, rounds)
    return summary(seconds, sides)


def _step(step: Callable[[Tensor, Tensor, float], Tensor], rows: list[Tensor], number: int) -> None:
    step(rows[number][:, :-1].contiguous(), rows[number][:, 1:].contiguous(), 1.0)


def summary(seconds: dict[Key, list[float]], sides: dict[Key, Competitor]) -> dict[str, Any]:
    """Medians as tokens per second, and what follows from them."""
    found: dict[str, dict[str, Any]] = {}
    for (name, way), times in seconds.items():
        side = sides[name, way]
        known = found.setdefault(name, {"parameters": side.parameters, "flops_per_token": side.flops_per_token, "tokens_per_second": {}})
        known["tokens_per_second"][str(way)] = ROWS * CONTEXT / statistics.median(times)
    for known in found.values():
        known["best"] = max(known["tokens_per_second"].values())
        known["gflops"] = known["best"] * known["flops_per_token"] / 1e9
        known["ratio"] = known["best"] / max(found[BASELINE]["tokens_per_second"].values())
    return {"tokens_per_step": ROWS * CONTEXT, "product_gflops": matmul_rate("fp32") / 1e9, "sides": found}
