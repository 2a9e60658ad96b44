"""Log messages that quote a stranger's names."""

from __future__ import annotations

import ast
import logging

import pytest

from andromeda.utils.log import get_logger
from tests.source_tree import trees


@pytest.mark.parametrize("name", ["andromeda", "andromeda.generate.batch"])
def test_control_characters_of_a_message_are_escaped(name: str, caplog: pytest.LogCaptureFixture) -> None:
    get_logger(name).warning("file %s is %d bytes\n", "x\x1b]0;owned\x07", 3)
    assert caplog.messages == ["file x\\x1b]0;owned\\x07 is 3 bytes\\x0a"]
    assert len(get_logger(name).filters) == 1


def test_every_module_takes_its_logger_from_there() -> None:
    """`logging.getLogger` gives one whose messages are raw; the level of another library's may be set."""
    raw = [
        module
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and "logging.getLogger" in ast.unparse(node.value)
    ]
    assert raw == ["andromeda.utils.log"]
    assert logging.getLogger("andromeda").filters
