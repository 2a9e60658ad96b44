"""The tiny runs of tests/train."""

from tests.train.conftest import corpus, one_thread, tiny

__all__ = ["corpus", "one_thread", "tiny"]
