"""Likelihoods and long sequences against a plain pass, and the harness's adapter against its own model of transformers' Llama."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from andromeda.config.model import AttentionConfig, ModelConfig, RotaryConfig
from andromeda.evaluate.token_loss import PromptCache, continuation_likelihoods, token_losses
from andromeda.model.transformer import Transformer

TEXT = "the cat sat on the mat, and the bird came to see it. " * 20


def small(**changes: Any) -> Transformer:
    settings: dict[str, Any] = {"rotary": RotaryConfig(kind="rope"), "attention": AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)}
    config = ModelConfig(vocab_size=61, max_seq_len=128, hidden_size=16, num_layers=2, **settings | changes)
    return Transformer(config, seed=1).double().eval()


def drawn(*shape: int) -> torch.Tensor:
    return torch.randint(0, 61, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
@torch.no_grad()
def test_chunked_losses_are_those_of_one_pass(chunk: int) -> None:
    model, ids, targets = small(), drawn(3, 50), drawn(3, 50).flip(1)
    targets[1, :20] = -100
    logs = model(ids).log_softmax(-1)
    expected = -logs.gather(2, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    torch.testing.assert_close(token_losses(model, ids, targets, chunk=chunk), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_continuations_of_a_prompt_that_was_read_once() -> None:
    model, ids = small(), drawn(2, 40)
    prompts = PromptCache(model, ids, 10, chunk=16)
    for pair, skip in (([[5, 6, 7], [8, 9]], [0, 0]), ([[1], [2, 3, 4, 5]], [0, 2])):
        found = prompts.nats(pair, skip)
        for row in range(2):
            whole = torch.cat([ids[row], torch.tensor(pair[row])])[None]
            logs = model(whole).log_softmax(-1)[0]
            nats = [-logs[39 + i, token].item() for i, token in enumerate(pair[row])]
            assert found[row].item() == pytest.approx(sum(nats[skip[row] :]), rel=1e-10)
    written, sequence = prompts.greedy(6, 61), ids
    for _ in range(6):
        sequence = torch.cat([sequence, model(sequence)[:, -1:].argmax(-1)], 1)
    assert written == sequence[:, 40:].tolist()


@torch.no_grad()
def test_likelihoods_are_sums_over_single_tokens_whatever_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small(), drawn(9, 30).tolist()
    pairs = [(row[: 3 + i], row[3 + i : 5 + 2 * i]) for i, row in enumerate(ids)]
    found = continuation_likelihoods(model, pairs)
    monkeypatch.setattr("andromeda.evaluate.token_loss.BATCH_TOKENS", {"cpu": 1})
    alone = continuation_likelihoods(model, pairs)
    for (context, continuation), one, other in zip(pairs, found, alone, strict=True):
        logs = model(torch.tensor([[*context, *continuation]])).log_softmax(-1)[0]
        at = range(len(context) - 1, len(context) + len(continuation) - 1)
        assert one.log == pytest.approx(sum(logs[i, t].item() for i, t in zip(at, continuation, strict=True)), rel=1e-10)
        assert one.greedy == all(logs[i].argmax() == t for i, t in zip(at, continuation, strict=True))
        assert (other.log, other.greedy) == (pytest.approx(one.log, rel=1e-12), one.greedy)
