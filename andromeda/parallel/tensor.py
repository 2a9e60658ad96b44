"""Tensor parallelism (arXiv 1909.08053): the matrices of every layer are split over the processes of one dimension of the mesh.

A branch of a layer (attention, feed-forward) is computed in shares, and the shares are summed: one all-reduce a branch in the forward
pass and one in the backward pass. The residual stream, norms and token shifts are whole on every process. The table of the embedding and
the head are split by the vocabulary. How a part is split it says itself (`tensor_plan`, model/tensor_plan.py); one that does not say
is computed whole by every process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from andromeda.config.model import ModelConfig
from andromeda.model.specs import match_kernels
from andromeda.model.tensor_plan import TensorPlan, has_plan, splits_kv_heads
from andromeda.model.transformer import Transformer
from andromeda.ops.collectives import Group, ShareSum, gather, sum_gradients, sum_shares
from andromeda.ops.cross_entropy import VocabularyShard
from andromeda.parallel.local_parameters import Gradient, distribute, use_local
from andromeda.utils.errors import ConfigError
from andromeda.utils.log import get_logger

log = get_logger(__name__)


class Branch(NamedTuple):
    """A part that is split, where it is in the model, and how."""

    path: str
    part: nn.Module
    plan: TensorPlan


def parallelize(model: Transformer, mesh: DeviceMesh, *, inference: bool = False) -> Transformer:
    """Split `model`, built with equal weights on every process of the one-dimensional `mesh`, in place; returns it.

    Afterwards every parameter is a DTensor on `mesh`, `model.hidden` gives equal states on all processes for equal ids, `model.head`
    all logits, and the loss reads the head's share through `model.head.shard`. Before conversions to other linear layers and
    before FSDP. Raises ConfigError, before anything changes, where the model's sizes cannot be split.

    inference: parameters are plain tensors, this process's pieces, without gradients, so that `optimize_for_inference` and the
    kernels of a decoding step take them; the dtype and device must be those of inference already.
    """
    group = Group.of(mesh)
    if group.size == 1:
        return model
    branches, tables = plan(model, group.size)
    _split_parameters(model, branches, tables, mesh, group, inference)
    _keep_heads(model, group)
    _connect(model, branches, tables, group)
    if inference:
        weight = model.head.weight
        total = ShareSum(group, weight.device, weight.dtype)
        for branch in branches:
            branch.part.sum_of_shares = total  # type: ignore[assignment]
    match_kernels(model)
    return model


def plan(model: Transformer, count: int) -> tuple[list[Branch], list[Branch]]:
    """How the branches of all layers, and the tables and the head, are split over `count` processes; `model` may be on the meta device.

    Raises ConfigError, one sentence, where they cannot be split.
    """
    branches = [branch for index in range(len(model.decoder.blocks)) for branch in _layer_branches(model, index, count)]
    _note_whole_parts(model, count)
    tables = [branch for name in ("embedding.tokens", "head", "value_embedding") for branch in _planned(model, name, count)]
    if model.head.tied and all(branch.path != "embedding.tokens" for branch in tables):
        # A head that shares the table of an embedding is split as that is, or not at all.
        tables = [branch for branch in tables if branch.path != "head"]
    return branches, tables


def _note_whole_parts(model: Transformer, count: int) -> None:
    """Log which parts every process computes whole. Raises ConfigError for a mixer that would be given the wrong heads."""
    mixers, networks = ([getattr(block, name) for block in model.decoder.blocks] for name in ("attention", "feedforward"))
    whole = sorted({type(part).__name__ for part in (*mixers, *networks) if not has_plan(part)})
    if whole and _heads_differ(model.config) and not all(has_plan(mixer) for mixer in mixers):
        raise ConfigError(
            f"parallel.tensor = {count} cannot split the heads' biases or value embeddings of {' and '.join(whole)}, "
            "which does not say how it is split (tensor_plan)."
        )
    for name in whole:
        log.info("Every process computes %s whole: it does not say how it is split (tensor_plan).", name)


def _layer_branches(model: Transformer, index: int, count: int) -> list[Branch]:
    path = f"decoder.blocks.{index}"
    return [branch for name in ("attention", "feedforward") for branch in _planned(model, f"{path}.{name}", count)]


def _planned(model: nn.Module, path: str, count: int) -> list[Branch]:
    part: Any = model.get_submodule(path)
    return [Branch(path, part, part.tensor_plan(count))] if has_plan(part) else []


def _heads_differ(config: ModelConfig) -> bool:
    """Whether a pass carries something for each head, of which every process keeps its own heads'."""
    return (
        bool(config.alibi.num_heads)
        or config.value_embedding.kind != "none"
        or config.rotary.heads != "all"
        or config.rotary.head_fraction < 1
    )


class Place(NamedTuple):
    """Where the model holds a parameter."""

    module: nn.Module
    name: str
    path: str


def _split_parameters(
    model: Transformer, branches: list[Branch], tables: list[Branch], mesh: DeviceMesh, group: Group, inference: bool
) -> None:
    """Split every parameter and let every module compute with its piece: as a DTensor, or for inference as the piece itself."""
    dims = {f"{branch.path}.{name}": dim for branch in (*branches, *tables) for name, dim in branch.plan.split.items()}
    shares = {f"{branch.path}.{name}" for branch in (*branches, *tables) for name in branch.plan.shares}
    views: dict[nn.Module, dict[str, tuple[Gradient, int]]] = {}
    for places in _shared_places(model):
        whole: Any = places[0].module._parameters[places[0].name]
        made = distribute(whole, mesh, dims.get(places[0].path))
        if inference:
            piece = made.to_local()  # type: ignore[attr-defined]
            made = nn.Parameter(piece / group.size if places[0].path in shares else piece, requires_grad=False)
        for module, name, path in places:
            module._parameters[name] = made
            partial_gradient = path not in dims and any(path.startswith(f"{branch.path}.") for branch in branches)
            how = Gradient.PARTIAL if partial_gradient else Gradient.OWN, group.size if path in shares else 1
            views.setdefault(module, {})[name] = how
    for module, named in views.items():
        if not inference:
            use_local(module, named, group)
        _note_sizes(module)
    for path in shares:
        parent, _, name = path.rpartition(".")
        module = model.get_submodule(parent)
        if name not in module._parameters:
            setattr(module, name, getattr(module, name) / group.size)


def _shared_places(model: nn.Module) -> list[list[Place]]:
    """All parameters, each with every place that holds it."""
    found: dict[int, list[Place]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(Place(module, name, f"{path}.{name}" if path else name))
    return list(found.values())


def _note_sizes(module: nn.Module) -> None:
    """The sizes that a layer states, of this process's piece."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape


def _keep_heads(model: Transformer, group: Group) -> None:
    """Tell the parts that know the numbers of heads and layers which are computed here."""
    heads, kv_heads = head_ranges(model.config, group)
    mixers: list[Any] = [block.attention for block in model.decoder.blocks]
    for mixer in mixers:
        if has_plan(mixer):
            mixer.keep_heads(heads, kv_heads)
    model.rotary.keep_heads(heads, kv_heads)
    model.alibi.keep_heads(heads)
    if has_plan(model.value_embedding):
        model.value_embedding.keep_layers(_piece(model.config.num_layers, group))


def head_ranges(config: ModelConfig, group: Group) -> tuple[range, range]:
    """Query heads and key/value heads of this process."""
    a = config.attention
    kv_heads = _piece(a.num_kv_heads, group) if splits_kv_heads(group.size, a.num_kv_heads) else range(a.num_kv_heads)
    return _piece(a.num_heads, group), kv_heads


def _piece(count: int, group: Group) -> range:
    size = count // group.size
    return range(group.rank * size, (group.rank + 1) * size)


def _connect(model: Transformer, branches: list[Branch], tables: list[Branch], group: Group) -> None:
    """Sum shares and gradients where split parts meet whole ones."""
    # One function for all layers, so that one compiled block serves them.
    read, write = partial(_read_whole, group), partial(_sum_output, group)
    for branch in branches:
        branch.part.register_forward_pre_hook(read)
        branch.part.register_forward_hook(write)
    for branch in tables:
        for name, dim in branch.plan.split.items():
            table: Any = branch.part.get_submodule(name.rpartition(".")[0])
            if dim == 0 and isinstance(table, nn.Embedding):
                table.forward = partial(_look_up, table.forward, table, group)  # type: ignore[method-assign]
        if branch.path == "head":
            model.head.shard = VocabularyShard(group)
            branch.part.register_forward_pre_hook(read)
            branch.part.register_forward_hook(partial(_gather_logits, group))
    if model.config.value_embedding.kind != "none":
        kv_heads = head_ranges(model.config, group)[1]
        split = has_plan(model.value_embedding)
        model.value_embedding.register_forward_hook(partial(_gather_layers if split else _slice_layers, group, kv_heads))


def _read_whole(group: Group, part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a part's input, which is whole, each process's gradient is a share."""
    return sum_gradients(args[0], group), *args[1:]


def _sum_output(group: Group, part: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A part's output is a share."""
    return sum_shares(output, group)


def _look_up(forward: Callable[[Tensor], Tensor], table: nn.Embedding, group: Group, ids: Tensor) -> Tensor:
    """Rows `ids` (...) of a table that is split by rows."""
    row = ids - group.rank * table.num_embeddings
    here = (row >= 0) & (row < table.num_embeddings)
    found = forward(torch.where(here, row, 0))
    return sum_shares(found * here[..., None].to(found.dtype), group)


def _gather_logits(group: Group, head: nn.Module, args: Any, logits: Tensor) -> Tensor:
    """Logits (..., V) of pieces (..., V / processes)."""
    return torch.cat(gather(logits, group).unbind(0), -1)


def _gather_layers(group: Group, kv_heads: range, part: nn.Module, args: Any, values: Sequence[Tensor]) -> Sequence[Tensor]:
    """Value embeddings (B, T, G, D) of all layers with this process's heads, from those of its layers with all heads."""
    layers = gather(torch.stack(tuple(values)), group).flatten(0, 1)
    return [layer[:, :, kv_heads.start : kv_heads.stop] for layer in layers.unbind(0)]


def _slice_layers(group: Group, kv_heads: range, part: nn.Module, args: Any, values: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """Value embeddings of all layers with this process's heads, from those with all heads."""
    return [None if v is None else sum_gradients(v, group)[:, :, kv_heads.start : kv_heads.stop] for v in values]
