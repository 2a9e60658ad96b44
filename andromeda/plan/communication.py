"""What the processes of a layout exchange in a step, in closed form: bytes that each sends, by collective, and the time of a ring.

The counts are those of the simulation and of real process groups (tests/plan/test_communication.py). FSDP gathers weights and scatters
gradients (arXiv 2304.11277), copies sum gradients, tensor parallelism sums the shares of branches (arXiv 1909.08053), context parallelism
gathers keys and values (arXiv 2407.21783), expert parallelism exchanges tokens (arXiv 2006.16668).
"""

from __future__ import annotations

from andromeda.config.parallel import ParallelConfig
from andromeda.config.run import RunConfig
from andromeda.model.transformer import Transformer
from andromeda.optim.optimizer_kind import FLOAT_BYTES
from andromeda.parallel.layout import DIMENSIONS, Layout, resolve_layout
from andromeda.parallel.layout_rules import check_layout
from andromeda.parallel.ring import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, COLLECTIVES, REDUCE_SCATTER, bytes_sent
from andromeda.utils.errors import ConfigError, nearest

WEIGHT_BYTES, GRADIENT_BYTES = 2, 4
"""Bytes of a gathered weight (bfloat16) and of a reduced gradient (float32)."""
RENAMED = {"dp": "replicate", "fsdp": "shard", "tp": "tensor", "cp": "context", "ep": "expert"}
EXAMPLE = "write replicate=8,shard=4,tensor=2"


def parse_layout(text: str, config: ParallelConfig) -> Layout:
    """Sizes such as `replicate=8,shard=4,tensor=2`; those that are not named are 1. Of no text, those of the configuration, where -1 is 1.

    Raises ConfigError.
    """
    names = (*DIMENSIONS, "expert")
    if not text.strip():
        return Layout(**{name: max(1, getattr(config, name)) for name in names})
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if name in RENAMED:
            raise ConfigError(f"--parallel {name} is now called {RENAMED[name]}: {EXAMPLE}.")
        if name not in names:
            raise ConfigError(f"--parallel has no dimension {name!r}{nearest(name, names)}: {EXAMPLE}.")
        if not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--parallel {part} is not a number of GPUs: {EXAMPLE}.")
        sizes[name] = int(size)
    return Layout(**sizes)


def in_layout(config: RunConfig, layout: Layout) -> RunConfig:
    """The configuration with this layout, and a micro-batch that is no larger than what one process reads.

    Raises ConfigError where a run could not be laid out so.
    """
    own = config.train.batch_size // layout.data
    micro = config.train.micro_batch_size
    train = config.train.model_copy(update={"micro_batch_size": min(micro, own) if micro and own else micro})
    parallel = config.parallel.model_copy(update=layout._asdict())
    config = config.model_copy(update={"train": train, "parallel": parallel})
    check_layout(config, layout.world_size)
    if layout.world_size == 1:
        return config
    from andromeda.parallel.split_model import check_model  # FSDP and DTensor take a second to import

    check_model(config, resolve_layout(parallel, layout.world_size))
    return config


def local_batch_sizes(config: RunConfig, layout: Layout) -> tuple[int, int]:
    """Sequences of a step and of a micro-batch that one process reads."""
    own = config.train.batch_size // layout.data
    return own, min(config.train.micro_batch_size or own, own)


def reshards(config: RunConfig, layout: Layout, parameters: int, itemsize: int, memory: float) -> bool:
    """Whether FSDP frees the gathered weights of a block after its forward pass, on a device with `memory` bytes."""
    if layout.shard * layout.context == 1:
        return True
    if config.parallel.reshard_after_forward != "auto":
        return config.parallel.reshard_after_forward == "always"
    from andromeda.parallel.fsdp import KEPT_SHARE

    return parameters // layout.tensor * itemsize > KEPT_SHARE * memory


def traffic(config: RunConfig, layout: Layout, model: Transformer, itemsize: int, memory: float) -> dict[str, float]:
    """Bytes that one process sends in a step, by collective.

    model: on the meta device. itemsize: bytes of a weight or activation in the compute dtype. memory: of one device.
    """
    if layout.world_size == 1:
        return {}
    own, micro = local_batch_sizes(config, layout)
    passes = own // micro
    sent: dict[str, float] = dict.fromkeys(COLLECTIVES, 0.0)
    _add_weights(sent, config, layout, model, itemsize, memory, passes)
    _add_activations(sent, config, layout, model, itemsize, own)
    return {kind: count for kind, count in sent.items() if count}


def _add_weights(
    sent: dict[str, float], config: RunConfig, layout: Layout, model: Transformer, itemsize: int, memory: float, passes: int
) -> None:
    """FSDP's collectives, and the sums of gradients over copies."""
    from andromeda.parallel.fsdp import stays_whole

    spread = _experts(model) if layout.expert > 1 else set()
    # Experts that are spread stay whole where they are; their gradients are summed over the processes that have the same.
    experts = sum(p.numel() for name, p in model.named_parameters() if name in spread) / layout.expert
    same = layout.data * layout.context // layout.expert
    sent[ALL_REDUCE] += bytes_sent(ALL_REDUCE, same, experts * GRADIENT_BYTES)
    named = [(name, p.numel() / _split_over(name, layout)) for name, p in model.named_parameters() if name not in spread]
    whole = {name for name, p in model.named_parameters() if stays_whole(name, p)}
    small = sum(count for name, count in named if name in whole)
    blocks = sum(count for name, count in named if name not in whole and ".blocks." in name)
    tables = sum(count for name, count in named if name not in whole and ".blocks." not in name)
    shards, batch = layout.shard * layout.context, layout.data * layout.context
    if shards == 1:
        sent[ALL_REDUCE] += bytes_sent(ALL_REDUCE, batch, (small + blocks + tables) * GRADIENT_BYTES)
        return
    total = sum(p.numel() for p in model.parameters())
    frees = reshards(config, layout, total, itemsize, memory)
    gathered = blocks * 2 * passes + tables * passes if frees else blocks + tables
    sent[ALL_GATHER] += bytes_sent(ALL_GATHER, shards, gathered * itemsize)
    scattered = (blocks + tables) * (passes if frees else 1)
    sent[REDUCE_SCATTER] += bytes_sent(REDUCE_SCATTER, shards, scattered * GRADIENT_BYTES)
    sent[ALL_REDUCE] += bytes_sent(ALL_REDUCE, layout.replicate, (blocks + tables) / shards * GRADIENT_BYTES)
    sent[ALL_REDUCE] += bytes_sent(ALL_REDUCE, batch, small * GRADIENT_BYTES)


def _experts(model: Transformer) -> set[str]:
    """Names of the parameters that are stacked by experts."""
    stacks = [(path, module) for path, module in model.named_modules() if hasattr(module, "num_experts")]
    return {f"{path}.{name}" for path, module in stacks for name, _ in module.named_parameters(recurse=False)}


def _split_over(name: str, layout: Layout) -> int:
    """Processes that the matrices of a parameter are split over by its values, before FSDP: norms and gains are not."""
    return layout.tensor if any(word in name for word in SPLIT_BY_TENSOR) else 1


SPLIT_BY_TENSOR = (".attention.", ".feedforward.", "embedding.", "head.")
"""In the names of parameters that tensor parallelism splits, but for a thousandth of them."""


def _add_activations(sent: dict[str, float], config: RunConfig, layout: Layout, model: Transformer, itemsize: int, own: int) -> None:
    """What tensor, context and expert parallelism exchange of `own` sequences."""
    sequence = config.train.seq_len or config.model.max_seq_len
    tokens, width = own * sequence / layout.context, config.model.hidden_size
    recomputed = config.train.activation_checkpointing == "full"
    forward = 2 if recomputed else 1
    vector = tokens * width * itemsize
    # Of attention and feed-forward, forward and backward; when a block is recomputed, its last sum is not needed.
    sums = len(model.decoder.blocks) * (4 + recomputed)
    embedded = tokens * width * (itemsize if layout.shard * layout.context > 1 else GRADIENT_BYTES)
    # Besides the shares of the embedding: the gradient of the last hidden states, and of each token the loss's largest logit and two sums.
    sent[ALL_REDUCE] += bytes_sent(ALL_REDUCE, layout.tensor, (sums + 1) * vector + embedded + 3 * tokens * FLOAT_BYTES)
    attention = config.model.attention
    pairs = 2 * own * sequence * max(1, attention.num_kv_heads // layout.tensor) * attention.head_dim * itemsize
    sent[ALL_GATHER] += len(model.decoder.blocks) * forward * bytes_sent(ALL_GATHER, layout.context, pairs)
    sent[REDUCE_SCATTER] += len(model.decoder.blocks) * bytes_sent(REDUCE_SCATTER, layout.context, pairs)
    if config.model.feedforward.kind == "moe":
        routed = vector * config.model.experts.top_k
        sent[ALL_TO_ALL] += len(model.decoder.blocks) * 2 * (forward + 1) * bytes_sent(ALL_TO_ALL, layout.expert, routed)
