"""`andromeda extend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from andromeda.cli.arguments import AllowCode, Overrides, check_buildable


def extend(
    run: Annotated[Path, typer.Argument(help="The run folder of a trained model; it is only read.")],
    overrides: Overrides = None,
    to: Annotated[int | None, typer.Option(min=1, help="The new context length in tokens; required.")] = None,
    method: Annotated[str, typer.Option(help="yarn, ntk, pi, dynamic-ntk, alibi-scale, none, several with commas, or all.")] = "yarn",
    steps: Annotated[int, typer.Option(min=0, help="Steps of continued training; 0 only evaluates.")] = 100,
    lr_scale: Annotated[float, typer.Option(help="Factor on the learning rates of the old run.")] = 0.1,
    out: Annotated[Path | None, typer.Option(help="The new run folder, or the parent of several; next to the old one by default.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out windows to evaluate.")] = 16,
    scored_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Targets at the end of each window that are scored at every context length; 256, or half the trained context if less.",
        ),
    ] = None,
    eval_corpus: Annotated[str, typer.Option(help="Corpus whose held-out text is evaluated; the run's own by default.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; the same as train.device=.")] = "",
    allow_code: AllowCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Extend the context of a trained model: a new run, a short continued training, and the loss before and after."""
    import json
    import sys

    from andromeda.config.load import check_overrides
    from andromeda.utils.errors import ConfigError

    if not to:
        raise ConfigError("Give the new context length, such as --to 65536.")
    changes = [*(overrides or []), *([f"train.device={device}"] if device else [])]
    check_buildable(run)
    check_overrides(run, changes)

    from andromeda.cli.tables import show
    from andromeda.extend.extension import extend as work
    from andromeda.extend.results import draw, table, verdicts
    from andromeda.extend.training_config import ExtendRequest
    from andromeda.train.progress import NullReporter, build_reporter

    request = ExtendRequest(str(run), to, steps, lr_scale, tuple(changes), samples, scored_tokens or 0, eval_corpus)
    name = "extended" if "," in method or method == "all" else method
    folder = out or run.parent / f"{run.name}-{name}-{to}"

    def note(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    ended = work(request, method, folder, lambda count: NullReporter() if as_json else build_reporter(count), note)
    if ended.signal:
        note("interrupted; the state is saved: the same command resumes.")
        raise typer.Exit(128 + ended.signal)
    plots = draw(ended.values, folder / "extension")
    if as_json:
        print(json.dumps(ended.values, indent=1))
        return
    columns, rows = table(ended.values)
    show(f"Loss of the same held-out targets (nats/token), trained at {ended.values['trained']:,}", columns, rows, range(1, len(columns)))
    print("The same targets with their whole new context, compared with the trained length (mean over windows and its standard error):")
    print("\n".join(f"  {line}" for line in verdicts(ended.values)))
    note(f"{folder}: extension.json, {', '.join(path.name for path in plots)}")
