"""A whole training run in plain PyTorch around `Andromeda`: bytes of a text file, AdamW, cosine schedule, a sample at the end.

python examples/train_nano.py my.txt --steps 500

`andromeda train` does the same with packing, precision, checkpoints that survive a kill, and much more; this file shows that the
model needs none of it.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda import Andromeda

CONTEXT, BATCH = 128, 16
LEARNING_RATE, WARMUP = 3e-3, 20


def read(path: Path) -> tuple[Tensor, Tensor]:
    """The bytes of a file, the last tenth held out."""
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
    if len(data) < 10 * (CONTEXT + 1):
        raise SystemExit(f"{path} has {len(data)} bytes: give a text of at least {10 * (CONTEXT + 1)}.")
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def sample(data: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows (count, CONTEXT) and their next bytes."""
    starts = torch.randint(len(data) - CONTEXT, (count, 1), generator=generator)
    windows = data[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def loss_of(model: Andromeda, data: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Mean nats per byte of random windows."""
    inputs, targets = sample(data, count, generator)
    device = model.head.weight.device
    return F.cross_entropy(model(inputs.to(device)).flatten(0, 1), targets.to(device).flatten())


def learning_rate(step: int, steps: int) -> float:
    """Linear warmup, then a cosine to a tenth."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return LEARNING_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train(model: Andromeda, data: Tensor, steps: int, seed: int = 0) -> float:
    """Train in place; returns the last training loss."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95))
    model.train()
    started, last = time.perf_counter(), math.nan
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = loss_of(model, data, BATCH, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps - 1:
            last = loss.item()
            speed = (step + 1) * BATCH * CONTEXT / (time.perf_counter() - started)
            print(f"step {step:5d}   loss {last:.3f}   {last / math.log(2):.3f} bits/byte   {speed:,.0f} tokens/s")
    return last


@torch.no_grad()
def evaluate(model: Andromeda, data: Tensor, seed: int = 1) -> float:
    """Nats per byte of held-out windows."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    return sum(loss_of(model, data, BATCH, generator).item() for _ in range(4)) / 4


def main() -> None:
    """Train on a file and write on from its first words."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, help="folder to save the model to, as `andromeda generate` reads it")
    options = parser.parse_args()
    trained, held_out = read(options.text)
    model = Andromeda.from_preset("nano", vocab_size=256, max_seq_len=CONTEXT, device="auto", dtype="fp32")
    print(model)
    train(model, trained, options.steps)
    print(f"held out: {evaluate(model, held_out) / math.log(2):.3f} bits/byte")
    prompt = trained[:32].tolist()
    answer = model.generate(prompt, max_new_tokens=64, temperature=0.8, seed=0)
    print(bytes([*prompt, *answer]).decode("utf-8", "replace"))
    if options.out:
        model.save(options.out)


if __name__ == "__main__":
    main()
