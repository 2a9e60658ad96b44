"""Steps by kernels are steps of the same layer: token by token compared with the plain model in float64, in every kind of cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from andromeda.generate import decode_kernels
from andromeda.generate.decode_kernels import DecodeKernelBlock, DecodeKernelHead
from andromeda.generate.decode_step import CudaGraphDecodeStep, DynamicDecodeStep, StaticDecodeStep
from andromeda.generate.fused_block import FusedBlock
from andromeda.generate.optimize import optimize_for_inference
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.kv_cache.protocol import KVCache
from andromeda.model.transformer import Transformer
from andromeda.ops import gemv, qk_preprocess
from tests.generate.test_fused_block import KINDS, model
from tests.ops import interpreted

PROMPT, WRITTEN = 9, 2
SMALL = ["hidden_size=32", "num_layers=1", "attention.num_heads=2", "attention.head_dim=16", "feedforward.mlp_ratio=1.5"]
"""What an interpreter can do in a second."""
MORE = {
    "value embeddings": ["model.value_embedding.kind=layered"],
    "xPos without ALiBi, layer norm": ["model.alibi.num_heads=0", "model.shift.tokens=3"],
}


def tokens(rows: int, device: torch.device) -> Tensor:
    return torch.randint(96, (rows, PROMPT + WRITTEN), generator=torch.Generator().manual_seed(1)).to(device)


def numbers(rows: int, device: torch.device) -> Tensor:
    """Documents that begin at another token in each row, in one of them with the last of the prompt."""
    return (torch.arange(PROMPT, device=device) >= PROMPT - 1 - torch.arange(rows, device=device)[:, None]).long()


def written(made: Transformer, ids: Tensor, documents: Tensor | None, way: str) -> Tensor:
    """Logits (B, WRITTEN, V) after the prompt, one token at a time."""

    def read(ids: Tensor, documents: Tensor | None, cache: KVCache) -> Tensor:
        return made.head(made.hidden(ids, documents=documents, cache=cache)[:, -1])

    with torch.no_grad():
        cache = DynamicKVCache()
        read(ids[:, :PROMPT], documents, cache)
        if way == "plain":
            step: Any = DynamicDecodeStep(read, cache, len(ids), None if documents is None else documents[:, -1:])
        else:
            step = (StaticDecodeStep if way == "fixed" else CudaGraphDecodeStep)(read, cache, WRITTEN)
        return torch.stack([step(token).clone() for token in ids[:, PROMPT:].T], 1)


def exact(made: Transformer, ids: Tensor, documents: Tensor | None) -> Tensor:
    """The same from one pass in float64."""
    wide = copy.deepcopy(made).double()
    if documents is not None:
        documents = torch.cat([documents, documents[:, -1:].expand(-1, WRITTEN)], 1)
    with torch.no_grad():
        return wide(ids, documents=documents)[:, PROMPT:]


def by_kernels(made: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """Its layers stepped, under the interpreter too, which runs on a CPU."""
    if interpreted.INTERPRETED:
        monkeypatch.setattr(gemv, "unsupported_reason", lambda x, *weights: "too many" if len(x) > gemv.MAX_ROWS else None)
        monkeypatch.setattr(qk_preprocess, "is_supported", lambda q, k, form: True)
    made = optimize_for_inference(made, compile=False)
    decode_kernels.use_decode_kernels(made)
    assert isinstance(made.head, DecodeKernelHead)
    assert all(isinstance(block, DecodeKernelBlock) for block in made.decoder.blocks)
    return made


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "way", "rows", "numbered"),
    [
        *(("preset andromeda", *case) for case in (("plain", 1, False), ("plain", 3, True), ("fixed", 2, True), ("fixed", 3, False))),
        *((name, "fixed", 1, True) for name in (KINDS | MORE) if name != "preset andromeda"),
    ],
)
def test_it_is_the_same_layer(name: str, way: str, rows: int, numbered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    device, changes = interpreted.device(), (KINDS | MORE)[name]
    plain = model([*(f"model.{name}" for name in SMALL), *changes], torch.float32, str(device))
    ids, documents = tokens(rows, device), numbers(rows, device) if numbered else None
    wanted = exact(plain, ids, documents)
    found = written(by_kernels(plain, monkeypatch), ids, documents, way)
    assert (found - wanted).norm() / wanted.norm() < 1e-5


def test_more_rows_than_the_kernels_take_go_the_layers_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    made = optimize_for_inference(model(KINDS["preset andromeda"], torch.float32), compile=False)
    block = made.decoder.blocks[0]
    assert isinstance(block, FusedBlock)
    monkeypatch.setattr(gemv, "_gemv_op", None)
    made.decoder.blocks[0] = DecodeKernelBlock(block)
    with torch.no_grad():
        assert made.hidden(torch.ones(9, 1, dtype=torch.long)).isfinite().all()


def test_layers_that_the_kernels_cannot_take_are_left_alone() -> None:
    made = optimize_for_inference(model(KINDS["preset andromeda"], torch.float32), compile=False)
    decode_kernels.use_decode_kernels(made)
    assert not any(isinstance(block, DecodeKernelBlock) for block in made.decoder.blocks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("way", ["plain", "fixed", "graph"])
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_in_16_bits_on_a_gpu(changes: list[str], way: str, rows: int) -> None:
    """As near to float64 as the layer's own parts, twice over: also as a CUDA graph, replayed for each token."""
    device = torch.device("cuda")
    plain = model(changes, torch.bfloat16, "cuda")
    nn.init.normal_(plain.head.weight, 0.0, 0.2)
    ids, documents = tokens(rows, device), numbers(rows, device)
    wanted = exact(plain, ids, documents)
    own = (written(plain, ids, documents, "plain") - wanted).norm() / wanted.norm()
    made = optimize_for_inference(plain, compile=False)
    assert all(isinstance(block, DecodeKernelBlock) for block in made.decoder.blocks)
    error = (written(made, ids, documents, way) - wanted).norm() / wanted.norm()
    assert error < 2 * own


def test_under_the_interpreter() -> None:
    interpreted.run(__file__)
