"""torch.compile, put on the blocks and the mixes between them from outside: one compiled block serves all layers."""

from __future__ import annotations

import shutil
import warnings

import torch

from andromeda.config.run import RunConfig
from andromeda.model.flops import training_flops_per_token
from andromeda.model.transformer import Transformer
from andromeda.utils.compile_cache import remove_torn_files
from andromeda.utils.errors import ConfigError

MIN_CPU_FLOPS = 3e14
"""Floating-point operations of a run on a CPU below which compiling takes longer than it saves (docs/training.md)."""

RECOMPILE_LIMIT = 32
"""Shapes and windows of one block that are compiled before torch gives up and runs uncompiled; its own limit is 8."""


def compile_blocks(model: Transformer, config: RunConfig, device: torch.device) -> bool:
    """Compile the blocks if `train.compile` says so; returns whether. Raises ConfigError for `on` without a C++ compiler."""
    if not should_compile(config, device):
        return False
    remove_torn_files()
    torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
    warnings.filterwarnings("ignore", module="torch._inductor")
    # Matmul results with gaps between their rows would have to be copied for kernels of our own, which want them contiguous.
    options = {"comprehensive_padding": False}
    for block in model.decoder.blocks:
        block.compile(options=options)
    model.decoder.compile_mixes(options=options)
    return True


def should_compile(config: RunConfig, device: torch.device) -> bool:
    """Whether a run on `device` compiles its blocks. Raises ConfigError for `on` without a C++ compiler."""
    train = config.train
    if train.compile == "off":
        return False
    if device.type == "cuda":
        return True
    compiler = shutil.which("g++") or shutil.which("clang++")
    if train.compile == "on" and not compiler:
        raise ConfigError("train.compile = 'on' needs a C++ compiler on this CPU: install g++, or set train.compile=off.")
    sequence = train.seq_len or config.model.max_seq_len
    work = train.steps * train.batch_size * sequence * training_flops_per_token(config.model, sequence)
    return train.compile == "on" or (bool(compiler) and work > MIN_CPU_FLOPS)
