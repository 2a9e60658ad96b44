"""Compute bounds of the presets: the least prefill time of a long prompt on one GPU, and the least number of GPUs for a target time.

The bound is the FLOPs of the linear layers at the rate of their precision and those of attention, causal pairs only, at the bfloat16
rate, with the H200 rates of `andromeda plan`. The number of GPUs is bound over target, rounded up, with perfect scaling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from andromeda.config.load import load
from andromeda.config.model import ModelConfig
from andromeda.model.flops import forward_flops_per_token, prefill_flops
from andromeda.utils.hardware import find_hardware

WINDOWS = ("model.attention.sliding_window=1024", "model.attention.full_attention_interval=8")
READ: dict[str, tuple[str, Sequence[str]]] = {
    "andromeda-125m": ("andromeda-125m", ()),
    "andromeda-360m": ("andromeda-360m", ()),
    "andromeda-360m-long": ("andromeda-360m-long", ()),
    "andromeda-1b": ("andromeda-1b", ()),
    "andromeda-1b, windows": ("andromeda-1b", WINDOWS),
    "andromeda": ("andromeda", ("model.alibi.fold_into_qk=true", "model.rotary.scale_base=32768")),
    "andromeda, windows": ("andromeda", ("model.alibi.fold_into_qk=true", "model.rotary.scale_base=32768", *WINDOWS)),
    "andromeda-7b, windows": ("andromeda-7b", WINDOWS),
}
"""Configurations: `windows` has a sliding window of 1,024 tokens in seven of eight layers."""
TARGETS = ((32768, 0.1), (100352, 0.3))
"""Prompt lengths with target seconds."""


def rows() -> list[list[str]]:
    """A head, and one line per configuration."""
    head = ["configuration"]
    for tokens, seconds in TARGETS:
        head += [f"{tokens:,} tokens, bf16", "linear layers in fp8", f"GPUs for {1e3 * seconds:.0f} ms, bf16 / fp8"]
    return [head, *([name, *_figures(*source)] for name, source in READ.items())]


def _figures(source: str, changes: Sequence[str]) -> Iterator[str]:
    for tokens, seconds in TARGETS:
        config = load(source, [*changes, f"model.max_seq_len={max(tokens, 131072)}"]).model
        bounds = [compute_bound(config, tokens, precision) for precision in ("bf16", "fp8")]
        yield from (f"{1e3 * value:,.0f} ms" for value in bounds)
        yield " / ".join(str(math.ceil(value / seconds)) for value in bounds)


def compute_bound(config: ModelConfig, tokens: int, precision: str, gpu: str = "h200") -> float:
    """Least seconds for a prompt with linear layers in this precision."""
    parts, device = forward_flops_per_token(config, tokens), find_hardware(gpu)
    attention = tokens * (parts["scores"] + parts["weighted values"])
    linear = prefill_flops(config, tokens) - attention
    return linear / (device.rate(precision) or math.nan) + attention / (device.rate("bf16") or math.nan)
