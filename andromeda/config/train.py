"""How a model is trained: optimizer, schedule, precision, checkpoints, guard, probes and logs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from andromeda.config.base import BaseConfig, FloatPair, StepsOrFraction, StringTuple
from andromeda.config.outer_optimizer import DiLoCoConfig

OPTIMIZERS = {
    "adamw": "andromeda.optim.adamw:AdamW",
    "adamw8bit": "andromeda.optim.adamw_8bit:AdamW8bit",
    "muon": "andromeda.optim.muon:Muon",
}
"""Built-in optimizers that `optim.kind` may name, each by its `package.module:Class`."""


class ScheduleConfig(BaseConfig):
    """Learning-rate factor over the steps, from 0 to 1 and down to `min_lr_ratio`."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After the warm-up: constant, linear or cosine decay, or constant until the cooldown (warm-up, stable, decay; arXiv 2404.06395)."""
    warmup: StepsOrFraction = 0
    """Steps of linear warm-up, or their fraction of `train.steps` (a number below 1, such as 0.01)."""
    cooldown: StepsOrFraction = 0
    """kind wsd: steps of the linear decay at the end, or their fraction of `train.steps` (such as 0.4)."""
    min_lr_ratio: float = Field(0.1, ge=0.0, le=1.0)
    """Last learning rate over the largest one."""


class ClipConfig(BaseConfig):
    """Gradient clipping, before the optimizer sees the gradients."""

    kind: Literal["none", "norm", "value", "adaptive"] = "norm"
    """By the global norm, by value, or adaptive for each unit (arXiv 2102.06171)."""
    limit: PositiveFloat = 1.0
    """Largest global norm, largest absolute value, or (adaptive) gradient norm over weight norm of one unit."""


class OptimizerConfig(BaseConfig):
    """The optimizer, its learning rates by role, and the keys of AdamW and Muon."""

    kind: str = "adamw"
    """`adamw`, `adamw8bit` (8-bit moments), `muon` (Muon for matrices, AdamW for the rest), or `package.module:Class` of your own."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keys of an optimizer of your own, checked by its `Config`."""
    lr: PositiveFloat = 3e-4
    """Learning rate of matrices, and of every role without a rate of its own."""
    betas: FloatPair = (0.9, 0.95)
    """AdamW: decay rates of the first and second moment (arXiv 1711.05101)."""
    eps: PositiveFloat = 1e-8
    """AdamW: added to the square root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay, times the learning rate at each step; of matrices only."""
    momentum: float = Field(0.95, ge=0.0, lt=1.0)
    """Muon: momentum after its warm-up."""
    momentum_start: float = Field(0.85, ge=0.0, lt=1.0)
    """Muon: momentum at the first step."""
    momentum_warmup: NonNegativeInt = 300
    """Muon: steps over which the momentum rises from `momentum_start` to `momentum`."""
    newton_schulz_steps: int = Field(5, gt=0, le=100)
    """Muon: Newton-Schulz iterations of the orthogonalization."""
    embedding_lr: NonNegativeFloat = 0.0
    """Learning rate of embedding tables; 0 takes `lr`, or 0.3 with Muon."""
    head_lr: NonNegativeFloat = 0.0
    """Learning rate of the head; 0 takes `lr`, or 0.004 with Muon."""
    scalar_lr: NonNegativeFloat = 0.0
    """Learning rate of gains, biases and mixing weights; 0 takes `lr`, or 0.04 with Muon."""


class SpikeGuardConfig(BaseConfig):
    """What counts as a bad step, and what happens then."""

    enabled: bool = True
    """Check the loss and the gradient norm of every step; off takes every step."""
    spike: PositiveFloat = 20.0
    """A gradient norm above this multiple of the recent median is bad."""
    history: int = Field(64, gt=0, le=1_000_000)
    """Steps over which the median of gradient norms is taken."""
    patience: PositiveInt = 3
    """Consecutive bad steps before the run rolls back to its last good checkpoint and skips their batches."""
    rollbacks: NonNegativeInt = 3
    """Rollbacks after which the run gives up with an error."""


class CheckpointConfig(BaseConfig):
    """When the run's state is written."""

    every: NonNegativeInt = 500
    """Steps between checkpoints; 0 writes only at the end and on a signal."""
    keep: PositiveInt = 2
    """How many checkpoints are kept, the newest ones."""
    background: bool = False
    """Write while training continues, from a copy of the state in main memory."""


class ProbesConfig(BaseConfig):
    """Small generated reasoning tasks, scored while training. They need a tokenizer that can spell them."""

    every: NonNegativeInt = 0
    """Steps between probes; 0 is off."""
    tasks: StringTuple = ("arithmetic", "recall", "induction", "multihop")
    """Names of the tasks: arithmetic, recall, induction, multihop."""
    samples: int = Field(64, gt=0, le=100_000)
    """Questions of each task in a probe."""


class SamplesConfig(BaseConfig):
    """Texts that the model writes while it trains, into `samples/training.jsonl` of the run folder."""

    every: NonNegativeInt = 0
    """Steps, and once at the end; 0 is off."""
    prompts: StringTuple = ("",)
    """Their beginnings; an empty one begins a new document."""
    max_new_tokens: int = Field(64, gt=0, le=100_000)
    """Tokens that follow each prompt, fewer where the model ends the text."""
    temperature: float = Field(0.8, ge=0.0)
    """Divides the logits; 0 always takes the most likely token."""


class LoggingConfig(BaseConfig):
    """Where metrics go besides metrics.jsonl."""

    every: PositiveInt = 10
    """Steps between lines of metrics.jsonl and of the terminal."""
    diagnostics_every: NonNegativeInt = 0
    """Steps between measurements of updates, activations and attention logits, each of which costs a forward pass; 0 is off."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder."""
    wandb: bool = False
    """Also log to Weights & Biases (an extra)."""
    project: str = "andromeda"
    """Project in Weights & Biases."""


class WindowWarmupConfig(BaseConfig):
    """Window warm-up: the attention window grows linearly over the run (0 is off)."""

    start: NonNegativeInt = 0
    """Tokens that a query sees at the first step."""
    end: NonNegativeInt = 0
    """Tokens that a query sees at the last step: `model.attention.sliding_window`."""
    step: PositiveInt = 64
    """The window is a multiple of this, so that few shapes are compiled."""


class TrainConfig(BaseConfig):
    """Steps, batches, precision, device and schedule of a run."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    seq_len: NonNegativeInt = 0
    """Tokens of a sequence; 0 takes `model.max_seq_len`."""
    batch_size: PositiveInt = 8
    """Sequences of one optimizer step, over all micro-batches and processes."""
    micro_batch_size: NonNegativeInt = 0
    """Sequences of one forward pass; 0 takes `batch_size`. The order of tokens does not depend on it."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = "auto"
    """`auto` is bf16 where the device computes it fast, else fp32."""
    device: str = "auto"
    """auto (the first GPU, else the CPU), cpu, cuda or cuda:N."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the model with torch.compile; `auto` compiles on a GPU."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Recompute activations in the backward pass to save memory: none, selective (all but matmuls and attention) or full."""
    ema: float = Field(0.0, ge=0.0, lt=1.0)
    """Decay of an exponential moving average of the weights; 0 is off."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of z-loss, the mean of (log Z)² with Z the sum of exp(logits) (arXiv 2204.02311); 0 is off."""
    eval_every: NonNegativeInt = 250
    """Steps between validations, and one at the end; 0 is off."""
    eval_tokens: PositiveInt = 65536
    """Tokens of a validation, in sequences spread evenly over the held-out text."""
    window: WindowWarmupConfig = WindowWarmupConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    optim: OptimizerConfig = OptimizerConfig()
    diloco: DiLoCoConfig = DiLoCoConfig()
    clip: ClipConfig = ClipConfig()
    spike_guard: SpikeGuardConfig = SpikeGuardConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    probes: ProbesConfig = ProbesConfig()
    samples: SamplesConfig = SamplesConfig()
    log: LoggingConfig = LoggingConfig()
