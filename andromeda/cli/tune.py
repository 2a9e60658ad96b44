"""`andromeda tune`: adapt a trained model to conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from andromeda.cli.arguments import AllowCode, Overrides, check_exists

app = typer.Typer(help="Adapt a trained model to conversations.", no_args_is_help=True)
Run = Annotated[str, typer.Argument(metavar="RUN[@STEP]", help="The run folder of a trained model; it is only read.")]
Template = Annotated[str, typer.Option(help="A chat template: chatml, or a Jinja file; the run's own by default, or else chatml.")]
SpecialToken = Annotated[
    list[str] | None, typer.Option(help="A special token that the template writes and the tokenizer lacks; may be repeated.")
]


@app.command()
def inspect(
    run: Run,
    data: Annotated[Path, typer.Argument(metavar="DATA.jsonl", help="Conversations, one JSON object a line.")],
    example: Annotated[int, typer.Option(min=1, help="Which example is printed, counted from 1.")] = 1,
    template: Template = "",
    special_token: SpecialToken = None,
    seq_len: Annotated[int, typer.Option(min=0, help="Cut examples to this many tokens; 0 is the run's sequence length.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the tokens and figures as JSON.")] = False,
) -> None:
    """Print every token of an example with its role and loss weight, and what becomes of the whole file."""
    from andromeda.train.run_dir import split_step

    check_exists(split_step(run)[0])
    from andromeda.tune.inspection import inspect_chat

    found = inspect_chat(run, data, example, template, tuple(special_token or ()), seq_len)
    if as_json:
        import json

        print(json.dumps(found.values()))
        return
    from andromeda.cli.tables import show

    show(f"Example {example} of {data}", ["position", "id", "token", "role", "weight"], found.rows(), [0, 1, 4])
    print(found.statistics.sentence())
    print("tokens by role: " + ", ".join(f"{role} {count:,}" for role, count in sorted(found.statistics.by_role.items())))
    print(f"chat template sha256 {found.template_sha256}; new special tokens: {', '.join(found.added) or 'none'}")


@app.command()
def sft(
    run: Run,
    overrides: Overrides = None,
    data: Annotated[list[Path] | None, typer.Option(help="A JSONL file of conversations; may be repeated; required.")] = None,
    out: Annotated[Path | None, typer.Option(help="The new run folder; next to the old one by default.")] = None,
    epochs: Annotated[float, typer.Option(help="Times that every example is seen.")] = 3.0,
    steps: Annotated[int, typer.Option(min=0, help="Steps in place of epochs; 0 follows from those.")] = 0,
    lr_scale: Annotated[float, typer.Option(help="Factor on the learning rates of the old run.")] = 0.1,
    template: Template = "",
    special_token: SpecialToken = None,
    validation_fraction: Annotated[float, typer.Option(min=0.001, max=0.5, help="Fraction of the examples held out.")] = 0.05,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; the same as train.device=.")] = "",
    allow_code: AllowCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each line of metrics.jsonl as it is written.")] = False,
) -> None:
    """Supervised fine-tuning: learn the answers of conversations. After Ctrl-C or SIGTERM, `andromeda train --resume` goes on."""
    import sys
    from contextlib import closing

    from andromeda.train.run_dir import split_step
    from andromeda.utils.errors import ConfigError

    folder = split_step(run)[0]
    check_exists(folder)
    if not data:
        raise ConfigError("Give the conversations to learn from with --data DATA.jsonl.")
    from andromeda.cli.train import write_report
    from andromeda.train.progress import build_reporter
    from andromeda.train.trainer import train
    from andromeda.tune.sft import SftRequest, prepare_sft
    from andromeda.tune.sft_config import TuneSchedule

    changes = [*(overrides or []), *([f"train.device={device}"] if device else [])]
    request = SftRequest(
        run,
        tuple(data),
        out or folder.parent / f"{folder.name}-sft",
        template,
        tuple(special_token or ()),
        validation_fraction,
        TuneSchedule(epochs, steps, lr_scale),
        tuple(changes),
    )
    config = prepare_sft(request, lambda text: print(text, file=sys.stderr if as_json else sys.stdout, flush=True))
    with closing(build_reporter(config.train.steps, as_json)) as reporter:
        result = train(config, request.out, init_from=run, reporter=reporter)
        if result.signal:
            raise typer.Exit(128 + result.signal)
        reporter.message(write_report(result.run_dir))
