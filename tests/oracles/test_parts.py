"""Single parts against loops, closed forms and each other, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from andromeda.config.model import ModelConfig
from andromeda.model.feedforward.dense import ACTIVATIONS
from andromeda.model.transformer import Transformer

WIDTH, V, T = 24, 31, 9


def config(**tables: dict[str, Any]) -> ModelConfig:
    values: dict[str, Any] = {
        "vocab_size": V,
        "max_seq_len": 32,
        "hidden_size": WIDTH,
        "num_layers": 2,
        "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "backend": "eager"},
        "feedforward": {"intermediate_size": 20},
        "rotary": {"kind": "rope"},
    }
    for name, table in tables.items():
        values[name] = values.get(name, {}) | table
    return ModelConfig.model_validate(values)


def build(seed: int = 0, **tables: dict[str, Any]) -> Transformer:
    """In float64 with everything that starts at zero or one moved away from it."""
    model = Transformer(config(**tables), seed=seed).double().eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, dtype=torch.float64, generator=draw)
    return model


def ids(batch: int = 2) -> Tensor:
    return torch.randint(0, V, (batch, T), generator=torch.Generator().manual_seed(2))


def stream(batch: int = 2) -> Tensor:
    return torch.randn(batch, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def agree(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [3, 4, 4, 4, 4, 4, 5, 5, 5]])


def before(x: Tensor, b: int, t: int, distance: int) -> Tensor:
    """The vector from `distance` tokens before token t of row b, zero where that is another document or none."""
    return x[b, t - distance] if t >= distance and DOCUMENTS[b, t] == DOCUMENTS[b, t - distance] else torch.zeros_like(x[b, t])


# --- heads ---


@pytest.mark.parametrize("kv_heads", [1, 2])
@torch.no_grad()
def test_shared_heads_are_full_attention_with_repeated_heads(kv_heads: int) -> None:
    shared, full = (build(attention={"num_kv_heads": n, "qk_norm": "l2_dim_scale", "bias": True}) for n in (kv_heads, 4))
    state = shared.state_dict()
    for name, value in state.items():
        if ".key." in name or ".value." in name:
            state[name] = value.unflatten(0, (kv_heads, 8)).repeat_interleave(4 // kv_heads, 0).flatten(0, 1)
        if name.endswith("key_scale"):
            state[name] = value.repeat_interleave(4 // kv_heads, 0)
    full.load_state_dict(state)
    agree(shared(ids()), full(ids()))


@torch.no_grad()
def test_windows_reach_as_far_as_they_say_and_every_nth_layer_sees_everything() -> None:
    model = build(attention={"sliding_window": 4, "full_attention_interval": 3})
    model = Transformer(model.config.model_copy(update={"num_layers": 6})).double()
    ctx, x, t = model.context(ids()), stream(), 7
    for layer, reach in enumerate((4, 4, 99, 4, 4, 99)):
        attention = model.decoder.blocks[layer].attention
        before = attention(x, ctx.for_layer(layer))[:, t]
        for s in range(t + 1):
            changed = x.clone()
            changed[:, s] += 1.0
            moved = (attention(changed, ctx.for_layer(layer))[:, t] - before).abs().max() > 1e-9
            assert bool(moved) == (t - s < reach), (layer, s)


@torch.no_grad()
def test_a_pass_narrows_windows_but_not_layers_without_one() -> None:
    wide, narrow = (build(attention={"sliding_window": n, "full_attention_interval": 2}) for n in (6, 3))
    narrow.load_state_dict(wide.state_dict())
    agree(wide(ids(), window=3), narrow(ids()))
    agree(narrow(ids(), window=6), narrow(ids()))
    assert (wide(ids()) - narrow(ids())).abs().max() > 1e-3


# --- blocks ---


@pytest.mark.parametrize("silent", ["attention", "feedforward"])
@torch.no_grad()
def test_a_parallel_block_with_one_silent_branch_is_the_serial_block(silent: str) -> None:
    serial, parallel = build(), build(block={"kind": "parallel"})
    for model in (serial, parallel):
        for block in model.decoder.blocks:
            getattr(block, silent).out.weight.zero_()
    state = {}
    for name, value in serial.state_dict().items():
        heard = "feedforward_norm" if silent == "attention" else "attention_norm"
        if f".{heard}." in name:
            state[name.replace(f".{heard}.", ".norm.")] = value
        elif "_norm." not in name:
            state[name] = value
    parallel.load_state_dict(state)
    agree(parallel(ids()), serial(ids()))


@torch.no_grad()
def test_a_parallel_block_is_the_sum_of_both_branches() -> None:
    model = build(block={"kind": "parallel"}, shift={"kind": "lerp"})
    ctx, x, block = model.context(ids()).for_layer(1), stream(), model.decoder.blocks[1]
    seen = block.shift(block.norm(x), ctx)
    agree(block(x, ctx), x + block.attention(seen, ctx) + block.feedforward(seen))


@torch.no_grad()
def test_u_net_skips_are_last_in_first_out_and_an_odd_middle_has_none() -> None:
    model = build(skips={"unet": True, "first": True})
    model = Transformer(model.config.model_copy(update={"num_layers": 5})).double()
    weights, mixes = torch.tensor([0.3, 0.7]), torch.arange(10).view(5, 2) / 7 + 0.1
    model.decoder.skip_weights.copy_(weights)
    for mix, values in zip(model.decoder.mixes, mixes, strict=True):
        mix.weights.copy_(values)
    ctx = model.context(ids())
    first, kept = stream(), {}
    x = first
    for layer, partner in enumerate((None, None, None, 1, 0)):
        if partner is not None:
            x = x + float(model.decoder.skip_weights[layer - 3]) * kept[partner]
        a, b = model.decoder.mixes[layer].weights.tolist()
        kept[layer] = x = model.decoder.blocks[layer](a * x + b * first, ctx.for_layer(layer))
    agree(model.decoder(first, ctx), x)


# --- feed-forward ---

DEFINITIONS = {
    "gelu": lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu": lambda z: max(z, 0.0),
    "relu2": lambda z: max(z, 0.0) ** 2,
    "silu": lambda z: z / (1 + math.exp(-z)),
}


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_activations_are_their_definitions(kind: str) -> None:
    z = torch.linspace(-4, 4, 41, dtype=torch.float64)
    assert ACTIVATIONS[kind](z).tolist() == pytest.approx([DEFINITIONS[kind](value) for value in z.tolist()], abs=1e-12)


@pytest.mark.parametrize(("kind", "gate"), [("swiglu", "silu"), ("geglu", "gelu"), ("reglu", "relu")])
@torch.no_grad()
def test_gated_networks_are_their_definition(kind: str, gate: str) -> None:
    part, x = build(feedforward={"kind": kind, "bias": True}).decoder.blocks[0].feedforward, stream()
    gated = (x @ part.gate.weight.T + part.gate.bias).apply_(DEFINITIONS[gate])
    expected = (gated * (x @ part.inner.weight.T + part.inner.bias)) @ part.out.weight.T + part.out.bias
    torch.testing.assert_close(part(x), expected, rtol=1e-9, atol=1e-9)


# --- shift ---


@pytest.mark.parametrize("tokens", [1, 2, 4])
@torch.no_grad()
def test_chunks_come_from_the_tokens_before(tokens: int) -> None:
    model = build(shift={"kind": "chunks", "tokens": tokens})
    x, expected = stream(), stream()
    size = WIDTH // (tokens + 1)
    for b in range(2):
        for t in range(T):
            for i in range(1, tokens + 1):
                part = slice(i * size, (i + 1) * size)
                expected[b, t, part] = before(x, b, t, i)[part]
    ctx = model.context(ids(), documents=DOCUMENTS).for_layer(0)
    assert torch.equal(model.decoder.blocks[0].attention_shift(x, ctx), expected)


@torch.no_grad()
def test_lerp_mixes_each_channel_with_the_token_before() -> None:
    part = build(shift={"kind": "lerp"}).decoder.blocks[1].feedforward_shift
    ctx, x = build().context(ids(), documents=DOCUMENTS).for_layer(1), stream()
    expected = torch.stack([torch.stack([(1 - part.mix) * x[b, t] + part.mix * before(x, b, t, 1) for t in range(T)]) for b in range(2)])
    agree(part(x, ctx), expected)


@torch.no_grad()
def test_smear_adds_a_gated_share_of_the_embedding_before() -> None:
    model = build(shift={"kind": "smear"})
    smear, x = model.embedding.smear, model.embedding.tokens(ids())
    expected = x.clone()
    for b in range(2):
        for t in range(T):
            gate = 1 / (1 + math.exp(-float(smear.gate.weight[0] @ x[b, t, :12])))
            expected[b, t] += smear.weight * gate * before(x, b, t, 1)
    agree(model.embedding(model.context(ids(), documents=DOCUMENTS)), expected)


# --- embedding and head ---


@torch.no_grad()
def test_a_factorized_embedding_is_the_product_of_its_tables() -> None:
    embedding = build(embedding={"kind": "factorized", "rank": 5}).embedding.tokens
    agree(embedding(ids()), (embedding.table.weight @ embedding.project.weight.T)[ids()])


@torch.no_grad()
def test_absolute_positions_count_from_the_start_of_the_document() -> None:
    embedding = (model := build(embedding={"absolute": True})).embedding
    positions = [[0, 1, 2, 0, 1, 2, 3, 0, 1], [0, 0, 1, 2, 3, 4, 0, 1, 2]]
    expected = embedding.tokens.weight[ids()] + embedding.absolute.table.weight[torch.tensor(positions)]
    agree(embedding(model.context(ids(), documents=DOCUMENTS)), expected)


class Waves(nn.Module):
    """A user's own embedding: fixed waves, no parameters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.hidden_size

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.sin(tokens[..., None] * torch.arange(1, self.width + 1) / 7).double()


@torch.no_grad()
def test_a_users_embedding_is_used_as_it_is() -> None:
    own = Waves(config())
    given = Transformer(config(), embedding=own).double()
    agree(given.embedding(given.context(ids())), own(ids()))
    pretrained = nn.Embedding(V, WIDTH)
    weight = pretrained.weight.detach().clone()
    model = Transformer(config(head={"tied": True}), embedding=pretrained)
    assert model.head.weight is pretrained.weight
    assert torch.equal(pretrained.weight, weight)


@torch.no_grad()
def test_the_head_caps_its_logits() -> None:
    head, x = build(head={"softcap": 2.0, "bias": True}).head, 5 * stream()
    z = x @ head.weight.T + head.bias
    agree(head(x), 2 * (1 - 2 / (torch.exp(z) + 1)))


# --- values ---


@torch.no_grad()
def test_values_are_mixed_with_the_layers_share_of_the_token_s_row() -> None:
    model = build(attention={"num_kv_heads": 2}, value_embedding={"kind": "layered"}, shift={"kind": "chunks"})
    table = model.value_embedding.table.weight.view(V, 2, 2, 8)
    for layer in range(2):
        mix = model.decoder.blocks[layer].attention.value_mix
        v, share = stream()[..., :16].unflatten(-1, (2, 8)), float(mix.weight)
        agree(mix(v, model.context(ids()).for_layer(layer).value), (1 - share) * v + share * table[ids(), layer])


# --- sigmoid attention ---


@torch.no_grad()
def test_sigmoid_attention_weighs_each_key_by_itself() -> None:
    part = (
        build(attention={"mixer": "sigmoid", "num_kv_heads": 2, "sliding_window": 4, "backend": "auto"}, alibi={"num_heads": 2})
        .decoder.blocks[0]
        .attention
    )
    q, k, v = stream()[..., :16].unflatten(-1, (4, 4)), stream()[..., :8].unflatten(-1, (2, 4)), stream()[..., 8:20].unflatten(-1, (2, 6))
    ctx = build(alibi={"num_heads": 2}).context(ids(), documents=DOCUMENTS)
    found, slopes = part.core_attention(q, k, v, part.attention_spec(ctx)), (2**-4, 2**-8, 0.0, 0.0)
    expected = torch.zeros_like(found)
    for b in range(2):
        for t in range(T):
            for h in range(4):
                for s in (s for s in range(max(0, t - 3), t + 1) if DOCUMENTS[b, s] == DOCUMENTS[b, t]):
                    logit = float(q[b, t, h] @ k[b, s, h // 2]) / math.sqrt(8) - slopes[h] * (t - s)
                    expected[b, t, h] += v[b, s, h // 2] / (1 + 32 * math.exp(-logit))
    agree(found, expected)
