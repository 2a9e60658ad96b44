"""What chat data needs to know of a run: its tokenizer with a chat template, and the length of its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from andromeda.data.tokenizer import Tokenizer
from andromeda.train.run_dir import RunDir, split_step
from andromeda.tune.chat_template import ChatTemplate, find_template
from andromeda.utils.errors import CheckpointError, ConfigError

DEFAULT = "chatml"


@dataclass(frozen=True)
class ChatModel:
    """How a run reads and writes conversations."""

    tokenizer: Tokenizer
    """With all special tokens of the template."""
    template: ChatTemplate
    added: tuple[str, ...]
    """Special tokens that the run's own tokenizer does not have."""


def chat_model(run: str | Path, template: str = "", special_tokens: Sequence[str] = ()) -> ChatModel:
    """The tokenizer and template with which a run is tuned.

    template: the name of one that comes with Andromeda or a Jinja file; empty is the run's own, or else chatml. special_tokens: names that
    the template writes as special tokens, beside those of the tokenizer. Raises an AndromedaError, one sentence.
    """
    folder = split_step(run)[0]
    if not RunDir(folder).exists:
        raise CheckpointError(f"{folder} is not a run folder (it holds no config.toml): give the --out of `andromeda train`.")
    if not (folder / "tokenizer").exists():
        raise ConfigError(f"{folder} has no tokenizer, so that no text can be given to it: train on a corpus that has one.")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    known = set(tokenizer.special_tokens)
    source, names = (tokenizer.chat_template, ()) if tokenizer.chat_template and not template else find_template(template or DEFAULT)
    grown = tokenizer.with_chat(source, [*names, *special_tokens])
    return ChatModel(grown, ChatTemplate(source, grown), tuple(name for name in grown.special_tokens if name not in known))
