"""From token ids to vectors. A provider is any module whose forward pass gives (B, T, C) for ids (B, T); one that can share its
table with the head has `weight` (V, C)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.config.own_code import find_class
from andromeda.model.forward_context import ForwardContext
from andromeda.model.layers import Embedding, Linear
from andromeda.model.norm import RMSNormNoGain
from andromeda.model.tensor_plan import TensorPlan, check_divides
from andromeda.model.token_shift import build_smear
from andromeda.ops.compute_dtype import residual_dtype
from andromeda.ops.embedding import embed


class TokenEmbedding(Embedding):
    """A table V x C."""

    supports_cuda_graph = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size)

    def tensor_plan(self, count: int) -> TensorPlan:
        """By rows, as a head that shares the table is."""
        check_divides(count, self.num_embeddings, "model.vocab_size")
        return TensorPlan({"weight": 0})


class FactorizedEmbedding(nn.Module):
    """A table V x r and a projection r x C (arXiv 1909.11942): fewer parameters for a large vocabulary."""

    supports_cuda_graph = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = Embedding(config.vocab_size, config.embedding.rank)
        self.project = Linear(config.embedding.rank, config.hidden_size, bias=False, init="unit_gain")

    def tensor_plan(self, count: int) -> TensorPlan:
        """The table by rows."""
        check_divides(count, self.table.num_embeddings, "model.vocab_size")
        return TensorPlan({"table.weight": 0})

    def flops(self) -> dict[str, float]:
        """Of one token: the projection."""
        return {"embedding": self.project.flops()}

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, C)."""
        return self.project(self.table(ids))


class NoAbsolutePositions(nn.Module):
    """No vector for absolute positions."""

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C) as it is."""
        return x


class AbsolutePositions(nn.Module):
    """A learned vector for each position since the document began."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = Embedding(config.max_seq_len, config.hidden_size)

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, C)."""
        return x + embed(ctx.positions, self.table.weight, x.dtype)


class InputEmbedding(nn.Module):
    """Provider, absolute positions, norm and smear, in this order; each may be the identity."""

    def __init__(self, config: ModelConfig, provider: nn.Module | None = None) -> None:
        super().__init__()
        self.tokens = build_token_embedding(config) if provider is None else provider
        if (provider is not None or config.embedding.kind == "custom") and not hasattr(self.tokens, "init_weights"):
            # A user's own embedding that has no rule of its own keeps the values that it came with.
            self.tokens.keeps_weights = True  # type: ignore[assignment]
        self.absolute = AbsolutePositions(config) if config.embedding.absolute else NoAbsolutePositions()
        self.norm = RMSNormNoGain(config.hidden_size, config.block.eps) if config.embedding.norm else nn.Identity()
        self.smear = build_smear(config)

    def flops(self, keys: Callable[[int], float]) -> dict[str, float]:
        """Of one token: those of the parts that have any."""
        said = [part.flops() for part in (self.tokens, self.smear) if hasattr(part, "flops")]  # type: ignore[operator]
        return {name: flops for part in said for name, flops in part.items()}

    def forward(self, ctx: ForwardContext) -> Tensor:
        """(B, T, C) for the context's ids (B, T)."""
        x = self.tokens(ctx.ids)
        return self.smear(self.norm(self.absolute(x.to(residual_dtype(x)), ctx)), ctx)


def build_token_embedding(config: ModelConfig) -> nn.Module:
    """The embedding that the configuration names; a custom class is built with the model's configuration."""
    if config.embedding.kind == "custom":
        return find_class(config.embedding.provider, "model.embedding.provider")(config)
    return {"plain": TokenEmbedding, "factorized": FactorizedEmbedding}[config.embedding.kind](config)
