"""Probes: small generated reasoning tasks, scored while a model trains.

Each task knows the score of guessing and has a solver that scores 100 %. All are scored by greedy exact match in one batched forward
pass: if every token of the answer is the model's most likely token given the correct tokens before it, greedy decoding would have
generated exactly that answer.
"""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from andromeda.config.run import RunConfig
from andromeda.data.loader import TokenStream
from andromeda.data.reasoning_tasks import Arithmetic, AssociativeRecall, Induction, MultiHop, ReasoningTask
from andromeda.data.tokenizer import Tokenizer
from andromeda.model.transformer import Transformer
from andromeda.train.precision import Precision
from andromeda.utils.errors import ConfigError, nearest

PROBE_TASKS: dict[str, ReasoningTask[Any]] = {
    "arithmetic": Arithmetic(),
    "recall": AssociativeRecall(),
    "induction": Induction(),
    "multihop": MultiHop(),
}

IGNORED = -100


class AnswerBatch:
    """The problems of one task: ids (N, T) padded at the right, and what each position must predict (-100 outside of answers)."""

    def __init__(self, rows: list[tuple[list[int], list[int]]]) -> None:
        length = max(len(prompt) + len(answer) for prompt, answer in rows) - 1
        self.ids = torch.zeros(len(rows), length, dtype=torch.int64)
        self.targets = torch.full((len(rows), length), IGNORED)
        for row, (prompt, answer) in enumerate(rows):
            whole = prompt + answer
            self.ids[row, : len(whole) - 1] = torch.tensor(whole[:-1])
            self.targets[row, len(prompt) - 1 : len(whole) - 1] = torch.tensor(answer)

    def score(self, model: Transformer, precision: Precision) -> Tensor:
        """Share of problems whose every answer token is the model's first choice, shape ()."""
        ids, targets = self.ids.to(precision.device), self.targets.to(precision.device)
        asked = targets != IGNORED
        with precision.autocast():
            # Only the positions of answers go through the head; what follows an answer is padding, which no earlier token sees.
            first = model.head(model.hidden(ids)[asked]).argmax(-1)
        wrong = torch.zeros_like(asked)
        wrong[asked] = first != targets[asked]
        return 1.0 - wrong.any(1).double().mean()


class Probes:
    """The same problems throughout a run."""

    def __init__(self, batches: dict[str, AnswerBatch]) -> None:
        self._batches = batches

    @torch.no_grad()
    def __call__(self, model: Transformer, precision: Precision) -> dict[str, float]:
        """Score of every task, and beside it that of guessing."""
        model.eval()
        # Their shapes come once in a while: not worth compiling for.
        with torch.compiler.set_stance("force_eager"):
            scores = {name: float(batch.score(model, precision)) for name, batch in self._batches.items()}
        model.train()
        return {f"probe/{name}": score for name, score in scores.items()} | {
            f"probe/{name}/chance": PROBE_TASKS[name].chance for name in scores
        }


def build_probes(config: RunConfig, stream: TokenStream) -> Probes:
    """The probes that `train.probes` names, drawn from the run's seed by generators of their own.

    Raises ConfigError for an unknown task, for a text task without a tokenizer, and for problems longer than the model's context.
    """
    wanted = config.train.probes
    if not wanted.every:
        return Probes({})
    return Probes({name: _batch(name, config, stream) for name in wanted.tasks})


def _batch(name: str, config: RunConfig, stream: TokenStream) -> AnswerBatch:
    if name not in PROBE_TASKS:
        raise ConfigError(f"There is no probe {name!r}{nearest(name, PROBE_TASKS)}: train.probes.tasks takes {', '.join(PROBE_TASKS)}.")
    random, alphabet = Random(f"{config.seed} {name}"), ordinary_tokens(stream)
    problems = [PROBE_TASKS[name].draw(random, alphabet) for _ in range(config.train.probes.samples)]
    batch = AnswerBatch(
        [(_begin(stream) + _spell(prompt, stream.tokenizer), _spell(answer, stream.tokenizer)) for prompt, answer in problems]
    )
    if batch.ids.shape[1] > config.model.max_seq_len:
        raise ConfigError(
            f"Probe {name} has problems of {batch.ids.shape[1]} tokens and the model's context is {config.model.max_seq_len}: "
            "leave it out of train.probes.tasks."
        )
    return batch


def ordinary_tokens(stream: TokenStream) -> list[int]:
    """Ids that stand for text: all, where there is no tokenizer to ask."""
    if stream.tokenizer is None:
        return list(range(stream.vocab_size))
    return np.flatnonzero(stream.tokenizer.byte_lengths()).tolist()


def _begin(stream: TokenStream) -> list[int]:
    """The token that begins a text."""
    return [] if stream.tokenizer is None else [stream.tokenizer.bos]


def _spell(said: str | tuple[int, ...], tokenizer: Tokenizer | None) -> list[int]:
    if not isinstance(said, str):
        return list(said)
    if tokenizer is None:
        raise ConfigError("The corpus has no tokenizer to spell text probes with: set train.probes.tasks to recall and induction.")
    return tokenizer.encode(said)
