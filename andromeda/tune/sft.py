"""Supervised fine-tuning on conversations: a chat corpus in the new run's folder, and an ordinary training that starts from the old run.

Its stream is a pure function of the row number like that of any corpus, so a killed run resumes bit for bit (`andromeda train --resume`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from andromeda.config.run import RunConfig
from andromeda.train.run_dir import RunDir, split_step
from andromeda.tune.chat_corpus import write_chat_corpus
from andromeda.tune.chat_model import chat_model
from andromeda.tune.examples import ChatStatistics, read_examples
from andromeda.tune.sft_config import TuneSchedule, configure, sequence_length
from andromeda.utils.errors import ConfigError

CORPUS = "chat-data"
"""Folder of the chat corpus inside the new run's."""


@dataclass(frozen=True)
class SftRequest:
    """What is tuned, on what, and where to."""

    run: str
    """RUN or RUN@STEP, which is only read."""
    data: tuple[Path, ...]
    """JSONL files of conversations."""
    out: Path
    template: str = ""
    """A template's name or a Jinja file; empty is the run's own, or chatml."""
    special_tokens: tuple[str, ...] = ()
    validation_fraction: float = 0.05
    """Fraction of the examples held out, at least one."""
    schedule: TuneSchedule = field(default_factory=TuneSchedule)
    overrides: tuple[str, ...] = ()


def prepare_sft(request: SftRequest, note: Callable[[str], None]) -> RunConfig:
    """Write the chat corpus and return the configuration that trains on it from the old run's weights.

    note: takes sentences on the data. Raises an AndromedaError, one sentence, for what cannot work.
    """
    run, out = split_step(request.run)[0], RunDir(request.out)
    if out.path.resolve() == run.resolve():
        raise ConfigError(f"{out.path} is the run that is tuned, which is never modified: give another folder with --out.")
    if out.exists:
        raise ConfigError(f"{out.path} holds a run: resume it with `andromeda train --out {out.path} --resume`, or give another --out.")
    request.schedule.check(request.overrides)
    out.refuse_foreign_files()
    model = chat_model(request.run, request.template, request.special_tokens)
    length, statistics = sequence_length(run, request.overrides), ChatStatistics()
    examples = list(read_examples(request.data, model.template, model.tokenizer, length, statistics))
    manifest = write_chat_corpus(examples, statistics, request.data, model.tokenizer, request.out / CORPUS, request.validation_fraction)
    note(_data_sentence(statistics, length, manifest.splits["val"].documents, manifest.sources[0].skipped.get("duplicate", 0)))
    note(f"chat template sha256 {model.template.sha256[:12]}; new special tokens: {', '.join(model.added) or 'none'}")
    return configure(run, request.out / CORPUS, model.tokenizer.vocab_size, request.schedule, request.overrides)


def _data_sentence(statistics: ChatStatistics, length: int, held_out: int, duplicates: int) -> str:
    twice = f"; {duplicates:,} equal to another were left out" if duplicates else ""
    return f"{statistics.sentence()} at {length:,} tokens{twice}; {held_out:,} are held out"
