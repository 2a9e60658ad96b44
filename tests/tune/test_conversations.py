"""Reading conversations: one sentence with the line and the key for everything that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from andromeda.tune.conversations import read_conversations
from andromeda.utils.errors import DataError
from tests.tune.conftest import write

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def call(**function: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]}


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ([], "the record is no object"),
        ({"messages": []}, "messages is no list of at least one"),
        ({"messages": [ASK]}, "messages has no assistant message"),
        ({"messages": [ASK, ANSWER | {"weight": 0}]}, "messages has no assistant message"),
        ({"messages": [ASK, ANSWER | {"weight": 0.5}]}, r"messages\[1\].weight is not 0 or 1"),
        ({"messages": [ASK | {"weight": 1}, ANSWER]}, r"messages\[0\].weight belongs to messages of the role assistant, not user"),
        ({"messages": [{"role": "human", "content": "q"}, ANSWER]}, r"messages\[0\].role is not one of system, user"),
        ({"messages": [ASK | {"contents": "x"}, ANSWER]}, r"messages\[0\].contents is no key of a message \(did you mean content\?\)"),
        ({"messages": [{"role": "user"}, ANSWER]}, r"messages\[0\].content is missing"),
        ({"messages": [{"role": "user", "content": 3}, ANSWER]}, r"messages\[0\].content is no text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
            r"messages\[0\].content\[0\] is no part of type text",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, r"messages\[0\].content holds half of a pair"),
        ({"messages": [ANSWER], "tools": {}}, "tools is no list"),
        (call(name="f", arguments="{"), r"messages\[0\].tool_calls\[0\].function.arguments is not valid JSON"),
        (call(name="f", arguments="[1]"), r"function.arguments is no JSON object"),
        (call(name=""), r"function.name is no text"),
    ],
)
def test_wrong_lines(tmp_path: Path, record: Any, sentence: str) -> None:
    write(tmp_path / "d.jsonl", [{"messages": [ASK, ANSWER]}, record])
    with pytest.raises(DataError, match=f"d.jsonl, line 2: .*{sentence}"):
        list(read_conversations(tmp_path / "d.jsonl"))


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('\n{"messages": \n')
    with pytest.raises(DataError, match="line 2: is not valid JSON"):
        list(read_conversations(tmp_path / "d.jsonl"))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_conversations(tmp_path / "missing.jsonl"))


def test_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    write(tmp_path / "d.jsonl", [{"id": 7, "messages": [{"role": "user", "content": parts, "name": None}, ANSWER]}])
    (found,) = read_conversations(tmp_path / "d.jsonl")
    assert found.messages[0] == {"role": "user", "content": "ab"}
