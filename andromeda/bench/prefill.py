"""Time to prefill a prompt and return the logits of the last position, with the compute bound and other implementations.

The bound is the model's FLOPs, causal pairs only, at the measured matmul rate: all in bfloat16, or linear layers in fp8 with
attention in bfloat16. Other implementations are compiled where that makes them faster.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from andromeda.bench.models import ANDROMEDA_UNFUSED, LLAMA, X_TRANSFORMERS_ALIBI, llama, random_model, unfused_attention, x_transformer
from andromeda.bench.timing import measured_hardware, median_ms
from andromeda.config.load import load
from andromeda.config.model import ModelConfig
from andromeda.generate.optimize import optimize_for_inference
from andromeda.model.flops import forward_flops_per_token, prefill_flops
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.transformer import Transformer

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class PrefillMode:
    """A way to prefill a prompt."""

    run: Callable[[Tensor], Tensor]
    """Logits of the last position (1, V) of ids (1, T)."""
    chunk: int = 0
    """Tokens per chunk, 0 for the whole prompt."""

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits of the last position."""
        return self.run(ids)


def measure(
    source: str,
    changes: list[str],
    lengths: Iterable[int],
    *,
    fp8: bool = False,
    chunks: Iterable[int] = (0,),
    unfused: bool = False,
    peers: Iterable[str] = (),
    rep: int = 1000,
) -> dict[str, Any]:
    """One configuration at several prompt lengths, with every implementation.

    chunks: tokens per chunk of Andromeda's prefill, 0 for the whole prompt; the last logits of each are compared with those of the
    first. unfused: Andromeda also with materialized T x T attention.
    """
    config = load(source, changes).model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    makers: dict[str, Callable[[], list[PrefillMode]]] = {"Andromeda": partial(_andromeda, config, device, fp8, list(chunks))}
    if unfused:
        makers[ANDROMEDA_UNFUSED] = partial(_unfused, config, device)
    makers |= {name: partial(_peer, name, config, device) for name in peers}
    rows = [
        {"implementation": name, **prefill_floor(config, row["tokens"], device, fp8), **row}
        for name, make in makers.items()
        for row in _side(make, config, list(lengths), device, rep)
    ]
    return {"configuration": [source, *changes], "linear_layers": "fp8" if fp8 else "bf16", "rows": rows}


def prefill_floor(config: ModelConfig, tokens: int, device: torch.device, fp8: bool) -> dict[str, float | None]:
    """FLOPs, and the least milliseconds for them at the measured rates."""
    parts = forward_flops_per_token(config, tokens)
    attention = tokens * (parts["scores"] + parts["weighted values"])
    linear = prefill_flops(config, tokens) - attention
    known = measured_hardware(device)
    rates = (known.rate("fp8" if fp8 else "bf16"), known.rate("bf16")) if known else (None, None)
    floor = 1e3 * (linear / rates[0] + attention / rates[1]) if rates[0] and rates[1] else None
    return {"operations": linear + attention, "floor_ms": floor}


def _side(
    make: Callable[[], list[PrefillMode]], config: ModelConfig, lengths: list[int], device: torch.device, rep: int
) -> Iterator[dict[str, Any]]:
    """One row per length and prefill mode; one that does not fit in memory has `failed`."""
    try:
        modes = make()
    except torch.OutOfMemoryError:
        yield from ({"tokens": tokens, "chunk": 0, "failed": "out of memory"} for tokens in lengths)
        return
    for tokens in lengths:
        ids = torch.randint(0, config.vocab_size, (1, tokens), device=device)
        first: Tensor | None = None
        for mode in modes:
            _forget(device)
            try:
                row, logits = _timed(mode, ids, rep)
            except torch.OutOfMemoryError:
                yield {"tokens": tokens, "chunk": mode.chunk, "failed": "out of memory"}
                continue
            difference = None if first is None else ((logits - first).norm() / first.norm()).item()
            first = logits if first is None else first
            yield {"tokens": tokens, "chunk": mode.chunk, **row, "difference": difference}


def _forget(device: torch.device) -> None:
    """Free memory, and drop code that was compiled for another length."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# Not inference_mode: kernels share masks between layers only for tensors with a version counter.
@torch.no_grad()
def _timed(mode: PrefillMode, ids: Tensor, rep: int) -> tuple[dict[str, Any], Tensor]:
    """Times, and the logits (1, V) in float32. The first call includes all compilation."""
    start = time.perf_counter()
    logits = mode(ids).float()
    finite = bool(logits.isfinite().all())
    first = time.perf_counter() - start
    ms = median_ms(lambda: mode(ids), ids.device.type, rep)
    peak = torch.cuda.max_memory_allocated() if ids.is_cuda else None
    return {"first_seconds": first, "ms": ms, "peak": peak, "finite": finite}, logits


def _andromeda(config: ModelConfig, device: torch.device, fp8: bool, chunks: list[int]) -> list[PrefillMode]:
    model = optimize_for_inference(random_model(config, device, DTYPE), fp8=fp8, compile=device.type == "cuda")
    return [PrefillMode(partial(read_prompt, model, chunk=chunk), chunk) for chunk in chunks]


def _unfused(config: ModelConfig, device: torch.device) -> list[PrefillMode]:
    attention = config.attention.model_copy(update={"backend": "sdpa"})
    (mode,) = _andromeda(config.model_copy(update={"attention": attention}), device, False, [0])

    def run(ids: Tensor) -> Tensor:
        with unfused_attention():
            return mode(ids)

    return [PrefillMode(run)]


def read_prompt(model: Transformer, ids: Tensor, chunk: int = 0) -> Tensor:
    """Fill a KV cache with ids (1, T), `chunk` tokens at a time (0: all at once); logits (1, V) of the last."""
    cache, hidden = DynamicKVCache(ids.shape[1]), None
    for part in ids.split(chunk or ids.shape[1], 1):
        hidden = model.hidden(part, cache=cache)
    assert hidden is not None
    logits: Tensor = model.head(hidden[:, -1])
    return logits


def _peer(name: str, config: ModelConfig, device: torch.device) -> list[PrefillMode]:
    if name == LLAMA:
        model: Any = llama(config, device, DTYPE).eval()
        run = torch.compile(model, dynamic=False) if device.type == "cuda" else model
        return [PrefillMode(lambda ids: run(input_ids=ids, logits_to_keep=1).logits[:, -1])]
    model = x_transformer(config, device, DTYPE, alibi=name == X_TRANSFORMERS_ALIBI).eval()
    return [PrefillMode(lambda ids: model.to_logits(model(ids, return_embeddings=True)[:, -1]))]
