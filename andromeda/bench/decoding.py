"""Time per decoded token after a context, with the roofline bound: weights and KV cache read once at the measured bandwidth."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from andromeda.bench.models import random_model
from andromeda.bench.timing import measured_hardware, median_ms
from andromeda.config.load import load
from andromeda.generate.decode_step import CudaGraphDecodeStep, StaticDecodeStep
from andromeda.generate.optimize import optimize_for_inference
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.kv_cache.protocol import KVCache
from andromeda.model.transformer import Transformer

DTYPE = torch.bfloat16
CHUNK = 8192


def measure(
    source: str,
    changes: list[str],
    contexts: Iterable[int],
    rows: int = 1,
    *,
    compile: bool = True,
    autotune: bool = False,
    fp8: bool = False,
    decode_kernels: bool = True,
    rep: int = 300,
) -> dict[str, Any]:
    """Milliseconds per token of one configuration after contexts of several lengths, with batch size `rows`."""
    config = load(source, changes).model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model(config, device, DTYPE)
    # Only the recorded decode step is compiled: prefill is not measured here.
    caches = [_read(model, tokens, rows) for tokens in contexts]
    optimize_for_inference(model, fp8=fp8, compile=compile and device.type == "cuda", autotune=autotune, decode_kernels=decode_kernels)
    mode = {"compiled": compile, "autotuned": autotune, "decode_kernels": decode_kernels, "linear_layers": "fp8" if fp8 else "bf16"}
    return {"configuration": [source, *changes], "dtype": "bf16", "batch": rows, **mode, "rows": [_measured(model, c, rep) for c in caches]}


@torch.no_grad()
def _read(model: Transformer, tokens: int, rows: int) -> DynamicKVCache:
    """KV cache of a prompt of random tokens."""
    cache = DynamicKVCache(tokens)
    for part in torch.randint(0, model.config.vocab_size, (rows, tokens), device=model.head.weight.device).split(CHUNK, 1):
        model.hidden(part, cache=cache)
    return cache


@torch.no_grad()
def _measured(model: Transformer, cache: DynamicKVCache, rep: int) -> dict[str, Any]:
    device, tokens, held = model.head.weight.device, cache.length, cache.bytes()

    def read(ids: Tensor, documents: Tensor | None, cache: KVCache) -> Tensor:
        logits: Tensor = model.head(model.hidden(ids, documents=documents, cache=cache)[:, -1])
        return logits

    start = time.perf_counter()
    step = (CudaGraphDecodeStep if device.type == "cuda" else StaticDecodeStep)(read, cache, most=256)
    first = time.perf_counter() - start
    held_weights = (x for part in (model.parameters(), model.buffers()) for x in part)
    weights = sum(x.numel() * x.element_size() for x in held_weights) - _table(model)
    known = measured_hardware(device)
    ms = median_ms(step._run, device.type, rep)
    floor = 1e3 * (weights + held) / known.bandwidth if known else None
    return {
        "context": tokens,
        "first_seconds": first,
        "ms": ms,
        "floor_ms": floor,
        "of_floor": floor / ms if floor else None,
        "cache": held,
        "weights": weights,
    }


def _table(model: Transformer) -> int:
    """Bytes of the embedding table, of which a step reads one row per sequence; 0 if it is tied to the head."""
    table = model.embedding.tokens
    weight: Tensor | None = getattr(table, "weight", None)
    if weight is None or weight is model.head.weight:
        return 0
    return weight.numel() * weight.element_size()
