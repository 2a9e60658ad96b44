"""Training steps at full size on this device, compared with transformers' Llama and x-transformers.

Andromeda runs the whole step of `andromeda train`: micro-batches, fused linear cross-entropy, clipping, spike guard, optimizer. The
others run a forward pass under autocast, their own loss, a backward pass and fused AdamW, with the same micro-batch size. Rates
count model FLOPs with half of causal attention (arXiv 2307.08691), and are also given relative to a large matmul on this device.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.bench.models import ANDROMEDA_UNFUSED, LLAMA, X_TRANSFORMERS_ALIBI, llama, unfused_attention, x_transformer
from andromeda.bench.timing import measured_hardware
from andromeda.config.load import load
from andromeda.config.run import RunConfig
from andromeda.model.flops import training_flops_per_token
from andromeda.train.objective import MicroBatch, NextTokenObjective
from andromeda.train.state import build_train_state, resolve_device
from andromeda.train.step import StepBatch, StepResult, TrainStep

WARMUP = 2

Step = Callable[[Tensor], object]


def measure(
    source: str, changes: list[str], rows: int = 8, steps: int = 6, peers: Iterable[str] = (), unfused: bool = False
) -> dict[str, Any]:
    """Median over `steps` training steps of batch size `rows`, after two that are not counted.

    unfused: Andromeda also with materialized T x T attention (`models.unfused_attention`).
    """
    config = load(source, changes)
    micro = config.train.micro_batch_size or min(config.train.batch_size, rows)
    config = load(source, [*changes, f"train.batch_size={rows}", f"train.micro_batch_size={micro}"])
    device = resolve_device(config.train.device)
    makers: dict[str, Callable[[], Step]] = {"Andromeda": partial(_andromeda, config, device)}
    if unfused:
        makers[ANDROMEDA_UNFUSED] = partial(_unfused, config, device)
    makers |= {name: partial(_peer, name, config, device, micro) for name in peers}
    implementations = {name: _side(make, config, device, steps) for name, make in makers.items()}
    tokens = rows * _sequence(config)
    return {
        "configuration": [source, *changes],
        "tokens_per_step": tokens,
        "micro_batch": micro,
        "implementations": summary(implementations, config, device),
    }


def summary(implementations: dict[str, dict[str, Any]], config: RunConfig, device: torch.device) -> dict[str, dict[str, Any]]:
    """Adds rates to the times. An implementation that failed has the reason in `failed`."""
    tokens, flops = config.train.batch_size * _sequence(config), training_flops_per_token(config.model, _sequence(config))
    known = measured_hardware(device)
    ceiling = known.rate("bf16") if known else None
    for implementation in implementations.values():
        if "seconds" in implementation:
            rate = tokens / implementation["seconds"]
            implementation |= {
                "tokens_per_second": rate,
                "tflops": rate * flops / 1e12,
                "of_ceiling": rate * flops / ceiling if ceiling else None,
            }
    return implementations


def _sequence(config: RunConfig) -> int:
    return config.train.seq_len or config.model.max_seq_len


def _side(make: Callable[[], Step], config: RunConfig, device: torch.device, steps: int) -> dict[str, Any]:
    """Build, warm up and time one implementation, then free its memory."""
    gc.collect()
    ids = torch.randint(0, config.model.vocab_size, (config.train.batch_size, _sequence(config)), device=device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        return _timed(make(), ids, steps)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}
    finally:
        torch._dynamo.reset()


def _timed(step: Step, ids: Tensor, steps: int) -> dict[str, Any]:
    made = [_seconds(step, ids) for _ in range(WARMUP + steps)]
    seconds, bad = [spent for spent, _ in made], [why for _, why in made if why]
    if bad:
        # The time of skipped steps (non-finite gradients) is not a result.
        return {"failed": f"{len(bad)} of {len(made)} steps were skipped: {bad[0]}"}
    peak = torch.cuda.max_memory_allocated() if ids.is_cuda else None
    return {"first_step_seconds": seconds[0], "seconds": statistics.median(seconds[WARMUP:]), "all_seconds": seconds[WARMUP:], "peak": peak}


def _seconds(step: Step, ids: Tensor) -> tuple[float, str | None]:
    """Seconds of a step, and why it was skipped, if it was."""
    start = time.perf_counter()
    done = step(ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, done.skip_reason if isinstance(done, StepResult) else None


def _andromeda(config: RunConfig, device: torch.device) -> Step:
    session = build_train_state(config, device, "bench")
    stepper = TrainStep(session, NextTokenObjective(session.model, config.train.z_loss), config.train)
    return lambda ids: stepper(StepBatch(MicroBatch(ids, ids, None), ids.numel(), (0, len(ids))))


def _unfused(config: RunConfig, device: torch.device) -> Step:
    attention = config.model.attention.model_copy(update={"backend": "sdpa"})
    step = _andromeda(config.model_copy(update={"model": config.model.model_copy(update={"attention": attention})}), device)

    def run(ids: Tensor) -> object:
        with unfused_attention():
            return step(ids)

    return run


def _peer(name: str, config: RunConfig, device: torch.device, micro: int) -> Step:
    if name == LLAMA:
        model = llama(config.model, device, torch.float32)
        loss = _llama_loss(model, compiled=device.type == "cuda")
    else:
        model = x_transformer(config.model, device, torch.float32, alibi=name == X_TRANSFORMERS_ALIBI)

        def loss(ids: Tensor) -> Tensor:
            return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())

    return _peer_step(model, loss, device, micro)


def _llama_loss(model: Any, compiled: bool) -> Callable[[Tensor], Tensor]:
    """Llama's loss with layers compiled one by one, as Andromeda's are, and a compiled head: compiling the whole model takes minutes."""

    def from_hidden(hidden: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(model.lm_head(hidden[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())

    head = torch.compile(from_hidden, dynamic=False) if compiled else from_hidden
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=False)

    def loss(ids: Tensor) -> Tensor:
        value: Tensor = head(model.model(input_ids=ids).last_hidden_state, ids)
        return value

    return loss


def _peer_step(model: nn.Module, loss: Callable[[Tensor], Any], device: torch.device, micro: int) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(ids: Tensor) -> None:
        for part in ids.split(micro):
            with torch.autocast(device.type, torch.bfloat16):
                value = loss(part)
            (value * (len(part) / len(ids))).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
