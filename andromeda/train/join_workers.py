"""A run as one worker of DiLoCo: what it shares with a worker that joins, and what it takes over when it joins itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from andromeda.parallel.diloco import start_worker
from andromeda.train.progress import Progress
from andromeda.train.state import TrainState, load_model, model_tensors
from andromeda.utils.errors import ConfigError


@contextmanager
def join_workers(state: TrainState) -> Iterator[None]:
    """While the block runs, the run is a worker of DiLoCo where its configuration says so. Raises an AndromedaError."""
    config = state.config.train.diloco
    if not config.workers:
        yield
        return
    if state.collectives.layout.world_size > 1:
        raise ConfigError("A worker of train.diloco is one process: leave out --nproc, and start more workers.")
    with start_worker(config, state.model, state.optimizer) as worker:
        state.diloco = worker
        worker.share(lambda: _shared(state), lambda shared: _take_over(state, shared))
        yield


def _shared(state: TrainState) -> dict[str, Any]:
    """Live weights, optimizer state and progress: the others wait until they are sent."""
    return {
        "model": model_tensors(state.model),
        "optimizer": state.optimizer.state_tensors(),
        "average": state.ema.state_tensors() if state.ema else {},
        "values": {
            "optimizer": state.optimizer.state_metadata(),
            "average": state.ema.updates if state.ema else 0,
            "cursor": asdict(state.progress),
        },
    }


def _take_over(state: TrainState, shared: dict[str, Any]) -> None:
    """Become like the worker that is ahead; the time that this one has spent stays its own."""
    values = shared["values"]
    load_model(state.model, shared["model"])
    state.optimizer.load_state(shared["optimizer"], values["optimizer"])
    if state.ema is not None:
        state.ema.load_state(shared["average"], values["average"])
    taken = Progress(**values["cursor"])
    state.progress.step, state.progress.rows, state.progress.tokens = taken.step, taken.rows, taken.tokens
