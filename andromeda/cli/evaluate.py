"""`andromeda eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from andromeda.cli.arguments import AllowCode, Device, DType, Ema, RunArgument, Step, check_buildable, parse_ints
from andromeda.utils.errors import RequestError

if TYPE_CHECKING:
    from andromeda.evaluate.result import EvalResult

MAX_DEPTHS = 1000


def evaluate(
    run: RunArgument,
    tasks: Annotated[list[str] | None, typer.Argument(metavar="TASK", help="What to measure; docs/evaluation.md lists it.")] = None,
    text: Annotated[str, typer.Option(help="A text file to evaluate on, instead of the held-out documents.")] = "",
    corpus: Annotated[str, typer.Option(help="Where the run's corpus is now.")] = "",
    questions: Annotated[str, typer.Option(help="Questions, one JSON object a line (fewshot, gsm8k).")] = "",
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens, such as 2048,4096.")] = "",
    depths: Annotated[str, typer.Option(help="Depths of the needle: how many (5), or fractions of the context such as 0,0.25,1.")] = "",
    samples: Annotated[int | None, typer.Option(help="Problems per cell, windows, positions or questions.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Solved examples before each question (fewshot, gsm8k, harness).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the problems.")] = 0,
    style: Annotated[str, typer.Option(help="Wording of retrieval problems: prose or code.")] = "prose",
    stride: Annotated[int, typer.Option(help="Tokens that each window scores (bits); 0 is half a window.")] = 0,
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="Allow lengths beyond the model's context.")] = False,
    harness_task: Annotated[list[str] | None, typer.Option(help="A task of lm-evaluation-harness; may be repeated (harness).")] = None,
    include_path: Annotated[str, typer.Option(help="A folder with your own tasks for lm-evaluation-harness (harness).")] = "",
    step: Step = None,
    ema: Ema = False,
    device: Device = "auto",
    dtype: DType = "auto",
    out: Annotated[Path | None, typer.Option(help="Write evaluations/ here instead of into the run folder.")] = None,
    allow_code: AllowCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each result as one JSON object a line.")] = False,
) -> None:
    """Evaluate a trained model: loss, use of context, retrieval, reasoning. Results are kept with hashes of weights and data."""
    check_buildable(run)
    given: dict[str, Any] = {"text": text, "corpus": corpus, "file": questions, "samples": samples, "shots": num_fewshot}
    given |= {"seed": seed, "style": style, "stride": stride, "beyond": extrapolate, "include": include_path}
    given |= {"lengths": parse_ints("--lengths", lengths, 1), "depths": _depths(depths), "tasks": tuple(harness_task or ())}

    from andromeda.cli.data import progress
    from andromeda.evaluate.evaluator import check_names, run_evaluations
    from andromeda.evaluate.loaded_model import load_model
    from andromeda.evaluate.request import check_options
    from andromeda.evaluate.result import check_writable

    chosen = check_options(**given)
    check_names(tasks or [])
    check_writable(out or run)
    subject = load_model(run, step=step, average=ema, device=device, dtype=dtype)
    with progress() as report:
        for result in run_evaluations(subject, tasks or [], chosen, report, _skip):
            result.save(out or run)
            _show(result, as_json)


def _depths(given: str) -> tuple[float, ...]:
    """Depths as fractions of the context: spread evenly where only their number is given."""
    if given.isdigit():
        if not 0 < int(given) <= MAX_DEPTHS:
            raise RequestError(f"--depths must be a number of depths from 1 to {MAX_DEPTHS}, not {given}.")
        from andromeda.evaluate.tasks.retrieval import evenly

        return evenly(int(given))
    try:
        return tuple(float(word) for word in given.split(",")) if given else ()
    except ValueError:
        raise RequestError(f"--depths must be a number of depths, or depths from 0 to 1 with commas between them, not {given!r}.") from None


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
