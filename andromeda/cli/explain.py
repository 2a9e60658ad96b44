"""`andromeda explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from andromeda.utils.errors import RequestError


def explain(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    text: Annotated[str, typer.Argument(help="The text whose continuation is explained.")],
    target: Annotated[str, typer.Option(help="The token whose logit is explained; the likeliest by default.")] = "",
    against: Annotated[str, typer.Option(help="The token beside it; the likeliest other one by default.")] = "",
    position: Annotated[int, typer.Option(help="The token after which the prediction is made; -1 is the last one.")] = -1,
    layers: Annotated[str, typer.Option(help="Layers whose attention is shown, such as 1,4,12; all by default.")] = "",
    step: Annotated[int | None, typer.Option(help="Use the checkpoint of this step; the newest by default.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Use the moving average of the weights.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; all is computed in float64.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Where the page is written; RUN/explain.html by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON too.")] = False,
) -> None:
    """Write a page that says why a model continues a text as it does: logit lens, attention, attributions."""
    numbers = _numbers(layers)

    from andromeda.api import Andromeda
    from andromeda.explain import ExplainRequest, write_explanation
    from andromeda.explain import explain as look
    from andromeda.explain.explanation import explanation_json

    model = Andromeda.from_run(run, device=device, dtype="fp64", ema=ema, step=step)
    found = look(run, model, ExplainRequest(text, target, against, position, numbers), step)
    page = write_explanation(found, out)
    if as_json:
        print(json.dumps(explanation_json(found) | {"page": str(page)}, ensure_ascii=False))
        return
    for check in found.checks:
        print(f"{'holds' if check.holds else 'DOES NOT HOLD'}: {check.name} (difference {check.error:.1e})")
    for sentence in found.refused.values():
        print(sentence)
    print(page)


def _numbers(given: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in given.split(",")) if given else ()
    except ValueError:
        raise RequestError(f"--layers must be whole numbers with commas between them, not {given!r}.") from None
