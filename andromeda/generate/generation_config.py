"""What a user may ask of a generation, checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from andromeda.config.base import BaseConfig, StringTuple
from andromeda.config.validation_errors import validate
from andromeda.utils.errors import ConfigError, RequestError, nearest


class GenerationConfig(BaseConfig):
    """How much text to write, and how each token is chosen. Applied in the order of the fields from `repetition_penalty` on."""

    max_new_tokens: PositiveInt | None = None
    """Longest answer in tokens; None takes 256, or what the context has left."""
    stop: StringTuple = ()
    """Texts that end the answer; they are not part of it."""
    repetition_penalty: PositiveFloat = 1.0
    """Logits of tokens seen before are divided by it when positive and multiplied when negative (arXiv 1909.05858); 1 is off."""
    temperature: float = Field(0.8, ge=0.0)
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = Field(50, ge=0)
    """Only the k most likely tokens; 0 is off."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Only the most likely tokens that together reach this probability (arXiv 1904.09751); 1 is off."""
    min_p: float = Field(0.0, ge=0.0, le=1.0)
    """Only tokens with at least this share of the most likely token's probability (arXiv 2407.01082); 0 is off."""
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    """Starts the random numbers of every prompt, alone or in a batch; None draws one, which the answer names."""


DEFAULT_NEW_TOKENS = 256
NO_OTHER_NAMES: Mapping[str, str] = {}


def parse_generation_config(given_names: Mapping[str, str] = NO_OTHER_NAMES, /, **values: Any) -> GenerationConfig:
    """The settings that a request names. Raises RequestError, one sentence for all mistakes.

    given_names: for a setting, the name by which the user gave it.
    """
    unknown = [name for name in values if name not in GenerationConfig.model_fields]
    if unknown:
        raise RequestError(f"There is no generation setting {unknown[0]!r}{nearest(unknown[0], GenerationConfig.model_fields)}.")
    if isinstance(values.get("stop"), str):
        values["stop"] = (values["stop"],)
    try:
        checked = validate(GenerationConfig, values, given_names=given_names)
    except ConfigError as error:
        raise RequestError(str(error)) from None
    if "" in checked.stop:
        raise RequestError(f"{given_names.get('stop', 'stop')} must not be empty text, which would end every answer at once: leave it out.")
    return checked
