"""Peak FLOP/s and bandwidth of devices: the vendors' figures, and measured ones where known.

MFU is by definition relative to the vendor's dense peak (arXiv 2204.02311, appendix B); roofline times use measured rates where known.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache

from andromeda.utils.errors import ConfigError, nearest

TERA, GIB = 1e12, 1 << 30


@dataclass(frozen=True)
class Hardware:
    """One kind of device. Rates are FLOP/s of dense matmuls (no structured sparsity), by precision."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Bytes per second, read plus written."""
    peak: dict[str, float]
    """The vendor's figures."""
    source: str
    measured: dict[str, float] = field(default_factory=dict)
    """Measured rate of a large matmul, where known."""
    link: float = 0.0
    """Bytes per second that one device sends and receives within a host; 0 is unknown."""

    def rate(self, precision: str) -> float | None:
        """The measured rate if known, else the vendor's; None if the device lacks this precision."""
        return self.measured.get(precision) or self.peak.get(precision)


def _gpu(name: str, memory: float, bandwidth: float, source: str, link: float = 0.0, **tera: float) -> Hardware:
    return Hardware(name, memory, bandwidth, {precision: rate * TERA for precision, rate in tera.items()}, source, link=link)


HARDWARE: dict[str, Hardware] = {
    "h100": _gpu("H100 SXM", 80e9, 3.35e12, "NVIDIA H100 datasheet", link=900e9, fp32=67, bf16=989.4, fp16=989.4, fp8=1978.9),
    "h200": Hardware(
        "H200 SXM",
        141e9,
        4.27e12,
        {"fp32": 67 * TERA, "bf16": 989.4 * TERA, "fp16": 989.4 * TERA, "fp8": 1978.9 * TERA},
        "NVIDIA H200 datasheet; measured: 8192-cubed matmuls and a device copy, torch 2.11, CUDA 13.0",
        {"bf16": 735 * TERA, "fp8": 1311 * TERA},
        link=900e9,
    ),
    "a100": _gpu("A100 SXM 80GB", 80e9, 2.039e12, "NVIDIA A100 datasheet", link=600e9, fp32=19.5, bf16=312, fp16=312),
    "b200": _gpu("B200 SXM", 180e9, 7.7e12, "NVIDIA HGX B200 datasheet", link=1800e9, fp32=75, bf16=2250, fp16=2250, fp8=4500),
    "4090": _gpu("GeForce RTX 4090", 24e9, 1.008e12, "NVIDIA Ada white paper", fp32=82.6, bf16=165.2, fp16=165.2, fp8=330.3),
}
"""Keys are what a user types and what a device's own name contains."""

CPU_PRECISIONS = ("fp32", "bf16")
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def find_hardware(name: str) -> Hardware:
    """The device that a user names: a key of `HARDWARE` or `cpu`, which is measured now. Raises ConfigError."""
    key = name.lower()
    if key == "cpu":
        return this_cpu()
    if key not in HARDWARE:
        raise ConfigError(f"Device {name!r} is not known{nearest(key, HARDWARE)}: give one of {', '.join(HARDWARE)} or cpu.")
    return HARDWARE[key]


def recognize(device_name: str) -> Hardware | None:
    """The entry for a device's own name ("NVIDIA H200"), or None."""
    return next((entry for key, entry in HARDWARE.items() if key in device_name.lower()), None)


def peak_flops(device: str, precision: str) -> float | None:
    """FLOP/s that MFU on this device is counted against, or None where nothing is known.

    device: a torch device ("cuda:0", "cpu") or a device's own name. precision: fp32, bf16, fp16 or fp8. A CPU has no
    vendor's figure: there it is the measured rate of a matmul on this machine.
    """
    if str(device).startswith("cpu"):
        return cpu_rate(precision) if precision in CPU_PRECISIONS else None
    name = str(device)
    if name.startswith("cuda"):
        import torch

        name = torch.cuda.get_device_name(name)
    entry = recognize(name)
    return entry.peak.get(precision) if entry else None


@cache
def this_cpu() -> Hardware:
    """This machine's processor and memory, measured once a process."""
    import psutil

    peak = {precision: cpu_rate(precision) for precision in CPU_PRECISIONS}
    return Hardware("this CPU", float(psutil.virtual_memory().total), _copy_rate(), peak, "measured now", peak)


@cache
def cpu_rate(precision: str) -> float:
    """FLOP/s of matmuls on this CPU, measured once per process."""
    return matmul_rate(precision)


def matmul_rate(precision: str, size: int = 1024, rounds: int = 5, enough: float = 1.0) -> float:
    """FLOP/s of the fastest of a few size-cubed matmuls on this CPU, within about `enough` seconds."""
    import torch

    a = torch.ones(size, size, dtype=getattr(torch, _DTYPES[precision]))
    taken: list[float] = []
    while len(taken) < rounds and sum(taken) < enough:
        taken.append(_seconds(lambda: a @ a))
    return 2 * size**3 / min(taken)


def _copy_rate(megabytes: int = 128, rounds: int = 3) -> float:
    """Bytes per second, read plus written, of the fastest of a few large copies on this CPU."""
    import torch

    source = torch.ones(megabytes << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    return max(2 * source.numel() / _seconds(lambda: target.copy_(source)) for _ in range(rounds))


def _seconds(work: object) -> float:
    start = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - start
