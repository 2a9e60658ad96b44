"""Prompts from a file or from standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from andromeda.errors import RequestError


def read_prompts(path: Path) -> Sequence[str | list[int]]:
    """The prompts of a file: one a line; in .jsonl each line is a text, a list of ids, or an object with either as "prompt".

    Empty lines are passed over. Raises RequestError.
    """
    try:
        # Not splitlines, which also splits at separators that JSON strings may hold.
        lines = _text(path.read_bytes(), str(path)).replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise RequestError(f"The prompts in {path} cannot be read ({error.strerror}): give a .txt or .jsonl file.") from None
    read = _json_prompt if path.suffix == ".jsonl" else _line
    prompts = [read(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise RequestError(f"{path} holds no prompts: write one a line.")
    return prompts


def read_stdin() -> str:
    """All of standard input, as it is. Raises RequestError when it is not UTF-8."""
    return _text(sys.stdin.buffer.read(), "Standard input")


def _text(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError(f"{source} is not text in UTF-8 (byte {error.start}): convert it first.") from None


def _line(line: str, place: str) -> str:
    return line


def _json_prompt(line: str, place: str) -> str | list[int]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{place[0].upper()}{place[1:]} is not JSON ({error}): correct or remove it.") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str | list):
        raise RequestError(
            f'{place[0].upper()}{place[1:]} holds no prompt: write a text, a list of token ids, or an object with one as "prompt".'
        )
    return prompt
