"""What a key or an option is called here that version 0.1 or another library calls differently."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from andromeda.config.aliases import FLAT_NAMES
from andromeda.config.keys import flatten
from andromeda.utils.errors import nearest

RENAMED = {
    "model.width": "model.hidden_size",
    "model.context": "model.max_seq_len",
    "model.attention.kv_heads": "model.attention.num_kv_heads",
    "model.attention.heads": "model.attention.num_heads",
    "model.attention.mechanism": "model.attention.mixer",
    "model.attention.window": "model.attention.sliding_window",
    "model.attention.global_every": "model.attention.full_attention_interval",
    "model.feedforward.hidden": "model.feedforward.intermediate_size",
    "model.feedforward.mult": "model.feedforward.mlp_ratio",
    "model.experts.count": "model.experts.num_experts",
    "model.experts.active": "model.experts.top_k",
    "model.experts.shared": "model.experts.num_shared_experts",
    "model.experts.score": "model.experts.router_activation",
    "model.experts.normalise": "model.experts.normalize",
    "model.experts.rate": "model.experts.bias_update_rate (balance bias) or model.experts.aux_loss_coef (balance loss)",
    "model.alibi.heads": "model.alibi.num_heads",
    "model.alibi.fold": "model.alibi.fold_into_qk",
    "model.rotary.scaling.original_context": "model.rotary.scaling.original_max_seq_len",
    "train.sequence": "train.seq_len",
    "train.batch": "train.batch_size",
    "train.micro_batch": "train.micro_batch_size",
    "train.checkpointing": "train.activation_checkpointing",
    "train.guard": "train.spike_guard",
    "train.schedule.final": "train.schedule.min_lr_ratio",
    "train.log.health": "train.log.diagnostics_every",
}
"""Keys of version 0.1 and what they are called now; remove after one release."""

_NANOGPT = {
    "n_layer": "model.num_layers",
    "n_head": "model.attention.num_heads",
    "n_embd": "model.hidden_size",
    "block_size": "model.max_seq_len",
    "max_iters": "train.steps",
    "grad_clip": "train.clip.limit",
    "beta1": "train.optim.betas",
    "beta2": "train.optim.betas",
    "decay_lr": "train.schedule.kind",
    "warmup_iters": "train.schedule.warmup",
    "lr_decay_iters": "train.schedule.cooldown",
    "min_lr": "train.schedule.min_lr_ratio",
    "eval_interval": "train.eval_every",
    "eval_iters": "train.eval_tokens",
    "log_interval": "train.log.every",
    "dtype": "train.precision",
    "dataset": "data.corpus",
    "wandb_log": "train.log.wandb",
    "wandb_project": "train.log.project",
    "out_dir": "--out",
}
_HUGGING_FACE = {
    "learning_rate": "train.optim.lr",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size (train.batch_size is the whole step's)",
    "max_steps": "train.steps",
    "num_train_epochs": "train.steps",
    "warmup_steps": "train.schedule.warmup",
    "warmup_ratio": "train.schedule.warmup",
    "lr_scheduler_type": "train.schedule.kind",
    "adam_beta1": "train.optim.betas",
    "adam_beta2": "train.optim.betas",
    "adam_epsilon": "train.optim.eps",
    "max_grad_norm": "train.clip.limit",
    "eval_steps": "train.eval_every",
    "save_steps": "train.checkpoints.every",
    "save_total_limit": "train.checkpoints.keep",
    "logging_steps": "train.log.every",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "gradient_checkpointing": "train.activation_checkpointing",
    "torch_compile": "train.compile",
    "optimizer": "train.optim.kind",
    "optimizer_type": "train.optim.kind",
    "report_to": "train.log.tensorboard or train.log.wandb",
    "run_name": "name",
    "dataloader_num_workers": "data.workers",
    "output_dir": "--out",
    "resume_from_checkpoint": "--resume",
    "n_positions": "model.max_seq_len",
    "n_ctx": "model.max_seq_len",
    "n_inner": "model.feedforward.intermediate_size",
    "activation_function": "model.feedforward.kind",
    "layer_norm_epsilon": "model.block.eps",
    "num_local_experts": "model.experts.num_experts",
    "num_experts_per_tok": "model.experts.top_k",
}
_TORCHTITAN = {
    "n_layers": "model.num_layers",
    "n_heads": "model.attention.num_heads",
    "n_kv_heads": "model.attention.num_kv_heads",
    "ffn_dim_multiplier": "model.feedforward.mlp_ratio",
    "norm_eps": "model.block.eps",
    "local_batch_size": "train.micro_batch_size",
    "global_batch_size": "train.batch_size",
    "max_norm": "train.clip.limit",
    "optimizer.name": "train.optim.kind",
    "decay_ratio": "train.schedule.cooldown",
    "decay_type": "train.schedule.kind",
    "min_lr_factor": "train.schedule.min_lr_ratio",
    "checkpoint.interval": "train.checkpoints.every",
    "log_freq": "train.log.every",
    "activation_checkpoint.mode": "train.activation_checkpointing",
    "validation.freq": "train.eval_every",
}
ELSEWHERE = {**_NANOGPT, **_HUGGING_FACE, **_TORCHTITAN}
"""Names of nanoGPT, Hugging Face (TrainingArguments and models' configurations) and torchtitan, and ours for the same thing.

A name counts in any table, so that `learning_rate`, `train.learning_rate` and `train.optim.learning_rate` are all found.
"""


ABSENT = {"dropout": "models here have no dropout"}
"""Settings of other libraries that stand for nothing here."""


def our_name(path: str, known: Sequence[str]) -> str | None:
    """The key, or `--option`, that another library's name stands for; None where it is no such name.

    known: the dotted paths that exist here.
    """
    table, _, name = path.replace("-", "_").rpartition(".")
    found = ELSEWHERE.get(f"{table.rpartition('.')[2]}.{name}") or ELSEWHERE.get(name)
    return found if found and (found.startswith("--") or found.partition(" ")[0] in known) else None


def unknown_key(path: str, known: Sequence[str], value: Any = None) -> str:
    """The clause for a key that is not among the known paths, with the one that was probably meant.

    value: what was given for it; of a table, the keys inside are looked at first.
    """
    if isinstance(value, Mapping) and value:
        inner = [_precise(f"{path}.{name}", known) for name in flatten(value)]
        if all(inner):
            return "; ".join(filter(None, inner))
    return _precise(path, known) or f"there is no key {path}{_similar(path, known)}"


def _precise(path: str, known: Sequence[str]) -> str | None:
    """The clause for a key whose name is that of one or two others, or known from elsewhere."""
    plain = _without_indices(path)
    name = plain.rpartition(".")[2]
    if plain in RENAMED:
        return f"{path} is now called {RENAMED[plain]}"
    if ours := our_name(plain, known):
        return f"there is no key {path}; {'use the option' if ours.startswith('--') else 'it is called'} {ours}"
    if name in ABSENT:
        return f"there is no key {path}: {ABSENT[name]}"
    same = [f"model.{name}"] if name in FLAT_NAMES else [other for other in known if other.rpartition(".")[2] == name]
    return f"there is no key {path} (did you mean {' or '.join(same)}?)" if 1 <= len(same) <= 2 else None


def _similar(path: str, known: Sequence[str]) -> str:
    """A hint at the known key that is spelled most like an unknown one."""
    plain = _without_indices(path)
    table, _, name = plain.rpartition(".")
    siblings = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == table]
    hint = nearest(name, [*siblings, *(FLAT_NAMES if table == "model" else ())])
    if hint and table:
        hint = hint.replace("mean ", f"mean {path.rpartition('.')[0]}.")
    return hint or nearest(plain, known)


def _without_indices(path: str) -> str:
    """`data.sources[3].path` as `data.sources[].path`, which is how keys are listed."""
    return re.sub(r"\[\d+\]", "[]", path)
