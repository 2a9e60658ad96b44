"""The path of the configuration from `train()` to the built model goes down through the packages, and seldom back up."""

from __future__ import annotations

import itertools
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from andromeda.config.base import BaseConfig
from andromeda.config.run import RunConfig
from andromeda.model.init import initialize
from andromeda.train.trainer import train

ROOT = Path(__file__).parents[2]
MOST_CLIMBS, BUILT = 3, "built"


def ranks() -> dict[str, int]:
    """Height of each package in the import contract: the lowest layer is 0."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    return {name.strip(): height for height, layer in enumerate(reversed(layers)) for name in layer.split("|")}


@contextmanager
def receivers(found: list[str]) -> Iterator[None]:
    """Within, notes the module of every function of ours that is given a configuration as an argument, until the model is built."""

    def watch(frame: FrameType, event: str, arg: Any) -> None:
        module, code = str(frame.f_globals.get("__name__", "")), frame.f_code
        if event != "call" or not module.startswith("andromeda.") or code.co_name[0] == "<" or BUILT in found:
            return
        given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]]
        if any(isinstance(value, BaseConfig) for value in given):
            found.append(module)
        if code is initialize.__code__:
            found.append(BUILT)

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)


def path_of_config(modules: list[str]) -> list[str]:
    """Packages in the order in which the configuration first reaches each module; `config` itself, which passes nothing on, left out."""
    first = list(dict.fromkeys(module for module in modules if module != BUILT))
    packages = [".".join(module.split(".")[:2]) for module in first]
    return [package for package in packages if package != "andromeda.config"]


def test_the_configuration_seldom_climbs_back(tiny: Callable[..., RunConfig], tmp_path: Path) -> None:
    found: list[str] = []
    with receivers(found):
        train(tiny(train__steps=1), tmp_path / "run")
    assert BUILT in found
    path, height = path_of_config(found), ranks()
    climbs = [(a, b) for a, b in itertools.pairwise(path) if height[b] > height[a]]
    assert len(climbs) <= MOST_CLIMBS, climbs
