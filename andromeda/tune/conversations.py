"""Conversations from a JSONL file, in the format of OpenAI's fine-tuning data: one object a line with `messages` and maybe `tools`.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}

Roles are system, user, assistant and tool. A content is a text, or a list of parts of type text. Assistant messages may have `tool_calls`
and a `weight` of 0, which keeps them from being learned; tool messages may have a `tool_call_id`. A wrong line ends the reading with one
sentence that names the file, the line and the key.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from andromeda.utils.errors import DataError, nearest
from andromeda.utils.untrusted import MalformedFile, parse_json, printable, read_lines

ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "weight")


class BadRecord(ValueError):
    """A line that is no conversation; the text is a clause that begins with the key."""


class Conversation(NamedTuple):
    """One example."""

    line: int
    """Line of the file, from 1."""
    messages: list[dict[str, Any]]
    """As in the file, their contents joined to one text each."""
    tools: list[dict[str, Any]]
    """Descriptions of the functions that can be called."""


def read_conversations(path: Path) -> Iterator[Conversation]:
    """The conversations of a file in order; empty lines are skipped. Raises DataError, one sentence."""
    line = 1
    try:
        for line, content in enumerate(read_lines(path), 1):
            if content.strip():
                yield parse_conversation(parse_json(content), line)
    except BadRecord as error:
        raise DataError(f"{path}, line {line}: {printable(str(error))}; see docs/tune.md for the format.") from None
    except MalformedFile as error:
        raise DataError(f"{path}, line {line}: {printable(str(error))}: correct or remove the line.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check the path.") from None


def parse_conversation(record: Any, line: int = 1) -> Conversation:
    """A conversation from a record of the file. Raises BadRecord."""
    if not isinstance(record, dict):
        raise BadRecord("the record is no object with messages")
    messages, tools = record.get("messages"), record.get("tools")
    if not isinstance(messages, list) or not messages:
        raise BadRecord("messages is no list of at least one message")
    if not (tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))):
        raise BadRecord("tools is no list of objects")
    for number, tool in enumerate(tools or []):
        _refuse_surrogates(tool, f"tools[{number}]")
    found = Conversation(line, [_message(message, f"messages[{i}]") for i, message in enumerate(messages)], tools or [])
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in found.messages):
        raise BadRecord("messages has no assistant message to learn from")
    return found


def _message(message: Any, key: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRecord(f"{key} is no object")
    given = {name: value for name, value in message.items() if value is not None}
    if unknown := next((name for name in given if name not in MESSAGE_KEYS), ""):
        raise BadRecord(f"{key}.{unknown[:60]} is no key of a message{nearest(unknown, MESSAGE_KEYS)}")
    role = given.get("role")
    if role not in ROLES:
        raise BadRecord(f"{key}.role is not one of {', '.join(ROLES)}")
    for name, owner in (("tool_calls", "assistant"), ("weight", "assistant"), ("tool_call_id", "tool")):
        if name in given and role != owner:
            raise BadRecord(f"{key}.{name} belongs to messages of the role {owner}, not {role}")
    if type(given.get("weight", 1)) is not int or given.get("weight", 1) not in (0, 1):
        raise BadRecord(f"{key}.weight is not 0 or 1")
    for name in ("name", "tool_call_id"):
        if not isinstance(given.get(name, ""), str):
            raise BadRecord(f"{key}.{name} is no text")
    if "content" not in given and not given.get("tool_calls"):
        raise BadRecord(f"{key}.content is missing")
    given["content"] = _content(given.get("content", ""), f"{key}.content")
    if "tool_calls" in given:
        given["tool_calls"] = _tool_calls(given["tool_calls"], f"{key}.tool_calls")
    _refuse_surrogates(given, key)
    return given


def _content(content: Any, key: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise BadRecord(f"{key} is no text and no list of parts")
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRecord(f"{key}[{number}] is no part of type text")
    return "".join(part["text"] for part in content)


def _tool_calls(calls: Any, key: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise BadRecord(f"{key} is no list")
    return [_tool_call(call, f"{key}[{number}]") for number, call in enumerate(calls)]


def _tool_call(call: Any, key: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise BadRecord(f"{key}.function is no object")
    if not isinstance(call.get("id", ""), str):
        raise BadRecord(f"{key}.id is no text")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRecord(f"{key}.function.name is no text")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            parsed = parse_json(arguments)
        except MalformedFile as error:
            raise BadRecord(f"{key}.function.arguments {error}") from None
    else:
        parsed = arguments
    if not isinstance(parsed, dict):
        raise BadRecord(f"{key}.function.arguments is no JSON object")
    named = {"id": call["id"]} if "id" in call else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _refuse_surrogates(value: Any, key: str) -> None:
    """Raise BadRecord for half of a pair of surrogates, which has no UTF-8 spelling."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRecord(f"{key} holds half of a pair of surrogates, which is no text") from None
    elif isinstance(value, dict):
        for name, child in value.items():
            _refuse_surrogates(name, key)
            _refuse_surrogates(child, f"{key}.{name}")
    elif isinstance(value, list):
        for number, child in enumerate(value):
            _refuse_surrogates(child, f"{key}[{number}]")
