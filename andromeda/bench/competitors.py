"""Speed of a training step of small models on the CPU: transformers' Llama, and Andromeda in two configurations.

All have 6 layers of hidden size 256, a vocabulary of 4,096, sequences of 256 tokens, batch size 8, 4 query heads and 1 key/value
head of dimension 64, AdamW with the same learning rate, clipping by the global norm, and the same parameter count to 2 %.
Andromeda's configurations are

- `same matmuls`: parameters are distributed as in Llama, so that both do the same matmuls and only the rest can differ;
- `value embeddings`: a third of the blocks' parameters are in an embedding table instead, which needs no matmuls. What they
  are worth there is measured by `andromeda bench convergence`.

Andromeda runs the whole training step of `andromeda train` (loss in chunks, clipping, guard, optimizer).
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
from andromeda.utils.compile_cache import remove_torn_files
from andromeda.utils.errors import MissingExtra
from andromeda.utils.hardware import matmul_rate

ROWS, CONTEXT, VOCABULARY, LEARNING_RATE, WEIGHT_DECAY = 8, 256, 4096, 1e-3, 0.1
BASELINE = "transformers Llama"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class ComputeMode:
    """Execution mode of an implementation."""

    compiled: bool = False
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.precision} {'compiled' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Competitor:
    """An implementation that is ready to train."""

    step: Callable[[Tensor, Tensor, float], Tensor]
    """One training step on ids and targets (ROWS, CONTEXT) with a factor on the learning rate; returns the mean loss in nats/token."""
    parameters: int
    flops_per_token: float
    """FLOPs of the matmuls of a training step, attention by its mask."""


def build_competitor(name: str, mode: ComputeMode) -> Competitor:
    """A competitor by its name in COMPETITORS."""
    return COMPETITORS[name](mode)


def andromeda_config(mixed: bool, mode: ComputeMode) -> RunConfig:
    """Configuration of one of Andromeda's models."""
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
        "compile": "on" if mode.compiled else "off",
        "precision": mode.precision,
        "optim": {"kind": "adamw", "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
    }
    return from_values({"model": model, "train": train})


def _andromeda(mixed: bool, mode: ComputeMode) -> Competitor:
    config = andromeda_config(mixed, mode)
    session = build_train_state(config, CPU, "bench")
    stepper = TrainStep(session, NextTokenObjective(session.model), config.train)

    def step(ids: Tensor, targets: Tensor, factor: float) -> Tensor:
        session.optimizer.set_lr_factor(factor, 0)
        return stepper(StepBatch(MicroBatch(ids, targets, None), targets.numel(), (0, ROWS))).nll

    return Competitor(step, sum(p.numel() for p in session.model.parameters()), training_flops_per_token(config.model, CONTEXT))


def _llama(mode: ComputeMode) -> Competitor:
    """transformers' Llama with its own loss; fused AdamW and weight decay on the same matrices, as ours."""
    model, run = _llama_model(mode.compiled)
    precision = PRECISIONS[mode.precision](CPU)
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
            loss: Tensor = run(input_ids=ids, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    attention = 6 * 4 * 64 * 2 * (CONTEXT + 1) / 2
    weights = sum(p.numel() for p in matrices) + VOCABULARY * 256
    return Competitor(step, sum(p.numel() for p in model.parameters()), 6.0 * (weights + attention))


def _llama_model(compiled: bool) -> tuple[Any, Any]:
    # transformers imports torchao if it is installed, which warns about libraries that it cannot load on a CPU.
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    logging.disable(logging.WARNING)
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingExtra("transformers", "bench", "The baseline of the CPU benchmarks") from None
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
    if compiled:
        remove_torn_files()
    return model, torch.compile(model, dynamic=False) if compiled else model


COMPETITORS: dict[str, Callable[[ComputeMode], Competitor]] = {
    BASELINE: _llama,
    "Andromeda, same matmuls": lambda mode: _andromeda(False, mode),
    "Andromeda, value embeddings": lambda mode: _andromeda(True, mode),
}


WARMUP = 3

Key = tuple[str, ComputeMode]


def compute_modes() -> list[ComputeMode]:
    """Modes that could be the fastest here: compiled if there is a C++ compiler, bfloat16 if it is not emulated."""
    compiled = (False, True) if shutil.which("g++") or shutil.which("clang++") else (False,)
    precisions = ("fp32", "bf16") if has_fast_bf16(CPU) else ("fp32",)
    return [ComputeMode(mode, precision) for precision in precisions for mode in compiled]


def measure(rounds: int = 15, chosen: list[ComputeMode] | None = None) -> dict[str, Any]:
    """Tokens/s of every competitor in every mode, and its best relative to the baseline's best."""
    implementations: dict[Key, Competitor] = {
        (name, mode): build_competitor(name, mode) for mode in chosen or compute_modes() for name in COMPETITORS
    }
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, VOCABULARY, (ROWS, CONTEXT + 1), generator=generator) for _ in range(WARMUP + rounds)]
    seconds = time_alternately(
        {key: partial(_step, implementation.step, rows) for key, implementation in implementations.items()}, WARMUP, rounds
    )
    return summary(seconds, implementations)


def _step(step: Callable[[Tensor, Tensor, float], Tensor], rows: list[Tensor], number: int) -> None:
    step(rows[number][:, :-1].contiguous(), rows[number][:, 1:].contiguous(), 1.0)


def summary(seconds: dict[Key, list[float]], implementations: dict[Key, Competitor]) -> dict[str, Any]:
    """Medians as tokens per second, and what follows from them."""
    found: dict[str, dict[str, Any]] = {}
    for (name, mode), times in seconds.items():
        implementation = implementations[name, mode]
        known = found.setdefault(
            name, {"parameters": implementation.parameters, "flops_per_token": implementation.flops_per_token, "tokens_per_second": {}}
        )
        known["tokens_per_second"][str(mode)] = ROWS * CONTEXT / statistics.median(times)
    for known in found.values():
        known["best"] = max(known["tokens_per_second"].values())
        known["gflops"] = known["best"] * known["flops_per_token"] / 1e9
        known["ratio"] = known["best"] / max(found[BASELINE]["tokens_per_second"].values())
    return {"tokens_per_step": ROWS * CONTEXT, "matmul_gflops": matmul_rate("fp32") / 1e9, "implementations": found}
