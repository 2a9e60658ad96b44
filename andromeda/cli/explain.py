"""`andromeda explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from andromeda.cli.arguments import AllowCode, Ema, RunArgument, Step, check_buildable, parse_ints


def explain(
    run: RunArgument,
    text: Annotated[str, typer.Argument(help="The text whose next token is explained.")],
    target: Annotated[str, typer.Option(help="The token whose logit is explained; the most likely one by default.")] = "",
    against: Annotated[str, typer.Option(help="The token it is compared with; the most likely other one by default.")] = "",
    position: Annotated[int, typer.Option(help="Index of the token after which the prediction is made; -1 is the last one.")] = -1,
    layers: Annotated[str, typer.Option(help="Layers whose attention is shown, such as 1,4,12; all by default.")] = "",
    step: Step = None,
    ema: Ema = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; everything is computed in float64.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="File of the page; RUN/explain.html by default.")] = None,
    allow_code: AllowCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Explain the next token as one HTML page: logit lens, attention, input attribution, parts of the logit."""
    numbers = parse_ints("--layers", layers)
    check_buildable(run)

    from andromeda.api import Andromeda
    from andromeda.explain import ExplainRequest, write_explanation
    from andromeda.explain import explain as look
    from andromeda.explain.explanation import explanation_json, prediction_text

    model = Andromeda.from_run(run, device=device, dtype="fp64", ema=ema, step=step)
    found = look(run, model, ExplainRequest(text, target, against, position, numbers), step)
    page = write_explanation(found, out)
    if as_json:
        print(json.dumps(explanation_json(found) | {"page": str(page)}, ensure_ascii=False))
        return
    print(prediction_text(found))
    for check in found.checks:
        print(f"{'holds' if check.holds else 'DOES NOT HOLD'}: {check.name} (difference {check.error:.1e})")
    for sentence in found.refused.values():
        print(sentence)
    print(page)
