"""Selection of the attention backend: the one named, or with `auto` the fastest that supports the spec."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType

from torch import Tensor

from andromeda.ops.attention import cudnn, decode, eager, fa4, flash, flex, sdpa
from andromeda.ops.attention.spec import AttentionSpec
from andromeda.ops.constant_result import assume_constant_result
from andromeda.utils.errors import ConfigError, nearest
from andromeda.utils.log import get_logger

_BACKENDS = {module.name: module for module in (sdpa, decode, flash, cudnn, flex, fa4, eager)}

log = get_logger(__name__)


@dataclass(frozen=True)
class BackendRanking:
    """Backends for one workload on one kind of device, the fastest first, and the measurement behind the order."""

    order: tuple[str, ...]
    source: str


RANKINGS = {
    ("cuda", "causal"): BackendRanking(
        ("fa4", "cudnn", "flex", "flash", "sdpa", "eager"),
        "H100, 24 query heads and 1 key/value head of 128, bf16, 32,768 tokens: forward and backward at 635 (fa4), 566 (cudnn), "
        "392 (flex) and 336 (flash) TFLOP/s; docs/performance.md",
    ),
    ("cuda", "masked"): BackendRanking(
        ("fa4", "flex", "sdpa", "eager"),
        "H100, the same heads, 32,768 tokens in a window of 1,024: forward and backward in 3.5 (fa4) and 5.2 ms (flex)",
    ),
    ("cuda", "biased"): BackendRanking(("flex", "sdpa", "eager"), "only flex has slopes without a T x S mask: 61 ms forward and backward"),
    ("cuda", "decode"): BackendRanking(
        ("flash", "decode", "sdpa", "flex", "eager"),
        "H100, the same heads, one query after 32,768 keys: 0.04 (flash), 0.08 (decode), 0.33 (fa4) and 0.38 ms (sdpa)",
    ),
    ("cpu", ""): BackendRanking(
        ("sdpa", "eager"),
        "Xeon, one thread, 2 query heads and 1 key/value head of 64, 16 x 512 tokens: forward and backward in 68 (sdpa) and 284 ms (eager)",
    ),
    ("", ""): BackendRanking(("sdpa", "eager"), "no other backend runs there"),
}
"""By device and workload; the empty string stands for every other one."""


def backends() -> dict[str, ModuleType]:
    """Every backend by name."""
    return dict(_BACKENDS)


def backend_ranking(spec: AttentionSpec, q: Tensor) -> BackendRanking:
    """The backends that `auto` tries for these queries (B, T, H, D), in order."""
    device = q.device.type
    return next(RANKINGS[key] for key in ((device, _workload(spec, q.shape[1])), (device, ""), ("", "")) if key in RANKINGS)


def _workload(spec: AttentionSpec, T: int) -> str:
    """The class of specs within which the order of the backends does not change."""
    if T == 1:
        return "decode"
    if spec.slopes is not None:
        return "biased"
    return "causal" if spec.is_plain_causal else "masked"


def select_backend(name: str, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> ModuleType:
    """The backend for this call. Raises ConfigError if a named one is unknown or does not support it; `auto` tries the next."""
    if name == "auto":
        return _first_supported(spec, q, k, v)
    if name not in _BACKENDS:
        raise ConfigError(f"There is no attention backend {name!r}{nearest(name, ['auto', *_BACKENDS])}.")
    reason = _BACKENDS[name].unsupported_reason(spec, q, k, v)
    if reason:
        raise ConfigError(f"Attention backend {name!r} cannot compute this call: {reason}; use backend auto or eager.")
    return _BACKENDS[name]


def _first_supported(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> ModuleType:
    fastest, missed = "", ""
    for name in backend_ranking(spec, q).order:
        reason = _BACKENDS[name].unsupported_reason(spec, q, k, v)
        if reason is None:
            if missed:
                _log_fallback(name, fastest, missed)
            return _BACKENDS[name]
        if not missed:
            fastest, missed = name, reason
    raise AssertionError("eager supports every call")


@assume_constant_result
def _log_fallback(name: str, fastest: str, reason: str) -> None:
    """Log that a slower backend was selected, also while torch.compile traces."""
    _log_once(name, fastest, reason)


@cache
def _log_once(name: str, fastest: str, reason: str) -> None:
    log.info("Attention runs on %s; %s would be faster, but %s.", name, fastest, reason)


def attend(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, backend: str = "auto") -> Tensor:
    """Attention of q (B, T, H, D) over k (B, S, G, D) and v (B, S, G, Dv): (B, T, H, Dv).

    Query head h reads key/value head h // (H / G). Raises ConfigError for a backend that is unknown or does not support this call.
    """
    spec, first = spec.crop_to_window(q.shape[1], k.shape[1])
    if first:
        k, v = k[:, first:], v[:, first:]
    return select_backend(backend, spec, q, k, v).attend(q, k, v, spec)
