"""Held-out bits against closed forms and a token-by-token computation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from andromeda.config.data import BuildConfig, DataConfig
from andromeda.config.model import AttentionConfig, ModelConfig, RotaryConfig
from andromeda.data.build import build
from andromeda.data.loader import TokenStream, open_stream
from andromeda.evaluate.bits_per_byte import held_out_bits, windows
from andromeda.model.transformer import Transformer

CONTEXT = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = folder / "texts"
    texts.mkdir()
    for i in range(60):
        (texts / f"{i}.txt").write_text(f"line {i} of the café\n" * (1 + i % 3))
    build([str(texts)], folder / "built", BuildConfig(tokenizer="bytes", vocab_size=257, validation_fraction=0.2))
    return folder / "built"


@pytest.fixture
def stream(corpus: Path) -> TokenStream:
    return open_stream(DataConfig(corpus=str(corpus)), CONTEXT, 0, "val")


def tiny() -> Transformer:
    config = ModelConfig(
        vocab_size=257,
        max_seq_len=CONTEXT,
        hidden_size=16,
        num_layers=1,
        rotary=RotaryConfig(kind="rope"),
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    )
    return Transformer(config).double()


@given(length=st.integers(1, 200), context=st.integers(1, 50), stride=st.integers(1, 50))
def test_windows_score_every_token_once_with_the_context_promised(length: int, context: int, stride: int) -> None:
    stride = min(stride, context)
    scored = []
    for begin, first, end in windows(length, context, stride):
        assert end - begin <= context
        if first:
            assert first - begin >= context - stride
        scored += range(first, end)
    assert scored == list(range(length))


def test_a_uniform_model_scores_log_vocabulary_on_exactly_the_held_out_bytes(corpus: Path, stream: TokenStream) -> None:
    model = tiny()
    torch.nn.init.zeros_(model.head.weight)
    bits = held_out_bits(model, stream, context=CONTEXT, stride=5)
    assert bits.bytes == len((corpus / "val.txt").read_bytes())
    assert bits.nats == pytest.approx(bits.tokens * math.log(257), rel=1e-12)
    assert bits.per_byte == pytest.approx(bits.tokens * math.log2(257) / bits.bytes, rel=1e-12)


def test_bits_equal_a_sum_over_single_tokens(stream: TokenStream) -> None:
    model = tiny()
    rows = stream.batch(0, stream.num_sequences or 0)
    ids = rows.ids.flatten().tolist()
    count = rows.tokens
    sequence = [*ids[:count], rows.targets.flatten()[count - 1].item()]
    expected = 0.0
    with torch.no_grad():
        for begin, first, end in windows(count, CONTEXT, 7):
            for t in range(first, end):
                logits = model(torch.tensor([sequence[begin : t + 1]]))[0, -1]
                expected -= logits.log_softmax(-1)[sequence[t + 1]].item()
    assert held_out_bits(model, stream, context=CONTEXT, stride=7, batch=3).nats == pytest.approx(expected, rel=1e-10)
