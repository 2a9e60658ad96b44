"""Stop texts in a stream: found across the borders of its pieces, and never shown, not even in part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from andromeda.generate.generation_config import GenerationConfig


class StopMatcher:
    """Lets text through up to the first stop text, holding back what might be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that may be shown now, and whether a stop text was completed."""
        text = self._held + text
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self._stops if stop in text]
        if found:
            # The one that is complete first counts, so that it does not matter how the text was cut into pieces.
            self._held = ""
            return text[: min(found)[1]], True
        cut = len(text) - max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[cut:]
        return text[:cut], False

    def finish(self) -> str:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` (but is not all of it)."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt."""

    index: int
    """Which prompt of the request."""
    text: str
    """Without the stop text; empty for a model without a tokenizer."""
    ids: tuple[int, ...]
    """The tokens chosen, without the separator that ended them."""
    finish: FinishReason
    """The separator was chosen, a stop text was written, or the longest answer was reached."""
    prompt_tokens: int
    seed: int
    prefill_seconds: float
    """Time to read the prompts of its batch."""
    decode_seconds: float
    """Time to write, from the second token on."""
    cache_bytes: int
    """Decode state of this sequence at its end: its share of its batch's cache."""

    @property
    def tokens_per_second(self) -> float:
        """Speed of this sequence after its first token, which the prefill gives; 0 when it wrote no second one."""
        steps = len(self.ids) + (self.finish == "eos") - 1
        return steps / self.decode_seconds if steps > 0 else 0.0


@dataclass(frozen=True)
class StreamChunk:
    """What one step adds to one sequence."""

    index: int
    """Which prompt of the request."""
    token: int
    text: str
    """What became certain; empty while a character or a possible stop text is unfinished."""
    completion: Completion | None = None
    """The whole answer, with its last piece."""


class TokenDecoder(Protocol):
    """Tokens to text, as they come."""

    def push(self, *ids: int) -> str:
        """Text that became certain."""
        ...

    def finish(self) -> str:
        """What is left at the end."""
        ...


class NullTokenDecoder:
    """The decoder of a model without a tokenizer."""

    def push(self, *ids: int) -> str:
        """No text."""
        return ""

    def finish(self) -> str:
        """No text."""
        return ""


class GeneratedSequence:
    """A sequence being written."""

    def __init__(self, index: int, prompt: list[int], limit: int, seed: int, decoder: TokenDecoder, settings: GenerationConfig) -> None:
        self.index, self.prompt, self.limit, self.seed = index, prompt, limit, seed
        self.ids: list[int] = []
        self.text = ""
        self.finish: FinishReason | None = None
        self._decoder = decoder
        self._stops = StopMatcher(settings.stop)

    def take(self, token: int, eos: int | None) -> str:
        """Add a chosen token; returns the text that may be shown now, and sets `finish` at the end."""
        if token == eos:
            self.finish = "eos"
            shown = self._rest("")
        else:
            self.ids.append(token)
            shown, stopped = self._stops.push(self._decoder.push(token))
            if stopped:
                self.finish = "stop"
            elif len(self.ids) == self.limit:
                self.finish = "length"
                shown = self._rest(shown)
        self.text += shown
        return shown

    def _rest(self, shown: str) -> str:
        """What was shown now, and everything still held back; a stop text can yet be found in that."""
        tail, stopped = self._stops.push(self._decoder.finish())
        if stopped:
            self.finish = "stop"
        return shown + tail + self._stops.finish()
