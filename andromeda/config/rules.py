"""Every rule between the parts of a configuration: what is refused, and what is allowed but unusual.

A rule is a condition on the configuration and the clause that the user reads when it holds. Clauses name keys by their
dotted path, say why, and how to fix it; `{...}` is filled from the configuration. Ranges and types of single keys are
in model.py, data.py and train.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from andromeda.config.data import RESERVED_TARGETS
from andromeda.config.derived import (
    FOLDED_DIMS,
    FOLDED_MAX_POSITIONS,
    GATED,
    content_dim,
    in_steps,
    intermediate_size,
    original_max_seq_len,
    rotated_dims,
    smallest_scale_base,
)
from andromeda.config.heads import HEAD_KINDS
from andromeda.config.model import BACKENDS, FULL, MIXERS, QK_NORMS, VALUE_EMBEDDINGS, ModelConfig
from andromeda.config.parallel import SIZES
from andromeda.config.parts import qk_norm_name, used_mixers, with_overrides
from andromeda.config.run import RunConfig
from andromeda.config.train import OPTIMIZERS
from andromeda.config.validation_errors import join_clauses
from andromeda.utils.errors import ConfigError, nearest

Rule = tuple[Callable[[Any], Any], str]
CLASS_PATH = r"[\w.]+:[\w.]+"
"""`package.module:Class`."""

MODEL_RULES: tuple[Rule, ...] = (
    # Heads
    (
        lambda m: m.attention.num_heads % m.attention.num_kv_heads != 0,
        "model.attention.num_heads = {m.attention.num_heads} is not a multiple of "
        "model.attention.num_kv_heads = {m.attention.num_kv_heads}: "
        "every key/value head serves the same number of query heads",
    ),
    (
        lambda m: m.attention.backend not in BACKENDS,
        "model.attention.backend = {m.attention.backend!r} is not known{backend_hint}: give one of {backends}",
    ),
    (
        lambda m: m.attention.mixer not in MIXERS and not re.fullmatch(CLASS_PATH, m.attention.mixer),
        "model.attention.mixer = {m.attention.mixer!r} is not registered{mechanism_hint}: give {mechanisms} or package.module:Class",
    ),
    (
        lambda m: m.attention.mixer == "sigmoid" and m.attention.backend not in ("auto", "eager"),
        "model.attention.backend = {m.attention.backend!r} computes softmax, not model.attention.mixer = 'sigmoid': use auto",
    ),
    (
        lambda m: not _known(qk_norm_name(m), QK_NORMS),
        "model.attention.qk_norm must be one of {qk_norms} or package.module:Class, not {qk_norm!r}{qk_norm_hint}",
    ),
    (
        lambda m: not _known(m.value_embedding.kind, VALUE_EMBEDDINGS),
        "model.value_embedding.kind must be one of {value_embeddings} or package.module:Class, not {m.value_embedding.kind!r}{values_hint}",
    ),
    (
        lambda m: ":" not in m.value_embedding.kind and m.value_embedding.own,
        "there is no key model.value_embedding.{value_key}{value_key_hint}",
    ),
    (
        lambda m: ":" not in qk_norm_name(m) and not isinstance(m.attention.qk_norm, str) and m.attention.qk_norm.own,
        "there is no key model.attention.qk_norm.{qk_norm_key}: {qk_norm!r} has no keys of its own",
    ),
    # Mixers by layer
    (
        lambda m: _unknown_layers(m),
        "model.layers names {unknown_layer!r}, which is neither full nor a table model.mixers.{unknown_layer}{layer_hint}",
    ),
    (
        lambda m: set(FULL) & set(m.mixers),
        "model.mixers.{reserved} cannot be a table: that name stands for model.attention in model.layers",
    ),
    (
        lambda m: not all(_known(mixer.kind, MIXERS) for mixer in m.mixers.values()),
        "model.mixers.{strange}.kind = {strange_kind!r} is not registered{strange_hint}: give {mechanisms} or package.module:Class",
    ),
    # ALiBi
    (
        lambda m: m.alibi.num_heads > m.attention.num_heads,
        "model.alibi.num_heads = {m.alibi.num_heads} is more than model.attention.num_heads = {m.attention.num_heads}",
    ),
    (
        lambda m: m.alibi.num_heads and m.alibi.fold_into_qk and m.attention.head_dim <= 2 * FOLDED_DIMS,
        "model.alibi.fold_into_qk takes {folded} dimensions of each head, too much of model.attention.head_dim = {m.attention.head_dim}: "
        "use heads of more than {twice_folded} dimensions, or model.alibi.fold_into_qk = false",
    ),
    (
        lambda m: m.alibi.num_heads and m.alibi.fold_into_qk and m.max_seq_len > FOLDED_MAX_POSITIONS,
        "model.alibi.fold_into_qk reaches {reach} positions, fewer than model.max_seq_len = {m.max_seq_len}: "
        "set model.alibi.fold_into_qk = false",
    ),
    (
        lambda m: m.alibi.num_heads and m.alibi.fold_into_qk and m.attention.softcap,
        "model.alibi.fold_into_qk cannot be combined with model.attention.softcap = {m.attention.softcap:g}, which would cap the bias too: "
        "set model.alibi.fold_into_qk = false",
    ),
    (
        lambda m: m.alibi.num_heads and m.alibi.fold_into_qk and m.attention.mixer == "sigmoid",
        "model.alibi.fold_into_qk needs softmax, which ignores a constant added to all logits of a query, "
        "not model.attention.mixer = 'sigmoid': "
        "set model.alibi.fold_into_qk = false",
    ),
    # Rotary positions
    (
        lambda m: m.rotary.kind != "none" and not _whole_pairs(m),
        "model.rotary.fraction = {m.rotary.fraction:g} rotates {rotated:g} of {content} head dimensions, but rotation takes whole pairs: "
        "use a fraction such as {even:g}",
    ),
    (
        lambda m: m.rotary.kind == "none" and m.rotary.scaling.kind != "none",
        "model.rotary.scaling.kind = {m.rotary.scaling.kind!r} has nothing to scale while model.rotary.kind is 'none'",
    ),
    (
        lambda m: m.rotary.scaling.kind == "none" and m.rotary.scaling.factor != 1.0,
        "model.rotary.scaling.factor = {m.rotary.scaling.factor:g} has no effect while model.rotary.scaling.kind is 'none': "
        "choose linear, ntk, dynamic or yarn",
    ),
    (
        lambda m: m.rotary.scaling.beta_fast <= m.rotary.scaling.beta_slow,
        "model.rotary.scaling.beta_fast = {m.rotary.scaling.beta_fast:g} must be above beta_slow = {m.rotary.scaling.beta_slow:g}",
    ),
    (
        lambda m: m.rotary.heads == "non_alibi" and not _splits_heads(m),
        "model.rotary.heads = 'non_alibi' splits the heads between model.alibi and model.rotary: "
        "set model.alibi.num_heads above 0 and model.rotary.kind to 'rope' or 'xpos'",
    ),
    (
        lambda m: _splits_heads(m) and m.alibi.num_heads * m.attention.num_kv_heads % m.attention.num_heads != 0,
        "model.rotary.heads = 'non_alibi' needs key/value heads whose query heads are all of one kind, but "
        "model.alibi.num_heads = {m.alibi.num_heads} is not a multiple of the {served} query heads of each: "
        "change it, or model.attention.num_kv_heads = {m.attention.num_kv_heads}",
    ),
    (
        lambda m: m.rotary.head_fraction < 1 and (m.rotary.heads != "all" or m.rotary.kind == "none"),
        "model.rotary.head_fraction = {m.rotary.head_fraction:g} needs model.rotary.heads = 'all' and model.rotary.kind = 'rope' or 'xpos'",
    ),
    (
        lambda m: not _whole_heads(m),
        "model.rotary.head_fraction = {m.rotary.head_fraction:g} rotates {rotated_heads:g} of model.attention.num_kv_heads = "
        "{m.attention.num_kv_heads} key/value heads: give a share that is a whole number of them, above 0",
    ),
    # Attention span
    (
        lambda m: m.attention.sliding_window >= m.max_seq_len,
        "model.attention.sliding_window = {m.attention.sliding_window} covers the whole model.max_seq_len = {m.max_seq_len}: "
        "set it lower, or to 0 for no window",
    ),
    (
        lambda m: m.attention.full_attention_interval and not m.attention.sliding_window,
        "model.attention.full_attention_interval = {m.attention.full_attention_interval} has no effect "
        "without model.attention.sliding_window",
    ),
    (
        lambda m: m.attention.full_attention_interval > m.num_layers,
        "model.attention.full_attention_interval = {m.attention.full_attention_interval} is more than "
        "model.num_layers = {m.num_layers}: no layer would have full attention",
    ),
    # Feed-forward
    (
        lambda m: m.feedforward.kind == "moe" and m.experts.top_k > m.experts.num_experts,
        "model.experts.top_k = {m.experts.top_k} is more than model.experts.num_experts = {m.experts.num_experts}",
    ),
    (
        lambda m: m.feedforward.kind == "moe" and m.feedforward.bias,
        "model.feedforward.bias = true cannot be combined with model.feedforward.kind = 'moe': experts have no biases",
    ),
    (
        lambda m: m.block.residual == "sandwich" and m.block.kind == "parallel",
        "model.block.residual = 'sandwich' normalizes each branch by itself, and model.block.kind = 'parallel' sums both first: "
        "set model.block.kind = 'serial'",
    ),
    # DeepNorm
    (
        lambda m: m.block.residual == "deepnorm" and m.init.kind == "zero_projections",
        "model.init.kind = 'zero_projections' cannot be combined with model.block.residual = 'deepnorm': "
        "its bound assumes the scaled initialization, "
        "so use model.init.kind = 'deepnorm'",
    ),
    (
        lambda m: m.block.residual == "deepnorm" and (m.skips.first or m.skips.unet),
        "model.skips cannot be combined with model.block.residual = 'deepnorm': its bound assumes one path through the blocks",
    ),
    (
        lambda m: m.init.kind == "deepnorm" and m.block.residual != "deepnorm",
        "model.init.kind = 'deepnorm' belongs with model.block.residual = 'deepnorm': set both",
    ),
    # Embedding and head
    (
        lambda m: m.head.tied and m.embedding.kind == "factorized",
        "model.head.tied = true cannot be combined with model.embedding.kind = 'factorized': "
        "there is no embedding table of vocabulary x hidden size to share",
    ),
    (
        lambda m: m.head.tied and m.init.kind == "zero_projections",
        "model.head.tied = true cannot be combined with model.init.kind = 'zero_projections', which initializes the head to zero",
    ),
    (
        lambda m: m.embedding.kind == "factorized" and m.embedding.rank >= m.hidden_size,
        "model.embedding.rank = {m.embedding.rank} must be below model.hidden_size = {m.hidden_size}: "
        "a factorized table saves nothing otherwise",
    ),
    (
        lambda m: m.embedding.kind == "custom" and not re.fullmatch(CLASS_PATH, m.embedding.provider),
        "model.embedding.provider = {m.embedding.provider!r} must be package.module:Class when model.embedding.kind is 'custom'; "
        "a class defined inside a function has no such path",
    ),
    (
        lambda m: m.embedding.kind != "custom" and m.embedding.provider,
        "model.embedding.provider = {m.embedding.provider!r} has no effect while model.embedding.kind is "
        "{m.embedding.kind!r}: set it to 'custom'",
    ),
    # Heads
    (
        lambda m: any(not name.isidentifier() or name in RESERVED_TARGETS for name in m.task_heads),
        "model.task_heads.{strange_head} is no name for a head: letters, digits and underscores, and none of {head_names}",
    ),
    (
        lambda m: any(not _known(table.kind, ("auto", *HEAD_KINDS)) for table in m.task_heads.values()),
        "model.task_heads.{unknown_head}.kind is not a kind of head{head_hint}: give {head_kinds} or package.module:Class",
    ),
    (
        lambda m: m.shift.kind == "chunks" and m.shift.tokens >= m.hidden_size,
        "model.shift.tokens = {m.shift.tokens} leaves no channels for each token in model.hidden_size = {m.hidden_size}",
    ),
)

RUN_RULES: tuple[Rule, ...] = (
    # Data
    (
        lambda c: c.data.corpus and c.data.sources,
        "data.corpus = {c.data.corpus!r} and data.sources are both given: keep one (a single corpus can be a source)",
    ),
    # Batches
    (
        lambda c: c.train.micro_batch_size and c.train.batch_size % c.train.micro_batch_size != 0,
        "train.batch_size = {c.train.batch_size} is not a multiple of train.micro_batch_size = {c.train.micro_batch_size}",
    ),
    (
        lambda c: c.train.seq_len > c.model.max_seq_len,
        "train.seq_len = {c.train.seq_len} is longer than model.max_seq_len = {c.model.max_seq_len}: lower it, or raise model.max_seq_len",
    ),
    # DiLoCo
    (
        lambda c: c.train.diloco.workers and c.train.diloco.worker >= c.train.diloco.workers,
        "train.diloco.worker = {c.train.diloco.worker} is not below train.diloco.workers = {c.train.diloco.workers}: workers count from 0",
    ),
    (
        lambda c: c.train.diloco.workers and c.train.diloco.min_workers > c.train.diloco.workers,
        "train.diloco.min_workers = {c.train.diloco.min_workers} is more than train.diloco.workers = {c.train.diloco.workers}",
    ),
    (
        lambda c: not c.train.diloco.workers and c.train.diloco.worker,
        "train.diloco.worker = {c.train.diloco.worker} has no effect while train.diloco.workers is 0: set it to the number of all workers",
    ),
    (
        lambda c: c.train.diloco.workers and c.train.steps % c.train.diloco.inner_steps,
        "train.steps = {c.train.steps} is not a multiple of train.diloco.inner_steps = {c.train.diloco.inner_steps}: "
        "the last steps would never be averaged",
    ),
    # Schedule
    (
        lambda c: c.train.schedule.kind == "wsd" and _warmup(c) + _cooldown(c) > c.train.steps,
        "train.schedule.warmup = {c.train.schedule.warmup} and train.schedule.cooldown = {c.train.schedule.cooldown} do not fit into "
        "train.steps = {c.train.steps}: give fractions of the steps, such as train.schedule.warmup=0.05 train.schedule.cooldown=0.4",
    ),
    (
        lambda c: c.train.schedule.kind != "wsd" and _warmup(c) > c.train.steps,
        "train.schedule.warmup = {c.train.schedule.warmup} does not fit into train.steps = {c.train.steps}: "
        "give it as a fraction of the steps, such as train.schedule.warmup=0.05",
    ),
    (
        lambda c: c.train.schedule.kind != "wsd" and c.train.schedule.cooldown,
        "train.schedule.cooldown = {c.train.schedule.cooldown} has no effect while train.schedule.kind is {c.train.schedule.kind!r}: "
        "set it to 'wsd'",
    ),
    (
        lambda c: c.train.optim.kind not in OPTIMIZERS and not re.fullmatch(r"[\w.]+:\w+", c.train.optim.kind),
        "train.optim.kind = {c.train.optim.kind!r} is not an optimizer{optimizer_hint}: give {optimizers} or package.module:Class",
    ),
    (
        lambda c: not all(0 <= beta < 1 for beta in c.train.optim.betas),
        "train.optim.betas = {c.train.optim.betas} must both be at least 0 and below 1",
    ),
    # Mesh
    (
        lambda c: not all(getattr(c.parallel, size) for size in SIZES),
        "a size in [parallel] is 0: give 1 or more, or -1 for the processes that are left",
    ),
    (
        lambda c: c.model.task_heads and (c.parallel.context, c.parallel.tensor) != (1, 1),
        "model.task_heads are trained with whole sequences and matrices: set parallel.context and parallel.tensor to 1",
    ),
    (
        lambda c: c.loss.distillation.teacher and (c.parallel.context, c.parallel.tensor) != (1, 1),
        "loss.distillation needs whole sequences and matrices: set parallel.context and parallel.tensor to 1",
    ),
    (
        lambda c: c.loss.balance != "fixed" and not c.model.task_heads and not c.loss.distillation.teacher,
        "loss.balance = {c.loss.balance!r} has nothing to balance: declare a head in model.task_heads",
    ),
    (
        lambda c: not c.loss.next_token_weight and not c.model.task_heads and not c.loss.distillation.teacher,
        "loss.next_token_weight = 0 leaves nothing to learn: declare a head in model.task_heads",
    ),
    (
        lambda c: c.loss.balance != "fixed" and c.train.diloco.workers,
        "loss.balance = {c.loss.balance!r} learns weights that workers of train.diloco would not share: set it to 'fixed'",
    ),
    # Window warm-up
    (
        lambda c: bool(c.train.window.start) != bool(c.train.window.end),
        "train.window needs both start and end above 0 (a growing window), or neither",
    ),
    (
        lambda c: c.train.window.start > c.train.window.end > 0,
        "train.window.start = {c.train.window.start} is above train.window.end = {c.train.window.end}: the window grows",
    ),
    (
        lambda c: c.train.window.start and c.train.window.end != c.model.attention.sliding_window,
        "train.window.end = {c.train.window.end} must equal model.attention.sliding_window = {c.model.attention.sliding_window}: "
        "the window grows to the model's own",
    ),
    # Precision and device
    (
        lambda c: not re.fullmatch(r"auto|cpu|cuda(:\d+)?", c.train.device),
        "train.device = {c.train.device!r} must be auto, cpu, cuda or cuda:N",
    ),
    (
        lambda c: c.train.precision == "fp16" and c.model.alibi.num_heads and c.model.alibi.fold_into_qk,
        "train.precision = 'fp16' overflows in the queries with model.alibi.fold_into_qk (65536 times a slope): "
        "use bf16, or set model.alibi.fold_into_qk = false",
    ),
    (
        lambda c: c.train.precision == "fp8" and c.train.device == "cpu",
        "train.precision = 'fp8' needs a GPU with fp8 matmuls, not train.device = {c.train.device!r}: use bf16 or auto",
    ),
    (
        lambda c: c.train.precision == "fp8" and any(size % 16 for size in _matrix_sizes(c.model)),
        "train.precision = 'fp8' needs matrix sizes that are multiples of 16: model.hidden_size, model.attention.head_dim and "
        "the intermediate size are {sizes}",
    ),
    (
        lambda c: c.train.probes.every and not c.train.probes.tasks,
        "train.probes.every = {c.train.probes.every} has nothing to score: train.probes.tasks is empty",
    ),
)

TRAINING_RULES: tuple[Rule, ...] = (
    (
        lambda c: not c.data.corpus and not c.data.sources,
        "data.corpus is empty: name a folder that `andromeda data build` made, or list several in data.sources",
    ),
)

NOTE_RULES: tuple[Rule, ...] = (
    (
        lambda c: c.model.rotary.kind == "xpos" and c.model.alibi.num_heads and c.model.rotary.heads == "all",
        "The first {c.model.alibi.num_heads} heads have both the decay of xPos and the bias of ALiBi: "
        "they attend to nearer tokens than with either alone.",
    ),
    (
        lambda c: c.model.alibi.num_heads and _logit_bound(c.model) and _alibi_horizon(c.model) < c.model.max_seq_len / 8,
        "QK norm {qk_norm!r} bounds attention logits at {bound:g}, so the steepest ALiBi head reaches about {horizon:.0f} tokens.",
    ),
    (
        lambda c: c.model.rotary.kind == "xpos" and _xpos_retention(c.model) < 0.1,
        "At a distance of model.max_seq_len xPos leaves {retention:.1%} of a rotated pair's weight on average: "
        "raise model.rotary.scale_base (a quarter of the context leaves {quarter:.1%}) where distant tokens matter.",
    ),
    (
        lambda c: c.model.rotary.scaling.kind != "none" and c.model.alibi.num_heads and c.model.alibi.scale == 1.0,
        "Rotary positions are scaled but ALiBi's slopes are not: model.alibi.scale = {c.model.rotary.scaling.factor:g} would match.",
    ),
    (
        lambda c: (o := c.model.rotary.scaling.original_max_seq_len) and c.model.max_seq_len > o * c.model.rotary.scaling.factor,
        "model.max_seq_len is beyond model.rotary.scaling.factor times original_max_seq_len: positions past that were never interpolated.",
    ),
    (
        lambda c: (
            c.model.rotary.kind == "none"
            and not c.model.alibi.num_heads
            and not c.model.embedding.absolute
            and c.model.shift.kind == "none"
        ),
        "The model has no position encoding (NoPE): it can infer order from the causal mask alone.",
    ),
    (
        lambda c: c.model.alibi.fold_into_qk and not c.model.alibi.num_heads,
        "model.alibi.fold_into_qk has no effect while model.alibi.num_heads is 0.",
    ),
    (
        lambda c: c.model.block.residual == "deepnorm" and c.model.block.kind == "parallel",
        "DeepNorm with parallel blocks is unpublished: its bound still holds, but there are half as many norms.",
    ),
    (
        lambda c: c.model.block.residual == "deepnorm" and c.model.feedforward.kind in (*GATED, "moe"),
        "DeepNorm's bound assumes two matrices in the feed-forward; {c.model.feedforward.kind} has more.",
    ),
    (
        lambda c: c.model.block.residual == "deepnorm" and c.model.init.kind != "deepnorm",
        "DeepNorm without model.init.kind = 'deepnorm' scales only the residual stream: its bound does not hold.",
    ),
    (
        lambda c: c.model.block.residual == "deepnorm" and c.train.optim.kind == "muon",
        "DeepNorm's bound is derived for SGD; Muon's updates do not depend on the gradient's scale.",
    ),
    (
        lambda c: c.train.optim.kind == "muon" and c.train.clip.kind == "norm",
        "Clipping the global norm hardly affects matrices under Muon, whose update does not depend on the gradient's scale.",
    ),
    (
        lambda c: c.train.spike_guard.enabled and not c.train.checkpoints.every,
        "The spike guard rolls back to a checkpoint, but train.checkpoints.every = 0 writes none during the run.",
    ),
    (
        lambda c: set(c.model.mixers) - set(c.model.layers),
        "model.mixers has tables that no entry of model.layers names.",
    ),
    (
        lambda c: c.model.feedforward.kind != "moe" and c.model.experts != type(c.model.experts)(),
        "model.experts has no effect while model.feedforward.kind is {c.model.feedforward.kind!r}.",
    ),
)


def check_model(model: ModelConfig) -> None:
    """Raise ConfigError, one sentence for all reasons, when the model's parts do not fit together."""
    _raise_if_any(_model_reasons(model, "fp32"))


def check(config: RunConfig) -> None:
    """Raise ConfigError, one sentence for all reasons, when the run's parts do not fit together."""
    _raise_if_any(_model_reasons(config.model, config.train.precision) + _violations(RUN_RULES, c=config))


def check_training(config: RunConfig) -> None:
    """`check`, and what only a run needs: a source of tokens."""
    check(config)
    _raise_if_any(_violations(TRAINING_RULES, c=config))


def resolve(config: RunConfig) -> RunConfig:
    """The configuration, checked, with every 0 that stands for another key's value replaced by that value."""
    check(config)
    config = schedule_in_steps(config)
    train, rotary = config.train, config.model.rotary
    train = train.model_copy(
        update={"seq_len": train.seq_len or config.model.max_seq_len, "micro_batch_size": train.micro_batch_size or train.batch_size}
    )
    if rotary.scaling.kind != "none":
        scaling = rotary.scaling.model_copy(update={"original_max_seq_len": original_max_seq_len(config.model)})
        rotary = rotary.model_copy(update={"scaling": scaling})
    return config.model_copy(update={"train": train, "model": config.model.model_copy(update={"rotary": rotary})})


def schedule_in_steps(config: RunConfig) -> RunConfig:
    """The configuration with warm-up and cooldown as counts of steps where they were fractions of the run."""
    schedule = config.train.schedule.model_copy(update={"warmup": _warmup(config), "cooldown": _cooldown(config)})
    return config.model_copy(update={"train": config.train.model_copy(update={"schedule": schedule})})


def notes(config: RunConfig) -> list[str]:
    """Sentences about what is allowed but unusual, for a user to read before a run."""
    return _violations(NOTE_RULES, c=config)


def _raise_if_any(reasons: list[str]) -> None:
    if reasons:
        raise ConfigError(join_clauses(reasons))


def _model_reasons(model: ModelConfig, precision: str) -> list[str]:
    reasons = _violations(MODEL_RULES, m=model) + _overflow(model, precision)
    return reasons or _mixer_reasons(model)


def _mixer_reasons(model: ModelConfig) -> list[str]:
    """What is wrong with the tables of registered mixers: each is `[model.attention]` with some keys changed."""
    registered = [name for name in used_mixers(model) if name not in FULL and model.mixers[name].kind in MIXERS]
    return [
        f"with model.mixers.{name}, {clause}" for name in registered for clause in _violations(MODEL_RULES, m=with_overrides(model, name))
    ]


def _known(kind: str, registered: Iterable[str]) -> bool:
    return kind in registered or re.fullmatch(CLASS_PATH, kind) is not None


def _unknown_layers(m: ModelConfig) -> list[str]:
    return [name for name in m.layers if name not in FULL and name not in m.mixers]


def _violations(rules: Iterable[Rule], **parts: Any) -> list[str]:
    """The clauses of the rules whose condition holds."""
    (part,) = parts.values()
    figures = vars(_clause_values(parts.get("m") or part.model)) | _optimizers(parts.get("c"))
    return [clause.format(**parts, **figures) for holds, clause in rules if holds(part)]


def _optimizers(config: RunConfig | None) -> dict[str, str]:
    if config is None:
        return {}
    return {"optimizers": ", ".join(OPTIMIZERS), "optimizer_hint": nearest(config.train.optim.kind, OPTIMIZERS)}


def _clause_values(m: ModelConfig) -> SimpleNamespace:
    """Values that clauses quote besides the keys themselves."""
    content, norm = content_dim(m), qk_norm_name(m)
    strange = next((name for name, mixer in m.mixers.items() if not _known(mixer.kind, MIXERS)), "")
    unknown = next(iter(_unknown_layers(m)), "")
    odd_head = next((name for name, table in m.task_heads.items() if not _known(table.kind, ("auto", *HEAD_KINDS))), "")
    value_key = next(iter(m.value_embedding.own), "")
    pairs = max(1, min(content // 2, round(m.rotary.fraction * content / 2)))
    return SimpleNamespace(
        strange_head=next((name for name in m.task_heads if not name.isidentifier() or name in RESERVED_TARGETS), ""),
        head_names=", ".join(RESERVED_TARGETS),
        unknown_head=odd_head,
        head_hint=nearest(m.task_heads[odd_head].kind, HEAD_KINDS) if odd_head else "",
        head_kinds=", ".join(HEAD_KINDS),
        backends=", ".join(BACKENDS),
        backend_hint=nearest(m.attention.backend, BACKENDS),
        mechanisms=", ".join(MIXERS),
        mechanism_hint=nearest(m.attention.mixer, MIXERS),
        qk_norm=norm,
        qk_norms=", ".join(QK_NORMS),
        qk_norm_hint=nearest(norm, QK_NORMS),
        qk_norm_key=next(iter(getattr(m.attention.qk_norm, "own", {})), ""),
        value_embeddings=", ".join(VALUE_EMBEDDINGS),
        values_hint=nearest(m.value_embedding.kind, VALUE_EMBEDDINGS),
        value_key=value_key,
        value_key_hint=nearest(value_key, type(m.value_embedding).model_fields).replace("mean ", "mean model.value_embedding."),
        unknown_layer=unknown,
        layer_hint=nearest(unknown, [*FULL, *m.mixers]),
        reserved=next((name for name in FULL if name in m.mixers), ""),
        strange=strange,
        strange_kind=m.mixers[strange].kind if strange else "",
        strange_hint=nearest(m.mixers[strange].kind, MIXERS) if strange else "",
        folded=FOLDED_DIMS,
        twice_folded=2 * FOLDED_DIMS,
        reach=FOLDED_MAX_POSITIONS,
        content=content,
        served=m.attention.num_heads // m.attention.num_kv_heads,
        rotated=m.rotary.fraction * content,
        rotated_heads=m.rotary.head_fraction * m.attention.num_kv_heads,
        even=2 * pairs / content if content > 0 else 1.0,
        sizes=", ".join(map(str, _matrix_sizes(m))),
        bound=_logit_bound(m),
        horizon=_alibi_horizon(m) if m.alibi.num_heads else 0.0,
        retention=_xpos_retention(m),
        quarter=_xpos_decay(m, 4.0),
    )


def _warmup(c: RunConfig) -> int:
    return in_steps(c.train.schedule.warmup, c.train.steps)


def _cooldown(c: RunConfig) -> int:
    return in_steps(c.train.schedule.cooldown, c.train.steps)


def _splits_heads(m: ModelConfig) -> bool:
    """Whether some heads have ALiBi and the others rotary positions."""
    return bool(m.rotary.heads == "non_alibi" and m.alibi.num_heads and m.rotary.kind != "none")


def _whole_pairs(m: ModelConfig) -> bool:
    """Whether the fraction rotates a whole, positive number of pairs, up to the rounding of a fraction written in few digits."""
    pairs = m.rotary.fraction * content_dim(m) / 2
    return round(pairs) >= 1 and abs(pairs - round(pairs)) < 0.01


def _whole_heads(m: ModelConfig) -> bool:
    """Whether the share of rotated heads is a whole, positive number of key/value heads, up to the rounding of few digits."""
    heads = m.rotary.head_fraction * m.attention.num_kv_heads
    return round(heads) >= 1 and abs(heads - round(heads)) < 0.01


def _matrix_sizes(m: ModelConfig) -> tuple[int, ...]:
    return m.hidden_size, m.attention.head_dim, intermediate_size(m)


def _overflow(m: ModelConfig, precision: str) -> list[str]:
    """xPos multiplies queries and keys by factors that grow towards the context's ends, as far as the number format reaches."""
    bits = 15 if precision == "fp16" else 120
    safe = smallest_scale_base(m, bits)
    if m.rotary.kind != "xpos" or m.rotary.scale_base >= safe:
        return []
    return [
        f"model.rotary.scale_base = {m.rotary.scale_base} overflows {'float16' if precision == 'fp16' else 'float32'} at "
        f"model.max_seq_len = {m.max_seq_len}: set it to at least {safe}"
    ]


def _logit_bound(m: ModelConfig) -> float:
    """Largest attention logit that the QK norm lets through; 0 where there is none or it is learned."""
    D = content_dim(m)
    lengths = {"l2": 1.0, "rms": float(D)}  # product of the lengths of query and key
    scales = {"l2": 10.0, "rms": 1 / math.sqrt(max(D, 1))}
    norm = qk_norm_name(m)
    return lengths[norm] * (m.attention.scale or scales[norm]) if norm in lengths else 0.0


def _alibi_horizon(m: ModelConfig) -> float:
    """Distance at which the steepest ALiBi slope outweighs the largest difference of two logits."""
    steepest = 2 ** (-8 / 2 ** math.floor(math.log2(m.alibi.num_heads)))
    return 2 * _logit_bound(m) * m.alibi.scale / float(steepest)


def _xpos_retention(m: ModelConfig) -> float:
    """Mean over the rotated pairs of what xPos leaves of them at the distance of the whole context."""
    return _xpos_decay(m, m.max_seq_len / (m.rotary.scale_base * m.rotary.scaling.factor))


def _xpos_decay(m: ModelConfig, bases: float) -> float:
    pairs = max(rotated_dims(m) // 2, 1)
    return float(sum(((i / pairs + 0.4) / 1.4) ** bases for i in range(pairs)) / pairs)
