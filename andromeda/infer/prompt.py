"""Prompts as token ids, refused with numbers when they do not fit."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from andromeda.config.model import ModelConfig
from andromeda.data.tokenizer import Tokenizer
from andromeda.errors import DataError, RequestError
from andromeda.infer.settings import DEFAULT_NEW_TOKENS

Prompt = str | Sequence[int] | torch.Tensor
"""Text, or token ids (T,)."""


def encode(prompt: Prompt, tokenizer: Tokenizer | None, eos: int | None, vocab: int) -> list[int]:
    """The ids that a prompt stands for; never empty.

    Text begins with the document separator `eos`, as every document does in training; ids are taken as they are. An
    empty prompt is the separator alone. Raises RequestError.
    """
    begin = [] if eos is None else [eos]
    ids = begin + _text_ids(prompt, tokenizer) if isinstance(prompt, str) else _given_ids(prompt, vocab) or begin
    if not ids:
        raise RequestError("An empty prompt needs a model with a tokenizer, whose separator begins a text: give at least one token.")
    return ids


def room(prompt: Sequence[int], config: ModelConfig, max_new_tokens: int | None) -> int:
    """How many tokens may follow a prompt. Raises RequestError when it, or it with the tokens asked for, exceeds the context."""
    length, context = len(prompt), config.context
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
        return tokenizer.encode(text)
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
