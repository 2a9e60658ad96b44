"""Settings of a short training that continues from the weights of a run, as overrides of that run's configuration."""

from __future__ import annotations

from andromeda.config.train import OptimizerConfig
from andromeda.optim import find_optimizer
from andromeda.optim.param_groups import ROLES


def short_schedule(steps: int) -> list[str]:
    """Learning rates warm up over a tenth of the steps and decay to zero over the second half; windows do not grow."""
    return [
        f"train.steps={steps}",
        "train.schedule.kind=wsd",
        f"train.schedule.warmup={steps // 10}",
        f"train.schedule.cooldown={steps // 2}",
        "train.schedule.min_lr_ratio=0.0",
        "train.window.start=0",
        "train.window.end=0",
        f"train.checkpoints.every={max(1, steps // 4)}",
    ]


def scaled_rates(optim: OptimizerConfig, share: float) -> list[str]:
    """The learning rate of every role times `share`."""
    kind, _ = find_optimizer(optim)
    # A key of 0 that stands for `lr` stays 0.
    defaults = {f"{role}_lr": kind.default_lrs.get(role, 0.0) for role in ROLES if role != "matrix"}
    rates = {"lr": optim.lr} | {key: getattr(optim, key) or default for key, default in defaults.items()}
    return [f"train.optim.{key}={share * rate}" for key, rate in rates.items()]
