"""A stored figure compared with the one measured now, and when the two agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from andromeda.config.data import DataConfig

TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
"""Relative difference of losses that rounding explains."""
FRACTION_TOLERANCE = {"fp64": 0.0, "fp32": 0.02, "bf16": 0.05, "fp16": 0.05}
"""Absolute difference of shares: decisions between two nearly equal answers may fall otherwise."""

MAX_THREADS = 1024
"""More than any machine has; a larger stored number is ignored."""


class VerificationCheck(NamedTuple):
    """One stored claim, and what is found now."""

    what: str
    stored: str
    new: str
    difference: float | None
    """Largest relative difference of figures; None for what can only be equal or not."""
    tolerance: float
    agrees: bool
    note: str = ""
    checked: bool = True
    """Whether it could be checked at all; what could not does not agree."""

    @classmethod
    def not_checked(cls, what: str, stored: str, reason: str) -> VerificationCheck:
        """Something that could not be checked, and why."""
        return cls(what, stored, "not checked", None, 0.0, False, reason, checked=False)

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return "agrees" if self.agrees else "DIFFERS" if self.checked else "not checked"


@dataclass(frozen=True)
class DataLocations:
    """Where corpora and files are now, if they were moved."""

    corpus: str = ""
    files: str = ""

    def data(self, config: DataConfig) -> DataConfig:
        """Where a run's data lie now: of several sources each by its own name in the folder that is given."""
        if not self.corpus:
            return config
        if not config.sources:
            return config.model_copy(update={"corpus": self.corpus})
        moved = [source.model_copy(update={"path": str(Path(self.corpus) / Path(source.path).name)}) for source in config.sources]
        return config.model_copy(update={"sources": tuple(moved)})


@contextmanager
def use_threads(machine: Any) -> Iterator[None]:
    """The threads that a machine computed with, for a while: sums are then split as they were. As before where they are not known."""
    wanted, before = machine.get("threads") if isinstance(machine, dict) else None, torch.get_num_threads()
    torch.set_num_threads(wanted if isinstance(wanted, int) and 0 < wanted <= MAX_THREADS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_arithmetic(old: dict[str, Any], new: dict[str, Any], old_versions: dict[str, Any], new_versions: dict[str, Any]) -> bool:
    """Whether sums run in the same order: on a CPU, with everything that decides it alike."""
    keys = ("device", "precision", "processor", "threads")
    alike = all(old.get(key) == new.get(key) for key in keys) and old_versions.get("torch") == new_versions.get("torch")
    return alike and old.get("device") == "cpu"


def relative_difference(old: Any, new: Any) -> float:
    """Relative difference of two figures; 0 for equal words, infinite for others."""
    if isinstance(old, int | float) and isinstance(new, int | float):
        return 0.0 if old == new else abs(old - new) / max(abs(old), abs(new))
    return 0.0 if old == new else float("inf")
