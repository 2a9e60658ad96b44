"""What this machine can do: versions, devices, the precision and the attention kernels that jobs will get, and what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import torch

from andromeda.ops.attention import AttentionSpec, backend_ranking, backends
from andromeda.train.precision import build_precision
from andromeda.utils.hardware import recognize

PURPOSES = {
    "": "needed",
    "eightbit": "8-bit optimizer states",
    "data": "datasets and Parquet as sources of text",
    "wandb": "logging to Weights & Biases",
    "bench": "benchmarks compared with other implementations",
    "flash": "FlashAttention-4 on Hopper and newer GPUs",
    "test": "running the tests",
}
"""What each extra is for; an extra that is not named here is shown by its own name."""

HEADS, KV_HEADS, HEAD_DIM, TOKENS = 4, 1, 128, 256
"""Shape of the calls that attention backends are asked about."""


@dataclass(frozen=True)
class Library:
    """A library that some job can use."""

    name: str
    version: str | None
    """None where it is not installed."""
    purpose: str
    command: str
    """Installs it."""


@dataclass(frozen=True)
class DeviceReport:
    """Something that can train."""

    name: str
    """As torch names it."""
    description: str
    memory: int
    """Bytes."""
    precision: str
    """What `train.precision = "auto"` takes here."""
    reason: str


@dataclass(frozen=True)
class BackendChoice:
    """Which backend computes one kind of attention on one device."""

    pattern: str
    device: str
    backend: str
    refusals: dict[str, str]
    """Why each faster backend does not."""
    source: str
    """How it is known which backends are faster."""


@dataclass(frozen=True)
class EnvironmentReport:
    """Everything that `andromeda doctor` says."""

    machine: dict[str, str]
    libraries: tuple[Library, ...]
    devices: tuple[DeviceReport, ...]
    attention: tuple[BackendChoice, ...]


def examine() -> EnvironmentReport:
    """Look at this machine."""
    found = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    return EnvironmentReport(
        machine=machine(),
        libraries=tuple(libraries()),
        devices=tuple(describe(device) for device in found),
        attention=tuple(choice for device in found for choice in attention(device)),
    )


def machine() -> dict[str, str]:
    """System, interpreter and tools, by name."""
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda or "none: this torch is built for CPUs"),
        "cpu features": ", ".join(cpu_features()) or "none that matter here",
        "threads": str(torch.get_num_threads()),
        "c++ compiler": shutil.which("c++") or shutil.which("g++") or "none: torch.compile cannot make CPU kernels",
    }


def cpu_features() -> list[str]:
    """Instruction sets that decide how fast this processor trains."""
    # torch has no public question for these; its own kernels ask the same functions.
    checks = {
        "avx2": torch.cpu._is_avx2_supported,
        "avx512": torch.cpu._is_avx512_supported,
        "avx512_vnni": torch.cpu._is_vnni_supported,
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported,
        "amx": torch.cpu._is_amx_tile_supported,
    }
    return [name for name, supported in checks.items() if supported()]


def libraries() -> Iterator[Library]:
    """What the package can use, in the order in which it declares it, and triton, which torch brings on GPUs."""
    try:
        declared = importlib.metadata.requires("andromeda") or []
    except importlib.metadata.PackageNotFoundError:
        # Run from a checkout that was never installed.
        declared = []
    for requirement in declared:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        extra = re.search(r"extra == ['\"](\w+)['\"]", requirement)
        key = extra[1] if extra else ""
        if name != "andromeda":
            wanted = f"'andromeda[{key}]'" if key else "andromeda"
            yield Library(name, _version(name), PURPOSES.get(key, key), f"pip install {wanted}")
    yield Library("triton", _version("triton"), "compiled kernels on GPUs", "pip install triton")


def describe(device: torch.device) -> DeviceReport:
    """What a device is and the precision that it trains in."""
    precision = build_precision("auto", device).name
    if device.type == "cpu":
        fast = "it multiplies bfloat16 in hardware" if precision == "bf16" else "it emulates bfloat16, which is slower than fp32"
        return DeviceReport("cpu", _cpu_name(), psutil.virtual_memory().total, precision, fast)
    found = torch.cuda.get_device_properties(device)
    known = recognize(found.name)
    peak = f", {known.peak['bf16'] / 1e12:.0f} TFLOP/s in bf16 by its vendor" if known else ""
    verb = "multiplies" if precision == "bf16" else "does not multiply"
    reason = f"compute capability {found.major}.{found.minor} {verb} bfloat16 in hardware"
    return DeviceReport(str(device), found.name + peak, found.total_memory, precision, reason)


def attention(device: torch.device) -> Iterator[BackendChoice]:
    """For every kind of pattern the backend that `auto` takes on a device, in its automatic precision."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(build_precision("auto", device).name, torch.float16)
    q = torch.zeros(1, TOKENS, HEADS, HEAD_DIM, device=device, dtype=dtype)
    k = v = torch.zeros(1, TOKENS, KV_HEADS, HEAD_DIM, device=device, dtype=dtype)
    for name, pattern, queries in patterns(device):
        refusals: dict[str, str] = {}
        ranked = backend_ranking(pattern, q[:, -queries:])
        for backend in ranked.order:
            reason = backends()[backend].unsupported_reason(pattern, q[:, -queries:], k, v)
            if reason is None:
                yield BackendChoice(name, str(device), backend, refusals, ranked.source)
                break
            refusals[backend] = reason


def patterns(device: torch.device) -> Iterator[tuple[str, AttentionSpec, int]]:
    """Every kind of attention that a model can ask for, with the number of queries."""
    documents = torch.zeros(1, TOKENS, dtype=torch.long, device=device)
    slopes = torch.full((HEADS,), 0.5, device=device)
    scale = HEAD_DIM**-0.5
    yield "causal", AttentionSpec(scale), TOKENS
    yield "window", AttentionSpec(scale, window=64), TOKENS
    yield "documents", AttentionSpec(scale, documents=(documents, documents)), TOKENS
    yield "window and documents", AttentionSpec(scale, window=64, documents=(documents, documents)), TOKENS
    yield "ALiBi as a bias", AttentionSpec(scale, slopes=slopes), TOKENS
    # Folded, the bias is in the queries and keys: what remains to compute is plain causal attention.
    yield "ALiBi folded", AttentionSpec(scale), TOKENS
    yield "soft cap", AttentionSpec(scale, softcap=30.0), TOKENS
    yield "decoding one token", AttentionSpec(scale), 1
    yield "decoding, ALiBi as a bias", AttentionSpec(scale, slopes=slopes), 1


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
