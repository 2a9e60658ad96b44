"""How long a model takes to read a prompt and give the last position's logits, beside the arithmetic floor and the peers.

The floor is the model's operations, causal pairs alone, at the device's measured rate of products: all of them in bfloat16, or
those of the linear layers in 8 bits with attention in bfloat16. Peers are compiled where that makes them faster.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from andromeda.config.load import load
from andromeda.config.model import ModelConfig
from andromeda.infer.optimise import optimise
from andromeda.model.cache import Cache
from andromeda.model.flops import forward_flops_per_token, prefill_flops
from andromeda.model.hardware import recognise
from andromeda.model.transformer import Transformer
from andromeda.study.bench.subjects import empty_model, llama, x_transformer
from andromeda.study.bench.timing import device_ms

PEERS = ("transformers Llama", "x-transformers", "x-transformers without ALiBi")
DTYPE = torch.bfloat16

Read = Callable[[Tensor], Tensor]
"""Logits of the last position (1, V) of ids (1, T)."""


def measure(
    source: str, changes: list[str], lengths: Iterable[int], *, eight_bits: bool = False, peers: Iterable[str] = (), rep: int = 2000
) -> dict[str, Any]:
    """One configuration at several lengths, every side at each of them."""
    config = load(source, changes).model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    makers: dict[str, Callable[[], Read]] = {"Andromeda": partial(_andromeda, config, device, eight_bits)}
    makers |= {name: partial(_peer, name, config, device) for name in peers}
    rows = [
        {"side": name, "tokens": tokens, **floors(config, tokens, device, eight_bits), **figures}
        for name, make in makers.items()
        for tokens, figures in _side(make, config, list(lengths), device, rep)
    ]
    return {"configuration": [source, *changes], "linear_layers": "fp8" if eight_bits else "bf16", "rows": rows}


def floors(config: ModelConfig, tokens: int, device: torch.device, eight_bits: bool) -> dict[str, float | None]:
    """Operations, and the least milliseconds for them."""
    parts = forward_flops_per_token(config, tokens)
    attention = tokens * (parts["scores"] + parts["weighted values"])
    linear = prefill_flops(config, tokens) - attention
    known = recognise(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    rates = (known.rate("fp8" if eight_bits else "bf16"), known.rate("bf16")) if known else (None, None)
    floor = 1e3 * (linear / rates[0] + attention / rates[1]) if rates[0] and rates[1] else None
    return {"operations": linear + attention, "floor_ms": floor}


def _side(
    make: Callable[[], Read], config: ModelConfig, lengths: list[int], device: torch.device, rep: int
) -> Iterable[tuple[int, dict[str, Any]]]:
    read: Read | None = None
    for tokens in lengths:
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            read = read or make()
            yield tokens, _timed(read, torch.randint(0, config.vocab_size, (1, tokens), device=device), rep)
        except torch.OutOfMemoryError:
            yield tokens, {"failed": "out of memory"}


@torch.inference_mode()
def _timed(read: Read, ids: Tensor, rep: int) -> dict[str, Any]:
    logits = read(ids)
    finite = bool(logits.isfinite().all())
    ms = device_ms(lambda: read(ids), ids.device.type, rep)
    return {"ms": ms, "peak": torch.cuda.max_memory_allocated() if ids.is_cuda else None, "finite": finite}


def _andromeda(config: ModelConfig, device: torch.device, eight_bits: bool) -> Read:
    model = optimise(empty_model(config, device, DTYPE), eight_bits=eight_bits, compiled=device.type == "cuda")
    return partial(read_prompt, model)


def read_prompt(model: Transformer, ids: Tensor, chunk: int = 0) -> Tensor:
    """Fill a cache with ids (1, T), `chunk` tokens at a time (0: at once); logits (1, V) of the last."""
    cache, hidden = Cache(ids.shape[1]), None
    for part in ids.split(chunk or ids.shape[1], 1):
        hidden = model.hidden(part, cache=cache)
    assert hidden is not None
    return model.head(hidden[:, -1])


def _peer(name: str, config: ModelConfig, device: torch.device) -> Read:
    if name == "transformers Llama":
        model: Any = llama(config, device, DTYPE).eval()
        run = torch.compile(model, dynamic=False) if device.type == "cuda" else model
        return lambda ids: run(input_ids=ids, logits_to_keep=1).logits[:, -1]
    model = x_transformer(config, device, DTYPE, alibi="without" not in name).eval()
    return lambda ids: model.to_logits(model(ids, return_embeddings=True)[:, -1])
