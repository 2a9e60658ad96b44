"""A byte-level BPE of Hugging Face `tokenizers` computed by tiktoken, several times as fast and with the same ids.

tiktoken merges the adjacent pair whose concatenation has the lowest id; `tokenizers` merges by a list of pairs. The two agree when
ids of merged tokens ascend in the order of the merges and every token's bytes are encoded as that token alone. Then the list has a
rule for every pair that tiktoken can meet: between the borders of a token, no merge of a lower rank has crossed them, so that what is
merged there is what is merged when the token is encoded by itself. Both are checked when a tokenizer is converted; so are the parts
around the merges, of which only known pre-tokenizers are converted, and the Unicode tables of both regular-expression engines.
"""

from __future__ import annotations

import json
import re
from functools import cache
from itertools import pairwise
from typing import Any

from andromeda.data.encoders.split_patterns import SPLIT_PATTERNS, pattern_name

MAX_RUN = re.compile(r"\s{20000}|\S{200000}")
"""A longer run of white space overflows the stack of tiktoken's regular-expression engine; a longer word is slow to merge."""

NEW_CHARACTERS = "".join(
    map(chr, [0x8C7, 0x10E80, 0x10570, 0x870, 0x11F04, 0x1E4D0, 0x11F50, 0x2EBF0, 0x31350, 0x10D50, 0x10D40, 0x105C0, 0x11BC0, 0x11DE0,
              0x16D40, 0x1E5D0, 0x1CCF0, 0x10D69, 0x323B0, 0x10EC6, 0x1E6C0, 0x11DB0, 0x16EA0, 0x88F, 0xC5C])
)  # fmt: skip
"""Characters that Unicode 13 to 17 added: where the engines differ on one of them, their tables are of different versions."""


class TiktokenBPE:
    """The same ids as `tokenizers` gives, for texts that `accepts` takes."""

    def __init__(self, pattern: str, token_bytes: list[bytes]) -> None:
        import tiktoken

        ranks = {content: i for i, content in enumerate(token_bytes) if content}
        self._encoding = tiktoken.Encoding("andromeda", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._ascii_only = not same_unicode_tables()

    def accepts(self, text: str) -> bool:
        """Whether a text is encoded here: not where the engines' Unicode tables differ, nor with a run that one cannot take."""
        return not (self._ascii_only and not text.isascii()) and not (len(text) > 20000 and MAX_RUN.search(text))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        return self._encoding.encode_ordinary(text)


def convert(model_file: bytes, token_bytes: list[bytes], own_pattern: re.Pattern[str]) -> TiktokenBPE | None:
    """A tokenizer.json for tiktoken, or None where equal ids are not certain.

    token_bytes: the bytes of every id, empty for special tokens. own_pattern: what our own pre-tokenizer's pattern looks like.
    """
    content = json.loads(model_file)
    pattern = _pattern(content)
    known = pattern is not None and (pattern_name(pattern) is not None or own_pattern.fullmatch(pattern) is not None)
    if pattern is None or not known or not _plain(content) or not _merges_ascend(content) or not _tokens_are_their_own(content):
        return None
    filled = [one for one in token_bytes if one]
    if len(set(filled)) != len(filled) or not {bytes([b]) for b in range(256)} <= set(filled):
        return None
    return TiktokenBPE(pattern if pattern_name(pattern) else _without_possessive(pattern), token_bytes)


def _without_possessive(pattern: str) -> str:
    """Our own pattern with ordinary quantifiers, which match the same, since what follows each one cannot begin inside of it.

    tiktoken's engine then runs a third faster; the engine of `tokenizers` would try all lengths of a run that no word follows.
    """
    return pattern.replace("++", "+").replace("*+", "*").replace("?+", "?")


def _pattern(content: dict[str, Any]) -> str | None:
    """The regular expression that cuts text before the merges; None for another kind of pre-tokenizer."""
    step = content.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return SPLIT_PATTERNS["gpt-2"] if steps[0].get("use_regex", True) else None
    split = steps[0]
    whole = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    if len(steps) != 2 or steps[1].get("use_regex", True) or not whole:
        return None
    found = split["pattern"].get("Regex")
    return found if isinstance(found, str) else None


def _plain(content: dict[str, Any]) -> bool:
    """Whether nothing but the pattern and the merges decides the ids of a text."""
    model = content["model"]
    off = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    return (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in off)
        and content.get("normalizer") is None
        and all(token["special"] for token in content.get("added_tokens", []))
    )


def _merges_ascend(content: dict[str, Any]) -> bool:
    """Whether each merge makes a token of a higher id than the merge before."""
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    ids = [vocabulary.get("".join(pair), -1) for pair in pairs]
    return all(a < b for a, b in pairwise(ids)) and all(
        vocabulary[one] < i for pair, i in zip(pairs, ids, strict=True) for one in pair if len(one) > 1
    )


def _tokens_are_their_own(content: dict[str, Any]) -> bool:
    """Whether the merges make each token of its own bytes."""
    from tokenizers import Tokenizer

    special = {token["content"] for token in content.get("added_tokens", [])}
    bare = Tokenizer.from_str(json.dumps({"version": "1.0", "model": content["model"] | {"ignore_merges": False}, "added_tokens": []}))
    words = [word for word in content["model"]["vocab"] if word not in special]
    return all(len(found.ids) == 1 for found in bare.encode_batch_fast(words, add_special_tokens=False))


@cache
def same_unicode_tables() -> bool:
    """Whether both engines know the same letters, marks, digits and spaces among the newest characters."""
    import tiktoken
    from tokenizers import Regex, normalizers

    ranks = {bytes([i]): i for i in range(256)}
    for inside, outside in ((r"\p{L}", r"\P{L}"), (r"\p{M}", r"\P{M}"), (r"\p{N}", r"\P{N}"), (r"\s", r"\S")):
        found = tiktoken.Encoding("probe", pat_str=inside, mergeable_ranks=ranks, special_tokens={}).encode_ordinary(NEW_CHARACTERS)
        if bytes(found).decode() != normalizers.Replace(Regex(outside), "").normalize_str(NEW_CHARACTERS):
            return False
    return True
