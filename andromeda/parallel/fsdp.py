"""Fully sharded data parallelism (FSDP2, arXiv 2304.11277): each process keeps a part of every matrix, and of its gradient and optimizer
state; the weights of a block are gathered when it is computed.

Vectors and scalars (gains, biases, mixing weights) and routers stay whole and in float32 on every process: they are under a thousandth
of a model, and some of their gradients must not be rounded. Matrices and tables are sharded by rows and gathered in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from andromeda.config.parallel import ParallelConfig
from andromeda.model.transformer import Transformer
from andromeda.parallel.expert import is_spread
from andromeda.parallel.mesh import ParallelMesh
from andromeda.utils.log import get_logger

log = get_logger(__name__)

KEPT_SHARE = 0.25
"""Share of a device's memory up to which `auto` keeps the gathered weights between the forward and the backward pass."""


def shard_model(model: Transformer, mesh: ParallelMesh, config: ParallelConfig, dtype: torch.dtype | None) -> Transformer:
    """Shard the matrices of `model`, in place, over the dimension `shard` of the mesh, and copy the shards over `replicate`.

    Call it after everything else that changes the blocks (precision, activation checkpointing, compilation) and before the optimizer
    is built. dtype: in which weights are gathered, None for their own; gradients are summed in float32 (or float64).
    """
    if dtype is not None:
        log.info("Sharded weights are gathered as %s and cast where they are used, not once a step.", str(dtype).removeprefix("torch."))
    whole = {parameter for name, parameter in model.named_parameters() if stays_whole(name, parameter)}
    settings: dict[str, Any] = {
        "mesh": mesh.sharded_with_context,
        "mp_policy": MixedPrecisionPolicy(dtype, None if dtype is None else torch.float32, cast_forward_inputs=False),
        "ignored_params": whole,
    }
    reshard = _reshards(model, mesh.device, config, dtype)
    model.keeps_gathered = not reshard  # type: ignore[assignment]
    for block in model.decoder.blocks:
        fully_shard(block, reshard_after_forward=reshard, **settings)
    # The rest (tables, head) is gathered for the whole step, since the loss reads the head after the forward pass.
    fully_shard(model, reshard_after_forward=False, **settings)
    register_fsdp_forward_method(model, "hidden")
    sharded: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        # Sums, not means: the loss is divided by the number of targets of the whole step.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    _prefetch(list(model.decoder.blocks), config.prefetch)
    return model


def keeps_gathered(model: nn.Module) -> bool:
    """Whether the gathered weights of a sharded model are kept from the forward to the backward pass."""
    return bool(getattr(model, "keeps_gathered", False))


def stays_whole(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is not sharded: vectors, routers, and experts that are spread over processes already."""
    return parameter.ndim < 2 or ".router." in name or is_spread(parameter)


def _reshards(model: nn.Module, device: torch.device, config: ParallelConfig, dtype: torch.dtype | None) -> bool:
    if config.reshard_after_forward != "auto":
        return config.reshard_after_forward == "always"
    if device.type != "cuda":
        return True
    gathered = sum(p.numel() * (p.element_size() if dtype is None else dtype.itemsize) for p in model.parameters())
    return gathered > KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory


def _prefetch(blocks: Sequence[Any], count: int) -> None:
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + count])
        block.set_modules_to_backward_prefetch(blocks[max(0, index - count) : index][::-1])
