"""Chat templates: Jinja as transformers renders it, in a sandbox, with every part of the result known for what it is.

A conversation is rendered twice: as it is, and with marks around every text of the data. Marks are noncharacters of Unicode that the data
does not hold. They say which characters are the template's and which are data, so that the name of a special token in a user's text stays
text, wherever it begins and ends; and the tag `{% generation %}` says what the model writes, which alone is learned. Where the two
renderings differ by more than the marks, the template changes texts (such as by `trim`), and that example is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

from andromeda.data.tokenizer import MAX_TEMPLATE, Tokenizer, template_sha256
from andromeda.tune.conversations import Conversation
from andromeda.utils.errors import ConfigError, DataError, nearest
from andromeda.utils.untrusted import MalformedFile, printable, read_text

BUILT_IN = {"chatml": ("<|im_start|>", "<|im_end|>", "<|tool_call|>", "<|end_tool_call|>")}
"""Special tokens of each template that comes with Andromeda, in `templates/`."""
NONCHARACTERS = [*map(chr, range(0xFDD0, 0xFDF0)), *(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))]
PLAIN_KEYS = ("role", "type")
"""Keys whose texts are of a fixed set, and which templates compare: never marked."""
TEMPLATE, TOOLS = "template", "tools"
"""What a character is that comes from no message."""


class ChatSpan(NamedTuple):
    """A part of a rendered conversation."""

    text: str
    role: str
    """Of the message that the text is from, or `template`, or `tools`."""
    answer: int | None
    """Number of the assistant message that it is in, counted among those; None where the model does not write it."""
    special: bool = False
    """Whether the text is the name of a special token, written by the template."""


class Marks(NamedTuple):
    """The characters of one rendering that are neither the template's nor the data's."""

    begin: str
    """Of a text of the data; the number of its role and `stop` follow."""
    stop: str
    end: str
    split: str
    """Inside names of special tokens in the data."""
    answer: str
    answered: str


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` around what the model writes, as in transformers; puts marks around it."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it
    marks = ("", "")

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag as a call of `_mark`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{self.marks[0]}{caller()}{self.marks[1]}"


class ChatTemplate:
    """A template for the conversations of one tokenizer."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        self.source, self._tokenizer = source, tokenizer
        self.sha256 = template_sha256(source)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
        self._tag: Any = next(tag for tag in environment.extensions.values() if isinstance(tag, GenerationTag))
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise DataError(f"The chat template cannot be used ({_first_line(error)}): correct it.") from None
        self._names = sorted((name for name in tokenizer.special_tokens if name), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")

    def render(self, conversation: Conversation, *, prompt: bool = False) -> list[ChatSpan]:
        """The parts of a conversation in order. prompt: with the beginning of the next answer. Raises DataError, one sentence."""
        place, marks = f"The conversation of line {conversation.line}", self._marks(conversation)
        self._tag.marks = (marks.answer, marks.answered)
        plain = self._text(conversation.messages, conversation.tools, prompt, place)
        roles = [message["role"] for message in conversation.messages] + [TOOLS]
        messages = [self._marked(message, i, marks) for i, message in enumerate(conversation.messages)]
        marked = self._text(messages, self._marked(conversation.tools, len(messages), marks), prompt, place)
        inner = re.compile(f"{marks.begin}[0-9]+{marks.stop}|[{marks.end}{marks.split}]")
        if inner.sub("", marked) != plain:
            raise DataError(f"{place}: the chat template changes texts of messages (such as by trim), so that none can be told from it.")
        return self._spans(marked, marks, roles, place)

    def _text(self, messages: Any, tools: Any, prompt: bool, place: str) -> str:
        names = {number: name for name, number in self._tokenizer.special_tokens.items()}
        try:
            return self._template.render(
                messages=messages,
                tools=tools or None,
                add_generation_prompt=prompt,
                bos_token=names[self._tokenizer.bos],
                eos_token=names[self._tokenizer.eos],
            )
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise DataError(f"{place} does not fit the chat template ({_first_line(error)}): change one of them.") from None

    def _marks(self, conversation: Conversation) -> Marks:
        text = self.source + json.dumps([conversation.messages, conversation.tools], ensure_ascii=False)
        free = [character for character in NONCHARACTERS if character not in text]
        if len(free) < len(Marks._fields):
            raise DataError(f"The conversation of line {conversation.line} holds nearly all noncharacters of Unicode: remove them.")
        return Marks(*free[: len(Marks._fields)])

    def _marked(self, value: Any, role: int, marks: Marks) -> Any:
        """A value of the data with marks around its texts. Raises DataError for keys that are not plain names."""
        if isinstance(value, str):
            split = self._special.sub(lambda name: name[0][0] + marks.split + name[0][1:], value)
            return f"{marks.begin}{role}{marks.stop}{split}{marks.end}" if value else value
        if isinstance(value, list):
            return [self._marked(child, role, marks) for child in value]
        if not isinstance(value, dict):
            return value
        if name := next((key for key in value if self._special.search(key)), ""):
            raise DataError(f"{printable(name[:60])!r} is a key of the data and holds the name of a special token: rename it.")
        plain = {key for key in PLAIN_KEYS if self._is_plain(value.get(key))}
        return {key: child if key in plain else self._marked(child, role, marks) for key, child in value.items()}

    def _is_plain(self, value: Any) -> bool:
        """Whether a text can be no part of a special token's name."""
        return isinstance(value, str) and value.isalpha() and value.isascii()

    def _spans(self, text: str, marks: Marks, roles: list[str], place: str) -> list[ChatSpan]:
        """The parts of a marked text. Raises DataError where the template took texts apart."""
        spans: list[ChatSpan] = []
        owner, answer, answers = "", None, 0
        for part in filter(None, re.split(f"({marks.begin}[0-9]+{marks.stop}|[{''.join(marks[2:])}])", text)):
            if part[0] == marks.begin and not owner:
                owner = roles[int(part[1:-1])]
            elif part == marks.end and owner:
                owner = ""
            elif part == marks.answer and answer is None and not owner:
                answer, answers = answers, answers + 1
            elif part == marks.answered and answer is not None and not owner:
                answer = None
            elif owner and part == marks.split:
                continue
            elif any(mark in part for mark in marks):
                raise DataError(f"{place}: the chat template takes texts of messages apart, so that none can be told from it.")
            elif owner:
                spans.append(ChatSpan(part, owner, answer))
            else:
                spans += self._own(part, answer)
        if answers != roles.count("assistant"):
            raise DataError(
                f"{place} has {roles.count('assistant')} assistant messages and {answers} {{% generation %}} blocks in the chat template: "
                "put every answer of the model, with the token that ends it, into one."
            )
        return spans

    def _own(self, text: str, answer: int | None) -> Iterator[ChatSpan]:
        """The template's own text, cut at special tokens."""
        role, at = TEMPLATE if answer is None else "assistant", 0
        for found in self._special.finditer(text):
            if found.start() > at:
                yield ChatSpan(text[at : found.start()], role, answer)
            yield ChatSpan(found[0], role, answer, special=True)
            at = found.end()
        if at < len(text):
            yield ChatSpan(text[at:], role, answer)


def find_template(name: str) -> tuple[str, tuple[str, ...]]:
    """Source and special tokens of a template that comes with Andromeda, or of a file. Raises ConfigError or DataError."""
    if name in BUILT_IN:
        return (files("andromeda.tune") / "templates" / f"{name}.jinja").read_text(), BUILT_IN[name]
    path = Path(name)
    if not path.exists():
        raise ConfigError(f"There is no chat template {name!r}{nearest(name, BUILT_IN)}: name {', '.join(BUILT_IN)} or a Jinja file.")
    try:
        return read_text(path, MAX_TEMPLATE), ()
    except (MalformedFile, OSError) as error:
        raise DataError(f"The chat template {path} cannot be read ({error}): check the file.") from None


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """As transformers has it: without HTML's escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _first_line(error: BaseException) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0])[:200]
