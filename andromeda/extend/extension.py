"""`andromeda extend`: from a trained run to one with a longer context, measured at every stage; a repeated call goes on.

The new run is an ordinary run folder whose checkpoint of step 0 holds the old weights, so that training goes on from it
as from any other checkpoint. The old run is only ever read.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from andromeda.config.load import load
from andromeda.config.run import RunConfig
from andromeda.data.loader import open_stream
from andromeda.data.tokenizer import Tokenizer
from andromeda.evaluate import hidden_notes
from andromeda.evaluate.context_loss import context_lengths, evenly_spaced_windows, held_out_tokens, measure_long_context
from andromeda.extend.methods import parse_methods, trained_context
from andromeda.extend.results import ORIGINAL, RESULTS_FILE, ExtensionResults
from andromeda.extend.training_config import ExtendRequest, configure, tail_length, without_scaling
from andromeda.model.meta_model import meta_model
from andromeda.model.transformer import Transformer
from andromeda.train import checkpoint
from andromeda.train.callbacks.ema import build_ema
from andromeda.train.precision import Precision, build_precision
from andromeda.train.progress import Reporter
from andromeda.train.run_dir import RunDir
from andromeda.train.state import build_train_state, load_model, resolve_device
from andromeda.train.trainer import resolve_seq_len, train
from andromeda.train.weights import read_weights
from andromeda.utils.errors import CheckpointError, ConfigError

NUM_NEEDLES = 16
"""Notes of a row that retrieval is measured with: so many depths."""
ReporterFactory = Callable[[int], Reporter]
"""Makes the screen of a training of so many steps."""


@dataclass(frozen=True)
class ExtendResult:
    """How a call ended."""

    values: dict[str, Any]
    """What extension.json holds."""
    signal: int | None = None
    """The signal that ended it early."""


def extend(wishes: ExtendRequest, method: str, out: Path, screens: ReporterFactory, note: Callable[[str], None]) -> ExtendResult:
    """Extend a run by one method, in the run folder `out`, or by several, each in a folder of its own below `out`.

    Raises an AndromedaError, one sentence, before anything is written when something cannot work.
    """
    old = _old(wishes)
    methods = parse_methods(method, old)
    configs = {name: configure(old, wishes, name) for name in methods}
    if out.resolve() == Path(wishes.run).resolve():
        raise ConfigError(f"--out {out} is the run itself, which is never changed: give another folder.")
    folders = {name: RunDir(out / name if len(methods) > 1 else out) for name in methods}
    _refuse_others(out, folders.values())
    _, weights = read_weights(wishes.run, average=bool(old.train.ema), warn=note)
    for config in configs.values():
        load_model(meta_model(config.model), weights)  # copies nothing, and raises where the shapes differ
    sample = _Sample(old, wishes, next(iter(configs.values())))
    _make(out)
    book = ExtensionResults(out, {"wishes": wishes.values(), "trained": trained_context(old)})
    if book.find(ORIGINAL) is None:
        note("measuring the model as it is")
        book.keep(sample.measure(*_unstretched(old, wishes), weights), ORIGINAL)
    for name, config in configs.items():
        signal = _one(name, config, folders[name], weights, sample, book, screens, note, wishes.steps)
        if signal:
            return ExtendResult(book.values, signal)
    return ExtendResult(book.values)


def _one(
    method: str,
    config: RunConfig,
    folder: RunDir,
    weights: dict[str, Tensor],
    sample: _Sample,
    book: ExtensionResults,
    screens: ReporterFactory,
    note: Callable[[str], None],
    steps: int,
) -> int | None:
    """One method from its step 0 to its last measurement; returns the signal that ended it early."""
    if book.find(method, "untrained") is None:
        note(f"{method}: measuring before training")
        book.keep(sample.measure(config, sample.lengths, weights), method, "untrained")
    if steps == 0 or book.find(method, "after"):
        return None
    if not folder.exists:
        initialize_run(config, folder, weights)
    screen = screens(config.train.steps)
    try:
        ended = train(config, folder.path, resume=True, reporter=screen)
    finally:
        screen.close()
    _free()
    if ended.signal:
        return ended.signal
    note(f"{method}: measuring after training")
    _, trained = read_weights(folder.path, average=bool(config.train.ema), warn=note)
    book.keep(sample.measure(config, sample.lengths, trained), method, "after")
    return None


def initialize_run(config: RunConfig, folder: RunDir, weights: dict[str, Tensor]) -> None:
    """A run folder at step 0 with the given weights. It becomes a run last, so that a kill leaves none that lacks its weights."""
    stream = open_stream(config.data, resolve_seq_len(config), config.seed)
    session = build_train_state(config, resolve_device(config.train.device), stream.fingerprint)
    load_model(session.model, weights)
    session.ema = build_ema(session.model, config.train.ema)
    folder.create()
    folder.lock()
    try:
        checkpoint.save(folder.checkpoints, session.snapshot({"metrics_bytes": 0}))
        if stream.tokenizer:
            stream.tokenizer.save(folder.path / "tokenizer")
        folder.write_config(config)
    finally:
        folder.unlock()
    del session
    _free()


class _Sample:
    """What every stage is measured on: the same windows, lengths and questions."""

    def __init__(self, old: RunConfig, wishes: ExtendRequest, config: RunConfig) -> None:
        data = config.data
        if wishes.held_out:
            data = data.model_copy(update={"corpus": wishes.held_out, "sources": ()})
        self._device, self._tail = resolve_device(config.train.device), tail_length(old, wishes)
        self._precision: Precision = build_precision("auto" if config.train.precision == "fp8" else config.train.precision, self._device)
        tokens = held_out_tokens(data, config.seed)
        self._rows = evenly_spaced_windows(tokens, wishes.to, wishes.samples, self._tail)
        self.lengths = context_lengths(trained_context(old), wishes.to, self._tail)
        tokenizer = open_stream(data, 1, config.seed, "val").tokenizer
        self._questions = _questions(tokenizer, tokens, self.lengths, wishes.samples, config.seed) if tokenizer else {}

    def measure(self, config: RunConfig, lengths: list[int], weights: dict[str, Tensor]) -> dict[str, Any]:
        """Loss by context and by position, and retrieval, of `weights` under the positions of `config`."""
        model = _filled(config, weights, self._device)
        rows = self._rows[:, -lengths[-1] - 1 :]
        found = measure_long_context(model, rows, lengths, self._tail, self._precision)
        asked = {length: each for length, each in self._questions.items() if length in lengths}
        if asked:
            right = {length: hidden_notes.score_notes(model, each, self._precision) for length, each in asked.items()}
            found["retrieval"] = hidden_notes.notes_result(right, next(iter(asked.values())).depths)
        del model
        _free()
        return found


def _filled(config: RunConfig, weights: dict[str, Tensor], device: torch.device) -> Transformer:
    """A model with these weights; its random start, which takes seconds, is not drawn where weights are all that it holds."""
    model = config.model
    if model.head.tied or model.embedding.kind == "custom" or model.feedforward.kind == "moe":
        filled = Transformer(model).to(device)
    else:
        filled = meta_model(model).to_empty(device=device)
    load_model(filled, weights)
    return filled


def _questions(tokenizer: Tokenizer, tokens: Tensor, lengths: list[int], rows: int, seed: int) -> dict[int, hidden_notes.NoteBatch]:
    """Retrieval problems of the lengths that have room for them."""
    least = 64 * NUM_NEEDLES
    return {n: hidden_notes.question_sequences(tokenizer, tokens.numpy(), n, NUM_NEEDLES, rows, seed) for n in lengths if n >= least}


def _unstretched(old: RunConfig, wishes: ExtendRequest) -> tuple[RunConfig, list[int]]:
    """The old model's configuration, and the lengths that it can be measured at."""
    lengths = context_lengths(trained_context(old), wishes.to, tail_length(old, wishes))
    try:
        return without_scaling(old, wishes), lengths
    except ConfigError:
        # xPos as it was trained leaves the range of float32 out there; that it cannot read on is the finding.
        return old, [n for n in lengths if n <= old.model.max_seq_len]


def _old(wishes: ExtendRequest) -> RunConfig:
    folder = RunDir(wishes.run)
    if not folder.exists:
        raise CheckpointError(f"{wishes.run} is not a run folder (it holds no config.toml): give the --out of `andromeda train`.")
    return load(str(folder.path))


def _refuse_others(out: Path, folders: Iterable[RunDir]) -> None:
    for folder in (RunDir(out), *folders):
        folder.refuse_foreign_files()
    if RunDir(out).exists and not (out / RESULTS_FILE).exists():
        raise ConfigError(f"{out} holds a run that is no extension: give another folder with --out.")


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder {out} cannot be made ({error.strerror}): give another one with --out.") from None


def _free() -> None:
    """Forget a model that is gone before the next one is built."""
    gc.collect()
    # Compiled code is kept for all models of a class: of another model's it would only make the next one's more general and slower.
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
