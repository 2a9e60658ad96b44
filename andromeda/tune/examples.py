"""Conversations as token ids that know whether they are learned, and the statistics of a whole file of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from andromeda.data.tokenizer import Tokenizer
from andromeda.tune.chat_template import TEMPLATE, ChatSpan, ChatTemplate
from andromeda.tune.conversations import Conversation, read_conversations
from andromeda.utils.errors import DataError


class ChatExample(NamedTuple):
    """A conversation of N tokens, the document separator first."""

    ids: np.ndarray
    """int64 (N,)."""
    learned: np.ndarray
    """uint8 (N,): 1 where the model is to predict the token: in answers, the token that ends each of them included."""
    roles: tuple[str, ...]
    """Whose each token is: a role, `tools`, or `template` for what the chat template puts between messages."""

    def cut(self, length: int) -> ChatExample:
        """The first tokens."""
        return ChatExample(self.ids[:length], self.learned[:length], self.roles[:length])


class _Piece(NamedTuple):
    ids: list[int]
    learned: bool
    roles: list[str]


def encode_conversation(conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer) -> ChatExample:
    """The tokens of a conversation. Raises DataError where an answer does not end with a special token.

    Special tokens come from the template alone. The text between two of them is encoded as one, and cut where an answer begins or ends,
    as a prompt ends there when text is generated.
    """
    weights = [message.get("weight", 1) for message in conversation.messages if message["role"] == "assistant"]
    spans = template.render(conversation)
    pieces: list[_Piece] = []
    for (special, answer), group in groupby(spans, lambda span: (span.special, span.answer)):
        parts, learned = list(group), answer is not None and weights[answer] == 1
        pieces += [_special(part, tokenizer, learned) for part in parts] if special else [_text(parts, tokenizer, learned)]
    _refuse_open_answers(spans, conversation)
    pieces.insert(0, _Piece(_missing_start(pieces, tokenizer), False, [TEMPLATE] * 2))
    ids = [i for piece in pieces for i in piece.ids]
    learned_tokens = [int(piece.learned) for piece in pieces for _ in piece.ids]
    roles = tuple(role for piece in pieces for role in piece.roles[: len(piece.ids)])
    return ChatExample(np.array(ids, dtype=np.int64), np.array(learned_tokens, dtype=np.uint8), roles)


def encode_prompt(conversation: Conversation, template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """The tokens from which the next answer is generated: those that stand before it in training."""
    ids: list[int] = []
    for (special, _), parts in groupby(template.render(conversation, prompt=True), lambda span: (span.special, span.answer)):
        spans = list(parts)
        ids += [tokenizer.special_tokens[span.text] for span in spans] if special else _text(spans, tokenizer, False).ids
    return [*_missing_start([_Piece(ids, False, [])], tokenizer), *ids]


def _special(span: ChatSpan, tokenizer: Tokenizer, learned: bool) -> _Piece:
    return _Piece([tokenizer.special_tokens[span.text]], learned, [span.role])


def _text(spans: list[ChatSpan], tokenizer: Tokenizer, learned: bool) -> _Piece:
    """Text of one or several spans, each token with the role of its first byte."""
    ids = tokenizer.encode("".join(span.text for span in spans))
    ends = np.cumsum([len(span.text.encode()) for span in spans])
    starts = np.cumsum([0, *(len(tokenizer.decode_bytes([i])) for i in ids)])[:-1]
    owners = np.minimum(np.searchsorted(ends, starts, side="right"), len(spans) - 1)
    return _Piece(ids, learned, [spans[owner].role for owner in owners])


def _missing_start(pieces: list[_Piece], tokenizer: Tokenizer) -> list[int]:
    """What a document of a corpus begins with, as far as the template has not written it: exactly one beginning of text."""
    first = pieces[0].ids[0] if pieces and pieces[0].ids else None
    return tokenizer.separator[:-1] if first == tokenizer.separator[-1] else tokenizer.separator


def _refuse_open_answers(spans: list[ChatSpan], conversation: Conversation) -> None:
    for answer, parts in groupby((span for span in spans if span.answer is not None), lambda span: span.answer):
        if not list(parts)[-1].special:
            raise DataError(
                f"The answer {(answer or 0) + 1} of line {conversation.line} does not end with a special token inside "
                "{% generation %}, so that the model would not learn to end it: correct the chat template, or name the token "
                "with --special-token."
            )


@dataclass
class ChatStatistics:
    """What became of the examples of a file."""

    examples: int = 0
    tokens: int = 0
    learned: int = 0
    """Tokens that count for the loss."""
    truncated: int = 0
    """Examples cut at the length of a sequence."""
    truncated_tokens: int = 0
    truncated_learned: int = 0
    """Learned tokens among those that were cut off."""
    unlearned: int = 0
    """Examples left out, since nothing that is learned was left of them."""
    by_role: dict[str, int] = field(default_factory=dict)
    """Tokens of each role."""

    @property
    def share(self) -> float:
        """Share of the tokens that is learned."""
        return self.learned / max(1, self.tokens)

    def sentence(self) -> str:
        """All of it for a reader."""
        cut = f"{self.truncated:,} examples were cut, by {self.truncated_tokens:,} tokens, {self.truncated_learned:,} of them learned"
        left = f"; {self.unlearned:,} were left out, since they were cut before their first answer" if self.unlearned else ""
        return (
            f"{self.examples:,} examples, {self.tokens:,} tokens, {self.learned:,} of them learned ({self.share:.1%}); "
            f"{cut if self.truncated else 'none was cut'}{left}"
        )


def read_examples(
    paths: Iterable[Path], template: ChatTemplate, tokenizer: Tokenizer, length: int, statistics: ChatStatistics
) -> Iterator[ChatExample]:
    """The examples of JSONL files, cut to `length` tokens; those of which nothing is learned are left out. Raises DataError."""
    for path in paths:
        for conversation in read_conversations(path):
            try:
                whole = encode_conversation(conversation, template, tokenizer)
            except DataError as error:
                raise DataError(f"{path}: {error}") from None
            example = whole.cut(length)
            if len(example.ids) < len(whole.ids):
                statistics.truncated += 1
                statistics.truncated_tokens += len(whole.ids) - len(example.ids)
                statistics.truncated_learned += int(whole.learned[length:].sum())
            if not example.learned.any():
                statistics.unlearned += 1
                continue
            statistics.examples += 1
            statistics.tokens += len(example.ids)
            statistics.learned += int(example.learned.sum())
            for role in example.roles:
                statistics.by_role[role] = statistics.by_role.get(role, 0) + 1
            yield example


def example_key(example: ChatExample) -> bytes:
    """sha256 of what an example holds: decides its place in the corpus and whether it is held out."""
    return hashlib.sha256(example.ids.tobytes() + example.learned.tobytes()).digest()
