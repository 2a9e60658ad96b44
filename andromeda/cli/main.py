"""The command line: one thin file a verb, gathered here.

No verb's file imports torch (or anything else that is slow) at its top, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import cache
from typing import Any, cast

import typer
from typer.core import TyperGroup

from andromeda import __version__
from andromeda.cli.ablate import ablate
from andromeda.cli.bench import app as bench_app
from andromeda.cli.data import app as data_app
from andromeda.cli.demo import demo
from andromeda.cli.doctor import doctor
from andromeda.cli.evaluate import evaluate
from andromeda.cli.explain import explain
from andromeda.cli.export import export
from andromeda.cli.extend import extend
from andromeda.cli.generate import generate
from andromeda.cli.import_ import import_
from andromeda.cli.plan import plan
from andromeda.cli.renamed_options import explain_unknown
from andromeda.cli.report import report
from andromeda.cli.tokenizers import app as tokenizers_app
from andromeda.cli.train import train
from andromeda.cli.tune import app as tune_app
from andromeda.cli.verify import verify
from andromeda.utils.errors import AndromedaError, DataError, Interrupted
from andromeda.utils.untrusted import MalformedFile, printable

UsageError = cast(type[Exception], typer.BadParameter.__mro__[1])
"""What typer raises for every call that it cannot read, and does not export."""


class CommandGroup(TyperGroup):
    """All verbs. Typer ends an interruption without a word, and takes a file that ends too early for one."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb of the call."""
        from andromeda.config.own_code import allow_code

        try:
            with allow_code(False):  # what --allow-code consents to ends with the call
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted.") from None
        except MalformedFile as error:  # what no reader gave a sentence of its own
            raise DataError(f"A file of the folder {error}: restore it.") from None
        except EOFError as error:
            raise DataError(f"A file ends too early ({error}): restore it.") from None


app = typer.Typer(
    name="andromeda",
    cls=CommandGroup,
    help="Train, extend, evaluate, generate with and share long-context language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help needs no rich, whose import takes longer than all else here
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"andromeda {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
) -> None:
    """What comes before a verb."""


app.add_typer(data_app, name="data")
app.add_typer(tokenizers_app, name="tokenizers")
app.add_typer(bench_app, name="bench")
app.add_typer(tune_app, name="tune")
for verb, command, short in (
    ("doctor", doctor, "What this machine can do, and what is missing."),
    ("plan", plan, "What a run needs: FLOPs, memory, time, cost."),
    ("demo", demo, "A small model from this machine's own sources."),
    ("train", train, "Train a model, or resume a run."),
    ("extend", extend, "Extend the context of a trained model."),
    ("generate", generate, "Generate text from a prompt."),
    ("ablate", ablate, "Compare techniques at an equal budget."),
    ("eval", evaluate, "Evaluate a trained model."),
    ("verify", verify, "Recompute what a run folder claims, and compare."),
    ("report", report, "A run as one HTML page."),
    ("export", export, "A model as a Hugging Face folder."),
    ("import", import_, "A Hugging Face folder as a run."),
    ("explain", explain, "Why a model predicts what it predicts, as one HTML page."),
):
    app.command(verb, short_help=short)(command)


@cache
def _command() -> Any:
    """All verbs as one command, built once in a process: it takes longer than many a call, and tests make hundreds."""
    return typer.main.get_command(app)


def main() -> None:
    """Run the command line; bad input ends with its sentence on stderr and exit code 2."""
    _replace_closed_streams()
    try:
        # Not standalone: typer would print a wrong call as a box of several lines instead of one sentence.
        code = _command()(standalone_mode=False, prog_name="andromeda")
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except UsageError as error:
        _refuse_call(error)
    except typer.Abort:
        sys.exit(130)
    except AndromedaError as error:
        if not error.told:
            print(f"andromeda: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        detail = str(error).strip().partition("\n")[0].rstrip(".")
        print(f"andromeda: Out of memory ({detail[:200]}): use a smaller model, batch or context (`andromeda plan`).", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # The reader of our output went away (`| head`).
        _drop_output()
        sys.exit(141)
    except OSError as error:
        # A full disk, a read-only folder: files written before are complete, because each is renamed into place.
        place = f"{error.filename}: " if error.filename else ""
        print(
            f"andromeda: {printable(f'{place}{error.strerror or error}')}: free some space or give another path, and call again.",
            file=sys.stderr,
        )
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        sys.exit(2)


def _replace_closed_streams() -> None:
    """Put /dev/null in the place of standard streams that the caller closed (`>&-`), which Python gives as None."""
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    # Their numbers first, or the next file that is opened, such as a checkpoint, would be taken for one of them.
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(number)
    closed = sys.stdout is None
    sys.stdin, sys.stdout, sys.stderr = (stream or open(os.devnull, "r+") for stream in (sys.stdin, sys.stdout, sys.stderr))  # noqa: SIM115
    if closed:
        print("andromeda: Standard output is closed: what this command prints is lost.", file=sys.stderr)


def _drop_output() -> None:
    """Point stdout at /dev/null, so that the interpreter's last flush does not fail where nothing can be written."""
    with suppress(OSError):  # no file at all, where another program took stdout's place
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _out_of_memory(error: Exception) -> bool:
    """Python's and numpy's errors, torch's for a GPU, and torch's for a CPU, which has no type of its own."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)


def _refuse_call(error: Any) -> None:
    """Print why a call is not understood, as one sentence, and exit; a call without arguments gets the help."""
    if type(error).__name__ == "NoArgsIsHelpError":  # typer does not export it either
        print(error.format_message(), file=sys.stderr)
        sys.exit(error.exit_code)
    sentence = error.format_message().rstrip(".")
    if error.ctx:
        sentence = explain_unknown(error) or sentence
    if sentence:
        command = error.ctx.command_path if error.ctx else "andromeda"
        print(f"andromeda: {printable(sentence)}: see `{command} --help`.", file=sys.stderr)
    sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
