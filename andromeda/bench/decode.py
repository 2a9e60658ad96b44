"""How long a model takes for one token more after a context, beside the floor: weights and cache read once at the device's bandwidth."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from andromeda.bench.ceilings import measured_hardware
from andromeda.bench.models import random_model
from andromeda.bench.timing import median_ms
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
    compiled: bool = True,
    tuned: bool = False,
    eight_bits: bool = False,
    kernels: bool = True,
    rep: int = 300,
) -> dict[str, Any]:
    """Milliseconds a token of one configuration after contexts of several lengths, `rows` sequences at once."""
    config = load(source, changes).model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = random_model(config, device, DTYPE)
    # Only the recorded pass is compiled: what reads the context is not measured here.
    caches = [_read(model, tokens, rows) for tokens in contexts]
    optimize_for_inference(model, fp8=eight_bits, compile=compiled and device.type == "cuda", autotune=tuned, decode_kernels=kernels)
    way = {"compiled": compiled, "tuned": tuned, "kernels": kernels, "linear_layers": "fp8" if eight_bits else "bf16"}
    return {"configuration": [source, *changes], "dtype": "bf16", "batch": rows, **way, "rows": [_measured(model, c, rep) for c in caches]}


@torch.no_grad()
def _read(model: Transformer, tokens: int, rows: int) -> DynamicKVCache:
    """What a prompt of random tokens leaves behind."""
    cache = DynamicKVCache(tokens)
    for part in torch.randint(0, model.config.vocab_size, (rows, tokens), device=model.head.weight.device).split(CHUNK, 1):
        model.hidden(part, cache=cache)
    return cache


@torch.no_grad()
def _measured(model: Transformer, cache: DynamicKVCache, rep: int) -> dict[str, Any]:
    device, tokens, held = model.head.weight.device, cache.length, cache.bytes()

    def read(ids: Tensor, documents: Tensor | None, cache: KVCache) -> Tensor:
        return model.head(model.hidden(ids, documents=documents, cache=cache)[:, -1])

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
    """Bytes of the embedding's table, of which a step reads a row for each sequence; none where the head is the same table."""
    table = model.embedding.tokens
    weight = getattr(table, "weight", None)
    if weight is None or weight is model.head.weight:
        return 0
    return weight.numel() * weight.element_size()
