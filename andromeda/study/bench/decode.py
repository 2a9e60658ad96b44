"""How long a model takes for one token more after a context, beside the floor: weights and cache read once at the device's bandwidth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from andromeda.config.load import load
from andromeda.infer.optimise import optimise
from andromeda.infer.step import FixedStep, GraphStep
from andromeda.model.cache import Cache, Nothing
from andromeda.model.hardware import recognise
from andromeda.model.transformer import Transformer
from andromeda.study.bench.subjects import empty_model
from andromeda.study.bench.timing import device_ms

DTYPE = torch.bfloat16
CHUNK = 8192


def measure(
    source: str, changes: list[str], contexts: Iterable[int], rows: int = 1, compiled: bool = True, rep: int = 300
) -> dict[str, Any]:
    """Milliseconds a token of one configuration after contexts of several lengths, `rows` sequences at once."""
    config = load(source, changes).model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = optimise(empty_model(config, device, DTYPE), compiled=compiled and device.type == "cuda")
    measured = [_measured(model, tokens, rows, rep) for tokens in contexts]
    return {"configuration": [source, *changes], "dtype": "bf16", "batch": rows, "compiled": compiled, "rows": measured}


@torch.inference_mode()
def _measured(model: Transformer, tokens: int, rows: int, rep: int) -> dict[str, Any]:
    device = model.head.weight.device

    def read(ids: Tensor, documents: Tensor | None, cache: Nothing) -> Tensor:
        return model.head(model.hidden(ids, documents=documents, cache=cache)[:, -1])

    cache = Cache(tokens)
    for part in torch.randint(0, model.config.vocab_size, (rows, tokens), device=device).split(CHUNK, 1):
        model.hidden(part, cache=cache)
    held = cache.bytes()
    step = (GraphStep if device.type == "cuda" else FixedStep)(read, cache, most=256)
    del cache
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) - _table(model)
    known = recognise(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    ms = device_ms(step._run, device.type, rep)
    floor = 1e3 * (weights + held) / known.bandwidth if known else None
    return {"context": tokens, "ms": ms, "floor_ms": floor, "of_floor": floor / ms if floor else None, "cache": held, "weights": weights}


def _table(model: Transformer) -> int:
    """Bytes of the embedding's table, of which a step reads a row for each sequence; none where the head is the same table."""
    table = model.embedder.tokens
    weight = getattr(table, "weight", None)
    if weight is None or weight is model.head.weight:
        return 0
    return weight.numel() * weight.element_size()
