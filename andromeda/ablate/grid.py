"""What is to be compared: a baseline and arms, each a set of changes, from a TOML file or from `--vary key=value,value`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, NonNegativeFloat, NonNegativeInt, PositiveFloat

from andromeda.config.base import BaseConfig, StringTuple, as_tuple
from andromeda.config.validation_errors import validate
from andromeda.utils.errors import ConfigError, nearest

BASELINE = "baseline"
RESERVED_KEYS = {"seed": "the grid's seeds", "train.steps": "the budget: give the arm a share of it instead"}
"""Keys that no arm may set, and what they follow from."""


class Variant(BaseConfig):
    """One variant of the baseline."""

    name: str
    """Title in tables; also names the run folders."""
    changes: StringTuple = ()
    """Overrides `key.path=value` on top of the baseline's, or of `on`'s."""
    on: str = BASELINE
    """The arm that this one starts from, and is compared with."""
    label: str = ""
    """Free text that groups arms, such as the row of a specification."""
    share: PositiveFloat = 1.0
    """Share of the budget that this arm gets; above or below 1, it is compared at another budget on purpose."""
    train: bool = True
    """Off measures time and memory alone, for what cannot change what is learned."""


class AblationGrid(BaseConfig):
    """A whole comparison."""

    arm: Annotated[tuple[Variant, ...], BeforeValidator(as_tuple)] = ()
    base: StringTuple = ()
    """Changes to the configuration that make the baseline."""
    budget: Literal["tokens", "flops", "seconds"] = "tokens"
    """What is equal between arms."""
    amount: NonNegativeFloat = 0.0
    """How much of it a run gets; 0 is what the baseline is configured for (seconds must be given)."""
    cost: StringTuple = ()
    """Changes under which time and memory are measured, such as a batch that fills the device."""
    seeds: Annotated[tuple[NonNegativeInt, ...], BeforeValidator(as_tuple)] = (0, 1, 2)
    metric: Literal["loss", "bits_per_byte"] = "loss"
    """Held-out figure at the end: nats per token, or bits per byte where tokenizers differ."""
    spread: Literal["own", "shared"] = "own"
    """Variance of each arm by itself, or steadied by that of all arms (few seeds, many arms)."""


def read_grid(path: str | Path) -> AblationGrid:
    """A grid from a TOML file. Raises ConfigError, one sentence."""
    try:
        return grid_from_values(tomllib.loads(Path(path).read_text("utf-8")), str(path))
    except OSError as error:
        raise ConfigError(f"The grid {path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise ConfigError(f"The grid {path} is not a text file in UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"The grid {path} is not valid TOML: {str(error)[:1].lower()}{str(error)[1:]}.") from None


def grid_from_values(values: dict[str, Any], source: str = "the grid") -> AblationGrid:
    """A grid from nested values, checked. Raises ConfigError."""
    try:
        grid = validate(AblationGrid, values)
    except ConfigError as error:
        raise ConfigError(f"In {source}: {error}") from None
    check_grid(grid, source)
    return grid


def variants_of(given: Sequence[str]) -> list[Variant]:
    """An arm for each value of each `key=value,value`. Raises ConfigError."""
    arms = []
    for text in given:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not values.strip():
            raise ConfigError(f"--vary {text!r} is not understood: write key.path=value,value, such as model.block.kind=parallel.")
        short = key.strip().split(".", 1)[-1]
        arms += [Variant(name=f"{short}={value}", changes=(f"{key.strip()}={value}",)) for value in split(values)]
    return arms


def split(values: str) -> list[str]:
    """The values between commas that are not inside brackets, braces or quotes."""
    pieces = re.findall(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""", values)
    return [piece.strip() for piece in pieces if piece.strip()]


def slug(name: str) -> str:
    """A name as part of a folder's name."""
    return re.sub(r"[^a-z0-9._=+-]+", "-", name.lower()).strip("-.") or "arm"


def check_grid(grid: AblationGrid, source: str = "the grid") -> None:
    """Raises ConfigError, one sentence, when arms cannot be told apart, stand on one that is not there, or are none at all."""
    if not grid.arm:
        raise ConfigError(f"There is nothing to compare in {source}: give arms in --grid FILE, or --vary key.path=value,value.")
    if not all(arm.name.strip() for arm in grid.arm):
        raise ConfigError(f"Every arm of {source} needs a name, which is its title and its folder.")
    if not grid.seeds or len(set(grid.seeds)) != len(grid.seeds):
        raise ConfigError(f"The seeds of {source} must be different whole numbers, one at least.")
    if grid.budget == "seconds" and not grid.amount:
        raise ConfigError(
            f"A budget of seconds in {source} needs the seconds of training that each run gets: give amount (--budget-amount)."
        )
    if grid.budget == "seconds" and grid.cost:
        raise ConfigError(f"A budget of seconds in {source} is counted in steps of the runs as they are: leave cost out.")
    seen = {slug(BASELINE): BASELINE}
    for arm in grid.arm:
        if slug(arm.name) in seen:
            raise ConfigError(f"Two arms of {source} have the name {arm.name!r} (as a folder {slug(arm.name)!r}): give each its own.")
        if arm.on not in seen.values():
            known = list(seen.values())
            raise ConfigError(f"Arm {arm.name!r} of {source} is on {arm.on!r}, which no arm above it is called{nearest(arm.on, known)}.")
        for key in (change.partition("=")[0].strip() for change in arm.changes):
            if key in RESERVED_KEYS:
                raise ConfigError(f"Arm {arm.name!r} of {source} sets {key}, which follows from {RESERVED_KEYS[key]}.")
        seen[slug(arm.name)] = arm.name
