"""Tokens as people can tell them apart."""

from __future__ import annotations

from collections.abc import Sequence

from andromeda.utils.html import Html, el

VISIBLE = str.maketrans({"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}", " ": "\N{OPEN BOX}"})


def visible(token: str, longest: int = 14) -> str:
    """With blanks and line ends that can be seen; a long one is cut."""
    text = token.translate(VISIBLE)
    return text if len(text) <= longest else text[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


def shaded(tokens: Sequence[str], values: Sequence[float], tips: Sequence[str], here: int = -1) -> Html:
    """A text whose tokens are shaded by signed values, the largest in full."""
    full = max((abs(v) for v in values), default=0.0) or 1.0
    spans = []
    for i, (token, value, tip) in enumerate(zip(tokens, values, tips, strict=True)):
        share = abs(value) / full
        kind = ("minus" if value < 0 else "plus") + (" strong" if share > 0.6 else "") + (" here" if i == here else "")
        spans.append(el("span", visible(token, 40), class_=f"token {kind}", style=f"--s:{share:.3f}", data_tip=tip))
        if "\n" in token:
            spans.append(el("br"))
    return el("p", spans, class_="tokens")
