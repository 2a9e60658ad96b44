"""Context parallelism: every sequence is split over the processes of one dimension of the mesh.

A sequence of T tokens is cut into 2 N chunks, and process r of N has the chunks r and 2 N - 1 - r: under a causal mask every process
then has equal work (as in Llama 3, arXiv 2407.21783, section 3.3.2). Both chunks are rows of one batch. What a token needs of others is
exchanged: keys and values are gathered, in one all-gather a layer whose gradient is a reduce-scatter; token shift gets the last vectors of
the chunk before. Nothing of it is known to the model: it is what a KV cache answers (`ContextCache`).

Shapes: B sequences, T tokens of each, N processes, c = T / (2 N) tokens of a chunk, G key/value heads, D head dim.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from andromeda.config.model import ModelConfig
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.kv_cache.protocol import CoreAttention, DecodeState, KVCache, NoDecodeState, NoKVCache
from andromeda.model.transformer import Transformer
from andromeda.ops.attention import AttentionSpec
from andromeda.ops.collectives import Group, gather
from andromeda.utils.errors import ConfigError


def parallelize(model: Transformer, mesh: DeviceMesh) -> ContextParallel:
    """`model` over sequences that are split over the processes of the one-dimensional `mesh`, all of which hold equal weights.

    The gradients of a parameter must be summed over these processes, as over those that hold other sequences. Call it before
    `optimize_for_inference`, which exchanges parts of the model in place. Raises ConfigError for token mixers that do not support it.
    """
    check_mixers(model, mesh.size())
    return ContextParallel(model, Group.of(mesh))


def check_mixers(model: Transformer, count: int) -> None:
    """Raise ConfigError for token mixers that carry more than keys and values from token to token, or do not say that they do not."""
    mixers: list[Any] = [block.attention for block in model.decoder.blocks]
    unfit = sorted({type(mixer).__name__ for mixer in mixers if not getattr(mixer, "supports_split_sequences", False)})
    if unfit:
        raise ConfigError(
            f"parallel.context = {count} splits sequences, which {' and '.join(unfit)} does not support (supports_split_sequences): "
            "set parallel.context = 1."
        )


def check_length(config: ModelConfig, length: int, count: int) -> None:
    """Raise ConfigError for sequences of `length` tokens that cannot be split over `count` processes."""
    if length % (2 * count):
        raise ConfigError(
            f"parallel.context = {count} splits each sequence into {2 * count} chunks, "
            f"which {length} tokens (train.seq_len) are no multiple of."
        )
    if length // (2 * count) < _halo(config):
        raise ConfigError(
            f"parallel.context = {count} leaves chunks of {length // (2 * count)} tokens, fewer than token shift reaches back: "
            "use longer sequences."
        )


def _halo(config: ModelConfig) -> int:
    """Most tokens that a token shift reaches back, at least one."""
    return config.shift.tokens if config.shift.kind == "chunks" else 1


class ContextParallel:
    """A model whose forward passes are over this process's share of each sequence."""

    def __init__(self, model: Transformer, group: Group) -> None:
        self.model, self.group = model, group
        self.chunks = group.rank, 2 * group.size - 1 - group.rank
        """Numbers of this process's chunks."""

    def split(self, x: Tensor) -> Tensor:
        """This process's chunks of x (B, T, ...): (2 B, c, ...), first all sequences' earlier chunk, then their later one."""
        chunks = x.unflatten(1, (2 * self.group.size, -1))
        return torch.cat([chunks[:, index] for index in self.chunks])

    def join(self, x: Tensor) -> Tensor:
        """All tokens (B, T, ...) of x (2 B, c, ...) on every process, with gradients."""
        pieces = gather(x, self.group).unflatten(1, (2, -1))
        # The first halves are chunks 0 to N - 1, the second halves the others, the last first.
        ordered = torch.cat([pieces[:, 0], pieces[:, 1].flip(0)])
        return ordered.transpose(0, 1).flatten(1, 2)

    def hidden(
        self, ids: Tensor, *, documents: Tensor | None = None, cache: DynamicKVCache | None = None, window: int = 0, span: int = 0
    ) -> Tensor:
        """Last hidden states (2 B, c, C) of this process's chunks of ids (B, T), which all processes are given; as `Transformer.hidden`.

        With a cache, every process's holds all keys and values afterwards. Raises ConfigError for a length that cannot be split.
        """
        check_length(self.model.config, ids.shape[1], self.group.size)
        inner: KVCache = NoKVCache() if cache is None else cache
        start = inner.length
        own = ContextCache(self, inner, ids, documents)
        mine = None if documents is None else self.split(documents)
        hidden: Tensor = self.model.hidden(self.split(ids), documents=mine, cache=own, window=window, span=span or start + ids.shape[1])  # type: ignore[arg-type]
        return hidden

    def last_hidden(self, ids: Tensor, **options: Any) -> Tensor:
        """The last hidden state (B, 1, C) of ids (B, T), equal on every process; arguments as in `hidden`."""
        tails = gather(self.hidden(ids, **options)[:, -1:], self.group)
        # The last chunk is the second one of the first process.
        return tails[0, ids.shape[0] :]


class ContextCache:
    """What the parts of a model ask of a cache in a pass over chunks of sequences, answered by exchange with the other processes."""

    index: Tensor | None = None

    def __init__(self, context: ContextParallel, inner: KVCache, ids: Tensor, documents: Tensor | None) -> None:
        """inner: the cache of whole sequences, which keeps all keys and values; ids, documents (B, T): whole sequences."""
        self.context, self.inner = context, inner
        self.shape, self.past = ids.shape, int(inner.length)
        self.all_documents = inner.documents(documents)
        self.all_positions = inner.positions(ids.shape, documents, ids.device).expand(ids.shape)
        self.chunk = ids.shape[1] // (2 * context.group.size)
        self.ends = tuple(self.past + (index + 1) * self.chunk for index in context.chunks)
        starts = torch.tensor([end - self.chunk for end in self.ends], device=ids.device)
        self.length: Tensor = starts.repeat_interleave(ids.shape[0])[:, None]
        self.chunk_documents = None if self.all_documents is None else [self._documents(end) for end in self.ends]

    def _documents(self, end: int) -> tuple[Tensor, Tensor]:
        """Document numbers of the chunk that ends at token `end` (B, c) and of all keys up to there."""
        assert self.all_documents is not None
        # Tensors of their own: what attention backends derive from them is cached for the layers that follow.
        return self.all_documents[:, end - self.chunk : end].contiguous(), self.all_documents[:, :end].contiguous()

    def state(self, layer: int) -> DecodeState:
        """The state of layer number `layer` (-1: of the embedding)."""
        return ContextLayerState(self, self.inner.state(layer))

    def documents(self, documents: Tensor | None) -> Tensor | None:
        """Document numbers (2 B, h + c) of this process's chunks and of the h tokens before each, which token shift compares."""
        if documents is None or self.all_documents is None:
            return None
        halo = _halo(self.context.model.config)
        before = torch.nn.functional.pad(self.all_documents, (halo, 0), value=-1)
        return torch.cat([before[:, end - self.chunk : end + halo] for end in self.ends])

    def positions(self, shape: torch.Size, documents: Tensor | None, device: torch.device) -> Tensor:
        """Position of each token of this process's chunks since its document began (2 B, c)."""
        return self.context.split(self.all_positions)

    def advance(self, count: int, positions: Tensor, documents: Tensor | None) -> None:
        """Note that the pass is complete."""
        self.inner.advance(self.shape[1], self.all_positions, self.all_documents)


class ContextLayerState(NoDecodeState):
    """State of one layer in a pass over chunks."""

    exchanges = True

    def __init__(self, cache: ContextCache, inner: DecodeState) -> None:
        super().__init__()
        self.cache, self.inner = cache, inner

    def attend(self, compute: CoreAttention, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """q (2 B, c, H, D) attends to the keys k and values v (2 B, c, G, D) of all processes, each chunk up to its end."""
        cache, rows = self.cache, len(q) // 2
        joined = cache.context.join(torch.cat([k, v], -1))
        keys, values = self.inner.update(*joined.split([k.shape[-1], v.shape[-1]], -1))
        out = []
        for index, end in enumerate(cache.ends):
            documents = None if cache.chunk_documents is None else cache.chunk_documents[index]
            own = spec.with_documents(documents)
            out.append(compute(q[index * rows : (index + 1) * rows], keys[:, :end], values[:, :end], own))
        return torch.cat(out)

    def shift_state(self, slot: str, x: Tensor, count: int) -> Tensor:
        """The `count` vectors (2 B, count, C) before each chunk of x (2 B, c, C): the last ones of the chunk before."""
        context, rows = self.cache.context, len(x) // 2
        tails = context.join(x[:, -count:]).unflatten(1, (-1, count))
        first = self.inner.get(slot, x, (rows, count, x.shape[2]))
        self.inner.put(slot, tails[:, -1])
        return torch.cat([tails[:, index - 1] if index else first for index in context.chunks])

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Not answered: queries of a chunk are not the last of all keys."""
        self._refuse("update")

    def get(self, slot: str, like: Tensor, shape: Any) -> Tensor:
        """Not answered: what a recurrence carries is on another process."""
        self._refuse("get")

    def put(self, slot: str, value: Tensor) -> None:
        """Not answered: what a recurrence carries would have to reach another process."""
        self._refuse("put")

    def _refuse(self, call: str) -> NoReturn:
        raise ConfigError(
            f"A token mixer asks for `state.{call}`, which context parallelism cannot answer: call `attend` or `shift_state`, "
            "or set parallel.context = 1."
        )
