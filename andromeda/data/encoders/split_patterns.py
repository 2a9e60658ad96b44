"""Regular expressions of other projects that cut text before byte pairs are merged, under the names that llama.cpp has for them.

A GGUF file names its pattern instead of holding it: only a tokenizer that cuts by one of these can be written to one
(llama.cpp, src/llama-vocab.cpp and src/unicode.cpp).
"""

from __future__ import annotations

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SPLIT_PATTERNS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
}
"""llama.cpp's name and the expression. Together the alternatives match every character, so nothing is lost."""

EXPRESSIONS = {pattern: name for name, pattern in SPLIT_PATTERNS.items()} | {
    pattern.replace(_CONTRACTIONS, "(?i:'s|'t|'re|'ve|'m|'ll|'d)"): name for name, pattern in SPLIT_PATTERNS.items()
}
"""The expressions as they are here, and as Hugging Face's tokenizers spell the contractions."""

WHOLE_WORDS = ("llama-bpe",)
"""Patterns with which llama.cpp takes a word that is in the vocabulary as it is, without merging."""


def pattern_name(expression: str) -> str | None:
    """llama.cpp's name of an expression; None where it has none."""
    return EXPRESSIONS.get(expression)
