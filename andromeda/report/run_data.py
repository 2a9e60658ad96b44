"""What a run folder says, as far as it goes: a report can be made at any moment of a run, and of one that was damaged."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from andromeda.config.run import RunConfig
from andromeda.data.corpus import CorpusManifest
from andromeda.data.tokenizer import CHAT_TEMPLATE, Tokenizer, template_sha256
from andromeda.evaluate.result import EvalResult, load_readable_results
from andromeda.train import checkpoint
from andromeda.train.metrics import MetricsHistory, is_number, read_metrics
from andromeda.train.run_dir import RunDir
from andromeda.utils.errors import AndromedaError, CheckpointError
from andromeda.utils.untrusted import MalformedFile, open_regular, parse_json, read_json_object

SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "finish")
"""Settings of a sample that are shown."""
SAMPLE_BYTES = 4 << 20
"""Read of each file of samples."""


@dataclass(frozen=True)
class GeneratedSample:
    """A text that the model wrote. `prompt` stands before `text`."""

    file: str
    prompt: str
    text: str
    about: str = ""
    step: int | None = None
    """Of training, where the model was still trained."""


@dataclass(frozen=True)
class RunData:
    """All that is known of a run."""

    path: Path
    config: RunConfig
    manifest: dict[str, Any]
    metrics: MetricsHistory
    evaluations: dict[str, EvalResult]
    samples: list[GeneratedSample]
    corpora: dict[str, CorpusManifest]
    """Manifests of the corpora that are still where the run found them, by path."""
    compressors: dict[str, float] = field(default_factory=dict)
    """Bits per byte that general compressors need for the held-out text, where the run has measured them."""
    newest: int | None = None
    """Step of the newest checkpoint."""
    chat_template: str = ""
    """sha256 of the chat template; empty where the run has none."""
    problems: list[str] = field(default_factory=list)
    """What could not be read, one sentence each."""

    @property
    def finished(self) -> bool:
        """Whether the last step is behind it, by its metrics or, where it has none, by its checkpoint."""
        return (self.metrics.step or self.newest or 0) >= self.config.train.steps

    def of_kind(self, kind: str) -> list[EvalResult]:
        """Evaluations of a kind, the newest weights first."""
        return sorted((r for r in self.evaluations.values() if r.kind == kind), key=lambda r: (-r.step, r.name))


def read_run(path: str | Path) -> RunData:
    """Everything in a run folder. Raises CheckpointError or ConfigError, one sentence, when it is none."""
    folder = RunDir(path)
    if not folder.exists:
        raise CheckpointError(f"{path} is not a run folder (it holds no config.toml): give the --out of `andromeda train`.")
    evaluation_section, problems = load_readable_results(folder.path)
    config = folder.config()
    there = checkpoint.list_all(folder.checkpoints)
    return RunData(
        path=folder.path,
        config=config,
        manifest=_or_nothing(folder.manifest, problems),
        metrics=read_metrics(folder.metrics_file),
        evaluations=evaluation_section,
        samples=read_samples(folder.samples),
        corpora=_corpora(config),
        compressors=_compressors(folder.path / "demo.json"),
        newest=int(there[0].name.rpartition("-")[2]) if there else None,
        chat_template=_or_nothing(partial(_chat_template, folder.path / "tokenizer"), problems) or "",
        problems=problems,
    )


def read_samples(folder: Path, most: int = 24, longest: int = 6000) -> list[GeneratedSample]:
    """Texts of .jsonl files (as `andromeda generate --json` prints them, or with a `step`) and of .txt files, the newest files first.

    At most `most` texts of a file and of all. Of a file with more, those of some of its steps, always with the newest.
    """
    found: list[GeneratedSample] = []
    files = [p for p in folder.glob("*") if p.suffix in (".jsonl", ".txt")] if folder.is_dir() else []
    for path in sorted(files, key=lambda p: (-p.lstat().st_mtime, p.name)):
        try:
            with open_regular(path) as file:
                text = file.read(SAMPLE_BYTES).decode("utf-8", "replace")
        except (OSError, MalformedFile):
            continue
        if len(found) >= most:
            break
        found += (
            _some_steps(_lines_of(path.name, text), most) if path.suffix == ".jsonl" else [GeneratedSample(path.name, "", text.strip("\n"))]
        )
    return [replace(s, prompt=s.prompt[-longest:], text=s.text[:longest]) for s in found[:most]]


def _lines_of(file: str, text: str) -> list[GeneratedSample]:
    found = []
    for line in text.splitlines():
        try:
            values = parse_json(line)
            prompt, answer = values["prompt"], str(values["text"])
            prompt = prompt if isinstance(prompt, str) else f"{len(prompt)} token ids"
            about = ", ".join(f"{name.replace('_', ' ')} {values[name]}" for name in SAMPLING_KEYS if values.get(name) is not None)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        step = values.get("step")
        step = step if isinstance(step, int) and is_number(step) and step >= 0 else None
        found.append(GeneratedSample(file, prompt, answer, about, step))
    return found


def _some_steps(samples: list[GeneratedSample], most: int) -> list[GeneratedSample]:
    """The samples of as many steps, evenly spread, as fit into `most`: those of the newest step first."""
    steps = sorted({s.step for s in samples if s.step is not None}, reverse=True)
    if not steps or len(samples) <= most:
        return sorted(samples, key=lambda s: -(s.step or 0))
    count = max(1, min(len(steps), most * len(steps) // len(samples)))
    kept = {steps[i * (len(steps) - 1) // max(1, count - 1)] for i in range(count)}
    return sorted((s for s in samples if s.step in kept), key=lambda s: -(s.step or 0))


def _or_nothing(read: Any, problems: list[str]) -> Any:
    """What `read` gives; an empty table, and its sentence among the problems, when it cannot."""
    try:
        return read()
    except AndromedaError as error:
        problems.append(str(error))
        return {}


def _chat_template(folder: Path) -> str:
    template = Tokenizer.load(folder).chat_template if (folder / CHAT_TEMPLATE).exists() else ""
    return template_sha256(template) if template else ""


def _corpora(config: RunConfig) -> dict[str, CorpusManifest]:
    found = {}
    for path in [config.data.corpus, *(source.path for source in config.data.sources)]:
        try:
            if path:
                found[path] = CorpusManifest.load(Path(path))
        except AndromedaError:
            continue
    return found


def _compressors(path: Path) -> dict[str, float]:
    try:
        kept = read_json_object(path)
        return {name: float(kept[name]) for name in ("xz", "zlib") if is_number(kept.get(name))}
    except (OSError, ValueError, AttributeError):
        return {}


def training_status(record: RunData) -> str:
    """How far the run is."""
    step, steps = record.metrics.step, record.config.train.steps
    if not record.metrics.records:
        return f"saved at step {record.newest:,}" if record.newest is not None else "not begun"
    if record.finished and (warning := record.metrics.warning):
        return f"training finished after {steps:,} steps without learning ({warning.rstrip('.')})"
    return f"training finished after {steps:,} steps" if record.finished else f"at step {step:,} of {steps:,} of its training"


def held_out_bits(record: RunData) -> float | None:
    """Bits per byte of the held-out text, by the newest evaluation."""
    found = next((r.result.get("bits_per_byte") for r in record.of_kind("bits") if r.name == r.kind), None)
    return found if is_number(found) else None
