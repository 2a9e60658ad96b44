"""What a layout does to a model before anything else: its tensors are split, its experts spread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from andromeda.config.run import RunConfig
from andromeda.model.meta_model import meta_model
from andromeda.model.transformer import Transformer
from andromeda.parallel import context, expert, tensor
from andromeda.parallel.layout import Layout
from andromeda.utils.log import get_logger

if TYPE_CHECKING:
    from andromeda.parallel.mesh import ParallelMesh

log = get_logger(__name__)


def check_model(config: RunConfig, layout: Layout) -> None:
    """Raise ConfigError, one sentence, where the model's parts cannot be laid out; nothing is allocated."""
    if layout.tensor * layout.context * layout.expert == 1:
        return
    model = meta_model(config.model)
    if layout.tensor > 1:
        tensor.plan(model, layout.tensor)
    if layout.expert > 1:
        expert.stacks_of_experts(model, layout.expert)
    if layout.context > 1:
        context.check_mixers(model, layout.context)
        context.check_length(config.model, config.train.seq_len or config.model.max_seq_len, layout.context)


def split_model(model: Transformer, mesh: ParallelMesh) -> Transformer:
    """Split the tensors of `model`, or spread its experts, as the layout says, in place; returns it.

    Before linear layers are exchanged for those of a precision, which take whole matrices and leave the split ones as they are.
    """
    if mesh.layout.tensor > 1:
        tensor.parallelize(model, mesh.dim("tensor"))
        if mesh.device.type == "cuda":
            log.info("Weights that are split over processes are cast in every pass: parallel.tensor = %d.", mesh.layout.tensor)
    if mesh.expert_mesh is not None:
        expert.parallelize(model, mesh.expert_mesh[expert.DIMENSION])
    return model
