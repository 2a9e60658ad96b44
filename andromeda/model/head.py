"""From hidden states to logits. The loss reads `weight`, `bias` and `softcap`, so that it never needs all logits at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from andromeda.config.heads import HEAD_KINDS, MultiTokenConfig, head_keys, target_name
from andromeda.config.model import ModelConfig
from andromeda.config.parts import own_head
from andromeda.model.init import InitScheme
from andromeda.model.tensor_plan import TensorPlan, check_divides
from andromeda.ops.cross_entropy import VocabularyShard
from andromeda.utils.errors import ConfigError


class LMHead(nn.Module):
    """logits = cap * tanh((x W^T + b) / cap), or the matmul alone when the cap is 0 (arXiv 2408.00118 for the cap)."""

    role = "head"
    shard: VocabularyShard | None = None
    """Which logits this head gives, where several processes give a share each; None is all of them."""

    def __init__(self, config: ModelConfig, embedding: nn.Module) -> None:
        super().__init__()
        self.tied = config.head.tied
        self.softcap = config.head.softcap
        self.weight = _tied(embedding, config) if config.head.tied else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.head.bias else None

    def init_weights(self, scheme: InitScheme) -> None:
        """Draw the matrix, unless it is the embedding's table."""
        if not self.tied:
            scheme.fill(self.weight, "head")

    def tensor_plan(self, count: int) -> TensorPlan:
        """Each process gives the logits of its share of the vocabulary."""
        check_divides(count, self.weight.shape[0], "model.vocab_size")
        return TensorPlan({"weight": 0, "bias": 0})

    def flops(self, keys: Callable[[int], float]) -> dict[str, float]:
        """Of one token whose logits are computed."""
        return {"head": 2.0 * self.weight.numel()}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> logits (..., V)."""
        logits = self.matmul(x)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def matmul(self, x: Tensor) -> Tensor:
        """x W^T + b."""
        return F.linear(x, self.weight, self.bias)


class TaskHead(nn.Module):
    """A head besides the language model's: outputs = x W^T + b, one for each class, label or number."""

    role = "head"
    softcap = 0.0

    def __init__(self, hidden_size: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def init_weights(self, scheme: InitScheme) -> None:
        """Draw the matrix."""
        scheme.fill(self.weight, "head")

    def flops(self, keys: Callable[[int], float]) -> dict[str, float]:
        """Of one token."""
        return {"task heads": 2.0 * self.weight.numel()}

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> outputs (..., K)."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class MultiTokenHead(nn.Module):
    """Hidden states for tokens further ahead: x + silu(x W_k^T) for each, to be read by the language model's own head.

    Residual blocks as in Medusa (arXiv 2401.10774), which begin as the identity; the output matrix is shared (arXiv 2404.19737).
    """

    def __init__(self, hidden_size: int, vocab_size: int, tokens: int) -> None:
        super().__init__()
        self.tokens, self._vocab_size = tokens, vocab_size
        self.weight = nn.Parameter(torch.zeros(tokens - 1, hidden_size, hidden_size))

    def init_weights(self, scheme: InitScheme) -> None:
        """Zero: every block is the identity at first."""
        nn.init.zeros_(self.weight)

    def flops(self, keys: Callable[[int], float]) -> dict[str, float]:
        """Of one token in training; generation reads one token ahead."""
        ahead, hidden_size, _ = self.weight.shape
        return {"task heads": 2.0 * ahead * hidden_size * (hidden_size + self._vocab_size)}

    def forward(self, x: Tensor, ahead: int) -> Tensor:
        """x (..., C) -> hidden states (..., C) for the token `ahead` after the current one, 2 or more."""
        return x + F.silu(F.linear(x, self.weight[ahead - 2].to(x.dtype)))


HEADS = "task_heads."
"""How the names of the parameters of these heads begin."""


def build_heads(config: ModelConfig) -> nn.ModuleDict:
    """The heads of `[model.task_heads]` by name. Raises ConfigError where the number of outputs is not known."""
    heads = nn.ModuleDict()
    for name, table in config.task_heads.items():
        if table.kind not in HEAD_KINDS and table.kind != "auto":
            heads[name] = own_head(name, table).build(config, name)
            continue
        keys = None if table.kind == "auto" else head_keys(name, table)
        if keys is None or not keys.num_outputs:
            raise ConfigError(
                f"model.task_heads.{name} predicts the target {target_name(name, table)!r}, which no corpus of the run has: build it with "
                f"--target {target_name(name, table)}=KIND, or set model.task_heads.{name}.kind and num_labels."
            )
        if isinstance(keys, MultiTokenConfig):
            heads[name] = MultiTokenHead(config.hidden_size, config.vocab_size, keys.tokens)
        else:
            heads[name] = TaskHead(config.hidden_size, keys.num_outputs)
    return heads


def _tied(embedding: nn.Module, config: ModelConfig) -> nn.Parameter:
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.shape != (config.vocab_size, config.hidden_size):
        raise ConfigError(
            "model.head.tied needs an embedding with a weight of vocab_size x width: use embedding.kind plain or an untied head."
        )
    return weight
