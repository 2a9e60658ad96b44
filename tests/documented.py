"""Commands and Python code of the documentation, read from its Markdown (docs/testing.md tells a writer how to mark them)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*.md")])

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)(?P=fence) *$", re.MULTILINE | re.DOTALL
)
COMMENTS = re.compile(r"(?:<!--(?:(?!-->).)*-->\s*)+\Z", re.DOTALL)
MARK = re.compile(r'<!--\s*(?P<what>not run|run with|before)\s*(?:"(?P<start>[^"]*)")?\s*:\s*(?P<text>.*?)\s*-->', re.DOTALL)
LOOKS_LIKE_A_COMMAND = re.compile(r"^(?:\$ \S|(?:andromeda|make|pip|git|source|python -m|python \S+\.py)\s)", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    line: int
    text: str
    not_run: str = ""
    """Why it is not run; empty where it is."""
    extra: str = ""
    """Arguments that are added when it is run."""


@dataclass(frozen=True)
class Block:
    """A fenced block, with the marks before it."""

    line: int
    language: str
    text: str
    marks: tuple[re.Match[str], ...] = field(repr=False)

    @property
    def before(self) -> list[str]:
        """Commands that prepare what the block needs."""
        return [mark["text"] for mark in self.marks if mark["what"] == "before"]

    def mark(self, what: str, command: str) -> str:
        """The text of a mark that is about a command: one without a beginning is about all of them."""
        texts = [mark["text"] for mark in self.marks if mark["what"] == what and command.startswith(mark["start"] or "")]
        return " ".join(texts)

    def commands(self) -> Iterator[Command]:
        """The commands of a shell block: every line of `bash`, lines after `$ ` of `console`; a backslash at the end joins lines."""
        lines = enumerate(self.text.splitlines(), self.line + 1)
        for number, text in lines:
            if self.language == "console":
                if not text.startswith("$ "):
                    continue
                text = text[2:]
            while text.endswith("\\"):
                text = text[:-1] + next(lines)[1].removeprefix("> ").lstrip()
            if text.strip() and not text.lstrip().startswith("#"):
                yield Command(number, text.strip(), self.mark("not run", text), self.mark("run with", text))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text, found = page.read_text("utf-8"), []
    for match in FENCE.finditer(text):
        comments = COMMENTS.search(text, 0, match.start())
        marks = tuple(MARK.finditer(comments[0])) if comments else ()
        inner = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        found.append(Block(text.count("\n", 0, match.start()) + 1, match["language"], inner, marks))
    return found
