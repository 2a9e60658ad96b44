"""Comparison of tokenizers on the same text: compression, speed, and bits/byte of models trained with equal FLOPs.

Each tokenizer builds its own corpus of the same documents; the split depends on the text only, so that all hold out the same
bytes. Loss per token is not comparable between tokenizers; bits/byte is. Models get equal FLOPs, not equal tokens: a larger
vocabulary sees more text per token and has a more expensive head.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from andromeda.config.data import BuildConfig
from andromeda.config.load import load
from andromeda.config.run import RunConfig
from andromeda.config.validation_errors import validate
from andromeda.data.build import build
from andromeda.data.compare_tokenizers import compare
from andromeda.data.corpus import HELD_OUT_TEXT, CorpusManifest
from andromeda.data.loader import open_stream
from andromeda.data.tokenizer import ROUND_TRIP_TEXT, Tokenizer
from andromeda.evaluate.bits_per_byte import held_out_bits
from andromeda.model.flops import training_flops_per_token
from andromeda.train.progress import Reporter
from andromeda.train.trainer import resolve_seq_len, train
from andromeda.train.weights import load_weights
from andromeda.utils.errors import ConfigError, DataError, nearest
from andromeda.utils.files import write_whole
from andromeda.utils.progress_callback import ProgressCallback
from andromeda.utils.untrusted import read_json_object

KINDS = ("bpe", "unigram", "bytes")
NAME = "tokenizers.json"
DERIVED_KEYS = ("data.corpus", "model.vocab_size", "train.steps")
"""Keys that each model has its own value of."""
TIMED_BYTES = 2_000_000
"""Text that speeds are measured on, as often as needed from the held-out text."""


@dataclass(frozen=True)
class TokenizerComparison:
    """The tokenizers to compare, and the models to train."""

    source: tuple[str, ...]
    kinds: tuple[str, ...] = ("bpe", "unigram")
    sizes: tuple[int, ...] = (1024, 4096, 16384)
    flops: float = 2e13
    """Training FLOPs of each model; 0 trains none."""
    preset: str = "nano"
    overrides: tuple[str, ...] = ()
    max_bytes: int = 0
    validation: float = 0.02

    def values(self) -> dict[str, Any]:
        """For JSON."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


@dataclass(frozen=True)
class ComparisonIO:
    """Callbacks for progress, messages and training displays."""

    report: ProgressCallback
    note: Callable[[str], None]
    screens: Callable[[int], Reporter]
    workers: int = 1


class ComparisonInterrupted(Exception):
    """A signal ended a training; its state is saved."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


def run(plan: TokenizerComparison, out: Path, around: ComparisonIO) -> dict[str, Any]:
    """Compare, or resume a comparison in `out`; returns the contents of tokenizers.json.

    Raises an AndromedaError or ComparisonInterrupted.
    """
    _check(plan)
    folders = {name: out / name for name in _names(plan)}
    found = _begin(plan, out)
    for name, folder in folders.items():
        around.note(f"{name}: building its corpus")
        build(list(plan.source), folder / "corpus", _build_config(plan, name), workers=around.workers, report=around.report)
    corpora = [folder / "corpus" for folder in folders.values()]
    for name, figures in zip(folders, compare(corpora), strict=True):
        found["tokenizers"].setdefault(name, {}).update(asdict(figures), folder=name)
    for name, corpus in zip(folders, corpora, strict=True):
        if "encode_mb_per_second" not in found["tokenizers"][name]:
            found["tokenizers"][name] |= speeds(Tokenizer.load(corpus), (corpus / HELD_OUT_TEXT).read_bytes())
            _save(found, out)
    for name, folder in folders.items():
        if plan.flops and "bits_per_byte" not in found["tokenizers"][name]:
            found["tokenizers"][name] |= _learn(plan, folder, around)
            _save(found, out)
    _save(found, out)
    return found


def speeds(tokenizer: Tokenizer, text: bytes) -> dict[str, Any]:
    """MB/s of encoding and decoding in one process, and whether the round trip is lossless."""
    whole = text.decode()
    some = (whole * (TIMED_BYTES // max(1, len(text)) + 1))[:TIMED_BYTES]
    pieces = [some[i : i + 100_000] for i in range(0, len(some), 100_000)]
    begun = time.perf_counter()
    ids = tokenizer.encode_batch(pieces)
    encoded = time.perf_counter()
    back = [tokenizer.decode(one) for one in ids]
    decoded = time.perf_counter()
    size = len(some.encode()) / 1e6
    return {
        "encode_mb_per_second": size / (encoded - begun),
        "decode_mb_per_second": size / (decoded - encoded),
        "lossless": back == pieces and all(tokenizer.decode(tokenizer.encode(each)) == each for each in (ROUND_TRIP_TEXT, whole)),
    }


def steps_for(config: RunConfig, flops: float) -> int:
    """Training steps closest to this many FLOPs, at least one."""
    length = resolve_seq_len(config)
    return max(1, round(flops / (config.train.batch_size * length * training_flops_per_token(config.model, length))))


def configuration(plan: TokenizerComparison, corpus: Path) -> RunConfig:
    """The run of one tokenizer: the preset with its vocabulary, and as many steps as the FLOPs allow."""
    vocab = CorpusManifest.load(corpus).tokenizer.vocab_size
    changes = [f"data.corpus={corpus}", f"model.vocab_size={vocab}", "train.eval_every=0", *plan.overrides]
    # Loaded with one step first to count FLOPs: the schedule depends on the number of steps.
    once = load(
        plan.preset, [*changes, "train.steps=1", "train.schedule.kind=constant", "train.schedule.cooldown=0", "train.schedule.warmup=0"]
    )
    steps = steps_for(once, plan.flops)
    schedule = ["train.schedule.kind=wsd", f"train.schedule.warmup={steps // 20}", f"train.schedule.cooldown={2 * steps // 5}"]
    return load(plan.preset, [*changes, f"train.steps={steps}", *schedule])


def _learn(plan: TokenizerComparison, folder: Path, around: ComparisonIO) -> dict[str, Any]:
    """Train one model and measure it on every held-out byte."""
    config = configuration(plan, folder / "corpus")
    around.note(f"{folder.name}: training {config.train.steps:,} steps")
    screen = around.screens(config.train.steps)
    try:
        ended = train(config, folder / "run", resume=(folder / "run" / "config.toml").exists(), reporter=screen)
    finally:
        screen.close()
    if ended.signal:
        raise ComparisonInterrupted(ended.signal)
    length = resolve_seq_len(config)
    bits = held_out_bits(
        load_weights(folder / "run"), open_stream(config.data, length, config.seed, "val"), context=length, stride=length // 2
    )
    tokens = config.train.steps * config.train.batch_size * length
    return {
        "bits_per_byte": bits.per_byte,
        "steps": config.train.steps,
        "tokens": tokens,
        "flops": tokens * training_flops_per_token(config.model, length),
        "context": length,
    }


def table(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows."""
    columns = [
        "tokenizer",
        "entries",
        "used",
        "bytes/token",
        "tokens/word",
        "encode MB/s",
        "decode MB/s",
        "lossless",
        "tokens seen",
        "bits/byte",
    ]
    rows = []
    for figures in found["tokenizers"].values():
        bits = figures.get("bits_per_byte")
        rows.append(
            [
                figures["kind"],
                f"{figures['vocab_size']:,}",
                f"{figures['used']:.0%}",
                f"{figures['bytes_per_token']:.3f}",
                f"{figures['tokens_per_word']:.3f}",
                f"{figures['encode_mb_per_second']:.1f}",
                f"{figures['decode_mb_per_second']:.1f}",
                "yes" if figures["lossless"] else "NO",
                f"{figures['tokens']:,}" if bits else "-",
                f"{bits:.3f}" if bits else "-",
            ]
        )
    return columns, rows


def _check(plan: TokenizerComparison) -> None:
    for kind in plan.kinds:
        if kind not in KINDS:
            raise ConfigError(f"There is no tokenizer {kind!r}{nearest(kind, KINDS)}: give {', '.join(KINDS)}.")
    if not plan.kinds or not (plan.sizes or plan.kinds == ("bytes",)):
        raise ConfigError("Name at least one kind and one size to compare, such as --kinds bpe,unigram --vocab-sizes 1024,4096.")
    if min(plan.sizes, default=300) < 300:
        raise ConfigError(f"A vocabulary of {min(plan.sizes)} has no room for merges beyond the 256 bytes: give sizes of 300 or more.")
    if not 0 <= plan.flops < math.inf:
        raise ConfigError(f"--flops {plan.flops:g} is not a number of FLOPs: give those of each model, or 0 to train none.")
    for key in (change.partition("=")[0].strip() for change in plan.overrides):
        if key in DERIVED_KEYS:
            raise ConfigError(f"--set {key} is set by the comparison for each tokenizer: leave it out.")
    for name in _names(plan):
        _build_config(plan, name)
    load(plan.preset, plan.overrides)


def _names(plan: TokenizerComparison) -> list[str]:
    sized = [f"{kind}-{size}" for kind in plan.kinds if kind != "bytes" for size in plan.sizes]
    return list(dict.fromkeys([*sized, *["bytes"] * ("bytes" in plan.kinds)]))


def _build_config(plan: TokenizerComparison, name: str) -> BuildConfig:
    kind, _, size = name.partition("-")
    given: dict[str, Any] = {"tokenizer": kind, "max_bytes": plan.max_bytes, "validation_fraction": plan.validation}
    if size:
        given["vocab_size"] = int(size)
    return validate(BuildConfig, given)


def _begin(plan: TokenizerComparison, out: Path) -> dict[str, Any]:
    """Earlier measurements. Raises ConfigError if the folder holds another comparison."""
    path = out / NAME
    if not path.exists():
        return {"plan": plan.values(), "tokenizers": {}}
    try:
        found = read_json_object(path)
        same = found["plan"] == plan.values()
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged: remove it to measure everything again.") from None
    if not same:
        raise ConfigError(f"{out} holds another comparison: give the same arguments to resume, or another --out.")
    return found


def _save(found: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / NAME, (json.dumps(found, indent=1) + "\n").encode())


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers with commas between. Raises ConfigError."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{option} {text!r} are no whole numbers: write them with commas, such as 1024,4096.") from None


def words(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
