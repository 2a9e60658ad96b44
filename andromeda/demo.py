"""The demo: from this machine's own Python sources to a small model that generates them, in one call that can be interrupted anywhere.

It is measured as compressors are: in bits for each byte of text it has never seen.
"""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from andromeda.api import Andromeda
from andromeda.config.data import BuildConfig
from andromeda.config.load import load
from andromeda.config.run import RunConfig
from andromeda.data.build import build
from andromeda.data.corpus import CorpusManifest
from andromeda.evaluate.evaluator import EVAL_TASKS, run_evaluations
from andromeda.evaluate.loaded_model import LoadedModel
from andromeda.evaluate.request import check_options
from andromeda.evaluate.result import EvalResult
from andromeda.train.metrics import read_metrics
from andromeda.train.progress import Reporter
from andromeda.train.run_dir import RunDir
from andromeda.train.trainer import TrainResult, train
from andromeda.utils.errors import AndromedaError
from andromeda.utils.files import write_whole
from andromeda.utils.progress_callback import ProgressCallback

PRESET = "nano"
CORPUS_BYTES = 40_000_000
"""Read of the sources: a few times what the training sees, so that no text comes twice."""
VALIDATION = 0.02
PROMPTS = (
    '''def read_lines(path, encoding="utf-8"):
    """Read a text file and return its lines.

    Parameters
    ----------
    path : str
        The name of the file.''',
    """class TestReader(unittest.TestCase):

    def test_empty(self):
        reader = Reader("empty.txt")
        self.assertEqual(reader.read(), [])

    def test_lines(self):""",
    '''    def is_valid(self, value):
        """Return True if the value can be stored."""
        if value is None:
            return False''',
)
"""None ends in a blank or a line end: the tokenizer joins those to what follows, so that the model has rarely seen them alone."""
WRITING: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.15, "seed": 1}
"""Without unlikely tokens and with a price on repetition: a model this small rambles or goes in circles otherwise."""
EVALUATIONS: dict[str, dict[str, Any]] = {
    "bits": {},
    "position": {"samples": 48},
    "context": {"samples": 24},
    "retrieval": {"samples": 8, "style": "code"},
    "reasoning": {"samples": 16},
}
"""What is measured after training, with options that keep it short; those that this version or corpus cannot do are left out."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo ends with."""

    held_out: float
    """Bits per byte of the model, every byte of the held-out text."""
    xz: float
    """Bits per byte of `xz -9` on the same bytes."""
    zlib: float
    """Bits per byte of `zlib -9` on the same bytes."""
    held_out_bytes: int
    parameters: int
    tokens: int
    """Targets learned from."""
    tokens_per_second: float
    seconds: float
    """Time spent training."""


def build_corpus(out: Path, workers: int, report: ProgressCallback) -> CorpusManifest:
    """Collect, tokenize and split the interpreter's Python sources, once: packages that come later do not make another corpus."""
    if (out / "manifest.json").exists():
        return CorpusManifest.load(out)
    vocab = load(PRESET).model.vocab_size
    return build(
        ["python"],
        out,
        BuildConfig(vocab_size=vocab, max_bytes=CORPUS_BYTES, validation_fraction=VALIDATION),
        workers=workers,
        report=report,
    )


def configuration(corpus: Path, overrides: list[str]) -> RunConfig:
    """The preset on the demo's corpus."""
    return load(PRESET, [f"data.corpus={json.dumps(str(corpus))}", *overrides])


def train_or_resume(config: RunConfig, out: Path, reporter: Reporter) -> TrainResult:
    """Train in `out`, from its last checkpoint if there is one."""
    return train(config, out, resume=(out / "config.toml").exists(), reporter=reporter)


def compressed_bits(text: bytes) -> tuple[float, float]:
    """Bits per byte that xz and zlib need at their strongest (level 9)."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text), 8 * len(zlib.compress(text, 9)) / len(text)


def evaluate(loaded: LoadedModel, report: ProgressCallback, skip: Callable[[str], None]) -> list[EvalResult]:
    """Measure the trained model; each result is kept in the run folder."""
    found = []
    for task, options in EVALUATIONS.items():
        if task not in EVAL_TASKS:
            continue
        try:
            for result in run_evaluations(loaded, [task], check_options(**options), report, skip):
                result.save(loaded.run)
                found.append(result)
        except AndromedaError as error:
            skip(f"{task} is left out: {error}")
    return found


def measure(loaded: LoadedModel, corpus: Path, evaluations: list[EvalResult]) -> DemoResult:
    """Model and compressors on the held-out text; kept as demo.json in the run folder."""
    bits = next(result.result for result in evaluations if result.kind == "bits")
    xz, deflate = compressed_bits((corpus / "val.txt").read_bytes())
    lines = read_metrics(RunDir(loaded.run).metrics_file).records
    last = next(line for line in reversed(lines) if "seconds" in line)
    measured = DemoResult(
        held_out=bits["bits_per_byte"],
        xz=xz,
        zlib=deflate,
        held_out_bytes=bits["bytes"],
        parameters=loaded.model.num_parameters(),
        tokens=last["tokens"],
        tokens_per_second=last["tokens"] / last["seconds"],
        seconds=last["seconds"],
    )
    write_whole(loaded.run / "demo.json", (json.dumps(asdict(measured), indent=2) + "\n").encode())
    return measured


def write_samples(model: Andromeda, out: Path, show: Callable[[str], None], new_tokens: int = 120) -> None:
    """Continue a few prompts; shown as the model generates, and kept in the run folder's samples/."""
    kept = []
    for prompt in PROMPTS:
        show(prompt)
        pieces = []
        for piece in model.generate(prompt, stream=True, max_new_tokens=new_tokens, **WRITING):
            show(piece)
            pieces.append(piece)
        show("\n\n")
        kept.append(json.dumps({"prompt": prompt, "text": "".join(pieces), **WRITING}, ensure_ascii=False))
    write_whole(out / "samples" / "demo.jsonl", ("\n".join(kept) + "\n").encode())
