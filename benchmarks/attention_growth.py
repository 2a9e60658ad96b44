"""How time and memory of attention grow with the length on one CPU core: PyTorch's flash kernel, and the definition with its T x T matrix.

`python benchmarks/attention_growth.py > benchmarks/results/attention-growth.json`
Two heads of 64 in float32, forward pass, CPU time of one thread. Memory is by how much the peak of a process of its own grows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from andromeda.bench.record import record
from andromeda.train.metrics import peak_memory

LENGTHS = (2048, 4096, 8192, 16384)
KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "definition": SDPBackend.MATH}
LONGEST = {"flash": 16384, "definition": 8192}


def measure(kernel: str, length: int) -> dict[str, float]:
    """Seconds and additional MiB of one forward pass."""
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, 2, length, 64) for _ in range(3))
    before, start = peak_memory(q.device), time.process_time()
    with sdpa_kernel(KERNELS[kernel]), torch.no_grad():
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return {"seconds": time.process_time() - start, "mib": (peak_memory(q.device) - before) / 2**20}


def main() -> None:
    """Print all figures as JSON; each is measured in a process of its own."""
    rows = []
    for kernel in KERNELS:
        for length in (n for n in LENGTHS if n <= LONGEST[kernel]):
            done = subprocess.run([sys.executable, __file__, kernel, str(length)], capture_output=True, text=True, check=True)
            rows.append({"kernel": kernel, "tokens": length, **json.loads(done.stdout)})
    print(json.dumps(record("python benchmarks/attention_growth.py", {"rows": rows}), indent=1))


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
