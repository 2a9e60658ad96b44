"""What is tested of models whose linear layers were exchanged, whatever for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from andromeda.config.model import AttentionConfig, FeedForwardConfig, ModelConfig, RotaryConfig
from andromeda.model.transformer import Transformer

CONFIG = ModelConfig(
    vocab_size=64,
    max_seq_len=32,
    hidden_size=32,
    num_layers=2,
    rotary=RotaryConfig(kind="rope"),
    attention=AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=16),
    feedforward=FeedForwardConfig(kind="gelu", intermediate_size=64, bias=True),
)


def parameters_stay(exchange: Callable[[nn.Module], Any], kind: type[nn.Module], use: Callable[[Transformer], object]) -> Any:
    """The same tensors by the same names before and after an exchange of all layers and a use of them; returns what `exchange` did."""
    plain = Transformer(CONFIG, seed=1)
    before, saved = dict(plain.named_parameters()), plain.state_dict().keys()
    given = exchange(plain.decoder)
    use(plain)
    after = dict(plain.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert plain.state_dict().keys() == saved
    assert sum(isinstance(m, kind) for m in plain.modules()) == 2 * 6
    return given
