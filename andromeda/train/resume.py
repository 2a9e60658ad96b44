"""What a resumed run must find as it was left, and what may differ."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from andromeda.config.derived import in_steps
from andromeda.config.keys import flatten
from andromeda.config.run import RunConfig
from andromeda.config.train import TrainConfig
from andromeda.optim.schedules import build_schedule
from andromeda.train import checkpoint
from andromeda.train.metrics import sha256_prefix
from andromeda.train.progress import Reporter
from andromeda.train.run_dir import RunDir
from andromeda.train.state import TrainState, model_tensors
from andromeda.utils.errors import CheckpointError, ConfigError
from andromeda.utils.untrusted import MalformedFile

MAY_CHANGE_ON_RESUME = (
    "name",
    "data.corpus",
    "data.workers",
    "train.device",
    "train.compile",
    "train.activation_checkpointing",
    "train.micro_batch_size",
    "train.eval_every",
    "train.eval_tokens",
    "train.checkpoints",
    "train.diloco.lighthouse",
    "train.diloco.address",
    "train.diloco.timeout",
    "train.probes",
    "train.samples",
    "train.log",
    "parallel",
)
"""Keys and tables that a resumed run may change: none of them affects what is learned. The data's fingerprint guards its path."""


def changed_keys(run_dir: RunDir, config: RunConfig, resume: bool) -> list[str]:
    """Keys that differ from the run in `run_dir`. Raises ConfigError where a run may not be started or resumed."""
    if not run_dir.exists:
        if resume and run_dir.path.exists():
            raise ConfigError(f"There is no run in {run_dir.path} to resume: leave out --resume to start one.")
        if resume:
            raise ConfigError(f"There is no run folder {run_dir.path}: give the right one with --out, or leave out --resume to start one.")
        run_dir.refuse_foreign_files()
        return []
    if not resume:
        raise ConfigError(f"{run_dir.path} already holds a run: add --resume to continue it, or give another folder with --out.")
    old, new = flatten(run_dir.config().model_dump()), flatten(config.model_dump())
    changed = [key for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
    refused = sorted(key for key in changed if not may_change_on_resume(key, old))
    if refused == ["train.steps"]:
        raise ConfigError(
            f"train.steps was {old['train.steps']} and is now {new['train.steps']}, but {why_length_is_fixed(old)}: "
            f"start a new run from these weights (`andromeda train {run_dir.path} --init-from {run_dir.path} "
            f"train.steps={new['train.steps']} --out NEW`)."
        )
    if refused:
        details = "; ".join(f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in refused[:5])
        raise ConfigError(
            f"The run in {run_dir.path} was started with another configuration ({details}): give the old values, or another --out."
        )
    return sorted(changed)


def changed_since(config: RunConfig, saved: Mapping[str, Any]) -> list[str]:
    """Differences between a configuration and the one that a checkpoint holds which a resumed run may not have, each in words."""
    old, new = flatten(saved), flatten(json.loads(json.dumps(config.model_dump())))
    default = flatten(json.loads(json.dumps(RunConfig().model_dump())))
    # A key that only one of them has is of another version of Andromeda, unless it is of a part with keys of its own or was set.
    own = {key for key in old.keys() - new.keys() if key.startswith(OWN_TABLES)}
    added = {key for key in new.keys() - old.keys() if new[key] != default.get(key)}
    apart = {key for key in old.keys() & new.keys() if old[key] != new[key]} | own | added
    return [f"{key} was {old.get(key)!r} and is now {new.get(key)!r}" for key in sorted(apart) if not may_change_on_resume(key, old)]


def refuse_other_config(run_dir: RunDir, config: RunConfig, snapshot: checkpoint.Snapshot) -> None:
    """Raises CheckpointError where config.toml was edited since the checkpoint in keys that decide what is learned."""
    changed = changed_since(config, snapshot.metadata.get("config") or {}) if "config" in snapshot.metadata else []
    if changed:
        raise CheckpointError(
            f"{run_dir.config_file} was changed since the checkpoint of step {snapshot.step} ({'; '.join(changed[:5])}): "
            "restore the old values, or train in another folder."
        )


METRICS_LOST = "metrics lost"
"""How the event begins that a resumed run records in place of metrics that were deleted or changed."""


def set_aside_changed_metrics(run_dir: RunDir, metadata: Mapping[str, Any]) -> str:
    """Set metrics.jsonl aside where it does not begin with what the checkpoint recorded; returns what is wrong with it, or nothing."""
    path, size = run_dir.metrics_file, metadata.get("metrics_bytes", 0)
    if path.is_dir() and not path.is_symlink():
        return ""  # not a log that was changed: opening it says what to do
    try:
        found = path.stat().st_size
        if found >= size and metadata.get("metrics_sha256") in (None, sha256_prefix(path, size)):
            return ""
        reason = "was changed" if found >= size else f"has {found} bytes instead of {size}"
    except FileNotFoundError:
        return f"{path.name} is missing; a new one begins" if size else ""
    except MalformedFile as error:
        reason = str(error)
    aside = path.with_name(f"damaged-{path.name}")
    os.rename(path, aside)
    return f"{path.name} {reason} since the checkpoint; it is now {aside.name}, and a new one begins"


OWN_TABLES = ("model.mixers", "model.task_heads", "model.attention.qk_norm", "model.value_embedding", "train.optim.options")
"""Tables that may have keys of a user's own part."""


LENGTH = ("train.steps", "train.schedule.cooldown")
"""Keys that decide when a run ends, and nothing before that where the schedule allows it."""


def may_change_on_resume(key: str, old: Mapping[str, Any]) -> bool:
    """Whether a resumed run may change a key. old: the flat configuration that it was trained with."""
    if key in LENGTH:
        return not why_length_is_fixed(old)
    return any(key == free or key.startswith(free + ".") for free in MAY_CHANGE_ON_RESUME)


def why_length_is_fixed(old: Mapping[str, Any]) -> str:
    """Why the steps already done depend on the number of steps, or nothing where they do not."""
    kind = old.get("train.schedule.kind")
    if kind not in ("constant", "wsd"):
        return f"the learning rates of schedule {kind!r} depend on it from the first step on (those of 'wsd' and 'constant' do not)"
    return "the window of train.window grows over all steps" if old.get("train.window.end") else ""


def rest_of_schedule(old: TrainConfig, new: TrainConfig, step: int) -> str:
    """What becomes of the learning rate of a run that is at `step` when its length changes, as a sentence."""
    was, now = build_schedule(old.schedule, old.steps), build_schedule(new.schedule, new.steps)
    message = f"train.steps is now {new.steps:,} (was {old.steps:,}): "
    if new.schedule.kind == "constant":
        return f"{message}the learning rate stays constant until then"
    down, before = new.steps - in_steps(new.schedule.cooldown, new.steps), old.steps - in_steps(old.schedule.cooldown, old.steps)
    if step > down:
        message += f"the learning rate is now at {now(step):.0%} and falls to {new.schedule.min_lr_ratio:.0%} at step {new.steps:,}"
    else:
        message += f"the learning rate stays at its full value until step {down:,} and falls from there to step {new.steps:,}"
    if step > before:
        message += (
            f"; it had fallen to {was(step):.0%}, since the cooldown began at step {before:,} and these steps stay in the run "
            "(a checkpoint from before it, where one is kept, continues with --init-from RUN@STEP --keep-optimizer)"
        )
    return message


def resume_latest(state: TrainState, run_dir: RunDir, reporter: Reporter) -> checkpoint.Snapshot | None:
    """Restore the newest intact checkpoint, if there is one, and return it, setting damaged ones aside."""
    newest = state.ranks.from_first(lambda: checkpoint.latest(run_dir.checkpoints, reporter.message))
    if newest is None:
        return None
    snapshot = checkpoint.read(newest, like=model_tensors(state.model))
    refuse_other_config(run_dir, state.config, snapshot)
    if snapshot.step > state.config.train.steps:
        raise ConfigError(
            f"{run_dir.path} is at step {snapshot.step} already, beyond train.steps={state.config.train.steps}: give a larger number."
        )
    state.restore(snapshot)
    state.ranks.on_first(lambda: checkpoint.set_aside_newer(newest))
    reporter.message(f"resuming from step {snapshot.step}")
    return snapshot
