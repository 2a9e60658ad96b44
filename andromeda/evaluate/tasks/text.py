"""The evaluations on text: bits per byte, loss by position, loss of the same targets by context."""

from __future__ import annotations

import math
from typing import Any

from pydantic import PositiveInt
from torch import Tensor

from andromeda.config.base import BaseConfig
from andromeda.config.validation_errors import validate
from andromeda.evaluate.bits_per_byte import BitsPerByte, text_nats
from andromeda.evaluate.context_loss import bin_by_position, loss_by_context, loss_by_position
from andromeda.evaluate.held_out_text import HELD_OUT, EvalText, open_text
from andromeda.evaluate.loaded_model import LoadedModel
from andromeda.evaluate.request import EvalOptions, Lengths, Measurement, check_lengths
from andromeda.evaluate.result import safe_file_name
from andromeda.utils.errors import RequestError
from andromeda.utils.progress_callback import ProgressCallback

SHORTEST_CONTEXT = 64
TARGETS = 16


class TextSettings(BaseConfig):
    """Where the text is; the run's own held-out documents when both are empty."""

    text: str = ""
    corpus: str = ""


class BitsSettings(TextSettings):
    """Windows of `context` tokens, of which each but the first scores `stride`."""

    context: PositiveInt
    stride: PositiveInt


class BitsEvaluation:
    """Bits that the model needs for a byte of text."""

    kind = "bits"

    def settings(self, options: EvalOptions, loaded: LoadedModel) -> list[BaseConfig]:
        """One measurement with windows of the longest length, the model's context by default, and strides of a half."""
        context = max(options.lengths, default=loaded.context)
        check_lengths(loaded, (context,), options.beyond)
        stride = options.stride or max(1, context // 2)
        if stride > context:
            raise RequestError(f"--stride {stride} would leave out tokens between windows of {context}: give at most {context}.")
        return [BitsSettings(text=options.text, corpus=options.corpus, context=context, stride=stride)]

    def read(self, values: dict[str, Any]) -> BitsSettings:
        """Settings that were stored."""
        return validate(BitsSettings, values)

    def measure(self, loaded: LoadedModel, settings: BitsSettings, report: ProgressCallback) -> Measurement:
        """Every token of the text but the first."""
        text = open_text(loaded, settings.text, settings.corpus)
        ids, targets, numbers = text.ids[:-1], text.ids[1:], text.numbers()
        size = text.bytes_of(targets)
        nats = text_nats(
            loaded.model,
            ids,
            targets,
            context=settings.context,
            stride=settings.stride,
            documents=None if numbers is None else numbers[:-1],
            report=report,
        )
        bits = BitsPerByte(nats, len(targets), size)
        result = {"bits_per_byte": bits.per_byte, "loss": bits.loss, "tokens": bits.tokens, "bytes": bits.bytes}
        return Measurement(_name(self.kind, text), text.fingerprint, result)


class PositionSettings(TextSettings):
    """At most `windows` windows of `length` tokens."""

    length: PositiveInt
    windows: PositiveInt


class PositionEvaluation:
    """Loss by position."""

    kind = "position"

    def settings(self, options: EvalOptions, loaded: LoadedModel) -> list[BaseConfig]:
        """Windows of the longest length, the model's context by default."""
        length = max(options.lengths, default=loaded.context)
        check_lengths(loaded, (length,), options.beyond)
        return [PositionSettings(text=options.text, corpus=options.corpus, length=length, windows=options.samples or 128)]

    def read(self, values: dict[str, Any]) -> PositionSettings:
        """Settings that were stored."""
        return validate(PositionSettings, values)

    def measure(self, loaded: LoadedModel, settings: PositionSettings, report: ProgressCallback) -> Measurement:
        """Means over bins that double."""
        text = open_text(loaded, settings.text, settings.corpus)
        curve = loss_by_position(loaded.model, text, length=settings.length, windows=settings.windows, report=report)
        edges, nats, tokens = bin_by_position(curve)
        result = {"edges": edges, "nats": nats, "tokens": tokens, "windows": curve.windows, "crossing": curve.crossing}
        return Measurement(_name(self.kind, text), text.fingerprint, result)


class ContextSettings(TextSettings):
    """`places` runs of `targets` tokens, each read after every one of the `contexts`."""

    contexts: Lengths
    targets: PositiveInt = TARGETS
    places: PositiveInt


class ContextEvaluation:
    """Loss of the same targets given more and more context."""

    kind = "context"

    def settings(self, options: EvalOptions, loaded: LoadedModel) -> list[BaseConfig]:
        """Contexts of 64, 128, ... tokens, up to what leaves room for the targets."""
        contexts = options.lengths or self._doubling(loaded.context - TARGETS)
        check_lengths(loaded, tuple(length + TARGETS - 1 for length in contexts), options.beyond)
        return [ContextSettings(text=options.text, corpus=options.corpus, contexts=tuple(sorted(contexts)), places=options.samples or 128)]

    def _doubling(self, longest: int) -> tuple[int, ...]:
        if longest < 2:
            raise RequestError("This model's context is too short for the loss by context: leave the task out.")
        shorter = [SHORTEST_CONTEXT << i for i in range(longest.bit_length()) if SHORTEST_CONTEXT << i < longest]
        return (*shorter, longest)

    def read(self, values: dict[str, Any]) -> ContextSettings:
        """Settings that were stored."""
        return validate(ContextSettings, values)

    def measure(self, loaded: LoadedModel, settings: ContextSettings, report: ProgressCallback) -> Measurement:
        """Mean and standard error over the places, and what the longest context gains over the shortest."""
        text = open_text(loaded, settings.text, settings.corpus)
        found = loss_by_context(
            loaded.model, text, contexts=settings.contexts, targets=settings.targets, places=settings.places, report=report
        )
        places = found.shape[1]
        gain = found[:1] - found
        result = {
            "context": list(settings.contexts),
            "nats": found.mean(1).tolist(),
            "error": _standard_error(found),
            "gain": gain.mean(1).tolist(),
            "gain_error": _standard_error(gain),
            "tokens": places * settings.targets,
        }
        return Measurement(_name(self.kind, text), text.fingerprint, result)


def _standard_error(found: Tensor) -> list[float]:
    """Of the means of found (n, places); zero where there is one place only."""
    places = found.shape[1]
    return (found.std(1) / math.sqrt(places)).tolist() if places > 1 else [0.0] * len(found)


def _name(kind: str, text: EvalText) -> str:
    return kind if text.name == HELD_OUT else safe_file_name(f"{kind}-{text.name}")
