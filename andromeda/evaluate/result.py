"""Results of evaluations as files of the run folder: RUN/evaluations/NAME.json, each with the hashes that tie it to its weights and data.

A result is enough to repeat it: `andromeda verify` runs the evaluation again with the settings stored and compares.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError

from andromeda.utils.errors import CheckpointError, ConfigError
from andromeda.utils.files import takes_files, write_whole
from andromeda.utils.untrusted import MalformedFile, parse_json, read_regular, refuse_links

FOLDER = "evaluations"
KINDS = ("bits", "position", "context", "retrieval", "reasoning", "fewshot", "gsm8k", "harness", "heads")


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind!r}")
    return kind


@dataclass(frozen=True)
class EvalResult:
    """One evaluation of one checkpoint.

    The `result` of each kind (docs/evaluation.md has them in words; all losses are in nats a token):
    bits        {"bits_per_byte", "loss", "tokens", "bytes"}
    position    {"edges": n + 1 positions, "nats": n means, "tokens": n counts}; bin i holds edges[i] <= position < edges[i + 1]
    context     {"context": n lengths, "nats": n means of the same targets, "error": n standard errors,
                "gain": n falls of the loss below that of the first context, "gain_error": n, "tokens": targets}
    retrieval   {"task", "lengths": n, "depths": m from 0 (begin) to 1 (end), "accuracy": n x m, "match": n x m, "chance", "samples"}
    reasoning   {task: {"in", "out", "chance", "chance_out"}}
    fewshot     {"accuracy", "normalized", "chance", "questions", "shots"}
    gsm8k       {"exact_match", "answered", "questions", "shots"}
    harness     {task: {metric: figure}}
    heads       {head: {metric: figure}}
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    kind: Annotated[str, AfterValidator(_known)]
    name: str
    step: int
    """Of the checkpoint."""
    weights: str
    """sha256 of its model.safetensors (average.safetensors for the moving average)."""
    data: str | None
    """sha256 of the text, or the fingerprint of the corpus; None where problems are generated."""
    settings: dict[str, Any]
    result: dict[str, Any]
    command: str = field(default_factory=lambda: shlex.join(["andromeda", *sys.argv[1:]]))
    made: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    machine: dict[str, Any] = field(default_factory=dict)
    """Host, device, precision and threads."""
    versions: dict[str, Any] = field(default_factory=dict)
    """Python, Andromeda with the commit of its code, and the libraries that figures depend on."""

    def save(self, run: Path) -> Path:
        """Write it, whole, in the place of an older one of the same name. Raises ConfigError when the folder cannot be written."""
        path = result_path(run, self.name)
        try:
            refuse_links(run, path)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, (json.dumps(to_json_values(asdict(self)), indent=1, allow_nan=False) + "\n").encode())
        except MalformedFile as error:
            raise ConfigError(f"{run} {error}: give another place with --out.") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}): make room or give another place with --out.") from None
        return path


_SHAPE = TypeAdapter(EvalResult)
"""Checks what a file says."""


def check_writable(run: Path) -> None:
    """Raises ConfigError for a folder that no result can be written into, before any is computed."""
    place = run / FOLDER
    if not takes_files(place):
        raise ConfigError(f"{place} cannot be written: give another place with --out.")


def result_path(run: Path, name: str) -> Path:
    """Where the result of that name lies."""
    return run / FOLDER / f"{name}.json"


def safe_file_name(text: str) -> str:
    """A name for a result that any file system takes."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-.") or "result"


def load_result(path: Path) -> EvalResult:
    """One result. Raises CheckpointError, one sentence, when it is damaged."""
    fix = "remove it and run `andromeda eval` again"
    try:
        content = read_regular(path)
        parse_json(content)  # within limits of depth and of numbers, which the next line does not have
        found = _SHAPE.validate_json(content)
    except MalformedFile as error:
        raise CheckpointError(f"{path} is no result of an evaluation (it {error}): {fix}.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): {fix}.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = ": ".join([*map(str, first["loc"]), first["msg"].lower()])
        raise CheckpointError(f"{path} is no result of an evaluation, or one of another version ({reason}): {fix}.") from None
    if result_path(Path(), found.name).name != path.name:
        raise CheckpointError(f"{path} holds a result of another name, {found.name!r}: {fix}.")
    return found


def load_results(run: Path | str) -> dict[str, EvalResult]:
    """All results of a run folder by name, in alphabetical order; none where nothing was evaluated. Raises CheckpointError."""
    found = [load_result(path) for path in sorted((Path(run) / FOLDER).glob("*.json"))]
    return {one.name: one for one in found}


def load_readable_results(run: Path | str) -> tuple[dict[str, EvalResult], list[str]]:
    """The results that can be read, and a sentence for each that cannot."""
    found, problems = {}, []
    for path in sorted((Path(run) / FOLDER).glob("*.json")):
        try:
            one = load_result(path)
            found[one.name] = one
        except CheckpointError as error:
            problems.append(str(error))
    return found, problems


def to_json_values(value: Any) -> Any:
    """Values as JSON has them: a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {str(key): to_json_values(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_values(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
