"""How long a model takes to read a prompt and give the last position's logits, beside the arithmetic floor and the peers.

The floor is the model's operations, causal pairs alone, at the device's measured rate of products: all of them in bfloat16, or
those of the linear layers in 8 bits with attention in bfloat16. Peers are compiled where that makes them faster.
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

from andromeda.bench.ceilings import measured_hardware
from andromeda.bench.models import ANDROMEDA_UNFUSED, LLAMA, X_TRANSFORMERS_ALIBI, llama, random_model, unfused_attention, x_transformer
from andromeda.bench.timing import median_ms
from andromeda.config.load import load
from andromeda.config.model import ModelConfig
from andromeda.generate.optimize import optimize_for_inference
from andromeda.model.flops import forward_flops_per_token, prefill_flops
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.transformer import Transformer

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class PrefillMode:
    """A way of reading a prompt."""

    run: Callable[[Tensor], Tensor]
    """Logits of the last position (1, V) of ids (1, T)."""
    chunk: int = 0
    """Tokens that are read at once, 0 for all."""

    def __call__(self, ids: Tensor) -> Tensor:
        """Read it."""
        return self.run(ids)


def measure(
    source: str,
    changes: list[str],
    lengths: Iterable[int],
    *,
    eight_bits: bool = False,
    chunks: Iterable[int] = (0,),
    unfused: bool = False,
    peers: Iterable[str] = (),
    rep: int = 1000,
) -> dict[str, Any]:
    """One configuration at several lengths, every side at each of them.

    chunks: tokens that Andromeda reads at once, 0 for the whole prompt; the last logits of each way are compared with those of
    the first. unfused: Andromeda once more, its attention by matrix products of T x T.
    """
    config = load(source, changes).model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    makers: dict[str, Callable[[], list[PrefillMode]]] = {"Andromeda": partial(_andromeda, config, device, eight_bits, list(chunks))}
    if unfused:
        makers[ANDROMEDA_UNFUSED] = partial(_unfused, config, device)
    makers |= {name: partial(_peer, name, config, device) for name in peers}
    rows = [
        {"side": name, **prefill_floor(config, row["tokens"], device, eight_bits), **row}
        for name, make in makers.items()
        for row in _side(make, config, list(lengths), device, rep)
    ]
    return {"configuration": [source, *changes], "linear_layers": "fp8" if eight_bits else "bf16", "rows": rows}


def prefill_floor(config: ModelConfig, tokens: int, device: torch.device, eight_bits: bool) -> dict[str, float | None]:
    """Operations, and the least milliseconds for them."""
    parts = forward_flops_per_token(config, tokens)
    attention = tokens * (parts["scores"] + parts["weighted values"])
    linear = prefill_flops(config, tokens) - attention
    known = measured_hardware(device)
    rates = (known.rate("fp8" if eight_bits else "bf16"), known.rate("bf16")) if known else (None, None)
    floor = 1e3 * (linear / rates[0] + attention / rates[1]) if rates[0] and rates[1] else None
    return {"operations": linear + attention, "floor_ms": floor}


def _side(
    make: Callable[[], list[PrefillMode]], config: ModelConfig, lengths: list[int], device: torch.device, rep: int
) -> Iterator[dict[str, Any]]:
    """A row for every length and way of reading; what does not fit says so."""
    try:
        ways = make()
    except torch.OutOfMemoryError:
        yield from ({"tokens": tokens, "chunk": 0, "failed": "out of memory"} for tokens in lengths)
        return
    for tokens in lengths:
        ids = torch.randint(0, config.vocab_size, (1, tokens), device=device)
        first: Tensor | None = None
        for way in ways:
            _forget(device)
            try:
                row, logits = _timed(way, ids, rep)
            except torch.OutOfMemoryError:
                yield {"tokens": tokens, "chunk": way.chunk, "failed": "out of memory"}
                continue
            difference = None if first is None else ((logits - first).norm() / first.norm()).item()
            first = logits if first is None else first
            yield {"tokens": tokens, "chunk": way.chunk, **row, "difference": difference}


def _forget(device: torch.device) -> None:
    """Free what others left, and let nothing that was compiled for one length serve another."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# Not inference_mode: kernels share masks among the layers only of tensors that count their changes.
@torch.no_grad()
def _timed(way: PrefillMode, ids: Tensor, rep: int) -> tuple[dict[str, Any], Tensor]:
    """Figures, and the logits (1, V) in float32. The first call's time holds all compilation."""
    start = time.perf_counter()
    logits = way(ids).float()
    finite = bool(logits.isfinite().all())
    first = time.perf_counter() - start
    ms = median_ms(lambda: way(ids), ids.device.type, rep)
    peak = torch.cuda.max_memory_allocated() if ids.is_cuda else None
    return {"first_seconds": first, "ms": ms, "peak": peak, "finite": finite}, logits


def _andromeda(config: ModelConfig, device: torch.device, eight_bits: bool, chunks: list[int]) -> list[PrefillMode]:
    model = optimize_for_inference(random_model(config, device, DTYPE), fp8=eight_bits, compile=device.type == "cuda")
    return [PrefillMode(partial(read_prompt, model, chunk=chunk), chunk) for chunk in chunks]


def _unfused(config: ModelConfig, device: torch.device) -> list[PrefillMode]:
    attention = config.attention.model_copy(update={"backend": "sdpa"})
    (way,) = _andromeda(config.model_copy(update={"attention": attention}), device, False, [0])

    def run(ids: Tensor) -> Tensor:
        with unfused_attention():
            return way(ids)

    return [PrefillMode(run)]


def read_prompt(model: Transformer, ids: Tensor, chunk: int = 0) -> Tensor:
    """Fill a cache with ids (1, T), `chunk` tokens at a time (0: at once); logits (1, V) of the last."""
    cache, hidden = DynamicKVCache(ids.shape[1]), None
    for part in ids.split(chunk or ids.shape[1], 1):
        hidden = model.hidden(part, cache=cache)
    assert hidden is not None
    return model.head(hidden[:, -1])


def _peer(name: str, config: ModelConfig, device: torch.device) -> list[PrefillMode]:
    if name == LLAMA:
        model: Any = llama(config, device, DTYPE).eval()
        run = torch.compile(model, dynamic=False) if device.type == "cuda" else model
        return [PrefillMode(lambda ids: run(input_ids=ids, logits_to_keep=1).logits[:, -1])]
    model = x_transformer(config, device, DTYPE, alibi=name == X_TRANSFORMERS_ALIBI).eval()
    return [PrefillMode(lambda ids: model.to_logits(model(ids, return_embeddings=True)[:, -1]))]
