"""The process that trains runs one after the other: `python -m andromeda.ablate.worker`, driven by lines of JSON.

In: {"do": "train", "folder": ..., "config": ..., "lean": bool} or {"do": "cost", "config": ..., "steps": n}.
Out, one line each: {"done": true, ...}, {"stopped": signal} or {"error": sentence}. Everything else goes to stderr.
"""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from pydantic import TypeAdapter

from andromeda.ablate.jobs import tokens_per_step
from andromeda.config.load import from_values
from andromeda.config.own_code import FLAG, allow_code
from andromeda.config.run import RunConfig
from andromeda.data.loader import open_stream
from andromeda.train.metrics import peak_memory, read_metrics
from andromeda.train.objective import MicroBatch, NextTokenObjective
from andromeda.train.run_dir import RunDir
from andromeda.train.state import build_train_state, resolve_device
from andromeda.train.step import StepBatch, TrainStep
from andromeda.train.trainer import TrainingFailed, resolve_seq_len, train
from andromeda.utils.errors import AndromedaError, CheckpointError
from andromeda.utils.files import write_whole
from andromeda.utils.untrusted import read_json_object

WARMUP = 3


@dataclass(frozen=True)
class StepCost:
    """Time and memory of a training step of one variant."""

    step_seconds: float
    """Median of the measured steps."""
    peak_bytes: int
    """Peak memory: allocated on a GPU; on a CPU the resident size of the process, minus that before."""
    tokens: int
    """Of one step."""

    @property
    def seconds_per_token(self) -> float:
        """Comparable between variants with different batch sizes."""
        return self.step_seconds / self.tokens


def measure_cost(config: RunConfig, steps: int) -> StepCost:
    """Time `steps` training steps on the first batch of the run, after three that are not counted. Nothing is kept."""
    device = resolve_device(config.train.device)
    _forget(device)
    before = 0 if device.type == "cuda" else psutil.Process().memory_info().rss
    stream = open_stream(config.data, resolve_seq_len(config), config.seed)
    session = build_train_state(config, device, stream.fingerprint)
    stepper = TrainStep(session, NextTokenObjective(session.model, config.train.z_loss), config.train)
    batch = stream.batch(0, config.train.batch_size)
    work = StepBatch(MicroBatch.from_batch(batch, config.data.document_mask), batch.tokens, (0, config.train.batch_size))
    session.optimizer.set_lr_factor(1e-3, 0)
    times = [_timed(stepper, work, device) for _ in range(WARMUP + steps)]
    return StepCost(statistics.median(times[WARMUP:]), peak_memory(device) - before, tokens_per_step(config))


def _timed(stepper: TrainStep, work: StepBatch, device: torch.device) -> float:
    start = time.perf_counter()
    stepper(work)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


RESULT_FILE = "result.json"


@dataclass(frozen=True)
class RunResult:
    """Final metrics of a run, kept in its folder as result.json, which also marks it as finished."""

    loss: float | None
    """Held-out nats/token at the last step; None if the run failed or the loss is not finite."""
    bits_per_byte: float | None
    steps: int
    tokens: int
    seconds: float
    """Measured training time, over all starts."""
    curve: list[tuple[int, float | None]]
    """Step and held-out loss of every validation."""
    failed: str = ""
    """Why training ended early."""

    @property
    def diverged(self) -> bool:
        """Whether the final loss is not finite."""
        return self.loss is None


_SHAPE = TypeAdapter(RunResult)
"""Checks what a result.json says."""


def collect_result(folder: Path, failed: str = "") -> RunResult:
    """The result of a run from its metrics.jsonl."""
    lines = read_metrics(RunDir(folder).metrics_file).records
    timed = [line for line in lines if "seconds" in line]
    held_out = [line for line in lines if "validation/loss" in line]
    last: dict[str, Any] = timed[-1] if timed else {"step": 0, "tokens": 0, "seconds": 0.0}
    end = held_out[-1] if held_out and not failed and held_out[-1]["step"] == lines[-1]["step"] else {}
    loss, bits = end.get("validation/loss"), end.get("validation/bits_per_byte")
    return RunResult(
        loss=loss if loss is not None and math.isfinite(loss) else None,
        bits_per_byte=bits if bits is not None and math.isfinite(bits) else None,
        steps=last["step"],
        tokens=last["tokens"],
        seconds=last["seconds"],
        curve=[(line["step"], line["validation/loss"]) for line in held_out],
        failed=failed,
    )


def save_result(folder: Path, result: RunResult) -> None:
    """Write the result, which marks the run as finished."""
    write_whole(folder / RESULT_FILE, (json.dumps(asdict(result), indent=1) + "\n").encode())


def load_result(folder: Path) -> RunResult | None:
    """The result of a finished run, or None. Raises CheckpointError if the file is damaged."""
    path = folder / RESULT_FILE
    if not path.exists():
        return None
    try:
        values = read_json_object(path)
        return _SHAPE.validate_python({**values, "curve": [(step, loss) for step, loss in values["curve"]]})
    except (OSError, ValueError, TypeError, LookupError):
        raise CheckpointError(f"{path} is damaged: remove it, and the run is counted again from its metrics.") from None


def main() -> None:
    """Answer every line of stdin until it ends or a signal stops a run."""
    # Libraries may print to stdout; only answers may reach the parent.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with allow_code(FLAG in sys.argv):
        for line in sys.stdin:
            answer = _answer(json.loads(line))
            print(json.dumps(answer), file=answers, flush=True)
            if "stopped" in answer:
                return


def _end_with(parent: int) -> None:
    """Stop with the state saved when the parent is gone: after a SIGKILL its next call would find the run folders locked."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    config = from_values(request["config"])
    try:
        if request["do"] == "cost":
            return {"done": True, **asdict(measure_cost(config, request["steps"]))}
        return _train(config, Path(request["folder"]), request["lean"])
    except AndromedaError as error:
        return {"error": str(error)}
    except Exception as error:  # a defect, or a device out of memory: this run is lost, the others are not
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        # All runs of a process share the recompile limit, beyond which torch.compile silently runs eagerly.
        torch._dynamo.reset()
        gc.collect()


def _train(config: Any, folder: Path, lean: bool) -> dict[str, Any]:
    failed = ""
    try:
        result = train(config, folder, resume=(folder / "config.toml").exists())
        if result.signal:
            return {"stopped": int(result.signal)}
    except TrainingFailed as error:
        failed = str(error)
    found = collect_result(folder, failed)
    save_result(folder, found)
    if lean:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {"done": True, "loss": found.loss, "seconds": found.seconds}


if __name__ == "__main__":
    main()
