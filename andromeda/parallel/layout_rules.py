"""What a layout asks of a configuration: each rule is a condition and the sentence that the user reads when it holds."""

from __future__ import annotations

from collections.abc import Callable

from andromeda.config.run import RunConfig
from andromeda.parallel.layout import Layout, resolve_layout
from andromeda.utils.errors import ConfigError

Rule = tuple[Callable[[RunConfig, Layout], bool], str]

RULES: tuple[Rule, ...] = (
    (
        lambda c, n: c.train.batch_size < n.data,
        "train.batch_size = {c.train.batch_size} sequences are fewer than the {n.data} processes that share them "
        "(parallel.replicate x parallel.shard): start fewer processes, or raise train.batch_size",
    ),
    (
        lambda c, n: c.train.batch_size % n.data != 0,
        "train.batch_size = {c.train.batch_size} is not a multiple of the {n.data} processes that share its sequences "
        "(parallel.replicate x parallel.shard): change one of them",
    ),
    (
        lambda c, n: n.data > 1 and c.train.micro_batch_size > c.train.batch_size // n.data,
        "train.micro_batch_size = {c.train.micro_batch_size} is more than the {rows} sequences that each of the {n.data} processes reads "
        "of train.batch_size = {c.train.batch_size}: lower it",
    ),
    (
        lambda c, n: bool(n.data > 1 and c.train.micro_batch_size and c.train.batch_size // n.data % c.train.micro_batch_size),
        "train.micro_batch_size = {c.train.micro_batch_size} does not divide the {rows} sequences that each process reads "
        "of train.batch_size = {c.train.batch_size}: change it",
    ),
    (
        lambda c, n: c.train.optim.kind == "adamw8bit" and n.world_size > n.replicate,
        "train.optim.kind = 'adamw8bit' needs whole matrices, which parallel.shard = {n.shard} divides: "
        "use adamw or muon, or parallel.replicate=-1 parallel.shard=1",
    ),
    (
        lambda c, n: ":" in c.train.optim.kind and n.world_size > n.replicate,
        "train.optim.kind = {c.train.optim.kind!r} may need whole matrices, which parallel.shard = {n.shard} divides: "
        "use adamw or muon, or parallel.replicate=-1 parallel.shard=1",
    ),
    (
        lambda c, n: n.world_size > 1 and c.train.device.startswith("cuda:"),
        "train.device = {c.train.device!r} names one device for {n.world_size} processes: use cuda, of which each process takes its own",
    ),
    (
        lambda c, n: n.tensor > 1 and n.expert > 1,
        "parallel.tensor = {n.tensor} splits every expert, and parallel.expert = {n.expert} spreads them: set one of them to 1",
    ),
    (
        lambda c, n: n.tensor > 1 and c.train.precision == "fp8",
        "train.precision = 'fp8' needs whole matrices, which parallel.tensor = {n.tensor} splits: use bf16, or parallel.shard",
    ),
    (
        lambda c, n: n.tensor > 1 and c.train.clip.kind == "adaptive",
        "train.clip.kind = 'adaptive' needs whole rows of the matrices, which parallel.tensor = {n.tensor} splits: "
        "use norm, or parallel.shard",
    ),
    (
        lambda c, n: n.context > 1 and bool((c.train.seq_len or c.model.max_seq_len) % (2 * n.context)),
        "parallel.context = {n.context} splits each sequence into twice as many chunks, "
        "which train.seq_len (or model.max_seq_len) is no multiple of: change one of them",
    ),
)


def check_layout(config: RunConfig, world_size: int) -> Layout:
    """The layout of `world_size` processes. Raises ConfigError, one sentence, where `config` cannot be trained in it."""
    layout = resolve_layout(config.parallel, world_size)
    for holds, sentence in RULES:
        if holds(config, layout):
            raise ConfigError(sentence.format(c=config, n=layout, rows=config.train.batch_size // layout.data) + ".")
    return layout
