"""`andromeda eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from andromeda.utils.errors import RequestError

if TYPE_CHECKING:
    from andromeda.evaluate.result import EvalResult

MOST_DEPTHS = 1000


def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    tasks: Annotated[list[str] | None, typer.Argument(metavar="[TASK]...", help="What to measure; docs/evaluation.md lists it.")] = None,
    text: Annotated[str, typer.Option(help="A text file to measure on, instead of the held-out documents.")] = "",
    corpus: Annotated[str, typer.Option(help="Where the run's corpus lies now.")] = "",
    file: Annotated[str, typer.Option(help="Questions, one JSON object a line (fewshot, gsm8k).")] = "",
    lengths: Annotated[str, typer.Option(help="Tokens of context, such as 2048,4096.")] = "",
    depths: Annotated[str, typer.Option(help="Where evidence is put: how many places (5), or places such as 0,0.25,1.")] = "",
    samples: Annotated[int | None, typer.Option(help="Problems a cell, windows, places or questions.")] = None,
    shots: Annotated[int | None, typer.Option(help="Solved examples before each question (fewshot, gsm8k, harness).")] = None,
    seed: Annotated[int, typer.Option(help="Problems are drawn from it.")] = 0,
    style: Annotated[str, typer.Option(help="How problems of retrieval are worded: prose or code.")] = "prose",
    stride: Annotated[int, typer.Option(help="Tokens that each window scores (bits; half a window).")] = 0,
    beyond: Annotated[bool, typer.Option("--beyond", help="Allow lengths beyond the model's context.")] = False,
    task: Annotated[list[str] | None, typer.Option(help="A task of lm-evaluation-harness; may be repeated (harness).")] = None,
    include: Annotated[str, typer.Option(help="A folder with tasks of your own for lm-evaluation-harness (harness).")] = "",
    step: Annotated[int | None, typer.Option(help="Use the checkpoint of this step; the newest by default.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Use the moving average of the weights.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16 or fp64.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write evaluations/ here instead of into the run folder.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each result as one JSON object a line.")] = False,
) -> None:
    """Measure a trained model: loss, use of context, retrieval, reasoning. Each result is kept with the hashes of weights and data."""
    from andromeda.evaluate.request import check_options

    wishes: dict[str, Any] = {"text": text, "corpus": corpus, "file": file, "samples": samples, "shots": shots}
    wishes |= {"seed": seed, "style": style, "stride": stride, "beyond": beyond, "include": include}
    chosen = check_options(**wishes, lengths=_lengths(lengths), depths=_depths(depths), tasks=tuple(task or ()))

    from andromeda.cli.data import progress
    from andromeda.evaluate.evaluator import check_names, run_evaluations
    from andromeda.evaluate.loaded_model import load_model
    from andromeda.evaluate.result import check_writable

    check_names(tasks or [])
    check_writable(out or run)
    subject = load_model(run, step=step, average=ema, device=device, dtype=dtype)
    with progress() as report:
        for result in run_evaluations(subject, tasks or [], chosen, report, _skip):
            result.save(out or run)
            _show(result, as_json)


def _lengths(given: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in given.split(",")) if given else ()
    except ValueError:
        raise RequestError(f"--lengths must be whole numbers with commas between them, not {given!r}.") from None


def _depths(given: str) -> tuple[float, ...]:
    from andromeda.evaluate.tasks.retrieval import evenly

    if given.isdigit():
        if not 0 < int(given) <= MOST_DEPTHS:
            raise RequestError(f"--depths must be a number of places from 1 to {MOST_DEPTHS}, not {given}.")
        return evenly(int(given))
    try:
        return tuple(float(word) for word in given.split(",")) if given else ()
    except ValueError:
        raise RequestError(f"--depths must be a number of places, or places from 0 to 1 with commas between them, not {given!r}.") from None


def _skip(sentence: str) -> None:
    print(f"andromeda: {sentence}", file=sys.stderr)


def _show(result: EvalResult, as_json: bool) -> None:
    if as_json:
        import json
        from dataclasses import asdict

        from andromeda.evaluate.result import to_json_values

        print(json.dumps(to_json_values(asdict(result))), flush=True)
        return
    from andromeda.cli.tables import show
    from andromeda.evaluate.result_tables import table

    show(*table(result))
