"""The weights of another run as the start of a new one (`andromeda train CONFIG --init-from RUN`).

The new run is an ordinary run whose checkpoint of step 0 holds these weights; its data, schedule and step count start from the beginning.
Its tokenizer may have further special tokens, whose weights begin as the mean of all others.
The other run is only read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from andromeda.config.run import RunConfig
from andromeda.data.tokenizer import Tokenizer
from andromeda.model.head import HEADS
from andromeda.model.meta_model import meta_model
from andromeda.train import checkpoint
from andromeda.train.callbacks.ema import build_ema
from andromeda.train.checkpoint_reader import read_part, shape_of
from andromeda.train.grow_vocabulary import grow_vocabulary, vocabulary_dims
from andromeda.train.run_dir import RunDir, split_step
from andromeda.train.state import TrainState, load_model, model_tensors
from andromeda.train.weights import resolve_checkpoint, weights_sha256
from andromeda.utils.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class ParentCheckpoint:
    """The checkpoint that a run begins with."""

    run: Path
    path: Path
    keep_optimizer: bool
    """Load the optimizer's state too, instead of beginning with an empty one."""
    added: range = range(0)
    """Ids of special tokens that the new run's tokenizer has and this run's has not."""

    @property
    def step(self) -> int:
        """Its step."""
        return int(self.path.name.removeprefix("step-"))

    def record(self) -> dict[str, Any]:
        """What the new run's manifest.json says of it."""
        sha256 = weights_sha256(self.path)
        return {"run": str(self.run), "step": self.step, "weights_sha256": sha256, "keep_optimizer": self.keep_optimizer}


def find_parent(source: str | Path, out: RunDir, keep_optimizer: bool, warn: checkpoint.Warn) -> ParentCheckpoint:
    """The checkpoint that RUN or RUN@STEP names, whose files are intact, for a new run in `out`.

    Raises CheckpointError where there is none, ConfigError where `out` is that run itself.
    """
    run, step = split_step(source)
    if out.path.resolve() == run.resolve():
        raise ConfigError(f"{out.path} is the run that the weights come from, which is never modified: give another folder with --out.")
    parent = ParentCheckpoint(run, resolve_checkpoint(run, step=step, warn=warn), keep_optimizer)
    if keep_optimizer and (reason := checkpoint.find_damage(parent.path, ("optimizer",))):
        raise CheckpointError(
            f"The optimizer's state of step {parent.step} in {run} cannot be kept ({reason}): leave out --keep-optimizer."
        )
    return parent


def fitted(parent: ParentCheckpoint, config: RunConfig, tokenizer: Tokenizer | None) -> ParentCheckpoint:
    """The checkpoint with the special tokens that a run of `config` adds to its tokenizer. Allocates no model.

    Raises an AndromedaError, one sentence, where the weights cannot be those of that run.
    """
    folder = parent.run / "tokenizer"
    known = Tokenizer.load(folder) if tokenizer and folder.exists() else None
    if tokenizer and known and not tokenizer.extends(known):
        raise ConfigError(
            f"{parent.run} has another tokenizer than the corpus, so the same ids stand for other text: "
            f"build the corpus with its tokenizer (`andromeda data build TEXTS --tokenizer {folder} --out CORPUS`)."
        )
    added = range(known.vocab_size, tokenizer.vocab_size) if tokenizer and known else range(0)
    saved = read_part(parent.path, "model")
    _check_shapes(parent, model_tensors(meta_model(config.model)), saved, vocabulary_dims(config.model) if added else {})
    return replace(parent, added=added)


def _check_shapes(parent: ParentCheckpoint, wanted: dict[str, Tensor], saved: Mapping[str, Tensor], grow: Mapping[str, int]) -> None:
    """grow: dimensions of weights along which the new model may be larger."""
    shapes = {name: shape_of(saved, name) for name in wanted.keys() & saved.keys()}
    apart = [name for name in sorted(wanted.keys() ^ saved.keys()) if not _is_new_head(name, saved)]
    different = [f"{name} is only in the {'new model' if name in wanted else 'run'}" for name in apart]
    different += [
        f"{name} is {_size(shapes[name])} there and {_size(tuple(tensor.shape))} here"
        for name, tensor in wanted.items()
        if name in shapes and shapes[name] != tuple(tensor.shape) and not _grows(shapes[name], tuple(tensor.shape), grow.get(name))
    ]
    if different:
        more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
        raise ConfigError(
            f"The weights of {parent.run} do not fit this model ({'; '.join(different[:5])}{more}): "
            f"use that run's own configuration (`andromeda train {parent.run} --init-from {parent.run} --out NEW`)."
        )


def _grows(saved: tuple[int, ...], wanted: tuple[int, ...], dim: int | None) -> bool:
    """Whether a shape is another one made larger along a dimension."""
    if dim is None or len(saved) != len(wanted):
        return False
    return saved[dim] < wanted[dim] and saved[:dim] + saved[dim + 1 :] == wanted[:dim] + wanted[dim + 1 :]


def _is_new_head(name: str, saved: Mapping[str, Tensor]) -> bool:
    """Whether a parameter is of a head that the run does not have: it begins as in a run of its own."""
    return name.startswith(HEADS) and name not in saved


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def start_from(parent: ParentCheckpoint, state: TrainState, run_dir: RunDir) -> None:
    """Load the weights into a new run's state and write its checkpoint of step 0, before config.toml makes the folder a run.

    So a kill leaves either no run or one that resumes from these weights.
    """
    snapshot = checkpoint.read(parent.path, like=model_tensors(state.model))
    saved_weights, live = snapshot.tensors["model"], model_tensors(state.model)
    new_heads = {name: tensor for name, tensor in live.items() if _is_new_head(name, saved_weights)}
    grown = grow_vocabulary(read_part(parent.path, "model"), live, state.config.model, parent.added)
    load_model(state.model, {**saved_weights, **new_heads, **grown})
    state.ema = build_ema(state.model, state.config.train.ema)
    if state.diloco:
        state.diloco.begin()
    if parent.keep_optimizer:
        try:
            state.optimizer.load_state(snapshot.tensors["optimizer"], snapshot.metadata.get("optimizer", {}))
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(
                f"The optimizer's state in {parent.path} cannot be kept ({reason}): leave out --keep-optimizer."
            ) from None
    saved = checkpoint.save(run_dir.checkpoints, state.snapshot({"metrics_bytes": 0}), state.ranks)
    state.ranks.on_first(lambda: checkpoint.set_aside_newer(saved))
