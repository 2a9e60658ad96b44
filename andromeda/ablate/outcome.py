"""What one run came to: kept in its folder as outcome.json, which also says that it is finished."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from andromeda.train.metrics import read_metrics
from andromeda.train.run_dir import RunFolder
from andromeda.utils.errors import CheckpointError
from andromeda.utils.files import write_whole

FILE = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """The end of a run."""

    loss: float | None
    """Held-out nats per token at the last step; None where the run failed or is not finite."""
    bits_per_byte: float | None
    steps: int
    tokens: int
    seconds: float
    """Measured training time, over all starts."""
    curve: list[tuple[int, float | None]]
    """Step and held-out loss of every validation."""
    failed: str = ""
    """Why it could not go on by itself."""

    @property
    def diverged(self) -> bool:
        """Whether there is no finite figure at its end."""
        return self.loss is None


def collect(folder: Path, failed: str = "") -> Outcome:
    """The outcome of a run from its metrics.jsonl."""
    lines = read_metrics(RunFolder(folder).metrics_file).lines
    timed = [line for line in lines if "seconds" in line]
    held_out = [line for line in lines if "validation/loss" in line]
    last: dict[str, Any] = timed[-1] if timed else {"step": 0, "tokens": 0, "seconds": 0.0}
    end = held_out[-1] if held_out and not failed and held_out[-1]["step"] == lines[-1]["step"] else {}
    loss, bits = end.get("validation/loss"), end.get("validation/bits_per_byte")
    return Outcome(
        loss=loss if loss is not None and math.isfinite(loss) else None,
        bits_per_byte=bits if bits is not None and math.isfinite(bits) else None,
        steps=last["step"],
        tokens=last["tokens"],
        seconds=last["seconds"],
        curve=[(line["step"], line["validation/loss"]) for line in held_out],
        failed=failed,
    )


def keep(folder: Path, outcome: Outcome) -> None:
    """Write the outcome: from now on the run is finished."""
    write_whole(folder / FILE, (json.dumps(asdict(outcome), indent=1) + "\n").encode())


def kept(folder: Path) -> Outcome | None:
    """The outcome of a finished run, or None."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text("utf-8"))
        return Outcome(**{**values, "curve": [(step, loss) for step, loss in values["curve"]]})
    except (ValueError, TypeError, LookupError):
        raise CheckpointError(f"{path} is damaged: remove it, and the run is counted again from its metrics.") from None
