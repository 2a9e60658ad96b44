"""Who takes part in the CPU benchmarks: transformers' Llama, and Andromeda twice.

All have 6 layers of width 256, a vocabulary of 4096, a context of 256, 4 query heads and 1 key/value head of 64, rows of 8,
AdamW with the same rates, clipping by the global norm, and equal parameters to 2 %. Andromeda's are

- `same products`: the parameters lie where Llama's do, so that both sides owe the processor the same matrix products, and
  only what surrounds them can differ;
- `value embeddings`: a third of the blocks' parameters lie in a table of values instead, which costs no products. Whether
  they are worth as much there is another question, which `andromeda bench learn` answers.

Andromeda takes the whole step of `andromeda train` (loss in chunks, clipping, guard, optimizer).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from andromeda.config.load import from_values
from andromeda.config.run import RunConfig
from andromeda.model.flops import training_flops_per_token
from andromeda.train.objective import NextToken, Rows
from andromeda.train.precision import PRECISIONS
from andromeda.train.state import build_session
from andromeda.train.step import Stepper, Work
from andromeda.utils.errors import MissingExtra

ROWS, CONTEXT, VOCABULARY, RATE, DECAY = 8, 256, 4096, 1e-3, 0.1
PEER = "transformers Llama"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Way:
    """How a side computes."""

    compiled: bool = False
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.precision} {'compiled' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Side:
    """One that takes part, ready to learn."""

    step: Callable[[Tensor, Tensor, float], Tensor]
    """Learns from ids and targets (ROWS, CONTEXT) at a share of the learning rate; returns the mean loss in nats."""
    parameters: int
    flops_per_token: float
    """Of the matrix products of one step, attention by its mask."""


def build_side(name: str, way: Way) -> Side:
    """A side by its name in SIDES."""
    return SIDES[name](way)


def andromeda_config(mixed: bool, way: Way) -> RunConfig:
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
        "optim": {"kind": "adamw", "lr": RATE, "weight_decay": DECAY},
    }
    return from_values({"model": model, "train": train})


def _andromeda(mixed: bool, way: Way) -> Side:
    config = andromeda_config(mixed, way)
    session = build_session(config, CPU, "bench")
    stepper = Stepper(session, NextToken(session.model), config.train)

    def step(ids: Tensor, targets: Tensor, factor: float) -> Tensor:
        session.optimizer.set_factor(factor, 0)
        return stepper(Work(Rows(ids, targets, None), targets.numel(), (0, ROWS))).nll

    return Side(step, sum(p.numel() for p in session.model.parameters()), training_flops_per_token(config.model, CONTEXT))


def _llama(way: Way) -> Side:
    """With its own loss; fused AdamW, as ours, and weight decay on the same matrices."""
    model, run = _llama_model(way.compiled)
    precision = PRECISIONS[way.precision](CPU)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = set(map(id, matrices))
    groups = [
        {"params": matrices, "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if id(p) not in known], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)

    def step(ids: Tensor, targets: Tensor, factor: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor
        with precision.autocast():
            loss = run(input_ids=ids, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    attention = 6 * 4 * 64 * 2 * (CONTEXT + 1) / 2
    products = sum(p.numel() for p in matrices) + VOCABULARY * 256
    return Side(step, sum(p.numel() for p in model.parameters()), 6.0 * (products + attention))


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


SIDES: dict[str, Callable[[Way], Side]] = {
    PEER: _llama,
    "Andromeda, same products": lambda way: _andromeda(False, way),
    "Andromeda, value embeddings": lambda way: _andromeda(True, way),
}
