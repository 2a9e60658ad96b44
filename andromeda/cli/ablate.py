"""`andromeda ablate`: techniques on and off at an equal budget."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from andromeda.cli.arguments import AllowCode, Overrides, load_config
from andromeda.utils.errors import ConfigError

if TYPE_CHECKING:
    from andromeda.ablate.ablation import AblationResult, OnProgress
    from andromeda.ablate.grid import AblationGrid


def ablate(
    config: Annotated[str, typer.Argument(metavar="PRESET|FILE|RUN", help="The baseline.")],
    changes: Overrides = None,
    grid: Annotated[Path | None, typer.Option(help="A TOML file of variants, each with a name and changes (docs/ablation.md).")] = None,
    vary: Annotated[list[str] | None, typer.Option(help="key.path=value,value: a variant for each value; may be repeated.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where runs and results go; runs/ablation-NAME by default.")] = None,
    budget: Annotated[str, typer.Option(help="What is equal: tokens, flops or seconds (of training); the grid's by default.")] = "",
    budget_amount: Annotated[float, typer.Option(min=0.0, help="How much of it; 0 is what the baseline is configured for.")] = 0.0,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs per variant, with seeds 0, 1, ...; the grid's by default, else 3.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share one GPU (or the CPU).")] = 1,
    time_limit: Annotated[float, typer.Option(min=0.0, help="Seconds after which runs are stopped and saved; 0 is none.")] = 0.0,
    timing_steps: Annotated[int, typer.Option(min=0, help="Timed steps of each variant, alone on the device; 0 times none.")] = 8,
    drop_checkpoints: Annotated[bool, typer.Option("--drop-checkpoints", help="Delete the checkpoints of finished runs.")] = False,
    allow_code: AllowCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Compare techniques at an equal budget over several seeds: effect, spread, p-value, cost, verdict. The same command resumes."""
    from andromeda.config.load import check_overrides

    compared = _grid(grid, vary or [], budget, budget_amount, seeds)

    base = [*compared.base, *(changes or [])]
    place = out or Path("runs") / f"ablation-{load_config(config, base).name}"
    for variant in compared.variant:
        try:
            check_overrides(config, [*base, *variant.changes])
        except ConfigError as error:
            raise ConfigError(f"Variant {variant.name!r} is refused: {error}") from None

    from andromeda.ablate.ablation import AblationSettings, ablate

    settings = AblationSettings(place, shlex.join(["andromeda", *sys.argv[1:]]), jobs, time_limit, timing_steps, drop_checkpoints)
    with _progress(as_json) as on_progress:
        result = ablate(config, changes or [], compared, settings, on_progress)
    _show(result, place, as_json)
    if result.signal:
        raise typer.Exit(128 + result.signal)
    if result.failures:
        raise typer.Exit(1)


def _grid(path: Path | None, vary: list[str], budget: str, amount: float, seeds: int | None) -> AblationGrid:
    """The grid of the options and the file together; options win."""
    from andromeda.ablate.grid import AblationGrid, grid_from_values, read_grid, variants_of

    given = read_grid(path) if path else AblationGrid()
    values: dict[str, Any] = given.model_dump(mode="json")
    values["variant"] += [variant.model_dump(mode="json") for variant in variants_of(vary)]
    values |= {"budget": budget} if budget else {}
    values |= {"amount": amount} if amount else {}
    values |= {"seeds": list(range(seeds))} if seeds else {}
    if budget and budget != given.budget and given.amount and not amount:
        raise ConfigError(f"The grid's amount is of {given.budget}, not of {budget}: give --budget-amount too.")
    return grid_from_values(values, str(path) if path else "the call")


@contextmanager
def _progress(as_json: bool) -> Iterator[OnProgress]:
    """A bar on a terminal, lines when piped; on stderr when stdout is for JSON."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=as_json)
    if not console.is_terminal:

        def say(text: str, done: int, total: int) -> None:
            print(f"{done}/{total}  {text}", file=sys.stderr if as_json else sys.stdout, flush=True)

        yield say
        return
    with Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"), console=console) as bar:
        task = bar.add_task("", total=None)
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)


def _show(result: AblationResult, out: Path, as_json: bool) -> None:
    from andromeda.ablate.ablation import OUTPUTS
    from andromeda.ablate.ablation_tables import cells, head, verdicts
    from andromeda.cli.tables import show

    if as_json:
        print(json.dumps(result.results, indent=2))
        return
    titles = head(result.results)
    show(f"equal {result.results['budget']}", titles, [cells(row) for row in result.results["variants"]], right=range(2, len(titles) - 1))
    print(verdicts(result.results))
    for failure in result.failures:
        print(f"not finished: {failure}")
    if result.finished < result.total:
        print(f"{result.finished} of {result.total} runs are finished: the same command resumes.")
    print(f"{out}: {', '.join(name for name in OUTPUTS if (out / name).exists())}")
