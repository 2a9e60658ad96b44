"""How fast a model writes: preset `andromeda` in bf16 on a GPU, preset `nano` in float32 on one CPU core elsewhere.

`python benchmarks/generation.py > benchmarks/results/generation-{gpu,cpu}.json`
Weights are random, which changes no time. The better of two rounds, on a CPU in time of the process, so that other work on the
machine changes little.
"""

from __future__ import annotations

import json
import platform
import time
from types import SimpleNamespace
from typing import Any

import torch

from andromeda import Andromeda
from andromeda.generate import batch
from andromeda.generate.decode_step import supports_cuda_graph
from andromeda.generate.engine import Engine

NEW, ROUNDS = 128, 2


def main() -> None:
    """Print all figures as JSON."""
    gpu = torch.cuda.is_available()
    torch.set_num_threads(1)
    if not gpu:
        batch.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    model = build_on_gpu() if gpu else Andromeda.from_preset("nano")
    lengths, batches = ((64, 7900), (8, 32)) if gpu else ((64, 380), (8, 32))
    machine = torch.cuda.get_device_name() if gpu else f"one core of {processor()}"
    figures = {
        "command": "python benchmarks/generation.py",
        "machine": f"{machine}, torch {torch.__version__}",
        "model": repr(model).splitlines(),
        "prompts": [measure(model, length, 1) for length in lengths],
        "batches": [measure(model, 64, rows) for rows in batches],
        "sampling": [measure(model, 64, 1, **settings) for settings in ({"temperature": 0}, {"top_k": 0, "top_p": 0.9})],
        "milliseconds a token without a cache": {length: without_cache(model, length) for length in lengths},
    }
    if gpu:
        batch.supports_cuda_graph = lambda config, device: False  # type: ignore[assignment]
        figures["without a CUDA graph"] = measure(model, 64, 1)
        batch.supports_cuda_graph = supports_cuda_graph
    print(json.dumps(figures, indent=1))


def build_on_gpu() -> Andromeda:
    """Filled on the device, since drawing billions of numbers on the host takes minutes."""
    model = Andromeda(device="meta", dtype="bf16").to_empty(device="cuda")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    return model


def measure(model: Andromeda, length: int, rows: int, **settings: Any) -> dict[str, Any]:
    """`rows` prompts of `length` tokens, and `NEW` tokens after each."""
    engine = Engine(model, batch=rows)
    prompts = torch.randint(model.config.vocab_size, (rows, length)).tolist()
    answers = [engine.generate(prompts, max_new_tokens=NEW, seed=0, **settings)[0] for _ in range(ROUNDS)]
    speed = max(answer.tokens_per_second for answer in answers)
    return {
        **settings,
        "prompt_tokens": length,
        "rows": rows,
        "prefill_milliseconds": round(1e3 * min(answer.prefill_seconds for answer in answers), 2),
        "milliseconds_a_token": round(1e3 / speed, 3),
        "tokens_per_second": round(rows * speed, 1),
        "cache_bytes_a_row": answers[0].cache_bytes,
    }


@torch.no_grad()
def without_cache(model: Andromeda, length: int) -> float:
    """Milliseconds of a forward pass over `length` tokens, for the next token alone."""
    ids = torch.randint(model.config.vocab_size, (1, length), device=model.head.weight.device)
    times = []
    for _ in range(ROUNDS + 1):
        start = batch.time.perf_counter()
        model.head(model.hidden(ids)[:, -1]).argmax(-1).tolist()
        times.append(batch.time.perf_counter() - start)
    return round(1e3 * min(times), 2)


def processor() -> str:
    """The processor's name."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
