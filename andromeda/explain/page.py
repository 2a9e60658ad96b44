"""The explanation as one page."""

from __future__ import annotations

import shlex
from pathlib import Path

from andromeda.explain.explanation import Explanation
from andromeda.explain.sections import attention_view, checks_view, direct_view, gradients_view, lens_view, prediction
from andromeda.explain.tokens import visible
from andromeda.utils.errors import ConfigError
from andromeda.utils.files import write_whole
from andromeda.utils.formatting import figure, percent
from andromeda.utils.html import el, page, tiles

NAME = "explain.html"
VIEWS = (prediction, lens_view, attention_view, direct_view, gradients_view, checks_view)


def build_page(e: Explanation) -> str:
    """The page as HTML."""
    chance = float(e.seen.logits[0, e.position].softmax(-1)[e.target])
    top = tiles(
        [
            ("Explained token", visible(e.spell(e.target)), f"after token {e.position}, {visible(e.tokens[e.position])}"),
            ("Probability", percent(chance), "of all tokens"),
            ("Logit", figure(float(e.seen.logits[0, e.position, e.target])), f"beside {visible(e.spell(e.beside))}"),
            ("Identities", f"{sum(c.holds for c in e.checks)} of {len(e.checks)}", "hold for this text"),
        ]
    )
    step = f", step {e.step:,}" if e.step is not None else ""
    subtitle = f"Why {e.run}{step} says what it says after this text of {len(e.tokens)} tokens."
    made = ["Made by ", el("code", f"andromeda explain {shlex.quote(str(e.run))} ..."), ". One file; nothing is loaded from anywhere."]
    return page("One prediction, explained", subtitle, [view(e) for view in VIEWS], top, made, script="attention.js")


def write_explanation(e: Explanation, out: str | Path | None = None) -> Path:
    """Write the page (by default explain.html in the run folder) and return where it is. Raises ConfigError."""
    path = Path(out) if out else e.run / NAME
    try:
        write_whole(path, build_page(e).encode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): give another place with --out.") from None
    return path
