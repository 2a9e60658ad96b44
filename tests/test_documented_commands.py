"""Every command and every Python snippet of README and docs is run, or says why not.

Pages are run in a folder of their own, from their first block to their last, with a model of a few thousand weights. What a page
reads and has not made itself (a run, a corpus, texts) is there already.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from andromeda.config.data import BuildConfig
from andromeda.config.load import load
from andromeda.data.build import build
from andromeda.train.trainer import train
from tests.command import call
from tests.documented import LOOKS_LIKE_A_COMMAND, PAGES, ROOT, Block, Command, blocks

MODEL = [
    "model.max_seq_len=640", "model.hidden_size=16", "model.num_layers=2", "model.attention.num_heads=4", "model.attention.num_kv_heads=4",
    "model.attention.head_dim=16",
]  # fmt: skip
TRAINING = [
    "train.steps=2", "train.batch_size=2", "train.seq_len=128", "train.compile=off", "train.device=cpu", "train.schedule.warmup=0",
    "train.schedule.cooldown=1", "train.eval_every=0", "train.probes.every=0",
]  # fmt: skip
SMALL = {
    "data build": ["--workers=1", "--validation-fraction=0.3", "--vocab-size=300"],
    "train": [*MODEL, *TRAINING],
    "demo": [*MODEL, *TRAINING],
    "ablate": [*MODEL, *TRAINING, "--seeds=1", "--timing-steps=0"],
    "extend": ["--to=1280", "--steps=1", "--samples=1", "--scored-tokens=16"],
    "eval": ["--samples=1"],
    "plan": ["train.compile=off"],
    "generate": ["--max-new-tokens=4"],
    "tokenizers compare": ["--vocab-sizes=300,400", "--flops=1e6", "--validation-fraction=0.3", *(f"--set={change}" for change in MODEL)],
}
"""Arguments that keep a documented command small; of two for one thing the later counts."""

SHELL = ("bash", "console")

PROGRAMS = {"andromeda", "python", "cat", "head", "tail", "ls", "echo", "printf", "grep", "wc", "mkdir", "cd"}
"""What may be run without a mark: nothing that installs, downloads or runs the tests."""

WORDS = [first + middle + last for first in "bdfklmst" for middle in ("a", "e", "io") for last in ("n", "rt", "ck")]


LAUNCHER = f"""#!{sys.executable}
import sys
from andromeda.cli.main import main

if __name__ == "__main__":
    sys.argv[0] = "andromeda"
    main()
"""


def names(page: Path) -> str:
    return str(page.relative_to(ROOT))


def shell(page: Path) -> list[tuple[Block, Command]]:
    return [(block, command) for block in blocks(page) if block.language in SHELL for command in block.commands()]


RUN = [
    page for page in PAGES if any(not command.not_run for _, command in shell(page)) or any(b.language == "python" for b in blocks(page))
]


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, a corpus of them, a run of two steps, prompts and questions."""
    place, draw = tmp_path_factory.mktemp("documented"), random.Random(0)
    for folder, ending in (("texts", ".txt"), ("python", ".py")):
        (place / folder).mkdir()
        for number in range(24):
            text = "\n".join(" ".join(draw.choices(WORDS, k=12)) for _ in range(24))
            (place / folder / f"{number:02}{ending}").write_text(f"# {number}\n{text}\n")
    (place / "novel.txt").write_text(" ".join(draw.choices(WORDS, k=400)))
    questions = [{"question": "one and one", "choices": ["two", "three"], "answer": 0, "text": "bert"}] * 6
    (place / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (place / "gsm8k_test.jsonl").write_text('{"question": "One and one?", "answer": "2 #### 2"}\n' * 9)
    (place / "prompts.jsonl").write_text('{"prompt": "fan dert"}\n{"prompt": "kion"}\n')
    torch.set_num_threads(1)
    build([str(place / "texts")], place / "corpus", BuildConfig(tokenizer="bytes", validation_fraction=0.3))
    train(load("nano", [f"data.corpus={place / 'corpus'}", *MODEL, *TRAINING]), place / "run")
    return place


@pytest.fixture
def folder(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with everything but runs and corpora, as the working directory; `andromeda` is on the PATH."""
    for path in material.iterdir():
        if path.name not in ("corpus", "run"):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    command = tmp_path / ".bin" / "andromeda"
    command.parent.mkdir()
    command.write_text(LAUNCHER)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def provide(text: str, material: Path) -> None:
    """The runs and corpora that a command or snippet names, where nobody has made them yet; what it writes itself is taken away."""
    written = re.findall(r'(?:--out[ =]|\.save\(")([\w./-]+)', text) if "--resume" not in text and "--append" not in text else []
    for name in set(re.findall(r"\b(?:runs|corpora)/[\w-]+|\bcorpus\b(?!=)", text)) - set(written):
        if not Path(name).exists():
            shutil.copytree(material / ("run" if name.startswith("runs/") else "corpus"), name)
    for name in written:
        shutil.rmtree(name, ignore_errors=True)


def words(command: str) -> list[str]:
    """What the shell makes of a command without operators."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def has_operators(command: str) -> bool:
    """Whether only a shell can run it: pipes, redirections, lists, assignments."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    return "=" in command.split()[0] or any(set(token) <= set("|&;<>()") for token in lexer)


def run(command: Command, material: Path) -> None:
    """Run one command; it has to end with 0. Those of `andromeda` run in this process, which has torch already."""
    text = re.sub(r"\s+#\s.*", "", command.text)
    place = f"line {command.line}: {text}"
    assert text.split()[0] in PROGRAMS, f"{place} is not run by tests: write <!-- not run: WHY --> before its block"
    provide(f"{text} {command.extra}", material)
    if has_operators(text) or not text.startswith("andromeda "):
        bash(f"{text} {command.extra}", place)
        return
    arguments = words(f"{text} {command.extra}")[1:]
    if "--resume" not in arguments:
        small = next((SMALL[verb] for verb in SMALL if " ".join(arguments).startswith(verb)), [])
        if "--append" in arguments:  # the corpus keeps its vocabulary and its held-out documents
            small = [change for change in small if not change.startswith(("--vocab-size", "--validation-fraction"))]
        if "--tokenizer runs/" in text:  # that of a run has its size
            small = [change for change in small if not change.startswith("--vocab-size")]
        arguments += [argument for argument in small if argument.split("=")[0] not in command.extra]
    code = call(*arguments)
    assert code == 0, f"{place} ended with {code}, as: andromeda {shlex.join(arguments)}"


def bash(command: str, place: str) -> None:
    """Run a command by the shell."""
    done = subprocess.run(["bash", "-euc", command], capture_output=True, text=True)
    assert done.returncode == 0, f"{place} ended with {done.returncode}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("page", RUN, ids=names)
def test_commands_and_code_run(page: Path, folder: Path, material: Path) -> None:
    scope: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        commands = [command for command in block.commands() if not command.not_run] if block.language in SHELL else []
        snippet = block.language == "python" and not block.mark("not run", "")
        for command in block.before if commands or snippet else ():
            bash(command, f"before line {block.line}: {command}")
        for command in commands:
            run(command, material)
        if snippet:
            provide(block.text, material)
            exec(compile("\n" * block.line + block.text, str(page), "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_no_command_escapes(page: Path) -> None:
    """A block with commands is `bash` (commands alone) or `console` (`$ ` before each, with their output)."""
    for block in blocks(page):
        if block.language not in (*SHELL, "python"):
            found = LOOKS_LIKE_A_COMMAND.search(block.text)
            assert not found, (
                f"{names(page)}:{block.line}: a command in a block that is neither bash nor console: {found[0] if found else ''}"
            )


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_marks_are_read(page: Path) -> None:
    """Each mark stands before a block and is about something in it."""
    text = page.read_text("utf-8")
    read = [(block, mark) for block in blocks(page) for mark in block.marks]
    outside = re.sub(r"`[^`\n]*`|^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"<!--\s*(?:not run|run with|before)\b", outside)) == len(read), "a mark before no block"
    for block, mark in read:
        place = f"{names(page)}:{block.line}"
        starts = [command.text for command in block.commands()] if block.language != "python" else [""]
        assert mark["text"], f"{place}: a mark without a reason"
        assert any(start.startswith(mark["start"] or "") for start in starts), f"{place}: no command begins with {mark['start']}"


def test_blocks_are_read_as_they_are_marked(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        """# Page
<!-- not run "make": minutes -->
<!-- run with "andromeda train":
     train.steps=2 -->
<!-- before: touch here -->
```bash
make demo
andromeda train nano \\
  --out runs/a  # a comment
# nothing
```

  ```console
  $ andromeda doctor
  all is well
  ```
<!-- not run: a GPU -->

```console
$ andromeda bench attention
```
<!-- about something else -->
```python
x = 1
```
"""
    )
    shell, console, gpu, python = blocks(page)
    assert [(c.line, c.text, c.not_run, c.extra) for c in shell.commands()] == [
        (7, "make demo", "minutes", ""),
        (8, "andromeda train nano --out runs/a  # a comment", "", "train.steps=2"),
    ]
    assert shell.before == ["touch here"]
    assert [(c.text, c.not_run) for c in console.commands()] == [("andromeda doctor", "")]
    assert [(c.text, c.not_run) for c in gpu.commands()] == [("andromeda bench attention", "a GPU")]
    assert (python.language, python.text, python.marks) == ("python", "x = 1\n", ())


@pytest.mark.parametrize("text", ["andromeda plan nothing-like-this", "pip install andromeda", "andromeda doctor | grep nothing-like-this"])
def test_a_command_that_fails_or_installs_is_noticed(text: str, folder: Path, material: Path) -> None:
    with pytest.raises(AssertionError, match="line 7"):
        run(Command(7, text), material)
