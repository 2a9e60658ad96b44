"""What each augmentation does to a small model at equal tokens: `python benchmarks/augmentation.py [STEPS]`, minutes on one CPU core.

Writes benchmarks/results/augmentation.json. Held-out text is never augmented, except where infilling is measured: there
the bits of the middle are counted, given the text around it.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from andromeda.bench.record import record, save
from andromeda.config.data import AugmentationConfig, BuildConfig, DataConfig
from andromeda.config.load import load
from andromeda.data.augmentation import FIM, MASK, FillInTheMiddle
from andromeda.data.build import build
from andromeda.data.loader import open_stream
from andromeda.data.packing import IGNORE, PackedSequence
from andromeda.evaluate.bits_per_byte import held_out_bits
from andromeda.model.transformer import Transformer
from andromeda.ops.cross_entropy import linear_cross_entropy
from andromeda.train.progress import NullReporter
from andromeda.train.trainer import train
from andromeda.train.weights import load_weights

RESULT = Path(__file__).parent / "results" / "augmentation.json"
CONTEXT = 256
MODEL = [
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.attention.num_heads=1",
    f"model.max_seq_len={CONTEXT}",
    "train.compile=off",
    "train.eval_every=0",
]
QUIET = ["train.eval_every=0", "train.checkpoints.every=0"]
CASES = {
    "none": [],
    "fill in the middle, half of the documents": ["data.augment.fim=0.5"],
    "fill in the middle, nine tenths": ["data.augment.fim=0.9"],
    "a tenth of the inputs random": ["data.augment.mask=0.1"],
    "a tenth of the inputs masked": ["data.augment.mask=0.1", "data.augment.mask_with=special"],
    "documents and rows in the corpus's order": ["data.shuffle=false"],
}
MIXED = {"by size": 1.0, "by size to the power 0.5": 0.5, "equal shares": 0.0}


def main(steps: int) -> None:
    """Build, train every case, measure, write."""
    torch.set_num_threads(1)
    work = Path(".scratch/augmentation")
    code, prose = corpora(work)
    figures: dict[str, Any] = {"steps": steps, "cases": {}, "mixture": {}}
    for name, changes in CASES.items():
        model = learn(work / "run", steps, [f"data.corpus={code}", *changes])
        figures["cases"][name] = {"bits_per_byte": bits(model, code), "middle_bits_per_byte": middle_bits(model, code)}
        print(name, figures["cases"][name], flush=True)
    for name, power in MIXED.items():
        sources = f'data.sources=[{{path="{code}"}}, {{path="{prose}"}}]'
        model = learn(work / "run", steps, [sources, "data.by_size=true", f"data.upsample={power}"])
        figures["mixture"][name] = {"code": bits(model, code), "prose": bits(model, prose)}
        print(name, figures["mixture"][name], flush=True)
    save(RESULT, record(f"python benchmarks/augmentation.py {steps}", figures))
    print(json.dumps(figures, indent=1))


def corpora(work: Path) -> tuple[Path, Path]:
    """Python sources with the special tokens reserved, and this project's documentation in the same tokens."""
    code, prose = work / "code", work / "prose"
    build(["python"], code, BuildConfig(vocab_size=2048, special_tokens=(*FIM, MASK), max_bytes=8_000_000, validation_fraction=0.03))
    build(["docs"], prose, BuildConfig(tokenizer=str(code), include=(".md",), split_documents_at=4000, validation_fraction=0.2))
    return code, prose


def learn(out: Path, steps: int, changes: list[str]) -> Transformer:
    """A model after `steps` of preset nano's schedule."""
    shutil.rmtree(out, ignore_errors=True)
    schedule = [f"train.steps={steps}", f"train.schedule.cooldown={2 * steps // 5}", *QUIET]
    train(load("nano", [*MODEL, *schedule, *changes]), out, reporter=NullReporter())
    return load_weights(out)


def bits(model: Transformer, corpus: Path) -> float:
    """Bits per byte of the held-out text, read from left to right."""
    return held_out_bits(
        model, open_stream(DataConfig(corpus=str(corpus)), CONTEXT, 0, "val"), context=CONTEXT, stride=CONTEXT // 2
    ).per_byte


@torch.no_grad()
def middle_bits(model: Transformer, corpus: Path) -> float:
    """Bits per byte of the middles of held-out documents that were rearranged, prefix first."""
    stream = open_stream(DataConfig(corpus=str(corpus), packing="documents"), CONTEXT, 0, "val")
    tokenizer = stream.tokenizer
    assert tokenizer is not None
    tokens = tuple(tokenizer.special_tokens[name] for name in FIM)
    stage, lengths = FillInTheMiddle(AugmentationConfig(fim=1.0, fim_spm=0.0), tokens, tokenizer.eos, 0), tokenizer.byte_lengths()
    nats = size = 0.0
    for number in range(min(200, stream.num_sequences or 0)):
        batch = stream.batch(number, 1)
        row = stage(PackedSequence(batch.ids[0].numpy(), batch.targets[0].numpy(), batch.documents[0].numpy()), number)
        targets = np.where(in_middle(row, tokens[2]), row.targets, IGNORE)
        hidden = model.hidden(torch.from_numpy(row.ids)[None], documents=batch.documents)
        head = model.head
        nats += float(linear_cross_entropy(hidden, head.weight, torch.from_numpy(targets)[None], bias=head.bias, softcap=head.softcap).nll)
        size += int(lengths[targets[targets != IGNORE]].sum())
    return nats / math.log(2) / size


def in_middle(row: PackedSequence, token: int) -> np.ndarray:
    """Which positions of a row come at or after their document's middle token."""
    begun = np.cumsum(row.ids == token)
    first = np.r_[True, np.diff(row.documents) != 0]
    before = np.maximum.accumulate(np.where(first, begun - (row.ids == token), 0))
    return begun > before


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
