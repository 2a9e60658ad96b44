"""A training step of a small model on the CPU: Andromeda beside transformers' Llama, each at its best of compiled or not.

Both have 6 layers of width 256, a vocabulary of 4096, a context of 256, 4 query heads and 1 key/value head of 64, rows of 8,
AdamW, clipping by the global norm, and equal parameters to 2 %. Andromeda enters twice:

- `same products`: the parameters lie where Llama's do, so that both sides owe the processor the same matrix products, and
  only what surrounds them can differ;
- `value embeddings`: a third of the blocks' parameters lie in a table of values instead, which costs no products.

Andromeda takes the whole step of `andromeda train` (loss in chunks, clipping, guard, optimizer). Steps of all sides alternate,
so that whatever else the machine does falls on all alike; the figure is the median.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from andromeda.config.load import from_values
from andromeda.config.run import RunConfig
from andromeda.errors import MissingExtra
from andromeda.model.flops import training_flops_per_token
from andromeda.train.objective import NextToken
from andromeda.train.rows import Rows
from andromeda.train.session import build_session
from andromeda.train.step import Stepper, Work

ROWS, CONTEXT, VOCABULARY = 8, 256, 4096
Step = Callable[[Tensor], None]
"""Learns from ids (ROWS, CONTEXT + 1)."""


def andromeda_config(kind: str, compiled: bool) -> RunConfig:
    """The run that one of our sides takes a step of."""
    mixed = kind == "value embeddings"
    model = {
        "vocab_size": VOCABULARY,
        "context": CONTEXT,
        "width": 256,
        "depth": 6,
        "attention": {"heads": 4, "kv_heads": 1, "head_dim": 64},
        "rotary": {"kind": "rope"},
        "feedforward": {"kind": "relu2", "hidden": 512 if mixed else 1024},
        "block": {"norm": "rms_plain"},
        "value_embedding": {"kind": "layered" if mixed else "none"},
    }
    train = {"batch": ROWS, "device": "cpu", "compile": "on" if compiled else "off", "precision": "fp32"}
    return from_values({"model": model, "train": train})


def andromeda_step(kind: str, compiled: bool) -> tuple[Step, int, float]:
    """A step, the parameters, and the operations of matrix products per token."""
    from andromeda.train.compiling import compile_blocks

    config = andromeda_config(kind, compiled)
    session = build_session(config, torch.device("cpu"), "bench")
    compile_blocks(session.model, config, torch.device("cpu"))
    stepper = Stepper(session, NextToken(session.model), config.train)

    def step(ids: Tensor) -> None:
        rows = Rows(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None)
        stepper(Work(rows, ROWS * CONTEXT, (0, ROWS)))

    parameters = sum(p.numel() for p in session.model.parameters())
    return step, parameters, training_flops_per_token(config.model, CONTEXT)


def llama_step(compiled: bool) -> tuple[Step, int, float]:
    """The same for transformers' Llama, with its own loss."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise MissingExtra("transformers", "bench", "The CPU benchmark's peer") from None
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        intermediate_size=683,
        max_position_embeddings=CONTEXT,
        attn_implementation="sdpa",  # type: ignore[call-arg]
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    run = torch.compile(model, dynamic=False) if compiled else model

    def step(ids: Tensor) -> None:
        run(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    blocks = sum(p.numel() for p in model.model.layers.parameters()) + VOCABULARY * 256
    return step, sum(p.numel() for p in model.parameters()), 6.0 * blocks + 6 * 6 * 2 * 256 * (CONTEXT + 1) / 2


def sides(compiled: bool) -> dict[str, Callable[[], tuple[Step, int, float]]]:
    """Everything that takes part, built only when its turn comes."""
    return {
        "transformers Llama": lambda: llama_step(compiled),
        "Andromeda, same products": lambda: andromeda_step("same products", compiled),
        "Andromeda, value embeddings": lambda: andromeda_step("value embeddings", compiled),
    }


def measure(rounds: int = 15, warmup: int = 3, compiled: tuple[bool, ...] | None = None) -> dict[str, Any]:
    """Tokens per second of every side, and the ratios of their best; `rounds` timed steps each."""
    ways = compiled or ((False, True) if shutil.which("g++") or shutil.which("clang++") else (False,))
    steps: dict[tuple[str, bool], Step] = {}
    facts: dict[str, dict[str, float]] = {}
    for way in ways:
        for name, build in sides(way).items():
            steps[name, way], parameters, flops = build()
            facts[name] = {"parameters": parameters, "flops_per_token": flops}
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, VOCABULARY, (ROWS, CONTEXT + 1), generator=generator) for _ in range(warmup + rounds)]
    seconds: dict[tuple[str, bool], list[float]] = {key: [] for key in steps}
    for number, ids in enumerate(batches):
        for key, step in steps.items():
            start = time.perf_counter()
            step(ids)
            if number >= warmup:
                seconds[key].append(time.perf_counter() - start)
    return _summary(seconds, facts)


def _summary(seconds: dict[tuple[str, bool], list[float]], facts: dict[str, dict[str, float]]) -> dict[str, Any]:
    tokens = ROWS * CONTEXT
    speeds: dict[str, Any] = {name: dict(known) for name, known in facts.items()}
    for (name, compiled), times in seconds.items():
        speeds[name]["compiled" if compiled else "eager"] = tokens / statistics.median(times)
    for known in speeds.values():
        known["best"] = max(known.get("compiled", -math.inf), known.get("eager", -math.inf))
        known["gflops"] = known["best"] * known["flops_per_token"] / 1e9
    peer = speeds["transformers Llama"]["best"]
    ratios = {name: known["best"] / peer for name, known in speeds.items() if name != "transformers Llama"}
    return {"tokens_per_step": tokens, "floor_gflops": product_rate(), "tokens_per_second": speeds, "ratio": ratios}


def product_rate(size: int = 1024, rounds: int = 8) -> float:
    """GFLOP/s of a large float32 product on this machine: the ceiling of every side."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:]) / 1e9
