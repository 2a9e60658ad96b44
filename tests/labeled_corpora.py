"""Small generated corpora whose documents have targets."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from andromeda.config.data import BuildConfig
from andromeda.data.build import build

VALUE = {"good": 1, "fine": 1, "bad": -1, "poor": -1, "red": 0, "cat": 0, "dog": 0, "the": 0}
KINDS = {"cat": "animal", "dog": "animal", "red": "color"}
TARGETS = ("score=number", "topic=label", "tags=spans", "moods=labels", "better=pair")


def labeled_rows(count: int, seed: int = 0, pairs: int = 0) -> list[dict[str, Any]]:
    """Words whose tags, topic, moods and score follow from them, and pairs of which the one with good words is better."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        words = [draw.choice(list(VALUE)) for _ in range(draw.randint(2, 5))]
        text, spans = f"{i}:", []
        for word in words:
            text += " "
            if word in KINDS:
                spans.append([len(text), len(text) + len(word), KINDS[word]])
            text += word
        rows.append({"text": text, "score": sum(VALUE[word] for word in words) + 0.5, "topic": "pets" if "cat" in words else "other"})
        rows[-1] |= {"tags": spans, "moods": sorted({"good", "bad"} & set(words))}
        if i % 3 == 0:
            rows[-1].pop(draw.choice(["score", "topic", "tags", "moods"]))
    return rows + [{"prompt": f"{i}", "chosen": " good", "rejected": " bad"} for i in range(pairs)]


def labeled_corpus(folder: Path, rows: list[dict[str, Any]], targets: tuple[str, ...] = TARGETS) -> Path:
    """The rows as a corpus of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build([str(folder / "rows.jsonl")], folder / "corpus", BuildConfig(tokenizer="bytes", validation_fraction=0.2, targets=targets))
    return folder / "corpus"
