"""Tokens, roles and loss mask of conversations against a derivation of its own, transformers' rendering, and hostile texts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from andromeda.config.data import BuildConfig
from andromeda.data.tokenizer import Tokenizer, train_tokenizer
from andromeda.hub.tokenizer_files import tokenizer_files
from andromeda.tune.chat_template import NONCHARACTERS, ChatTemplate, find_template
from andromeda.tune.conversations import Conversation, parse_conversation
from andromeda.tune.examples import encode_conversation, encode_prompt
from andromeda.utils.errors import AndromedaError, DataError

Chat = tuple[ChatTemplate, Tokenizer]
PIECES = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|tool_call|>", "<|im_", "end|>", "<", "|>", "assistant\n", "é", "日本", "\U0001f600",
    " ", "\n", '"', "\\", "{", "}", "{% generation %}", "{{ bos_token }}", "\ufdd0", "\ufdd1", "\ufdef", "\U0010ffff", "0", "a", "hello",
)  # fmt: skip


def text(draw: random.Random) -> str:
    return "".join(draw.choices(PIECES, k=draw.randint(1, 6)))


def conversation(draw: random.Random) -> dict[str, Any]:
    """A random record with a system message, tools, calls, results and unlearned answers, each sometimes."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": text(draw)}] if draw.random() < 0.4 else []
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": text(draw)})
        answer: dict[str, Any] = {"role": "assistant", "content": text(draw)}
        if draw.random() < 0.3:
            answer["weight"] = draw.randint(0, 1)
        if draw.random() < 0.3:
            arguments: Any = {"x": text(draw), "n": draw.randint(0, 9)}
            arguments = json.dumps(arguments) if draw.random() < 0.5 else arguments
            answer["tool_calls"] = [{"id": "c", "type": "function", "function": {"name": text(draw), "arguments": arguments}}]
            answer |= {"content": None} if draw.random() < 0.5 else {}
            messages += [answer, {"role": "tool", "tool_call_id": "c", "content": text(draw)}]
            answer = {"role": "assistant", "content": text(draw)}
        messages.append(answer)
    messages[-1].pop("weight", None)
    tools = [{"type": "function", "function": {"name": "f", "description": text(draw)}}] if draw.random() < 0.3 else None
    return {"messages": messages, "tools": tools}


def derived(record: dict[str, Any], ids: dict[str, int]) -> tuple[list[int], list[int]]:
    """Ids and loss mask as ChatML is defined, written directly in bytes."""
    tokens: list[tuple[int, int]] = [(ids["<|endoftext|>"], 0)]

    def put(value: str, learned: int = 0) -> None:
        tokens.extend((byte, learned) for byte in value.encode())

    def special(name: str, learned: int = 0) -> None:
        tokens.append((ids[name], learned))

    messages, tools = record["messages"], record.get("tools") or []
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    if tools or system is not None:
        special("<|im_start|>")
        put("system\n" + (system or ""))
        if tools:
            put("\n\n" * (system is not None) + "Functions that can be called, one a line:\n")
            put("".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools))
        special("<|im_end|>")
        put("\n")
    for message in messages[system is not None :]:
        special("<|im_start|>")
        put(message["role"] + "\n")
        learned = int(message["role"] == "assistant" and message.get("weight", 1))
        put(message["content"] or "", learned)
        for call in message.get("tool_calls", []):
            given = call["function"]["arguments"]
            given = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
            special("<|tool_call|>", learned)
            put(f'{{"name": "{call["function"]["name"]}", "arguments": {given}}}', learned)
            special("<|end_tool_call|>", learned)
        special("<|im_end|>", learned)
        put("\n")
    return [i for i, _ in tokens], [weight for _, weight in tokens]


def test_tokens_and_mask_of_random_conversations(chat: Chat) -> None:
    """A thousand, full of names of special tokens and template syntax: every id and weight is as derived, answers' ends included."""
    draw, (template, tokenizer) = random.Random(0), chat
    for _ in range(1000):
        record = conversation(draw)
        example = encode_conversation(parse_conversation(record), template, tokenizer)
        ids, learned = derived(record, tokenizer.special_tokens)
        assert example.ids.tolist() == ids
        assert example.learned.tolist() == learned
        assert {role for role, weight in zip(example.roles, learned, strict=True) if weight} == {"assistant"}
        assert len(example.roles) == len(ids)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "unigram"])
def test_text_never_becomes_a_special_token(kind: str) -> None:
    """With fuzzed contents in every place there are as many special ids as with plain ones, and they decode to what was given."""
    words = ["the cat sat on the mat, then one red bird came to see it 12 345 <|im_ end|>\n" * 30]
    sizes = {"bytes": {}, "bpe": {"vocab_size": 280}, "unigram": {"vocab_size": 290}}
    source, names = find_template("chatml")
    tokenizer = train_tokenizer(words, BuildConfig(tokenizer=kind, **sizes[kind])).with_chat(source, names)
    template, draw = ChatTemplate(source, tokenizer), random.Random(1)
    special = set(tokenizer.special_tokens.values())
    for _ in range(60):
        record = conversation(draw)
        example = encode_conversation(parse_conversation(record), template, tokenizer)
        calls = sum(len(message.get("tool_calls", [])) for message in record["messages"])
        blocks = len(record["messages"]) + (record["tools"] is not None and record["messages"][0]["role"] != "system")
        assert sum(i in special for i in example.ids.tolist()) == 1 + 2 * blocks + 2 * calls
        kept = bytes(b for i in example.ids.tolist() for b in tokenizer.decode_bytes([i])).decode()
        assert all((message["content"] or "") in kept for message in record["messages"])


def test_rendering_is_transformers(chat: Chat, tmp_path: Path) -> None:
    """Ids and the mask of assistant tokens are those of an exported folder there, for texts that name no special token."""
    transformers = pytest.importorskip("transformers")
    template, tokenizer = chat
    for name, content in tokenizer_files(tokenizer, 4096, template.source).items():
        (tmp_path / name).write_bytes(content)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    draw = random.Random(2)
    for _ in range(30):
        record = conversation(draw)
        cleaned = json.loads(json.dumps(record).replace("|>", "|"))
        parsed = parse_conversation(cleaned)
        found = other.apply_chat_template(
            parsed.messages, tools=parsed.tools or None, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        example = encode_conversation(parsed._replace(messages=[{**m, "weight": 1} for m in parsed.messages]), template, tokenizer)
        assert example.ids.tolist() == found["input_ids"]
        assert example.learned.tolist() == found["assistant_masks"]


def test_prompt_is_what_stands_before_the_answer(chat: Chat) -> None:
    template, tokenizer = chat
    whole = parse_conversation({"messages": [{"role": "user", "content": "a <|im_end|>"}, {"role": "assistant", "content": "b"}]})
    example = encode_conversation(whole, template, tokenizer)
    prompt = encode_prompt(Conversation(1, whole.messages[:1], []), template, tokenizer)
    assert prompt == example.ids[: example.learned.argmax()].tolist()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "generation %} blocks"),
        ("{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}", "generation %} blocks"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}", "does not end with a special token"),
        ("{% generation %}{{ messages[1].content | trim }}<|im_end|>{% endgeneration %}", "changes texts"),
        ("{% generation %}{{ messages[1].content[0:1] }}<|im_end|>{% endgeneration %}", "changes texts"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[7].content.x }}", "does not fit"),
    ],
)
def test_templates_that_cannot_be_learned_from(chat: Chat, source: str, reason: str) -> None:
    """Each is refused in one sentence: without a mask, with an open end, changing texts, or reaching outside of the sandbox."""
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " answer "}]}
    with pytest.raises(DataError, match=reason):
        encode_conversation(parse_conversation(record), ChatTemplate(source, chat[1]), chat[1])


def test_odd_data(chat: Chat) -> None:
    """All noncharacters at once leave no marks, a key cannot be split, and a template's syntax error is a sentence."""
    template, tokenizer = chat
    ask = {"role": "user", "content": "".join(NONCHARACTERS)}
    answer = {"role": "assistant", "content": "a"}
    with pytest.raises(DataError, match="noncharacters"):
        template.render(parse_conversation({"messages": [ask, answer]}))
    with pytest.raises(DataError, match="is a key of the data"):
        template.render(parse_conversation({"messages": [answer], "tools": [{"<|im_end|>": 1}]}))
    with pytest.raises(AndromedaError, match="cannot be used"):
        ChatTemplate("{% for %}", tokenizer)
    with pytest.raises(AndromedaError, match="did you mean chatml"):
        find_template("chatm")
