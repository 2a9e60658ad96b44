"""An equal budget for every arm: how many steps it gets, and its schedule stretched to fit them."""

from __future__ import annotations

import statistics

from andromeda.config.load import from_values
from andromeda.config.run import RunConfig
from andromeda.model.flops import training_flops_per_token
from andromeda.optim.schedules import build_window
from andromeda.utils.errors import ConfigError

SAMPLES = 64
"""Points of a run at which the window is looked up where it grows."""


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of one optimizer step."""
    return config.train.batch_size * (config.train.seq_len or config.model.max_seq_len)


def flops_per_token(config: RunConfig) -> float:
    """Model FLOPs of training per token, averaged over the run where the window grows."""
    sequence, train = config.train.seq_len or config.model.max_seq_len, config.train
    if not train.window.end:
        return training_flops_per_token(config.model, sequence)
    window = build_window(train.window, SAMPLES)
    return statistics.fmean(training_flops_per_token(config.model, sequence, window=window(at)) for at in range(SAMPLES))


def amount_of(kind: str, config: RunConfig) -> float:
    """Tokens or FLOPs that a configuration is made for."""
    tokens = float(config.train.steps * tokens_per_step(config))
    return tokens * flops_per_token(config) if kind == "flops" else tokens


def spent(kind: str, config: RunConfig, seconds_per_step: float | None = None) -> float | None:
    """Tokens, FLOPs or seconds that a run of `config` takes; None for seconds where a step was not measured."""
    if kind == "seconds":
        return config.train.steps * seconds_per_step if seconds_per_step else None
    return amount_of(kind, config)


def steps_for(kind: str, amount: float, config: RunConfig, seconds_per_step: float | None = None) -> int:
    """Steps of `config` that come nearest to `amount` of tokens, FLOPs or seconds. Raises ConfigError when that is less than one."""
    if kind == "seconds":
        if not seconds_per_step:
            raise ConfigError("A budget of seconds needs the time of a step: measure it with --cost-steps above 0.")
        each = seconds_per_step
    else:
        each = tokens_per_step(config) * (flops_per_token(config) if kind == "flops" else 1.0)
    steps = round(amount / each)
    if steps < 1:
        raise ConfigError(f"The budget of {amount:.4g} {kind} is less than one step of {config.name!r}, which takes {each:.4g}: raise it.")
    return steps


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The configuration with this many steps; warm-ups and cooldown keep their share of the run."""
    ratio = steps / config.train.steps
    values = config.model_dump()
    train = values["train"]
    train["steps"] = steps
    schedule, optim = train["schedule"], train["optim"]
    schedule["warmup"] = round(schedule["warmup"] * ratio)
    schedule["cooldown"] = min(round(schedule["cooldown"] * ratio), steps - schedule["warmup"])
    optim["momentum_warmup"] = round(optim["momentum_warmup"] * ratio)
    return from_values(values)
