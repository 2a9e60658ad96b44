"""Notes hidden in a text and asked for at its end: key-value retrieval that a model can be trained on and tested at.

A note is a line `# note K1 K2 V1 V2` of four words that stand nowhere else in the text; a question is the same line again,
and its answer are the last two words. Greedy decoding would give exactly that answer when each of its tokens is the
model's first choice after the right ones before it, so one forward pass scores all questions of a sequence.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from andromeda.data.tokenizer import Tokenizer
from andromeda.model.transformer import Transformer
from andromeda.train.precision import Precision
from andromeda.utils.errors import DataError

WORD = re.compile(rb" [a-z]{3,10}")
MIN_SINGLE_TOKEN_WORDS = 128
"""Words that a tokenizer must have as single tokens; with fewer, words are spelled from three letters."""
KEY, VALUE = 2, 2
"""Words of each."""


@dataclass(frozen=True)
class NoteBatch:
    """Sequences of one task: ids (n, T), and for each question where its answer begins and at which depth its note lies."""

    ids: Tensor
    answers: Tensor
    """(n, q, a): positions in the sequence of each answer's tokens."""
    depths: Tensor
    """(q,): from 0, the beginning of the sequence, to 1, the end of the text."""


@lru_cache(maxsize=4)
def note_words(tokenizer: Tokenizer) -> np.ndarray:
    """Words as token ids (N, w), all of the same number of tokens."""
    single = [i for i in range(tokenizer.vocab_size) if WORD.fullmatch(tokenizer.decode_bytes([i]))]
    if len(single) >= MIN_SINGLE_TOKEN_WORDS:
        return np.array(single, dtype=np.int64)[:, None]
    letters = "abcdefghijklmnopqrstuvwxyz"
    spelled = tokenizer.encode_batch([f" {a}{b}{c}" for a in letters for b in letters for c in letters])
    longest = max(map(len, spelled))
    return np.array([ids for ids in spelled if len(ids) == longest], dtype=np.int64)


def note_sequence(
    tokenizer: Tokenizer, text: np.ndarray, length: int, draw: np.random.Generator, depths: np.ndarray, times: int = 1
) -> Any:
    """One sequence of exactly `length` tokens: ids (length,), and for each note the positions of its answer (notes, a).

    text: tokens to hide the notes in, at least `length`. depths (times * notes,): where each note stands, from 0 to 1, all
    notes once, then again if `times` is more; the questions at the end come in a random order.
    """
    notes = len(depths) // times
    lines, answer, end = _lines(tokenizer, text[:length], notes, draw)
    space = length - 1 - (times + 1) * sum(map(len, lines))
    if space < notes:
        raise DataError(f"{notes} notes and their questions do not fit into {length} tokens: ask for fewer notes or longer sequences.")
    places = np.round(depths * space).astype(int)
    parts, at = [np.array([tokenizer.bos])], 0
    for which in np.argsort(places, kind="stable"):
        parts += [text[at : places[which]], lines[which % notes]]
        at = places[which]
    parts.append(text[at:space])
    positions = np.zeros((notes, answer), dtype=np.int64)
    begin = sum(map(len, parts))
    for log in draw.permutation(notes):
        stop = begin + len(lines[log]) - end
        positions[log] = np.arange(stop - answer, stop)
        parts.append(lines[log])
        begin += len(lines[log])
    return np.concatenate(parts), positions


def _lines(tokenizer: Tokenizer, text: np.ndarray, notes: int, draw: np.random.Generator) -> tuple[list[np.ndarray], int, int]:
    """The notes' lines of words that are not in `text`, and how many tokens an answer and a line's end have."""
    table = note_words(tokenizer)
    # A spelled word's letters stand everywhere; that the word does is unlikely enough.
    free = np.flatnonzero(~np.isin(table[:, 0], text)) if table.shape[1] == 1 else np.arange(len(table))
    if len(free) < (wanted := notes * (KEY + VALUE)):
        raise DataError(f"{notes} notes need {wanted} words that are not in the text, and {len(free)} are left: ask for fewer notes.")
    picked = table[draw.choice(free, notes * (KEY + VALUE), replace=False)].reshape(notes, -1)
    head, end = (np.array(tokenizer.encode(part), dtype=np.int64) for part in ("\n# note", "\n"))
    return [np.concatenate([head, line, end]) for line in picked], picked.shape[1] * VALUE // (KEY + VALUE), len(end)


def training_sequences(tokenizer: Tokenizer, text: np.ndarray, length: int, notes: int, count: int, seed: int) -> np.ndarray:
    """Sequences (count, length) whose notes lie at random depths in pieces of `text` taken at random, and are repeated further on.

    Distances to the second place are spread evenly over the orders of magnitude: near ones are learned first, and far ones from them.
    """
    found = []
    for number in range(count):
        draw = np.random.default_rng([seed, length, number])
        start = int(draw.integers(0, len(text) - length))
        first = draw.random(notes)
        again = np.minimum(first + np.exp(draw.uniform(-math.log(length), 0.0, notes)), 1.0)
        piece = _plain(text[start : start + length], tokenizer)
        found.append(note_sequence(tokenizer, piece, length, draw, np.concatenate([first, again]), times=2)[0])
    return np.stack(found)


def question_sequences(tokenizer: Tokenizer, text: np.ndarray, length: int, notes: int, count: int, seed: int) -> NoteBatch:
    """`count` sequences with one note at each of `notes` even depths. text: held-out tokens, repeated where they run out."""
    depths = (np.arange(notes) + 0.5) / notes
    whole = np.resize(text, max(len(text), length + count))
    rows = []
    for number in range(count):
        draw = np.random.default_rng([seed, length, number, 1])
        start = (len(whole) - length) * number // max(1, count)
        rows.append(note_sequence(tokenizer, _plain(whole[start : start + length], tokenizer), length, draw, depths))
    ids, answers = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    return NoteBatch(ids, answers, torch.from_numpy(depths))


def _plain(text: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Separators inside the text become line ends: a sequence is one document."""
    return np.where(np.isin(text, tokenizer.separator), tokenizer.encode("\n")[0], text)


@torch.inference_mode()
def score_notes(model: Transformer, needles: NoteBatch, precision: Precision, rows_at_once: int = 1) -> Tensor:
    """Whether each answer is right: bool (n, q)."""
    model.eval()
    found = []
    for ids, answers in zip(needles.ids.split(rows_at_once), needles.answers.split(rows_at_once), strict=True):
        flat = answers.flatten(1).to(precision.device)
        with precision.autocast():
            hidden = model.hidden(ids.to(precision.device))
            said = model.head(hidden.gather(1, (flat - 1)[..., None].expand(-1, -1, hidden.shape[-1]))).argmax(-1).cpu()
        wanted = ids.gather(1, answers.flatten(1))
        found.append((said == wanted).view(answers.shape).all(-1))
    return torch.cat(found)


def notes_result(right: dict[int, Tensor], depths: Tensor) -> dict[str, Any]:
    """Scores (n, q) at each length as evaluate/result.py describes a retrieval."""
    accuracy = [each.double().mean(0).tolist() for each in right.values()]
    return {
        "task": "notes",
        "lengths": list(right),
        "depths": depths.tolist(),
        "accuracy": accuracy,
        "match": accuracy,
        "chance": 0.0,
        "samples": [len(each) for each in right.values()],
    }
