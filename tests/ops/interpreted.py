"""Running tests of Triton kernels: on a GPU where there is one, otherwise by Triton's interpreter in a process of its own.

Tests of kernels are marked `gpu` and take their device from `device()`; `pytest -m gpu` runs them on a GPU. Without one, a test
that is not marked calls `run`, so that the same tests run on a CPU wherever Triton is installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and not torch.cuda.is_available()


def device() -> torch.device:
    """The device whose tensors kernels take here."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    return torch.device("cpu" if INTERPRETED else "cuda")


def run(file: str) -> None:
    """All tests of a file that are marked `gpu`, by the interpreter, which must be chosen before Triton is imported."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--no-header", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout
