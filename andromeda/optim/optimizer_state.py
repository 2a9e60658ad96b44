"""Optimizer state as plain tensors and plain values, by parameter name: what safetensors and JSON can hold.

An entry of a parameter is one tensor `<parameter>/<entry>` (`blocks.0.w/exp_avg`), or, when it is quantized, its pieces
`<parameter>/<entry>/<piece>`. The values describe every entry, so that a missing tensor is found before anything changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.optim.optimizer_kind import OptimizerKind
from andromeda.utils.dtensor import as_sharded
from andromeda.utils.errors import CheckpointError

Names = dict[nn.Parameter, str]
Optimizers = list[torch.optim.Optimizer]


def tensors(kind: type[OptimizerKind], optimizers: Optimizers, names: Names) -> dict[str, Tensor]:
    """Every state tensor by its key; live, not copied."""
    found: dict[str, Tensor] = {}
    for name, entries in _states(optimizers, names):
        for entry, value in entries.items():
            found |= {_key(name, entry, piece): tensor for piece, tensor in kind.pack(value)[0].items()}
    return found


def metadata(kind: type[OptimizerKind], optimizers: Optimizers, names: Names) -> dict[str, Any]:
    """`parameters`: the names that are updated; `entries`: for each that has state, the description of its entries."""
    entries = {name: {entry: kind.pack(value)[1] for entry, value in state.items()} for name, state in _states(optimizers, names)}
    return {"parameters": sorted(names.values()), "entries": {name: described for name, described in entries.items() if described}}


def check_kind(kind_name: str, described: dict[str, Any]) -> None:
    """Raises CheckpointError when the state is of another kind of optimizer."""
    if described.get("kind") != kind_name:
        raise CheckpointError(
            f"The checkpoint's optimizer is {described.get('kind')!r} and the run's is {kind_name!r}: "
            "set train.optim.kind to the checkpoint's."
        )


def load(kind: type[OptimizerKind], optimizers: Optimizers, names: Names, saved: Mapping[str, Tensor], described: dict[str, Any]) -> None:
    """Replace all state by a saved one; checks everything first. Raises CheckpointError."""
    if differing := sorted(set(described["parameters"]) ^ set(names.values())):
        raise CheckpointError(
            f"The checkpoint's optimizer is of another model: {differing[0]} is in only one of the two "
            f"({len(differing)} such parameters); resume with the configuration that the checkpoint was written with."
        )
    fresh = {p: _restore(kind, name, p, saved, described["entries"].get(name, {})) for p, name in names.items()}
    for optimizer in optimizers:
        optimizer.state.clear()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if fresh[parameter]:
                    optimizer.state[parameter] = _placed(fresh[parameter], group)


def _states(optimizers: Optimizers, names: Names) -> Iterator[tuple[str, dict[str, Any]]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[parameter], optimizer.state.get(parameter, {})


def _key(name: str, entry: str, piece: str) -> str:
    return f"{name}/{entry}/{piece}" if piece else f"{name}/{entry}"


def _restore(
    kind: type[OptimizerKind], name: str, parameter: nn.Parameter, saved: Mapping[str, Tensor], entries: dict[str, dict[str, Any]]
) -> dict[str, Tensor]:
    """The state of one parameter, copied onto its device."""
    restored: dict[str, Tensor] = {}
    for entry, described in entries.items():
        keys = {piece: _key(name, entry, piece) for piece in (kind.packed_names if described else ("",))}
        if missing := [key for key in keys.values() if key not in saved]:
            raise CheckpointError(f"The checkpoint lacks the optimizer tensor {missing[0]}: it is damaged; use an older one.")
        pieces = {piece: saved[key].to(parameter.device, copy=True) for piece, key in keys.items()}
        whole = kind.unpack(pieces, described, parameter.dtype) if described else pieces[""]
        expected = kind.state_shape(parameter, entry)
        if whole.shape != expected:
            raise CheckpointError(
                f"The optimizer tensor {name}/{entry} has the shape {tuple(whole.shape)} where the model needs {tuple(expected)}: "
                "resume with the configuration that the checkpoint was written with."
            )
        restored[entry] = as_sharded(whole, parameter) if whole.shape == parameter.shape else whole
    return restored


def _placed(entries: dict[str, Tensor], group: dict[str, Any]) -> dict[str, Tensor]:
    """torch counts steps on the CPU, unless a fused kernel counts them on the device."""
    return {entry: value.cpu() if entry == "step" and not group.get("fused") else value for entry, value in entries.items()}
