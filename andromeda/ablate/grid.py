"""The grid of an ablation: a baseline and variants, each a set of overrides, from a TOML file or from `--vary key=value,value`."""

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
RESERVED_KEYS = {"seed": "the grid's seeds", "train.steps": "the budget: give the variant a budget_share instead"}
"""Keys that no variant may set, and what decides them."""
RENAMED_KEYS = {"arm": "variant", "spread": "variance", "on": "compared_with", "share": "budget_share"}
"""Keys of version 0.1 and their names now; remove after one release."""


class Variant(BaseConfig):
    """One variant of the baseline."""

    name: str
    """Title in tables, and name of the run folders."""
    changes: StringTuple = ()
    """Overrides `key.path=value` on top of those of the variant in `compared_with`."""
    compared_with: str = BASELINE
    """The variant that this one starts from and is compared with."""
    label: str = ""
    """Free text that groups variants on a page."""
    budget_share: PositiveFloat = 1.0
    """Share of the budget that this variant gets; other than 1 only to compare different budgets on purpose."""
    train: bool = True
    """False measures time and memory only, for changes that cannot affect the loss."""


class AblationGrid(BaseConfig):
    """A whole ablation."""

    variant: Annotated[tuple[Variant, ...], BeforeValidator(as_tuple)] = ()
    base: StringTuple = ()
    """Overrides that make the baseline."""
    budget: Literal["tokens", "flops", "seconds"] = "tokens"
    """What is equal between variants."""
    amount: NonNegativeFloat = 0.0
    """How much of it each run gets; 0 is what the baseline is configured for (seconds must be given)."""
    cost: StringTuple = ()
    """Overrides under which time and memory are measured, such as a batch that fills the device."""
    seeds: Annotated[tuple[NonNegativeInt, ...], BeforeValidator(as_tuple)] = (0, 1, 2)
    metric: Literal["loss", "bits_per_byte"] = "loss"
    """Held-out metric at the end: loss in nats/token, or bits/byte where tokenizers differ."""
    variance: Literal["own", "shared"] = "own"
    """Each variant's own variance, or one shrunk towards that of all variants (for few seeds and many variants)."""


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
    for table in (values, *(one for one in values.get("variant", ()) if isinstance(one, dict))):
        for key in RENAMED_KEYS.keys() & table.keys():
            raise ConfigError(f"In {source}: {key} is now called {RENAMED_KEYS[key]}.")
    try:
        grid = validate(AblationGrid, values)
    except ConfigError as error:
        raise ConfigError(f"In {source}: {error}") from None
    check_grid(grid, source)
    return grid


def variants_of(given: Sequence[str]) -> list[Variant]:
    """A variant for each value of each `key=value,value`. Raises ConfigError."""
    variants = []
    for text in given:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not values.strip():
            raise ConfigError(f"--vary {text!r} is not understood: write key.path=value,value, such as model.block.kind=parallel.")
        short = key.strip().split(".", 1)[-1]
        variants += [Variant(name=f"{short}={value}", changes=(f"{key.strip()}={value}",)) for value in split(values)]
    return variants


def split(values: str) -> list[str]:
    """The values of a comma-separated list; commas inside brackets, braces or quotes do not separate."""
    pieces = re.findall(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""", values)
    return [piece.strip() for piece in pieces if piece.strip()]


def slug(name: str) -> str:
    """A variant's name in the form used in folder names."""
    return re.sub(r"[^a-z0-9._=+-]+", "-", name.lower()).strip("-.") or "variant"


def check_grid(grid: AblationGrid, source: str = "the grid") -> None:
    """Raises ConfigError, one sentence, for variants without distinct names or with an unknown `compared_with`, or for none at all."""
    if not grid.variant:
        raise ConfigError(f"There is nothing to compare in {source}: give variants in --grid FILE, or --vary key.path=value,value.")
    if not all(variant.name.strip() for variant in grid.variant):
        raise ConfigError(f"Every variant of {source} needs a name, which is its title and its folder.")
    if not grid.seeds or len(set(grid.seeds)) != len(grid.seeds):
        raise ConfigError(f"The seeds of {source} must be different whole numbers, one at least.")
    if grid.budget == "seconds" and not grid.amount:
        raise ConfigError(
            f"A budget of seconds in {source} needs the seconds of training that each run gets: give amount (--budget-amount)."
        )
    if grid.budget == "seconds" and grid.cost:
        raise ConfigError(f"A budget of seconds in {source} is converted to steps by the time of the runs' own steps: leave cost out.")
    seen = {slug(BASELINE): BASELINE}
    for variant in grid.variant:
        if slug(variant.name) in seen:
            raise ConfigError(
                f"Two variants of {source} have the name {variant.name!r} (as a folder {slug(variant.name)!r}): give each its own."
            )
        if variant.compared_with not in seen.values():
            known = nearest(variant.compared_with, list(seen.values()))
            raise ConfigError(
                f"Variant {variant.name!r} of {source} has compared_with {variant.compared_with!r}, and no variant above it has that "
                f"name{known}."
            )
        for key in (change.partition("=")[0].strip() for change in variant.changes):
            if key in RESERVED_KEYS:
                raise ConfigError(f"Variant {variant.name!r} of {source} sets {key}, which is decided by {RESERVED_KEYS[key]}.")
        seen[slug(variant.name)] = variant.name
