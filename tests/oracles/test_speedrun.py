"""Preset `speedrun` against a straight-line float64 model written from the definitions of that record (modded-nanogpt, 2024-12-04).

x = x0 = rms(E[id]);  first half: x = block_i(x), kept;  second half: x = block_i(x + s_i kept.pop())
block: x = l0 x + l1 x0;  x = x + W_o attention(rms x);  x = x + W_2 relu(W_1 rms x)^2
attention: v = (1 - l) W_v x + l E_i[id];  q, k = rotate(rms(W q)), rotate(rms(W k));  causal, of one document, in a window
logits = 30 tanh(z / 30), z = W rms(x)
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.config.load import load
from andromeda.model.transformer import Transformer

VOCABULARY, WIDTH, DEPTH, HEADS, HEAD_DIM, WINDOW = 41, 24, 4, 3, 8, 5
SMALL = [
    f"model.vocab_size={VOCABULARY}",
    "model.max_seq_len=32",
    f"model.hidden_size={WIDTH}",
    f"model.num_layers={DEPTH}",
    f"model.attention.num_heads={HEADS}",
    f"model.attention.num_kv_heads={HEADS}",
    f"model.attention.head_dim={HEAD_DIM}",
    f"model.attention.sliding_window={WINDOW}",
    "model.attention.backend=eager",
    "train.seq_len=32",
    f"train.window.end={WINDOW}",
    "train.window.start=1",
]


def rms(x: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, position: int) -> Tensor:
    """Pairs (i, i + D/2) of x (H, D) by position / 10000^(2i/D)."""
    half = x.shape[-1] // 2
    angles = position / 10000 ** (torch.arange(half, dtype=torch.float64) / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def written_out(w: dict[str, Tensor], ids: list[int], documents: list[int], eps: float) -> Tensor:
    """Logits (T, V), token after token."""
    first = rms(w["embedding.tokens.weight"][ids], eps)
    x, kept = first, []
    for layer in range(DEPTH):
        if layer >= DEPTH // 2:
            x = x + w["decoder.skip_weights"][layer - DEPTH // 2] * kept.pop()
        x = block({name.removeprefix(f"decoder.blocks.{layer}."): value for name, value in w.items()}, x, first, layer, ids, documents, eps)
        if layer < DEPTH // 2:
            kept.append(x)
    return 30 * torch.tanh(rms(x, eps) @ w["head.weight"].T / 30)


def block(p: dict[str, Tensor], x: Tensor, first: Tensor, layer: int, ids: list[int], documents: list[int], eps: float) -> Tensor:
    mix = p[f"decoder.mixes.{layer}.weights"]
    x = mix[0] * x + mix[1] * first
    share = p["attention.value_mix.weight"]
    tables = p["value_embedding.table.weight"].view(VOCABULARY, DEPTH, HEADS, HEAD_DIM)
    queries, keys, values = [], [], []
    for t, token in enumerate(rms(x, eps)):
        start = next(s for s in range(t + 1) if documents[s] == documents[t])
        queries.append(rotate(rms((p["attention.query.weight"] @ token).view(HEADS, HEAD_DIM), 2**-23), t - start))
        keys.append(rotate(rms((p["attention.key.weight"] @ token).view(HEADS, HEAD_DIM), 2**-23), t - start))
        values.append((1 - share) * (p["attention.value.weight"] @ token).view(HEADS, HEAD_DIM) + share * tables[ids[t], layer])
    mixed = []
    for t in range(len(ids)):
        seen = [s for s in range(t + 1) if documents[s] == documents[t] and t - s < WINDOW]
        heads = []
        for h in range(HEADS):
            weights = torch.softmax(torch.stack([queries[t][h] @ keys[s][h] for s in seen]) / math.sqrt(HEAD_DIM), 0)
            heads.append(sum(weight * values[s][h] for weight, s in zip(weights, seen, strict=True)))
        mixed.append(p["attention.out.weight"] @ torch.cat(heads))
    x = x + torch.stack(mixed)
    return x + (rms(x, eps) @ p["feedforward.inner.weight"].T).clamp_min(0) ** 2 @ p["feedforward.out.weight"].T


@torch.no_grad()
def test_the_model_is_the_record_s() -> None:
    model = Transformer(load("speedrun", SMALL).model).double()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    ids = torch.randint(0, VOCABULARY, (14,), generator=draw)
    documents = [0] * 9 + [1] * 5
    expected = written_out(model.state_dict(), ids.tolist(), documents, model.config.block.eps)
    assert expected.std() > 0.5
    torch.testing.assert_close(model(ids[None], documents=torch.tensor([documents]))[0], expected, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_the_first_loss_is_that_of_a_guess() -> None:
    """A zero head gives every token the same probability, whatever the rest of the model does."""
    model = Transformer(
        load(
            "speedrun", ["model.hidden_size=16", "model.num_layers=2", "model.attention.num_heads=1", "model.attention.num_kv_heads=1"]
        ).model
    )
    ids = torch.randint(0, 50304, (1, 16), generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(model(ids).double()[0, :-1], ids[0, 1:])
    assert float(loss) == pytest.approx(math.log(50304), abs=1e-12)
    assert round(math.log(50304), 4) == 10.8258


def test_the_start_is_the_record_s() -> None:
    model = Transformer(load("speedrun", SMALL).model)
    zero = {name for name, p in model.named_parameters() if not p.any()}
    ends = {"attention.out.weight", "feedforward.out.weight"}
    assert zero == {"head.weight", *(f"decoder.blocks.{layer}.{end}" for layer in range(DEPTH) for end in ends)}
    assert [mix.weights.tolist() for mix in model.decoder.mixes] == [[1.0, 0.0]] * DEPTH
    assert model.decoder.skip_weights.tolist() == [1.0] * (DEPTH // 2)
    assert [b.attention.value_mix.weight.item() for b in model.decoder.blocks] == [0.5] * DEPTH


def test_value_embeddings_have_the_record_s_size() -> None:
    """463,601,664 parameters, of which a token uses 9,216."""
    with torch.device("meta"):
        model = Transformer(load("speedrun").model)
    table = model.value_embedding.table.weight
    assert table.numel() == 463_601_664
    assert table.shape[1] == 9216
