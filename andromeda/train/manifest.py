"""What a stranger needs to check a result: the code, the libraries, the machine, the data, the command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import andromeda
from andromeda.parallel.layout import ONE, Layout

LIBRARIES = ("torch", "numpy", "tokenizers", "sentencepiece", "safetensors", "pydantic", "torchao", "triton")


def start_entry(step: int, device: torch.device, changes: list[str], layout: Layout = ONE) -> dict[str, Any]:
    """One start of a run: at which step, how, where, with what, on how many processes."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": shlex.join(sys.argv),
        "changes": changes,
        "device": device_name(device),
        "mesh": layout._asdict(),
        "machine": machine(),
        "versions": versions(),
        "code": code_state(),
    }


def device_name(device: torch.device) -> str:
    """A device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def machine() -> dict[str, Any]:
    """The host."""
    return {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def processor() -> str:
    """The CPU's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Python, Andromeda and the libraries that figures depend on."""
    found = {"python": platform.python_version(), "andromeda": andromeda.__version__}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def code_state() -> dict[str, Any] | None:
    """Commit of the code that runs and whether it was changed since, or None outside a git checkout."""
    folder = Path(andromeda.__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--", str(folder)))}
    except (OSError, subprocess.SubprocessError):
        return None
