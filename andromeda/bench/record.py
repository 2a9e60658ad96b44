"""Benchmark results as JSON with the command, machine and versions that made them, and the argument parser of benchmarks."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shlex
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from andromeda.bench import timing
from andromeda.utils.files import write_whole

LIBRARIES = ("andromeda", "torch", "triton", "transformers", "x-transformers", "flash-attn-4", "numpy")


def machine() -> dict[str, Any]:
    """CPU, its vector extensions, torch's threads, and the GPU."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(), "gpu": gpu}


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that determine speed."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def record(command: str, figures: dict[str, Any]) -> dict[str, Any]:
    """`figures` with command, date, machine and versions."""
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return {"command": command, "date": day, "machine": machine(), "versions": versions(), **timing.roofline_figures(), **figures}


def command_line(name: str, arguments: list[str]) -> str:
    """The command `andromeda bench NAME` with these arguments, without --out."""
    kept = [word for before, word in zip(["", *arguments], arguments, strict=False) if word != "--out" and before != "--out"]
    return shlex.join(["andromeda", "bench", name, *kept])


def save(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(result, indent=2) + "\n").encode())


class BenchmarkParser(argparse.ArgumentParser):
    """argparse with errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Print one sentence and exit with code 2."""
        self.exit(2, f"andromeda: {message}: see `{self.prog} --help`.\n")
