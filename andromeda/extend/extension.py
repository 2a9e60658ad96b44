"""`andromeda extend`: from a trained run to one with a longer context, evaluated at every stage; a repeated call resumes.

The new run is an ordinary run folder whose checkpoint of step 0 holds the old weights, so that training resumes from it as from
any other checkpoint. The old run is only read.
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
from andromeda.train.run_dir import RunDir, refuse_linked_folder
from andromeda.train.state import build_train_state, load_model, resolve_device
from andromeda.train.trainer import resolve_seq_len, train
from andromeda.train.weights import read_weights
from andromeda.utils.errors import CheckpointError, ConfigError

NUM_NOTES = 16
"""Notes per sequence, and so depths, in the retrieval evaluation."""
ReporterFactory = Callable[[int], Reporter]
"""From a number of steps to the progress display of their training."""


@dataclass(frozen=True)
class ExtendResult:
    """Results of a call."""

    values: dict[str, Any]
    """Contents of extension.json."""
    signal: int | None = None
    """The signal that ended it early."""


def extend(request: ExtendRequest, method: str, out: Path, reporters: ReporterFactory, log: Callable[[str], None]) -> ExtendResult:
    """Extend a run by one method, in the run folder `out`, or by several, each in a folder of its own below `out`.

    Raises an AndromedaError, one sentence, for invalid arguments, before anything is written.
    """
    old = _old(request)
    methods = parse_methods(method, old)
    configs = {name: configure(old, request, name) for name in methods}
    if out.resolve() == Path(request.run).resolve():
        raise ConfigError(f"--out {out} is the run itself, which is never modified: give another folder.")
    folders = {name: RunDir(out / name if len(methods) > 1 else out) for name in methods}
    _refuse_others(out, folders.values())
    _, weights = read_weights(request.run, average=bool(old.train.ema), warn=log)
    for config in configs.values():
        load_model(meta_model(config.model), weights)  # copies nothing, and raises where the shapes differ
    sample = _EvaluationData(old, request, next(iter(configs.values())))
    _make(out)
    results = ExtensionResults(out, {"request": request.values(), "trained": trained_context(old)})
    if results.find(ORIGINAL) is None:
        log("evaluating the original model")
        results.keep(sample.measure(*_original_model(old, request), weights), ORIGINAL)
    for name, config in configs.items():
        signal = _run_method(name, config, folders[name], weights, sample, results, reporters, log, request.steps)
        if signal:
            return ExtendResult(results.values, signal)
    return ExtendResult(results.values)


def _run_method(
    method: str,
    config: RunConfig,
    folder: RunDir,
    weights: dict[str, Tensor],
    sample: _EvaluationData,
    results: ExtensionResults,
    reporters: ReporterFactory,
    log: Callable[[str], None],
    steps: int,
) -> int | None:
    """Evaluate, train and evaluate again by one method; returns the signal that ended it early, if any."""
    if results.find(method, "untrained") is None:
        log(f"{method}: evaluating before training")
        results.keep(sample.measure(config, sample.lengths, weights), method, "untrained")
    if steps == 0 or results.find(method, "after"):
        return None
    if not folder.exists:
        initialize_run(config, folder, weights)
    screen = reporters(config.train.steps)
    try:
        ended = train(config, folder.path, resume=True, reporter=screen)
    finally:
        screen.close()
    _free()
    if ended.signal:
        return ended.signal
    log(f"{method}: evaluating after training")
    _, trained = read_weights(folder.path, average=bool(config.train.ema), warn=log)
    results.keep(sample.measure(config, sample.lengths, trained), method, "after")
    return None


def initialize_run(config: RunConfig, folder: RunDir, weights: dict[str, Tensor]) -> None:
    """A run folder at step 0 with the given weights. config.toml is written last, so that a kill leaves no run without weights."""
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


class _EvaluationData:
    """The data that every stage is evaluated on: the same windows, lengths and retrieval problems."""

    def __init__(self, old: RunConfig, request: ExtendRequest, config: RunConfig) -> None:
        data = config.data
        if request.held_out:
            data = data.model_copy(update={"corpus": request.held_out, "sources": ()})
        self._device, self._tail = resolve_device(config.train.device), tail_length(old, request)
        self._precision: Precision = build_precision("auto" if config.train.precision == "fp8" else config.train.precision, self._device)
        tokens = held_out_tokens(data, config.seed)
        self._rows = evenly_spaced_windows(tokens, request.to, request.samples, self._tail)
        self.lengths = context_lengths(trained_context(old), request.to, self._tail)
        tokenizer = open_stream(data, 1, config.seed, "val").tokenizer
        self._questions = _questions(tokenizer, tokens, self.lengths, request.samples, config.seed) if tokenizer else {}

    def measure(self, config: RunConfig, lengths: list[int], weights: dict[str, Tensor]) -> dict[str, Any]:
        """Loss by context, loss by position, and retrieval of `weights` with the positions of `config`."""
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
    """A model with these weights, without the random initialization where the checkpoint holds all of its state."""
    model = config.model
    if model.head.tied or model.embedding.kind == "custom" or model.feedforward.kind == "moe":
        filled = Transformer(model).to(device)
    else:
        filled = meta_model(model).to_empty(device=device)
    load_model(filled, weights)
    return filled


def _questions(tokenizer: Tokenizer, tokens: Tensor, lengths: list[int], rows: int, seed: int) -> dict[int, hidden_notes.NoteBatch]:
    """Retrieval problems for the lengths that are long enough."""
    least = 64 * NUM_NOTES
    return {n: hidden_notes.question_sequences(tokenizer, tokens.numpy(), n, NUM_NOTES, rows, seed) for n in lengths if n >= least}


def _original_model(old: RunConfig, request: ExtendRequest) -> tuple[RunConfig, list[int]]:
    """Configuration of the original model, and the lengths at which it can be evaluated."""
    lengths = context_lengths(trained_context(old), request.to, tail_length(old, request))
    try:
        return without_scaling(old, request), lengths
    except ConfigError:
        # Unscaled xPos overflows float32 at these lengths: the original model is evaluated only at those it can represent.
        return old, [n for n in lengths if n <= old.model.max_seq_len]


def _old(request: ExtendRequest) -> RunConfig:
    folder = RunDir(request.run)
    if not folder.exists:
        raise CheckpointError(f"{request.run} is not a run folder (it holds no config.toml): give the --out of `andromeda train`.")
    return load(str(folder.path))


def _refuse_others(out: Path, folders: Iterable[RunDir]) -> None:
    for folder in (RunDir(out), *folders):
        refuse_linked_folder(out, folder.path)
        folder.refuse_foreign_files()
    if RunDir(out).exists and not (out / RESULTS_FILE).exists():
        raise ConfigError(f"{out} holds a run that is not an extension: give another folder with --out.")


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder {out} cannot be created ({error.strerror}): give another one with --out.") from None


def _free() -> None:
    """Free the memory of a deleted model before the next one is built."""
    gc.collect()
    # Compiled code is shared by all models of a class: another model's shapes would only cause dynamic, slower code.
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
