"""What tests of plans and measurements share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from andromeda.config import own_code


@pytest.fixture
def allow_code() -> Iterator[None]:
    """Consent to classes of the tests' own that configurations name."""
    with own_code.allow_code():
        yield


@pytest.fixture(scope="module")
def still_heap() -> Iterator[None]:
    """Objects that other tests of the process left are not searched through at every measurement, which collects garbage first."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
