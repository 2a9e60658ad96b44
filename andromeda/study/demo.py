"""The demo: from this machine's own Python sources to a small model that writes, in one call that can be interrupted anywhere.

Its yardstick is the compressors' one: the bits that each needs for a byte of text it has never seen.
"""

from __future__ import annotations

import json
import lzma
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from andromeda.api import Andromeda
from andromeda.config.data import BuildConfig
from andromeda.config.load import load
from andromeda.config.run import RunConfig
from andromeda.data.corpus import build
from andromeda.data.files import write_whole
from andromeda.data.loader import open_stream
from andromeda.data.manifest import Manifest
from andromeda.data.read import Report
from andromeda.evaluate.bits import held_out_bits
from andromeda.train.run import Result, train
from andromeda.train.screen import Screen

PRESET = "nano"
CORPUS_BYTES = 40_000_000
"""Read of the sources: a few times what the training sees, so that no text comes twice."""
VALIDATION = 0.02
PROMPTS = ("def ", "class ", "import ")


@dataclass(frozen=True)
class Measured:
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


def build_corpus(out: Path, workers: int, report: Report) -> Manifest:
    """Collect, tokenize and split the interpreter's Python sources, once: packages that come later do not make another corpus."""
    if (out / "manifest.json").exists():
        return Manifest.load(out)
    vocab = load(PRESET).model.vocab_size
    return build(
        ["python"], out, BuildConfig(vocab_size=vocab, max_bytes=CORPUS_BYTES, validation=VALIDATION), workers=workers, report=report
    )


def configuration(corpus: Path, overrides: list[str]) -> RunConfig:
    """The preset on the demo's corpus."""
    return load(PRESET, [f"data.corpus={json.dumps(str(corpus))}", *overrides])


def train_or_go_on(config: RunConfig, out: Path, screen: Screen) -> Result:
    """Train in `out`, from its last checkpoint if there is one."""
    return train(config, out, resume=(out / "config.toml").exists(), screen=screen)


def compressed_bits(text: bytes) -> tuple[float, float]:
    """Bits per byte that xz and zlib need at their strongest (level 9)."""
    return 8 * len(lzma.compress(text, preset=9)) / len(text), 8 * len(zlib.compress(text, 9)) / len(text)


def measure(model: Andromeda, config: RunConfig, corpus: Path, out: Path) -> Measured:
    """Model and compressors on the held-out text; kept as demo.json in the run folder."""
    context = config.model.context
    bits = held_out_bits(model, open_stream(config.data, context, config.seed, "val"), context=context, stride=context // 2)
    xz, deflate = compressed_bits((corpus / "val.txt").read_bytes())
    figures = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(figures) if "seconds" in line)
    measured = Measured(
        held_out=bits.per_byte,
        xz=xz,
        zlib=deflate,
        held_out_bytes=bits.bytes,
        parameters=model.num_parameters(),
        tokens=last["tokens"],
        tokens_per_second=last["tokens"] / last["seconds"],
        seconds=last["seconds"],
    )
    write_whole(out / "demo.json", (json.dumps(asdict(measured), indent=2) + "\n").encode())
    return measured


def write_samples(model: Andromeda, out: Path, show: Callable[[str], None], new_tokens: int = 120) -> None:
    """Let the model go on from a few prompts; shown as it writes, and kept in the run folder's samples/."""
    texts = []
    for prompt in PROMPTS:
        show(prompt)
        pieces = []
        for piece in model.generate(prompt, stream=True, max_new_tokens=new_tokens, temperature=0.7, top_k=40, seed=1):
            show(piece)
            pieces.append(piece)
        show("\n\n")
        texts.append(prompt + "".join(pieces))
    write_whole(out / "samples" / "demo.txt", ("\n\n----\n\n".join(texts) + "\n").encode())
