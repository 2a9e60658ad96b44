"""What the loss, the optimizers and the clippers cost on one CPU core.

`python benchmarks/optim.py [seconds] > benchmarks/results/optim.json`
CPU time of one thread, the least of many interleaved rounds, so that other work on the machine changes little.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from andromeda.config.model import AttentionConfig, ModelConfig
from andromeda.config.train import ClipConfig, OptimizerConfig
from andromeda.model.transformer import Transformer
from andromeda.ops.cross_entropy import linear_cross_entropy
from andromeda.optim import OptimizerContainer, build_optimizer, clip_gradients

MODEL = ModelConfig(
    vocab_size=4096, max_seq_len=256, hidden_size=256, num_layers=6, attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=64)
)
BATCH, LENGTH = 8, 256


def main(seconds: float) -> None:
    """Print all figures as JSON."""
    torch.set_num_threads(1)
    model = Transformer(MODEL)
    ids = torch.randint(MODEL.vocab_size, (BATCH, LENGTH))
    optimizers = {
        kind: build_optimizer(model, OptimizerConfig.model_validate({"kind": kind}), "on") for kind in ("adamw", "adamw8bit", "muon")
    }
    optimizers["adamw8bit, eager"] = build_optimizer(model, OptimizerConfig(kind="adamw8bit"), "off")
    cases = {**losses(model, ids), **updates(model, optimizers)}
    for run in cases.values():
        run()
    print(
        json.dumps(
            {
                "command": "python benchmarks/optim.py",
                "machine": f"one core of {processor()}, torch {torch.__version__}",
                "parameters": sum(p.numel() for p in model.parameters()),
                "tokens": BATCH * LENGTH,
                "milliseconds": {name: round(1e3 * least, 1) for name, least in measure(cases, seconds).items()},
                "state_bytes": {name: state_bytes(optimizer) for name, optimizer in optimizers.items()},
            },
            indent=1,
        )
    )


def losses(model: Transformer, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward pass of the model with either loss, and the losses alone at several chunk sizes."""
    targets = ids.roll(-1, 1)
    hidden = torch.randn(BATCH, LENGTH, MODEL.hidden_size, requires_grad=True)

    def plain(x: torch.Tensor) -> None:
        F.cross_entropy(model.head(x).flatten(0, 1), targets.flatten()).backward()

    def chunked(x: torch.Tensor, chunk: int = 0) -> None:
        (linear_cross_entropy(x, model.head.weight, targets, chunk=chunk).total / targets.numel()).backward()

    alone = {f"loss, chunks of {n}": partial(chunked, hidden, n) for n in (64, 128, 256, 512, 1024, 2048)}
    return {
        "step without update, all logits": lambda: plain(model.hidden(ids)),
        "step without update": lambda: chunked(model.hidden(ids)),
        "loss, all logits": lambda: plain(hidden),
        **alone,
    }


def updates(model: Transformer, optimizers: dict[str, OptimizerContainer]) -> dict[str, Callable[[], object]]:
    """One update by each optimizer at a rate of zero, and each clipper with all of it to do."""
    for optimizer in optimizers.values():
        optimizer.set_lr_factor(0.0, 0)
    cases: dict[str, Callable[[], object]] = {f"update, {name}": optimizer.step for name, optimizer in optimizers.items()}
    for kind in ("none", "norm", "value", "adaptive"):
        config = ClipConfig.model_validate({"kind": kind, "limit": 1e-3})
        cases[f"clip, {kind}"] = partial(clip_gradients, list(model.parameters()), config)
    return cases


def measure(cases: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Least CPU seconds of each case."""
    least = dict.fromkeys(cases, float("inf"))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, run in cases.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    return least


def state_bytes(optimizer: OptimizerContainer) -> int:
    """Bytes of an optimizer's state."""
    return sum(tensor.numel() * tensor.element_size() for tensor in optimizer.state_tensors().values())


def processor() -> str:
    """The processor's name."""
    with open("/proc/cpuinfo") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 120.0)
