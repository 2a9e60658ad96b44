"""The objective that a configuration asks for, with its teacher where it has one."""

from __future__ import annotations

from collections.abc import Mapping

from andromeda.config.data import RANKED
from andromeda.config.heads import KIND_OF_TARGET, TokenClassificationConfig, heads_of, target_name
from andromeda.config.loss import DistillationConfig
from andromeda.config.model import ModelConfig
from andromeda.config.run import RunConfig
from andromeda.data.targets import TargetReport
from andromeda.data.tokenizer import Tokenizer
from andromeda.loss import Nebula
from andromeda.loss.balance import FixedWeights
from andromeda.loss.head_tasks import build_tasks
from andromeda.model.transformer import Transformer
from andromeda.parallel.one_process import ALONE, Collectives
from andromeda.train.multi_task import MultiTaskObjective, learns_several
from andromeda.train.objective import NextTokenObjective, TrainObjective
from andromeda.train.run_dir import RunDir
from andromeda.train.weights import load_weights
from andromeda.utils.errors import ConfigError, nearest
from andromeda.utils.log import get_logger

log = get_logger("andromeda")


def build_objective(
    model: Transformer, config: RunConfig, balance: FixedWeights, tokenizer: Tokenizer | None = None, collectives: Collectives = ALONE
) -> TrainObjective:
    """The objective of a run on its model. balance: as `build_balance` returns it, on the model's device; tokenizer: of its corpus.

    Raises an AndromedaError where a teacher cannot be loaded or has another tokenizer.
    """
    if not learns_several(config):
        return NextTokenObjective(model, config.train.z_loss, collectives)
    teacher = load_teacher(config, model, tokenizer) if config.loss.distillation.teacher else None
    tasks = build_tasks(model, config.loss, config.train.z_loss, teacher)
    return MultiTaskObjective(model, Nebula(tasks, balance), collectives)


def measuring_objective(model: Transformer, config: RunConfig) -> TrainObjective:
    """An objective that measures the loss of every head as training does, without a teacher."""
    if not learns_several(config):
        return NextTokenObjective(model, config.train.z_loss)
    loss = config.loss.model_copy(update={"distillation": DistillationConfig(), "next_token_weight": config.loss.next_token_weight or 1.0})
    return MultiTaskObjective(model, Nebula(build_tasks(model, loss, config.train.z_loss)))


def check_head_targets(model: ModelConfig, targets: Mapping[str, TargetReport]) -> None:
    """Raises ConfigError, one sentence, where a head predicts what the corpus has not, or not as its kind needs it."""
    for name, keys in heads_of(model).items():
        wanted = target_name(name, model.task_heads[name])
        if not wanted:
            continue
        if wanted not in targets:
            raise ConfigError(
                f"model.task_heads.{name} predicts the target {wanted!r}, which the corpus does not have{nearest(wanted, targets)}: "
                f"build it with --target {wanted}={keys.target_kind}."
            )
        report, key = targets[wanted], f"model.task_heads.{name}"
        ranked = report.kind in RANKED and keys.target_kind in RANKED
        if report.kind != keys.target_kind and not ranked:
            raise ConfigError(
                f"{key}.kind = {model.task_heads[name].kind!r} predicts a target of kind {keys.target_kind!r}, and {wanted!r} is of kind "
                f"{report.kind!r}: take {KIND_OF_TARGET[report.kind]!r}, or build the corpus with --target {wanted}={keys.target_kind}."
            )
        if isinstance(keys, TokenClassificationConfig) and keys.num_labels < len(report.labels):
            raise ConfigError(
                f"{key}.num_labels = {keys.num_labels}, and the target {wanted!r} has {len(report.labels)} labels: leave it out."
            )


def load_teacher(config: RunConfig, model: Transformer, tokenizer: Tokenizer | None) -> Transformer:
    """The teacher on the device of the student, frozen. Raises ConfigError where it cannot teach this run."""
    run = config.loss.distillation.teacher
    kept = RunDir(run).path / "tokenizer"
    if tokenizer and kept.exists() and Tokenizer.load(kept).fingerprint != tokenizer.fingerprint:
        raise ConfigError(f"The teacher {run} has another tokenizer than the corpus: train it on a corpus with the same one.")
    teacher = load_weights(run, device=model.head.weight.device, warn=log.warning)
    length = config.train.seq_len or config.model.max_seq_len
    if teacher.config.max_seq_len < length:
        raise ConfigError(
            f"The teacher {run} was made for {teacher.config.max_seq_len} tokens, and the run reads {length}: lower train.seq_len."
        )
    return teacher.requires_grad_(False)
