"""Folders from somebody else: whatever they hold, nothing of them is run, nothing outside is written, nothing hangs, and what is forged
is not called right. Every attack is tried with every command that opens the folder, in this process, with the folder as working folder.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.command import call
from tests.corpora import short_documents

SIZES = ["hidden_size=16", "num_layers=1", "max_seq_len=32", "vocab_size=257", "attention.num_heads=2", "attention.num_kv_heads=1"]
MODEL = [*(f"model.{size}" for size in SIZES), "model.attention.head_dim=8", "model.value_embedding.kind=none"]
TRAIN = ["steps=4", "batch_size=2", "schedule.cooldown=1", "schedule.warmup=0", "compile=off", "device=cpu", "eval_every=2"]
TRAIN += ["checkpoints.every=2", "precision=fp32"]
CHANGES = [*MODEL, *(f"train.{key}" for key in TRAIN)]
SECONDS = 20
"""After which a command is said to hang."""
ESC = "\x1b]0;owned\x07"
EVIL = "open('OWNED', 'w').close()\nimport torch\nclass Part(torch.nn.Module):\n    def forward(self, *a): ...\n"

VERBS: dict[str, list[str]] = {
    "report": ["report", "run"],
    "verify": ["verify", "run", "--device", "cpu"],
    "generate": ["generate", "run", "the", "--device", "cpu", "--max-new-tokens", "2"],
    "eval": ["eval", "run", "bits", "--device", "cpu"],
    "explain": ["explain", "run", "the"],
    "resume": ["train", "--resume", "--out", "run"],
    "train": ["train", "run", "--init-from", "run", "--out", "new"],
    "extend": ["extend", "run", "--to", "64", "--steps", "0", "--samples", "1", "--device", "cpu", "--out", "longer"],
    "export": ["export", "run", "--to", "exported"],
    "plan": ["plan", "run"],
}
ALL = tuple(VERBS)
PAGES = {
    "report into a folder of the run": ["report", "run", "--out", "run/pages/x.html"],
    "explain into a folder of the run": ["explain", "run", "the", "--out", "run/pages/x.html"],
}
"""Commands that are tried with some attacks only."""
SEVERAL = ["extend", "run", "--to", "64", "--steps", "1", "--samples", "1", "--device", "cpu", "--out", "longer", "--method", "ntk,pi"]
ABLATION = ["ablate", "run", "--vary", "train.optim.weight_decay=0.1", "--seeds", "1", "--timing-steps", "0", "--out", "ablation"]
BUILD = ["data", "build", "texts", "--out", "corpus", "--tokenizer", "bytes", "--force"]
TIMED = [*ABLATION[:6], "--timing-steps", "1", "--out", "ablation"]
MORE = {**PAGES, "ablate timed": TIMED, "extend by several": SEVERAL, "ablate": ABLATION, "build": BUILD}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and a finished run with one evaluation."""
    place = tmp_path_factory.mktemp("made")
    corpus = short_documents(place, 40, validation=0.2)
    assert call("train", "nano", *CHANGES, f"data.corpus={corpus}", "--out", str(place / "run")) == 0
    assert call("eval", str(place / "run"), "bits", "--device", "cpu") == 0
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it to attack, with the run as the place of the evil module and the working folder."""
    shutil.copytree(made, tmp_path / "w", symlinks=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("precious")
    (tmp_path / "outside" / "folder").mkdir()
    for folder in (tmp_path / "w", tmp_path / "w" / "run"):
        (folder / "evil.py").write_text(EVIL)
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setattr(sys, "path", [*sys.path])
    replace_in(tmp_path / "w" / "run" / "config.toml", str(made / "corpus"), str(tmp_path / "w" / "corpus"))
    yield tmp_path / "w"
    assert "evil" not in sys.modules


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def newest(place: Path) -> Path:
    return max((place / "run" / "checkpoints").glob("step-*"))


def reindex(folder: Path) -> None:
    """As a forger does who knows how checkpoints are hashed."""
    files = [file for file in sorted(folder.iterdir()) if file.name != "index.json"]
    index = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file.read_bytes()).hexdigest()} for file in files}
    (folder / "index.json").write_text(json.dumps(index))


# What is done to the folder

Attack = Callable[[Path], None]


def config_key(old: str, new: str) -> Attack:
    return lambda place: replace_in(place / "run" / "config.toml", old, new)


def append_config(text: str) -> Attack:
    def act(place: Path) -> None:
        path = place / "run" / "config.toml"
        path.write_text(path.read_text() + text)

    return act


def put(name: str, content: bytes) -> Attack:
    def act(place: Path) -> None:
        for path in [place / name] if "*" not in name else sorted(place.glob(name)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    return act


def pipe(name: str) -> Attack:
    def act(place: Path) -> None:
        for path in sorted(place.glob(name)):
            path.unlink()
            os.mkfifo(path)

    return act


def link(name: str, target: str) -> Attack:
    """In the place of a file or folder: a link out of the folder, or to a device."""

    def act(place: Path) -> None:
        path = place / name
        path.parent.mkdir(exist_ok=True)
        if path.is_dir() and not path.is_symlink():
            moved = place.parent / "outside" / "folder"
            shutil.rmtree(moved)
            shutil.move(path, moved)
        elif path.exists():
            if not target.startswith("/"):
                shutil.copy(path, place.parent / "outside" / "precious")
            path.unlink()
        path.symlink_to(target if target.startswith("/") else place.parent / "outside" / target)

    return act


def hard_link(name: str) -> Attack:
    def act(place: Path) -> None:
        shutil.copy(place / name, place.parent / "outside" / "precious")
        (place / name).unlink()
        os.link(place.parent / "outside" / "precious", place / name)

    return act


def state(without: tuple[str, ...] = (), **changes: Any) -> Attack:
    """The newest state.json with other values or without some, and an index that fits."""

    def act(place: Path) -> None:
        path = newest(place) / "state.json"
        values = json.loads(path.read_text())
        for key, value in changes.items():
            values[key] = {**values[key], **value} if isinstance(value, dict) and isinstance(values.get(key), dict) else value
        path.write_text(json.dumps({key: value for key, value in values.items() if key not in without}))
        reindex(newest(place))

    return act


def raw_state(content: bytes) -> Attack:
    def act(place: Path) -> None:
        (newest(place) / "state.json").write_bytes(content)
        reindex(newest(place))

    return act


def index(content: bytes) -> Attack:
    def act(place: Path) -> None:
        for folder in (place / "run" / "checkpoints").glob("step-*"):
            (folder / "index.json").write_bytes(content)

    return act


def weights(content: bytes) -> Attack:
    def act(place: Path) -> None:
        for folder in (place / "run" / "checkpoints").glob("step-*"):
            (folder / "model.safetensors").write_bytes(content)
            reindex(folder)

    return act


def harness_result(place: Path) -> None:
    """A stored result whose tasks are of a folder with a function."""
    (place / "tasks").mkdir()
    (place / "tasks" / "utils.py").write_text("open('OWNED', 'w').close()\n")
    (place / "tasks" / "t.yaml").write_text(
        "task: t\ndataset_path: json\noutput_type: generate_until\ndoc_to_text: !function utils.f\ndoc_to_target: x\n"
    )
    stored = json.loads((place / "run/evaluations/bits.json").read_text())
    settings = {"tasks": ["t"], "include": str(place / "tasks"), "shots": None, "samples": 1, "seed": 0}
    stored |= {"kind": "harness", "name": "harness-t", "data": None, "settings": settings, "result": {"t": {"acc": 1.0}}}
    (place / "run/evaluations/harness-t.json").write_text(json.dumps(stored))


def result(**changes: Any) -> Attack:
    def act(place: Path) -> None:
        path = place / "run/evaluations/bits.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return act


def append(name: str, content: bytes) -> Attack:
    def act(place: Path) -> None:
        with (place / name).open("ab") as file:
            file.write(content)

    return act


def changed_metrics(without: tuple[str, ...]) -> Attack:
    """Other figures, and a checkpoint that is hashed again without what it held of them."""

    def act(place: Path) -> None:
        alter(place / METRICS)
        state(without=without)(place)

    return act


def ids_above(name: str) -> Attack:
    """Every token of the shards is beyond the vocabulary."""

    def act(place: Path) -> None:
        for path in place.glob(name):
            content = path.read_bytes()
            path.write_bytes(content[:1024] + b"\xff\xff" * ((len(content) - 1024) // 2))

    return act


def nothing_named(place: Path) -> None:
    """Neither the checkpoints nor the manifest say what the run was trained on."""
    state(without=("data",))(place)
    path = place / "run/manifest.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "data"}))


def settings(**changes: Any) -> Attack:
    def act(place: Path) -> None:
        path = place / "run/evaluations/bits.json"
        stored = json.loads(path.read_text())
        path.write_text(json.dumps({**stored, "settings": {**stored["settings"], **changes}}))

    return act


def pipe_as_text(place: Path) -> None:
    os.mkfifo(place / "pipe")
    settings(text="pipe")(place)


def huge_text(place: Path) -> None:
    with (place / "huge.txt").open("wb") as file:
        file.truncate(1 << 40)
    settings(text="huge.txt")(place)


def extension_results(place: Path) -> None:
    """Those of the very extension that is asked for, with measurements of other types."""
    assert call(*VERBS["extend"]) == 0
    path = place / "longer/extension.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "before": {"context": {"context": ["x"], "nats": [ESC]}, "position": {"edges": {}, "nats": 3}}}))


def damaged_newest(place: Path) -> None:
    """The newest checkpoint is damaged, which is told, with names of its own; an older one is whole."""
    folder = newest(place)
    (folder / "index.json").write_text(json.dumps({ESC: {"bytes": 1, "sha256": "x"}}))
    older = folder.with_name("step-00000002")
    if not older.exists():
        shutil.copytree(folder, older)


WIDE_MAP = {  # of 10,000 cells
    "task": "single",
    "lengths": [64] * 100,
    "depths": [0.5] * 100,
    "accuracy": [[0.5] * 100] * 100,
    "match": [[0.5] * 100] * 100,
    "chance": 0.1,
    "samples": 8,
}
DEEP = b"[" * 200_000
SPLIT_HEADER = struct.pack("<Q", 2**62) + b"{}"
HUGE_SHAPE = json.dumps({"head.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}).encode()
PROVIDER = config_key('kind = "plain"\nrank', 'kind = "custom"\nrank')
METRICS = "run/metrics.jsonl"
STATE = "run/checkpoints/*/state.json"
INDEX = "run/checkpoints/*/index.json"
WEIGHTS = "run/checkpoints/*/model.safetensors"
TOKENIZER = "run/tokenizer/andromeda.json"


def custom_embedding(place: Path) -> None:
    path = place / "run" / "config.toml"
    text = path.read_text().replace('provider = ""', 'provider = "evil:Part"')
    head, _, tail = text.partition("[model.embedding]")
    path.write_text(head + "[model.embedding]" + tail.replace('kind = "plain"', 'kind = "custom"', 1))


ATTACKS: dict[str, tuple[Attack, tuple[str, ...]]] = {
    # code
    "embedding of the folder": (custom_embedding, ALL),
    "mixer of the folder": (config_key('mixer = "softmax"', 'mixer = "evil:Part"'), ALL),
    "mixer that is a module of Python": (config_key('mixer = "softmax"', 'mixer = "antigravity:x"'), ALL),
    "mixer that is a function": (config_key('mixer = "softmax"', 'mixer = "os:system"'), ("report", "generate", "plan", "resume")),
    "mixer that is andromeda's, not registered": (
        config_key('mixer = "softmax"', 'mixer = "andromeda.model.attention:Attention"'),
        ("eval",),
    ),
    "QK norm of the folder": (config_key('qk_norm = "', 'qk_norm = "evil:Part" # "'), ("report", "generate", "verify", "plan", "train")),
    "value embedding of the folder": (
        config_key('[model.value_embedding]\nkind = "none"', '[model.value_embedding]\nkind = "evil:Part"'),
        ("report", "generate", "verify", "resume"),
    ),
    "optimizer of the folder": (
        config_key('kind = "muon"', 'kind = "evil:Part"'),
        ("report", "train", "resume", "plan", "verify", "extend"),
    ),
    "tasks of a folder": (harness_result, ("verify", "report")),
    # terminal
    "unknown key with an escape": (append_config('\n["x\\u001b]0;owned\\u0007"]\ny = 1\n'), ALL),
    "name with an escape": (config_key('name = "nano"', 'name = "x\\u001b]0;owned\\u0007"'), ("report", "plan", "verify")),
    "escape in a value": (config_key('kind = "muon"', 'kind = "x\\u001b]0;owned\\u0007"'), ("report", "train", "plan")),
    "escape in index.json": (index(json.dumps({ESC: {"bytes": 1, "sha256": "x"}}).encode()), ("generate", "verify", "resume")),
    "escape in an evaluation": (result(kind=ESC), ("verify", "report")),
    "escape in state.json": (state(data=ESC), ("resume", "verify")),
    # deep, endless, wrong
    "deep config.toml": (append_config("\nx = " + "[" * 100_000 + "\n"), ("report", "plan", "verify")),
    "config.toml with a key of many parts": (append_config("\n" + "a." * 300_000 + "b = 1\n"), ("report", "plan")),
    "config.toml with endless numbers": (append_config("\nx = 1e999\n"), ("report", "plan")),
    "config.toml of many megabytes": (append_config("\n" + "# x\n" * 400_000), ("report", "plan")),
    "deep state.json": (raw_state(DEEP), ("generate", "verify", "resume", "report")),
    "deep index.json": (index(DEEP), ("generate", "verify", "resume", "report")),
    "deep manifest": (put("run/manifest.json", DEEP), ("report", "verify", "resume")),
    "deep metrics": (put(METRICS, DEEP + b"\n"), ("report", "verify", "resume")),
    "deep tokenizer": (put(TOKENIZER, DEEP), ("generate", "verify", "eval")),
    "deep evaluation": (put("run/evaluations/bits.json", DEEP), ("report", "verify")),
    "deep corpus": (put("corpus/manifest.json", DEEP), ("report", "verify", "resume", "eval")),
    "deep extension": (put("longer/extension.json", DEEP), ("extend",)),
    "number without end in metrics": (put(METRICS, b'{"step": 1e999, "loss": 1}\n'), ("report", "verify", "resume")),
    "number without end in state.json": (raw_state(b'{"format": 1, "step": 4, "metrics_bytes": 1e999}'), ("resume", "verify")),
    "number without end in an evaluation": (
        put("run/evaluations/bits.json", b'{"kind": "bits", "name": "bits", "step": 1e999}'),
        ("report", "verify"),
    ),
    "index.json of nothing": (index(b"{}"), ("generate", "verify", "resume", "eval")),
    "index.json of a list": (index(b"[1]"), ("generate", "verify", "resume")),
    "index.json with other types": (index(b'{"model.safetensors": 1, "state.json": []}'), ("generate", "verify")),
    "index.json that leads out": (index(b'{"../../../../outside/precious": {"bytes": 8, "sha256": ""}}'), ("verify", "generate")),
    "state.json of a list": (raw_state(b"[]"), ("resume", "verify", "report")),
    "state.json without a state": (raw_state(b'{"format": 1, "step": 4}'), ("resume", "verify")),
    "state.json of another step": (state(step=2), ("resume", "verify")),
    "cursor of texts": (state(cursor={"step": "x"}), ("resume", "verify")),
    "cursor below nothing": (state(cursor={"step": -5, "rows": -1}), ("resume", "verify")),
    "random states of texts": (state(random={"python": "x"}), ("resume", "verify")),
    "guard of texts": (state(guard="x"), ("resume", "verify")),
    "metrics_bytes below nothing": (state(metrics_bytes=-1), ("resume", "verify")),
    "manifest of a list": (put("run/manifest.json", b"[]"), ("report", "verify", "resume")),
    "manifest with other types": (
        put("run/manifest.json", b'{"identity": [], "data": {}, "starts": [1, {"machine": 3, "versions": "x", "step": "y"}]}'),
        ("report", "verify", "resume"),
    ),
    "starts with other types": (
        put("run/manifest.json", b'{"starts": [{"machine": 3, "versions": "x", "step": "y", "changes": 5, "command": {}}]}'),
        ("report", "verify"),
    ),
    "metrics of other types": (
        put(METRICS, b'[]\n3\n{"step": "x"}\n{"step": true}\n{"step": 1, "loss": {"a": 1}}\n{"step": 1, "loss": "x", "tokens": [1]}\n'),
        ("report", "verify", "resume"),
    ),
    "a line of megabytes": (put(METRICS, b'{"step": 1, "x": "' + b"y" * (5 << 20) + b'"}\n'), ("report", "verify")),
    "tokenizer of another type": (put(TOKENIZER, b'{"kind": [], "file": 3, "eos": "x", "sha256": 0}'), ("generate", "verify")),
    "tokenizer that leads out": (
        put(TOKENIZER, b'{"kind": "bytes", "file": "../../../outside/precious", "eos": 0, "sha256": ""}'),
        ("generate", "verify"),
    ),
    "tokenizer of no list": (put("run/tokenizer/bytes.json", b'{"a": 1}'), ("generate", "verify")),
    "evaluation with other types": (result(result={"bits_per_byte": "x", "loss": []}), ("report", "verify")),
    "evaluation with settings of other types": (result(settings={"corpus": 3, "text": []}), ("report", "verify")),
    "evaluation of another name": (result(name="../../outside/x"), ("report", "verify")),
    "corpus with other types": (put("corpus/manifest.json", b'{"tokenizer": {"vocab_size": "x"}}'), ("report", "verify", "resume")),
    "offsets of objects": (put("corpus/train-documents.npy", b"\x93NUMPY\x01\x00\x10\x00{'descr': '|O'}\n"), ("verify", "resume")),
    "weights with an absurd header": (weights(SPLIT_HEADER), ("generate", "verify", "resume")),
    "weights with an absurd shape": (weights(struct.pack("<Q", len(HUGE_SHAPE)) + HUGE_SHAPE + b"\0" * 4), ("generate", "verify")),
    "weights of nothing": (weights(b""), ("generate", "verify", "resume")),
    # pipes and devices
    **{
        f"a pipe in place of {name}": (pipe(name), verbs)
        for name, verbs in {
            "run/config.toml": ("report", "plan", "verify"),
            "run/manifest.json": ("report", "verify", "resume"),
            METRICS: ("report", "verify", "resume"),
            STATE: ("generate", "verify", "resume", "report"),
            INDEX: ("generate", "verify", "resume"),
            WEIGHTS: ("generate", "verify", "resume"),
            TOKENIZER: ("generate", "verify"),
            "run/tokenizer/bytes.json": ("generate", "verify"),
            "run/evaluations/bits.json": ("report", "verify"),
            "corpus/manifest.json": ("report", "verify", "resume"),
            "corpus/train-*.bin": ("verify", "resume"),
            "corpus/*-documents.npy": ("verify", "resume"),
            "corpus/val.txt": ("eval",),
        }.items()
    },
    "endless metrics": (link(METRICS, "/dev/zero"), ("report", "verify", "resume")),
    "endless manifest": (link("run/manifest.json", "/dev/zero"), ("report", "verify", "resume")),
    "endless evaluation": (link("run/evaluations/bits.json", "/dev/zero"), ("report", "verify")),
    "endless sample": (link("run/samples/a.txt", "/dev/zero"), ("report",)),
    "endless demo.json": (link("run/demo.json", "/dev/zero"), ("report",)),
    # links
    "linked lock": (link("run/.lock", "precious"), ("resume",)),
    "hard-linked lock": (hard_link("run/.lock"), ("resume",)),
    "linked metrics": (link(METRICS, "precious"), ("resume", "report")),
    "hard-linked metrics": (hard_link(METRICS), ("resume",)),
    "linked checkpoints": (link("run/checkpoints", "folder"), ("resume",)),
    "linked samples": (link("run/samples", "folder"), ("resume", "report")),
    "linked tokenizer": (link("run/tokenizer", "folder"), ("resume",)),
    "linked evaluations": (link("run/evaluations", "folder"), ("eval",)),
    "linked report": (link("run/report.html", "precious"), ("report", "resume")),
    "linked config": (link("run/config.toml", "precious"), ("resume",)),
    "linked manifest": (link("run/manifest.json", "precious"), ("resume",)),
    "linked explanation": (link("run/explain.html", "precious"), ("explain",)),
    "linked tensorboard": (link("run/tensorboard", "folder"), ("resume",)),
    "linked folder of pages": (link("run/pages", "folder"), tuple(PAGES)),
    "linked plots of an extension": (link("longer/extension.png", "precious"), ("extend",)),
    "linked results of an extension": (link("longer/extension.json", "precious"), ("extend",)),
    "linked run of an extension": (link("longer/ntk", "folder"), ("extend by several",)),
    "linked run of an ablation": (link("ablation/optim.weight_decay=0.1-s0", "folder"), ("ablate",)),
    "linked baseline of an ablation": (link("ablation/baseline-s0", "folder"), ("ablate",)),
    "linked lock of an ablation": (link("ablation/.lock", "precious"), ("ablate",)),
    "linked tokenizer of a corpus": (link("corpus/tokenizer", "folder"), ("build", "generate")),
    "linked work of a corpus": (link("corpus/.work", "folder"), ("build",)),
    "linked folder of an export": (link("exported", "folder"), ("export",)),
    # forged
    "a later line of metrics": (append(METRICS, b'{"step": 9, "loss": 0.001}\n'), ("verify", "report")),
    "metrics that nobody remembers": (state(without=("metrics_bytes", "metrics_sha256")), ("verify", "resume")),
    "metrics without their hash": (changed_metrics(without=("metrics_sha256",)), ("verify", "resume")),
    "measured by an older version": (state(without=("validation",)), ("verify",)),
    "trained on nothing": (nothing_named, ("verify", "report", "resume")),
    "weights of another step in a result": (result(step=2), ("verify", "report")),
    "result of a step that never was": (result(step=10**9), ("verify", "report")),
    "result with other figures": (result(result={"bits_per_byte": 0.5, "loss": 0.3, "tokens": 10, "bytes": 10}), ("verify", "report")),
    "result with fewer figures": (result(result={"bits_per_byte": 0.5}), ("verify", "report")),
    "result of other weights": (result(weights="0" * 64), ("verify", "report")),
    "result on other data": (result(data="0" * 64), ("verify", "report")),
    "result of another machine": (
        result(machine={"device": "cuda", "precision": "fp16"}, result={"bits_per_byte": 1.0, "loss": 1.0, "tokens": 1, "bytes": 1}),
        ("verify",),
    ),
    "result with a precision of its own": (result(machine={"precision": ESC, "threads": -5}), ("verify",)),
    # absurd
    "result of an endless text": (settings(text="/dev/zero"), ("verify",)),
    "result of a text of a terabyte": (huge_text, ("verify",)),
    "result of a pipe": (pipe_as_text, ("verify",)),
    "result of a corpus that is a file": (settings(corpus="run/metrics.jsonl"), ("verify",)),
    "result of windows without end": (settings(context=10**12, stride=1), ("verify", "report")),
    "result of a billion problems": (
        result(kind="reasoning", settings={"samples": 10**9, "seed": 0}, result={"recall": {"in": 1.0}}),
        ("verify", "report"),
    ),
    "a map of many lengths": (result(kind="retrieval", settings={}, result=WIDE_MAP), ("report", "verify")),
    "configuration of very many layers": (config_key("num_layers = 1", "num_layers = 10000"), ("report", "plan", "verify", "resume")),
    "configuration of many layers": (config_key("num_layers = 1", "num_layers = 200"), ("report", "verify")),
    "configuration of very many experts": (
        config_key("num_shared_experts = 0", "num_shared_experts = 1000000"),
        ("report", "plan", "verify"),
    ),
    "configuration of a huge vocabulary": (config_key("vocab_size = 257", "vocab_size = 1000000"), ("report", "verify")),
    "configuration of endless steps": (config_key("steps = 4", "steps = 1000000000"), ("report", "verify", "plan")),
    "very many samples": (put("run/samples/a.jsonl", b'{"prompt": "", "text": "x"}\n' * 50_000), ("report",)),
    "very many events": (put(METRICS, b'{"step": 1, "event": "x"}\n' * 20_000), ("report",)),
    "samples of other types": (
        put("run/samples/a.jsonl", b'{"prompt": 3, "text": []}\n[1]\n{"prompt": [], "text": 1, "step": "x"}\n'),
        ("report",),
    ),
    "ids above the vocabulary": (ids_above("corpus/train-*.bin"), ("verify", "resume", "train")),
    "held-out ids above the vocabulary": (ids_above("corpus/val-*.bin"), ("verify", "eval", "resume")),
    "results of an extension of other types": (extension_results, ("extend",)),
    "result of an ablation of other types": (
        put("ablation/baseline-s0/result.json", b'{"loss": "x", "bits_per_byte": [], "steps": {}, "curve": []}'),
        ("ablate",),
    ),
    "costs of an ablation of other types": (
        put("ablation/costs.json", b'{"baseline": {"of": "x", "step_seconds": "y"}}'),
        ("ablate timed",),
    ),
    "escape in a file of the newest checkpoint": (damaged_newest, ("generate", "eval", "resume", "export")),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Hang(BaseException):
    """Not an OSError, as TimeoutError is: the command line would end it with a sentence."""


def ring(number: int, frame: FrameType | None) -> None:
    raise Hang


def test_the_folder_as_it_was_made_works_with_every_command(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Otherwise the attacks would prove nothing."""
    codes = {verb: call(*arguments) for verb, arguments in VERBS.items()}
    assert codes == dict.fromkeys(VERBS, 0)
    assert "checks agree" in capfd.readouterr().out


@pytest.mark.parametrize("name", ATTACKS)
def test_a_strangers_folder_is_data(name: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    attack, verbs = ATTACKS[name]
    attack(place)
    outside = contents(place.parent / "outside")
    before = signal.signal(signal.SIGALRM, ring)
    try:
        for verb in verbs:
            signal.alarm(SECONDS)
            code = call(*(VERBS | MORE)[verb])
            signal.alarm(0)
            printed = capfd.readouterr()
            assert code in (0, 1, 2), f"{verb}: {code}"
            assert "Traceback" not in printed.err, f"{verb}: {printed.err}"
            assert "\x1b" not in printed.out + printed.err, verb
            if code == 2:
                last = printed.err.strip().splitlines()[-1]
                assert last.startswith("andromeda: "), f"{verb}: {printed.err}"
                assert last.endswith("."), f"{verb}: {last}"
            assert not list(place.rglob("OWNED")), verb
            assert contents(place.parent / "outside") == outside, f"{verb} wrote outside"
            if verb == "verify" and name not in HARMLESS:
                assert code != 0, f"verify calls it right: {printed.out}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def resume(place: Path, *changes: str) -> int:
    return call("train", "--resume", "--out", "run", *changes)


@pytest.mark.parametrize(
    ("old", "new"), [("lr = 0", "lr = 1"), ("weight_decay = 0", "weight_decay = 9"), ('qk_norm = "', 'qk_norm = "none" # "')]
)
def test_an_edited_configuration_is_not_resumed(old: str, new: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    replace_first(place / "run" / "config.toml", old, new)
    assert resume(place) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert "config.toml was changed since the checkpoint of step 4" in said
    assert old.split(" ")[0] in said
    assert call("verify", "run", "--device", "cpu") == 1
    assert "config.toml" in capfd.readouterr().out


def replace_first(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def delete(path: Path) -> None:
    path.unlink()


def alter(path: Path) -> None:
    path.write_text(path.read_text().replace('"loss": 5', '"loss": 1', 1))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("damage", [delete, alter, cut])
def test_lost_metrics_are_noticed(damage: Callable[[Path], None], place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    metrics = place / METRICS
    before = metrics.read_bytes()
    damage(metrics)
    assert metrics.read_bytes() != before if metrics.exists() else True
    assert resume(place) == 0
    assert "metrics.jsonl" in "".join(capfd.readouterr())
    assert all(isinstance(json.loads(line)["step"], int) for line in metrics.read_text().splitlines())
    assert call("verify", "run", "--device", "cpu") == 1
    assert "metrics lost" in capfd.readouterr().out


HARMLESS: set[str] = {"name with an escape", "configuration of endless steps"}
"""Attacks that forge nothing."""
