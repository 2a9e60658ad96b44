"""Steps recorded as CUDA graphs against plain ones, and what happens where recording is impossible."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from andromeda.config.model import AlibiConfig, AttentionConfig, FeedForwardConfig, ModelConfig, TokenShiftConfig
from andromeda.generate import batch, decode_step
from andromeda.generate.decode_step import supports_cuda_graph
from andromeda.generate.engine import Engine
from andromeda.generate.sequence import Completion
from andromeda.model.meta_model import meta_model
from andromeda.model.transformer import Transformer
from andromeda.utils.errors import RequestError

ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16)
VARIANTS: dict[str, dict[str, Any]] = {
    "xpos": {},
    "alibi": {"alibi": AlibiConfig(num_heads=2)},
    "folded alibi, shift": {"alibi": AlibiConfig(num_heads=2, fold_into_qk=True), "shift": TokenShiftConfig(kind="lerp")},
    "window": {"attention": ATTENTION.model_copy(update={"sliding_window": 7})},
}
PROMPTS = [[1], list(range(2, 25)), [5] * 9, list(range(40))]


def build(device: str, **parts: Any) -> Transformer:
    return Transformer(
        ModelConfig(**({"vocab_size": 61, "max_seq_len": 300, "hidden_size": 64, "num_layers": 3, "attention": ATTENTION} | parts))
    ).to(device)


def write(model: Transformer, **wishes: Any) -> list[Completion]:
    return Engine(model, eos=3).generate(PROMPTS, **{"temperature": 1.5, "top_k": 0, "seed": 5} | wishes)


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_a_recorded_step_writes_what_a_plain_one_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded several times over, for sequences that end at different times."""
    model = build("cuda", **VARIANTS[name])
    monkeypatch.setattr(decode_step, "MIN_FREE_SLOTS", 32)
    recorded = write(model)
    monkeypatch.setattr(batch, "supports_cuda_graph", lambda config, device: False)
    assert [answer.ids for answer in recorded] == [answer.ids for answer in write(model)]


def test_a_step_that_cannot_be_recorded_is_taken_plainly_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = build("cpu")
    plain = write(model)
    monkeypatch.setattr(batch, "supports_cuda_graph", lambda config, device: True)
    monkeypatch.setattr(batch, "CudaGraphDecodeStep", fail)
    with caplog.at_level(logging.WARNING):
        assert [answer.ids for answer in write(model)] == [answer.ids for answer in plain]
    assert "without a CUDA graph" in caplog.text
    assert "(operation not permitted when stream is capturing)" in caplog.text


class Own(nn.Module):
    """A token mixer that does not say whether its steps can be recorded."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, ctx: object) -> Tensor:
        return x


@pytest.mark.usefixtures("allow_code")
def test_only_models_that_ask_the_device_for_nothing_are_recorded() -> None:
    cuda = torch.device("cuda")
    assert supports_cuda_graph(meta_model(ModelConfig()), cuda)
    assert not supports_cuda_graph(meta_model(ModelConfig()), torch.device("cpu"))
    assert not supports_cuda_graph(meta_model(ModelConfig(feedforward=FeedForwardConfig(kind="moe"))), cuda)
    assert not supports_cuda_graph(meta_model(ModelConfig(attention=AttentionConfig(mixer=f"{__name__}:Own"))), cuda)


def test_no_room_on_the_device_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batch.GenerationBatch, "_prefill", fail)
    with pytest.raises(RequestError, match="no room for 4 x 60 tokens"):
        write(build("cpu"), max_new_tokens=20)
