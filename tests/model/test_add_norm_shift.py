"""The kernel between two matmuls does what the parts do, forward and backward, with the shift's state and across documents."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from andromeda.config.load import load
from andromeda.model.kv_cache.dynamic import DynamicKVCache
from andromeda.model.transformer import Transformer
from andromeda.ops import add_norm_shift
from tests.ops import interpreted

CHANGES = [
    "model.hidden_size=64",
    "model.num_layers=2",
    "model.vocab_size=96",
    "model.max_seq_len=128",
    "model.attention.num_heads=2",
    "model.attention.head_dim=32",
    "model.alibi.num_heads=1",
]


def model(changes: list[str]) -> Transformer:
    torch.manual_seed(0)
    made = Transformer(load("andromeda", [*CHANGES, *changes]).model)
    for parameter in made.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim < 2 else 0.0, 0.2)
    return made.to(interpreted.device())


def gradients(made: Transformer, ids: Tensor, documents: Tensor | None) -> list[Tensor]:
    made.zero_grad()
    (made.hidden(ids, documents=documents).double() ** 3).mean().backward()
    return [p.grad.double() for p in made.parameters() if p.grad is not None]


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [[], ["model.block.norm=rms"]], ids=["layer", "rms"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_a_model(changes: list[str], packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside those of the parts in float64, which no kernel takes."""
    if interpreted.INTERPRETED:
        monkeypatch.setattr(add_norm_shift, "is_supported", lambda x: x.dtype == torch.float32)
    calls = 0
    real = add_norm_shift.add_norm_shift

    def counted(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return real(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(add_norm_shift, "add_norm_shift", counted)
    made = model(changes)
    exact = copy.deepcopy(made).double()
    ids = torch.randint(96, (2, 41), generator=torch.Generator().manual_seed(1)).to(interpreted.device())
    documents = (torch.arange(41, device=ids.device) // 7).expand(2, -1).contiguous() if packed else None
    actual, wanted = gradients(made, ids, documents), gradients(exact, ids, documents)
    assert calls == 4
    for a, w in zip(actual, wanted, strict=True):
        assert (a - w).norm() / w.norm() < 1e-4


@pytest.mark.gpu
def test_a_cache_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    if interpreted.INTERPRETED:
        monkeypatch.setattr(add_norm_shift, "is_supported", lambda x: x.dtype == torch.float32)
    made, cache = model([]), DynamicKVCache()
    ids = torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(1)).to(interpreted.device())
    with torch.no_grad():
        parts = [made.hidden(part, cache=cache) for part in ids.split([13, 16, 1], 1)]
        wanted = made.double().hidden(ids)
    assert (torch.cat(parts, 1) - wanted).norm() / wanted.norm() < 1e-5


def test_under_the_interpreter() -> None:
    interpreted.run(__file__)
