"""Prompts as token ids, refused with numbers when they do not fit."""

from __future__ import annotations

import json
import operator
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from andromeda.config.model import ModelConfig
from andromeda.data.tokenizer import Tokenizer
from andromeda.generate.generation_config import DEFAULT_NEW_TOKENS
from andromeda.utils.errors import DataError, RequestError

Prompt = str | Sequence[int] | torch.Tensor
"""Text, or token ids (T,)."""


def encode(prompt: Prompt, tokenizer: Tokenizer | None, bos: int | None, vocab: int) -> list[int]:
    """The ids that a prompt stands for; never empty.

    Text begins with `bos`, as every document does in training; ids are taken as they are. An empty prompt is `bos` alone.
    Raises RequestError.
    """
    begin = [] if bos is None else [bos]
    ids = begin + _text_ids(prompt, tokenizer) if isinstance(prompt, str) else _given_ids(prompt, vocab) or begin
    if not ids:
        raise RequestError("An empty prompt needs a model with a tokenizer, whose separator begins a text: give at least one token.")
    return ids


def max_completion_tokens(prompt: Sequence[int], config: ModelConfig, max_new_tokens: int | None) -> int:
    """How many tokens may follow a prompt. Raises RequestError when it, or it with the tokens asked for, exceeds the context."""
    length, context = len(prompt), config.max_seq_len
    if length >= context:
        raise RequestError(
            f"The prompt has {length} tokens, but this model's context of {context} leaves room for at most {context - 1}: "
            f"shorten it by {length - context + 1}, or extend the model's context."
        )
    if max_new_tokens is not None and length + max_new_tokens > context:
        raise RequestError(
            f"A prompt of {length} tokens and {max_new_tokens} new ones are more than this model's context of {context}: "
            f"ask for at most {context - length}, or shorten the prompt."
        )
    return max_new_tokens or min(DEFAULT_NEW_TOKENS, context - length)


def _text_ids(text: str, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None:
        raise RequestError("This model has no tokenizer: give its prompt as token ids, not as text.")
    try:
        return tokenizer.encode_start(text)
    except DataError as error:
        raise RequestError(str(error)) from None


def _given_ids(prompt: Sequence[int] | torch.Tensor, vocab: int) -> list[int]:
    try:
        if isinstance(prompt, bytes):
            raise TypeError
        ids = [operator.index(i) for i in (prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt)]
    except TypeError:
        raise RequestError("A prompt must be text or a flat list of whole numbers, its token ids.") from None
    outside = [i for i in ids if not 0 <= i < vocab]
    if outside:
        raise RequestError(f"The prompt holds token {outside[0]}, but this model knows tokens 0 to {vocab - 1} only.")
    return ids


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
