"""Optimizer state as plain tensors and plain values, by parameter name: what safetensors and JSON can hold.

An entry of a parameter is one tensor `<parameter>/<entry>` (`blocks.0.w/exp_avg`), or, when it is quantized, its pieces
`<parameter>/<entry>/<piece>`. The values describe every entry, so that a missing tensor is found before anything changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from andromeda.optim import adamw_8bit
from andromeda.utils.errors import CheckpointError

Names = dict[nn.Parameter, str]
Parts = list[torch.optim.Optimizer]


def tensors(parts: Parts, names: Names) -> dict[str, Tensor]:
    """Every state tensor by its key; live, not copied."""
    found: dict[str, Tensor] = {}
    for name, _, entries in _states(parts, names):
        for entry, value in entries.items():
            found |= {f"{name}/{entry}{piece}": tensor for piece, tensor in _pieces(value)[0].items()}
    return found


def values(parts: Parts, names: Names) -> dict[str, Any]:
    """`parameters`: the names that are updated; `entries`: for each that has state, what its entries are."""
    entries = {name: {entry: _pieces(value)[1] for entry, value in state.items()} for name, _, state in _states(parts, names)}
    return {"parameters": sorted(names.values()), "entries": {name: described for name, described in entries.items() if described}}


def load(kind: str, parts: Parts, names: Names, saved: dict[str, Tensor], described: dict[str, Any]) -> None:
    """Replace all state by a saved one; checks everything first. Raises CheckpointError."""
    if described.get("kind") != kind:
        raise CheckpointError(
            f"The checkpoint's optimizer is {described.get('kind')!r} and the run's is {kind!r}: set train.optim.kind to the checkpoint's."
        )
    if strangers := sorted(set(described["parameters"]) ^ set(names.values())):
        raise CheckpointError(
            f"The checkpoint's optimizer is of another model: {strangers[0]} is in only one of the two "
            f"({len(strangers)} such parameters); resume with the configuration that the checkpoint was written with."
        )
    fresh = {p: _restore(name, p, saved, described["entries"].get(name, {})) for p, name in names.items()}
    for part in parts:
        part.state.clear()
        for group in part.param_groups:
            for parameter in group["params"]:
                if fresh[parameter]:
                    part.state[parameter] = _placed(fresh[parameter], parameter, group)


def _states(parts: Parts, names: Names) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
    for part in parts:
        for group in part.param_groups:
            for parameter in group["params"]:
                yield names[parameter], parameter, part.state.get(parameter, {})


def _pieces(value: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Plain tensors by the end of their key, and the description of the whole."""
    if not hasattr(value, "codes"):
        return {"": value.detach()}, {}
    pieces, described = adamw_8bit.pack(value)
    return {f"/{piece}": tensor for piece, tensor in pieces.items()}, described


def _restore(name: str, parameter: nn.Parameter, saved: dict[str, Tensor], entries: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """The state of one parameter, copied onto its device."""
    restored: dict[str, Tensor] = {}
    for entry, described in entries.items():
        keys = {piece: f"{name}/{entry}/{piece}" for piece in ("codes", "scale", "qmap")} if described else {"": f"{name}/{entry}"}
        if missing := [key for key in keys.values() if key not in saved]:
            raise CheckpointError(f"The checkpoint lacks the optimizer tensor {missing[0]}: it is damaged; use an older one.")
        pieces = {piece: saved[key].to(parameter.device, copy=True) for piece, key in keys.items()}
        whole = adamw_8bit.unpack(pieces, described["signed"], parameter.dtype) if described else pieces[""]
        expected = torch.Size() if entry == "step" else parameter.shape
        if whole.shape != expected:
            raise CheckpointError(
                f"The optimizer tensor {name}/{entry} has the shape {tuple(whole.shape)} where the model needs {tuple(expected)}: "
                "resume with the configuration that the checkpoint was written with."
            )
        restored[entry] = whole
    return restored


def _placed(entries: dict[str, Tensor], parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
    """torch counts steps on the CPU, unless a fused kernel counts them on the device."""
    return {entry: value.cpu() if entry == "step" and not group.get("fused") else value for entry, value in entries.items()}
