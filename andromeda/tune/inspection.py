"""What a model would learn from chat data, token by token (`andromeda tune inspect`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from andromeda.data.tokenizer import Tokenizer
from andromeda.train.run_dir import split_step
from andromeda.tune.chat_model import chat_model
from andromeda.tune.examples import ChatExample, ChatStatistics, read_examples
from andromeda.tune.sft_config import sequence_length
from andromeda.utils.errors import RequestError
from andromeda.utils.untrusted import printable


@dataclass(frozen=True)
class ChatInspection:
    """One example, and the figures of its file."""

    example: ChatExample
    statistics: ChatStatistics
    template_sha256: str
    added: tuple[str, ...]
    """Special tokens that the run's own tokenizer does not have."""
    tokenizer: Tokenizer

    def tokens(self) -> list[str]:
        """The text of each token: of a special one its name, of others as Python writes it, of a part of a character its bytes."""
        names = {number: name for name, number in self.tokenizer.special_tokens.items()}
        return [printable(names[i]) if i in names else _quoted(self.tokenizer.decode_bytes([i])) for i in self.example.ids.tolist()]

    def rows(self) -> list[list[str]]:
        """Position, id, token, role and loss weight of each token."""
        ids, weights = self.example.ids.tolist(), self.example.learned.tolist()
        return [
            [str(place), str(i), token, role, str(weight)]
            for place, (i, token, role, weight) in enumerate(zip(ids, self.tokens(), self.example.roles, weights, strict=True))
        ]

    def values(self) -> dict[str, Any]:
        """For JSON."""
        names = ("id", "token", "role", "weight")
        columns = (self.example.ids.tolist(), self.tokens(), self.example.roles, self.example.learned.tolist())
        return {
            "tokens": [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)],
            "statistics": asdict(self.statistics) | {"share": self.statistics.share},
            "chat_template_sha256": self.template_sha256,
            "new_special_tokens": list(self.added),
        }


def inspect_chat(run: str, data: Path, number: int, template: str, special_tokens: tuple[str, ...], length: int) -> ChatInspection:
    """Example `number` (from 1) of a JSONL file as a run would learn it. length: of a sequence, 0 for the run's. Raises AndromedaError."""
    model, statistics = chat_model(run, template, special_tokens), ChatStatistics()
    length = length or sequence_length(split_step(run)[0], ())
    chosen = None
    for place, example in enumerate(read_examples([data], model.template, model.tokenizer, length, statistics), 1):
        chosen = example if place == number else chosen
    if chosen is None:
        raise RequestError(f"{data} has {statistics.examples} examples to learn from: give --example from 1 to that.")
    return ChatInspection(chosen, statistics, model.template.sha256, model.added, model.tokenizer)


def _quoted(content: bytes) -> str:
    try:
        return repr(content.decode())
    except UnicodeDecodeError:
        return repr(content)
