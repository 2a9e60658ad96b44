"""One model that writes text, tags it and scores it, compared with three models of one task each at equal compute.

python examples/write_tag_score.py --out work --steps 300 --seeds 3

Guests write reviews of meals; a program generates them, so that the truth is known: which words are dishes, persons and places, and how
much the guest liked it. Some names are those of persons and of places, and "not" turns the word after it around: both need the words
before. The model with all three tasks trains three times as long as each of the others: the same compute in all. What is compared is bits
per byte of held-out text, F1 of the tags (mean over classes) and the correlation of scores.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from andromeda.config.data import BuildConfig
from andromeda.config.load import from_values
from andromeda.config.run import RunConfig
from andromeda.data.build import build
from andromeda.evaluate.evaluator import run_evaluations
from andromeda.evaluate.loaded_model import load_model
from andromeda.evaluate.request import EvalOptions
from andromeda.model.flops import training_flops_per_token
from andromeda.train.manifest import machine, versions
from andromeda.train.metrics import read_metrics
from andromeda.train.trainer import train

LIKED = {"superb": 3, "lovely": 2, "good": 1, "fair": 0, "dull": -1, "poor": -2, "awful": -3}
NAMES = {
    "dish": ("soup", "fish", "bread", "rice", "pie"),
    "person": ("Ada", "Bob", "Paris", "Austin", "Sydney"),
    "place": ("Ulm", "Oslo", "Paris", "Austin", "Sydney"),
}
SENTENCES = (
    "{person} had the {dish} in {place}.",
    "The {dish} was {word}.",
    "{person} found the {dish} {word}.",
    "In {place} all is {word}.",
    "Go to {place} with {person}!",
)
TASKS = ("text", "tags", "score")
BAR = 0.95


def review(draw: random.Random) -> dict[str, Any]:
    """A text with its spans and score."""
    text, spans, score = "", [], 0
    for _ in range(draw.randint(2, 4)):
        for piece in draw.choice(SENTENCES).replace("{", "\0{").replace("}", "}\0").split("\0"):
            label = piece.strip("{}")
            if piece == "{word}":
                word = draw.choice(list(LIKED))
                negated = draw.random() < 0.4
                score += -LIKED[word] if negated else LIKED[word]
                text += "not " * negated + word
            elif piece.startswith("{"):
                word = draw.choice(NAMES[label])
                spans.append([len(text), len(text) + len(word), label])
                text += word
            else:
                text += piece
        text += " "
    return {"text": text.strip(), "tags": spans, "score": score + 0.0}


def build_corpus(folder: Path, count: int) -> Path:
    """Reviews as a corpus of bytes, a tenth held out; one that is there already is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    records, corpus = folder / "reviews.jsonl", folder / "corpus"
    if not records.exists():
        records.write_text("".join(json.dumps(review(draw)) + "\n" for _ in range(count)))
    config = BuildConfig(tokenizer="bytes", validation_fraction=0.1, targets=("tags=spans", "score=number"))
    build([str(records)], corpus, config)
    return corpus


def configuration(corpus: Path, tasks: tuple[str, ...], steps: int, seed: int, balance: str) -> RunConfig:
    """A model of two layers that learns `tasks`."""
    heads: dict[str, Any] = {"tags": {}, "score": {"kind": "regression"}}
    return from_values(
        {
            "preset": "nano",
            "seed": seed,
            "model": {
                "num_layers": 2,
                "hidden_size": 64,
                "max_seq_len": 256,
                "init": {"kind": "normal"},
                "attention": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 32},
                "task_heads": {name: heads[name] for name in tasks if name in heads},
            },
            "data": {"corpus": str(corpus), "packing": "documents"},
            "loss": {"next_token_weight": float("text" in tasks), "balance": balance if len(tasks) > 1 else "fixed"},
            "train": {
                "steps": steps,
                "batch_size": 4,
                "precision": "fp32",
                "compile": "off",
                "device": "cpu",
                "eval_every": steps,
                "eval_tokens": 65_536,
                "log": {"every": 20},
                "checkpoints": {"every": steps},
                "schedule": {"kind": "cosine", "warmup": max(1, steps // 20), "cooldown": 0},
                "optim": {"kind": "adamw", "lr": 4e-3},
            },
        }
    )


def measure(run: Path, tasks: tuple[str, ...]) -> dict[str, float]:
    """Held-out quality of each task: bits per byte, F1, correlation."""
    quality = {}
    if "text" in tasks:
        quality["text"] = read_metrics(run / "metrics.jsonl").latest("validation/bits_per_byte") or float("nan")
    if len(tasks) > 1 or "text" not in tasks:
        (result,) = run_evaluations(load_model(run, device="cpu"), ["heads"], EvalOptions(), lambda *_: None, print)
        quality |= {task: result.result[task][metric] for task, metric in (("tags", "f1"), ("score", "pearson")) if task in tasks}
    return quality


def ratio(task: str, several: float, single: float) -> float:
    """Quality of the model of several tasks as a share of the single one's; of bits, fewer are better."""
    return single / several if task == "text" else several / single


def compare(out: Path, corpus: Path, steps: int, seed: int, balance: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Train the four models of one seed and measure them."""

    def quality(tasks: tuple[str, ...], steps: int) -> dict[str, float]:
        run = out / f"{'-'.join(tasks)}-{seed}"
        done = (run / "config.toml").exists()
        train(configuration(corpus, tasks, steps, seed, balance), run, resume=done)
        found = measure(run, tasks)
        say(f"seed {seed}  {', '.join(tasks):20} {steps:5} steps  " + "  ".join(f"{task} {value:.4f}" for task, value in found.items()))
        return found

    several = quality(TASKS, 3 * steps)
    single = {task: quality((task,), steps)[task] for task in TASKS}
    return {"seed": seed, "several": several, "single": single, "ratio": {t: ratio(t, several[t], single[t]) for t in TASKS}}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Compare, print a table, and write the result where `--result` says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("write-tag-score"), help="folder of corpus and runs")
    parser.add_argument("--steps", type=int, default=300, help="of each model of one task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--reviews", type=int, default=6000)
    parser.add_argument("--balance", default="fixed", choices=["fixed", "uncertainty", "gradnorm", "dwa"])
    parser.add_argument("--result", type=Path, help="JSON file of the result")
    options = parser.parse_args(arguments)
    corpus = build_corpus(options.out, options.reviews)
    seeds = [compare(options.out, corpus, options.steps, seed, options.balance, print) for seed in range(options.seeds)]
    config = configuration(corpus, TASKS, 3 * options.steps, 0, options.balance)
    flops = training_flops_per_token(config.model, config.model.max_seq_len) * config.train.batch_size * config.model.max_seq_len
    found = {
        "command": shlex.join(["python", "examples/write_tag_score.py", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": datetime.now(UTC).date().isoformat(),
        "steps": {"several": 3 * options.steps, "single": options.steps},
        "training_flops": {"several": 3 * options.steps * flops, "single": options.steps * flops},
        "balance": options.balance,
        "seeds": seeds,
        "machine": machine(),
        "versions": versions(),
    }
    for task in TASKS:
        ratios = [one["ratio"][task] for one in seeds]
        print(f"{task:6} {min(ratios):.3f} to {max(ratios):.3f} of its own model's quality (bar {BAR})")
    if options.result:
        options.result.write_text(json.dumps(found, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
