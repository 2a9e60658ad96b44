"""What tests of plans and measurements share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def still_heap() -> Iterator[None]:
    """Objects that other tests of the process left are not searched through at every measurement, which collects garbage first."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
