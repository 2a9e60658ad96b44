"""How far a model of 125 M parameters that was trained at 2,048 tokens can be extended, by which method, at what cost.

    python benchmarks/extension.py --out benchmarks/results/extension-gpu.json --plots docs/images

One run of minutes on an H100: a corpus of this machine's own Python sources, in which the files of one package
are one long document; notes hidden in them, to be found again; a training at 2,048 tokens; then `andromeda extend` by every
method to 16,384 tokens, by YaRN and NTK to 32,768, and what is left at 65,536 to 200,000. Extensions are independent of each
other: each visible GPU takes one at a time. `--to` and `--methods` ask for other lengths and for a part of them. `--size tiny` runs the
same way on a CPU in minutes. What is done is written after every stage, and `--seconds` bounds the whole. The corpus and the
trained model stay in `--work`, for a call with other lengths or methods.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from andromeda.bench.record import record, save
from andromeda.config.data import BuildConfig, DataConfig
from andromeda.config.load import load
from andromeda.data.build import build
from andromeda.data.loader import open_stream
from andromeda.data.shards import token_dtype, write_shard
from andromeda.data.sources import _python_files
from andromeda.data.tokenizer import Tokenizer
from andromeda.evaluate import hidden_notes
from andromeda.extend.extension import extend
from andromeda.extend.results import draw
from andromeda.extend.training_config import ExtendRequest
from andromeda.train.progress import PlainTextReporter
from andromeda.train.run_dir import RunDir
from andromeda.train.trainer import train


@dataclass(frozen=True)
class Size:
    """One scale of the experiment."""

    model: tuple[str, ...]
    """Changes to preset andromeda-125m."""
    vocab: int
    corpus_bytes: int
    document_bytes: int
    """A package's files are joined into documents of at most this size."""
    validation: float
    trained: int
    to: tuple[int, ...]
    """Contexts to extend to: all methods to the first, `far_methods` to the others."""
    far: int
    """Longest text that is read at the end."""
    rows: int
    """Rows of a training step at the trained context."""
    seconds: float
    """Time for the training at the trained context."""
    steps: int
    """Steps of each continued training."""
    samples: int
    far_samples: int
    job_seconds: float
    """Time that one extension needs."""
    train: tuple[str, ...] = ()


SIZES = {
    "full": Size(
        model=(
            "model.num_layers=16",
            "model.attention.qk_norm=l2_head_scale",
            "model.shift.kind=lerp",
            "model.head.tied=true",
            "model.init.kind=normal",
            "model.init.std=0.02",
            "train.optim.embedding_lr=0.006",
        ),
        vocab=32768,
        corpus_bytes=100_000_000,
        document_bytes=400_000,
        validation=0.04,
        trained=2048,
        to=(16384, 32768),
        far=200_000,
        rows=16,
        seconds=100.0,
        steps=320,
        samples=32,
        far_samples=4,
        job_seconds=60.0,
    ),
    "tiny": Size(
        model=(
            "model.hidden_size=64",
            "model.num_layers=2",
            "model.attention.num_heads=2",
            "model.attention.num_kv_heads=1",
            "model.attention.head_dim=32",
            "model.feedforward.intermediate_size=128",
            "model.attention.qk_norm=l2_head_scale",
            "model.shift.kind=lerp",
        ),
        vocab=2048,
        corpus_bytes=6_000_000,
        document_bytes=40_000,
        validation=0.1,
        trained=1024,
        to=(2048, 4096),
        far=8192,
        rows=2,
        seconds=20.0,
        steps=4,
        samples=2,
        far_samples=2,
        job_seconds=20.0,
        train=("train.compile=off", "train.device=cpu"),
    ),
}
Job = tuple[int, str]
"""Which of the lengths, by which method."""
FAR: Job = (-1, "far")
"""The reading of longer texts still."""
METHODS = ("yarn", "ntk", "none", "pi", "dynamic-ntk")
FAR_METHODS = ("yarn", "ntk")
"""Those that are taken further than to the first length."""
NEEDLE_SHARE = {"train": 0.5, "extend": 0.5}
"""Share of the rows that are a text with notes in it."""


def jobs_of(lengths: int, methods: Sequence[str]) -> list[Job]:
    """What is done in this order while there is time, the most important first: YaRN, the furthest before the others."""
    last = lengths - 1
    asked = [(which, "yarn") for which in reversed(range(lengths))]
    asked += [(0, method) for method in METHODS if method != "yarn"]
    asked += [(which, method) for which in range(1, lengths) for method in FAR_METHODS if method != "yarn"]
    jobs = [job for job in asked if job[1] in methods]
    # Longer texts are read by the model that YaRN took furthest; three of the first length come before them.
    if (last, "yarn") in jobs:
        jobs.insert(min(len(jobs), lengths + 2), FAR)
    return jobs


class Clock:
    """Seconds since the start, and whether there is time for more."""

    def __init__(self, limit: float) -> None:
        self._start, self._limit = time.monotonic(), limit

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def allows(self, seconds: float) -> bool:
        """Whether so many seconds more stay within the limit."""
        return self.now + seconds < self._limit


class Experiment:
    """All stages over one working folder."""

    def __init__(
        self, size: Size, work: Path, out: Path, plots: Path, limit: float, steps: int, command: str, methods: Sequence[str] = METHODS
    ) -> None:
        self.size, self.work, self.out, self.plots, self.clock, self.command = size, work, out, plots, Clock(limit), command
        self.steps, self.jobs = steps, jobs_of(len(size.to), methods)
        self.figures: dict[str, Any] = {"seconds": {}}

    def run(self) -> None:
        """Every stage; what is done is kept."""
        with workers(self.size) as self.pool:
            for name, stage in (("corpus", self.corpus), ("training", self.training), ("extension", self.extension)):
                begun = self.clock.now
                stage()
                self.keep(name, self.clock.now - begun)

    def keep(self, stage: str, seconds: float) -> None:
        """Write all figures so far."""
        self.figures["seconds"][stage] = round(seconds, 1)
        print(f"[{self.clock.now:.0f} s] {stage} took {seconds:.0f} s", flush=True)
        save(self.out, record(self.command, self.figures))

    # The corpus

    def corpus(self) -> None:
        """Code with one document a package, and the same with notes in it at every length that is trained on; made once in a folder."""
        kept = self.work / "corpus.json"
        if not kept.exists():
            kept.write_text(json.dumps(self._corpus()))
        self.figures["corpus"] = json.loads(kept.read_text())
        self._notes_in_code()

    def _corpus(self) -> dict[str, Any]:
        texts = self.work / "texts"
        count = write_packages(texts, self.size)
        made = build(
            [str(texts)],
            self.work / "code",
            BuildConfig(vocab_size=self.size.vocab, validation_fraction=self.size.validation),
            workers=len(os.sched_getaffinity(0)),
        )
        shutil.rmtree(texts)
        splits = made.splits
        return {
            "documents": count,
            "train_tokens": splits["train"].tokens,
            "held_out_tokens": splits["val"].tokens,
            "bytes_per_token": splits["train"].bytes / splits["train"].tokens,
            "fingerprint": made.fingerprint,
            "seconds": round(self.clock.now, 1),
        }

    def _notes_in_code(self) -> None:
        """For each length that has none yet a folder of rows with notes, each one document of exactly that length."""
        # The tokenizer is saved last: a folder without it was left by a call that was stopped.
        folders = {length: self.work / f"notes-{length}" for length in (self.size.trained, *self.size.to)}
        missing = {length: folder for length, folder in folders.items() if not (folder / "tokenizer").exists()}
        if not missing:
            return
        tokenizer = Tokenizer.load(self.work / "code")
        stream = open_stream(DataConfig(corpus=str(self.work / "code"), shuffle=False), 1 << 16, 0)
        some = [stream.batch(i, 1).ids[0] for i in range(min(64, int(stream.epochs(1)[0] ** -1)))]
        text = torch.cat(some).numpy()
        for length, folder in missing.items():
            folder.mkdir(parents=True, exist_ok=True)
            made = hidden_notes.training_sequences(tokenizer, text, length, self._notes(length), self._noted_rows(length), seed=1)
            write_shard(folder / "train-00000.bin", made.astype(token_dtype(tokenizer.vocab_size)).ravel())
            tokenizer.save(folder / "tokenizer")

    def _noted_rows(self, length: int) -> int:
        """Rows with notes that a training reads, at most 4,000: of a step, which has as many tokens at every length, or one row."""
        steps, share = (1300, NEEDLE_SHARE["train"]) if length == self.size.trained else (self.size.steps, NEEDLE_SHARE["extend"])
        each = max(1, round(self.size.rows * self.size.trained / length))
        return min(max(8, int(steps * each * share)), 4000)

    def _notes(self, length: int) -> int:
        if self.size.vocab < 8192:
            return 12
        return 40 if length <= self.size.trained else 64

    # Training at the short context

    def training(self) -> None:
        """As many steps as fit into the time, by the speed of a few, unless their number is given; a run that is there is taken."""
        tokens, base = self.size.rows * self.size.trained, RunDir(self.work / "base")
        steps = self.steps or (base.config().train.steps if base.exists else 0)
        if not steps:
            speed = self._train("calibration", 16)
            steps = int(min(1800, max(24, self.size.seconds * speed / tokens)))
            shutil.rmtree(self.work / "calibration")
        speed = self._train("base", steps)
        model = load(str(self.work / "base")).model
        self.figures["training"] = {
            "steps": steps,
            "tokens": steps * tokens,
            "tokens_per_second": speed,
            "parameters": parameters(self.work / "base"),
            "model": model.model_dump(),
        }

    def _train(self, name: str, steps: int) -> float:
        """Train for `steps` in the folder `name`; returns tokens a second at the end."""
        config = load("andromeda-125m", [*self._settings(steps), *self.size.model, *self.size.train])
        train(config, self.work / name, resume=RunDir(self.work / name).exists, reporter=PlainTextReporter(steps))
        lines = [json.loads(line) for line in (self.work / name / "metrics.jsonl").read_text().splitlines()]
        torch._dynamo.reset()
        return [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")][-1]

    def _settings(self, steps: int) -> list[str]:
        return [
            f"model.vocab_size={self.size.vocab}",
            f"model.max_seq_len={self.size.trained}",
            mixture(self.work, self.size.trained, NEEDLE_SHARE["train"]),
            "data.packing=documents",
            "data.document_mask=false",
            "data.workers=2",
            f"train.steps={steps}",
            f"train.batch_size={self.size.rows}",
            f"train.micro_batch_size={self.size.rows}",
            f"train.schedule.warmup={min(50, steps // 10)}",
            f"train.schedule.cooldown={steps // 3}",
            "train.optim.momentum_warmup=100",
            "train.eval_every=0",
            "train.checkpoints.every=0",
            f"train.log.every={max(1, min(50, steps // 4))}",
        ]

    # Extension

    def extension(self) -> None:
        """All jobs that there is time for, one at a time on each GPU; one that fails does not stop the others."""
        self.figures["extension"] = {}
        self.waiting, running = list(self.jobs), dict[Future[dict[str, Any]], tuple[Job, float]]()
        while self.waiting or running:
            while len(running) < places(self.size) and (job := self._next([one for one, _ in running.values()])):
                running[self.pool.submit(run_job, self.work, self.size, job)] = job, self.clock.now
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                self._ended(*running.pop(future), future)
        self._draw()

    def _next(self, running: list[Job]) -> Job | None:
        """The first job that waits for no other and that there is time for."""
        furthest = (len(self.size.to) - 1, "yarn")
        if not self.clock.allows(self.size.job_seconds):
            self.waiting.clear()
        for job in self.waiting:
            if job != FAR or furthest not in (*running, *self.waiting):
                self.waiting.remove(job)
                return job
        return None

    def _ended(self, job: Job, begun: float, future: Future[dict[str, Any]]) -> None:
        which, method = job
        name = method if job == FAR else f"{method} to {self.size.to[which]}"
        if error := future.exception():
            traceback.print_exception(error)
            self.figures.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
        elif job == FAR:
            self.figures["far"] = future.result()
        else:
            values, found = future.result(), self.figures["extension"]
            methods = found.setdefault(str(self.size.to[which]), values)["methods"]
            methods.update(values["methods"])
            ordered = [one for to, one in self.jobs if to == which and one in methods]
            found[str(self.size.to[which])]["methods"] = {one: methods[one] for one in ordered}
        self.keep(name, self.clock.now - begun)

    def _draw(self) -> None:
        self.plots.mkdir(parents=True, exist_ok=True)
        for to, values in self.figures["extension"].items():
            draw(values, self.plots / f"extension-{to}")
        if "far" in self.figures:
            draw(self.figures["far"], self.plots / "extension-far")


def run_job(work: Path, size: Size, job: Job) -> dict[str, Any]:
    """One extension of the base run, in a folder of its own, or the reading of longer texts; returns what extension.json holds."""
    which, method = job
    if job == FAR:
        return read_far(work, size)
    to = size.to[which]
    request = ExtendRequest(
        str(work / "base"),
        to,
        steps=size.steps,
        lr_scale=0.2,
        # So few steps end before their compilation would.
        overrides=(mixture(work, to, NEEDLE_SHARE["extend"]), "train.compile=off", "train.checkpoints.every=0", "train.log.every=20"),
        samples=size.samples,
        held_out=str(work / "code"),
    )
    return extend(request, method, folder_of(work, to, method), PlainTextReporter, print).values


def read_far(work: Path, size: Size) -> dict[str, Any]:
    """The model extended the furthest, on texts that are longer still: its positions as they are, and scaled once more, untrained."""
    folders = [folder for to in size.to if (folder := folder_of(work, to, "yarn")).exists()]
    overrides = ("train.micro_batch_size=1", "train.batch_size=1")
    request = ExtendRequest(str(folders[-1]), size.far, steps=0, overrides=overrides, samples=size.far_samples, held_out=str(work / "code"))
    return extend(request, "yarn", work / f"far-{folders[-1].name}", PlainTextReporter, print).values


def mixture(work: Path, length: int, share: float) -> str:
    """Code with a share of rows that hold notes, as an override."""
    parts = [(work / "code", 1 - share), (work / f"notes-{length}", share)]
    return "data.sources=[" + ", ".join(f'{{path="{path}", weight={weight}}}' for path, weight in parts) + "]"


def folder_of(work: Path, to: int, method: str) -> Path:
    """The run folder of one extension."""
    return work / f"to-{to}-{method}"


def places(size: Size) -> int:
    """Extensions that are worked on at once."""
    return 1 if "train.device=cpu" in size.train else max(1, torch.cuda.device_count())


def workers(size: Size) -> ProcessPoolExecutor:
    """One process for each place, each with a GPU of its own."""
    context = multiprocessing.get_context("spawn")
    free = context.SimpleQueue()
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    for place in range(places(size)):
        free.put(seen[place] if len(seen) > place and seen[place] else str(place))
    pool = ProcessPoolExecutor(places(size), context, _take, (free,))
    for _ in range(places(size)):
        pool.submit(time.sleep, 1)  # begun now, they have imported everything when they are needed
    return pool


def _take(free: Any) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = free.get()


def write_packages(out: Path, size: Size) -> int:
    """This interpreter's Python sources, the files of one package joined to documents; returns their number."""
    out.mkdir(parents=True, exist_ok=True)
    count = total = 0
    for text in joined(size.document_bytes):
        if total > size.corpus_bytes:
            break
        (out / f"{count:06d}.txt").write_text(text, encoding="utf-8")
        count, total = count + 1, total + len(text)
    return count


def joined(longest: int) -> Iterator[str]:
    """Documents of at most `longest` characters, of neighboring files in the order of their paths, a heading before each."""
    held: list[str] = []
    package, size = "", 0
    for name, path in _python_files():
        own = "/".join(name.split("/")[:2])
        try:
            text = Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) > longest // 2:
            continue
        if held and (own != package or size + len(text) > longest):
            yield "".join(held)
            held, size = [], 0
        held.append(f"# File: {name}\n{text}\n")
        package, size = own, size + len(text)
    if held:
        yield "".join(held)


def parameters(run: Path) -> int:
    """Weights of a run's model."""
    from andromeda.api import Andromeda

    return Andromeda(load(str(run)).model, device="meta").num_parameters()


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/andromeda-extension"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/extension-gpu.json"))
    parser.add_argument("--plots", type=Path, default=Path("docs/images"))
    parser.add_argument("--seconds", type=float, default=440.0)
    parser.add_argument("--steps", type=int, default=0, help="of the training; as many as fit into its time by default")
    parser.add_argument("--to", type=_lengths, default=(), help="contexts to extend to instead of the size's, such as 20480,40960")
    parser.add_argument("--methods", type=_methods, default=METHODS, help=f"to be compared, of {','.join(METHODS)}; all by default")
    parser.add_argument("--samples", type=int, default=0, help="windows, and rows of notes, of each length instead of the size's")
    given = parser.parse_args()
    command = f"python benchmarks/extension.py --size {given.size}" + (f" --steps {given.steps}" if given.steps else "")
    command += f" --to {','.join(map(str, given.to))}" if given.to else ""
    command += f" --methods {','.join(given.methods)}" if given.methods != METHODS else ""
    command += f" --samples {given.samples}" if given.samples else ""
    size = SIZES[given.size]
    size = replace(size, to=given.to or size.to, samples=given.samples or size.samples)
    Experiment(size, given.work, given.out, given.plots, given.seconds, given.steps, command, given.methods).run()


def _lengths(text: str) -> tuple[int, ...]:
    """Contexts between commas, the shortest first."""
    return tuple(sorted({int(one) for one in text.split(",")}))


def _methods(text: str) -> tuple[str, ...]:
    """Names between commas, in the order of METHODS."""
    asked = text.split(",")
    if unknown := [one for one in asked if one not in METHODS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(METHODS)}")
    return tuple(one for one in METHODS if one in asked)


if __name__ == "__main__":
    main()
