"""A process that trains one run after the other: `python -m andromeda.ablate.worker`, spoken to in lines of JSON.

In: {"do": "train", "folder": ..., "config": ..., "lean": bool} or {"do": "cost", "config": ..., "steps": n}.
Out, one line for each: {"done": true, ...}, {"stopped": signal} or {"error": sentence}. Everything else goes to stderr.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from andromeda.ablate import cost, outcome
from andromeda.config.load import from_values
from andromeda.train.trainer import TrainingFailed, train
from andromeda.utils.errors import AndromedaError


def main() -> None:
    """Answer every line until the input ends or a signal stops a run."""
    # Libraries print what they like; only answers may reach the parent.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for line in sys.stdin:
        answer = _answer(json.loads(line))
        print(json.dumps(answer), file=answers, flush=True)
        if "stopped" in answer:
            return


def _end_with(parent: int) -> None:
    """Stop, state saved, when the parent is gone: one that was killed cannot say so, and would find its runs taken when it comes back."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    config = from_values(request["config"])
    try:
        if request["do"] == "cost":
            return {"done": True, **asdict(cost.measure(config, request["steps"]))}
        return _train(config, Path(request["folder"]), request["lean"])
    except AndromedaError as error:
        return {"error": str(error)}
    except Exception as error:  # a defect, or a device out of memory: this run is lost, the others are not
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        # All runs of a process share the compiler's limit of variants, behind which it goes on uncompiled without a word.
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
    found = outcome.collect(folder, failed)
    outcome.keep(folder, found)
    if lean:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {"done": True, "loss": found.loss, "seconds": found.seconds}


if __name__ == "__main__":
    main()
