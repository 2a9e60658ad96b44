"""`andromeda extend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def extend(
    run: Annotated[Path, typer.Argument(help="The run folder of a trained model; it is only read.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes of the continued training: key.path=value.")] = None,
    to: Annotated[int | None, typer.Option(min=1, help="Tokens of the new context; must be given.")] = None,
    method: Annotated[str, typer.Option(help="yarn, ntk, pi, dynamic-ntk, alibi-scale, none, several with commas, or all.")] = "yarn",
    steps: Annotated[int, typer.Option(min=0, help="Steps of continued training; 0 only measures.")] = 100,
    rate: Annotated[float, typer.Option(help="Learning rates, as a share of the old run's.")] = 0.1,
    out: Annotated[Path | None, typer.Option(help="The new run folder, or the folder of several; beside the old one by default.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out windows that are measured.")] = 16,
    tail: Annotated[
        int | None,
        typer.Option(
            min=1, help="Targets of each window that are scored at every context length; 256, or half the trained context if less."
        ),
    ] = None,
    held_out: Annotated[str, typer.Option(help="Corpus whose held-out text is measured; the run's own by default.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; short for train.device=.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
) -> None:
    """Stretch a trained model over a longer context: a new run, a short training, and its loss before and after."""
    import json
    import sys

    from andromeda.utils.errors import ConfigError

    if not to:
        raise ConfigError("Say how far to extend, such as --to 65536.")
    from andromeda.cli.tables import show
    from andromeda.extend.extension import extend as work
    from andromeda.extend.results import draw, table, verdicts
    from andromeda.extend.training_config import ExtendRequest
    from andromeda.train.progress import Silent, build_screen

    changes = [*(overrides or []), *([f"train.device={device}"] if device else [])]
    wishes = ExtendRequest(str(run), to, steps, rate, tuple(changes), samples, tail or 0, held_out)
    name = "extended" if "," in method or method == "all" else method
    folder = out or run.parent / f"{run.name}-{name}-{to}"

    def note(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    ended = work(wishes, method, folder, lambda count: Silent() if as_json else build_screen(count), note)
    if ended.signal:
        note("interrupted; the state is saved: the same command goes on from here.")
        raise typer.Exit(128 + ended.signal)
    plots = draw(ended.values, folder / "extension")
    if as_json:
        print(json.dumps(ended.values, indent=1))
        return
    columns, rows = table(ended.values)
    show(f"Loss of the same held-out targets (nats a token), trained at {ended.values['trained']:,}", columns, rows, range(1, len(columns)))
    print("The same targets, with their whole new context against the length that was trained (mean over windows and its standard error):")
    print("\n".join(f"  {line}" for line in verdicts(ended.values)))
    note(f"{folder}: extension.json, {', '.join(path.name for path in plots)}")
