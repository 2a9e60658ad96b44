"""Models that train in 16 bits with weights cast once a step: the same parameters, the same gradients however they are added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from andromeda.config.model import FeedForwardConfig
from andromeda.config.train import OptimizerConfig
from andromeda.model.master_weight_linear import MasterWeightLinear, accumulate_weight_grads, convert_to_master_weights
from andromeda.model.transformer import Transformer
from andromeda.ops import master_weight_linear, mlp
from andromeda.optim import build_optimizer
from andromeda.train.activation_checkpoint import checkpoint_blocks
from tests.model.exchanged import CONFIG, parameters_stay
from tests.ops import emulated16, interpreted

KINDS = pytest.mark.parametrize("kind", ["gelu", "swiglu", "relu2"])
assert emulated16


@pytest.fixture(autouse=True)
def accepted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The path that a GPU takes, on a CPU."""
    monkeypatch.setattr(mlp, "is_supported", lambda x, *parameters: torch.is_grad_enabled())
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(kind: str = "gelu", dtype: torch.dtype | None = torch.bfloat16) -> tuple[Transformer, Sequence[MasterWeightLinear]]:
    """A model in float32, or float64 as the reference of its matmuls, and its layers that were replaced: none without a dtype."""
    config = CONFIG.model_copy(update={"feedforward": FeedForwardConfig(kind=kind, intermediate_size=64, bias=True)})  # type: ignore[arg-type]
    made = Transformer(config, seed=1)
    if dtype == torch.float64:
        made.double()
    return made, convert_to_master_weights(made.decoder, lambda path: True, dtype) if dtype else []


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(seed))


def backward(made: Transformer, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> None:
    """Of one micro-batch, under autocast as a step has it."""
    with torch.autocast(device, dtype, enabled=made.head.weight.dtype == torch.float32):
        loss = made(ids(seed).to(device)).double().square().mean()
    loss.backward()


def taken(made: Transformer) -> dict[str, Tensor]:
    """The gradients, which go."""
    found = {name: p.grad.double() for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad()
    return found


def test_parameters_and_what_is_saved_stay_the_same() -> None:
    leading = parameters_stay(lambda root: convert_to_master_weights(root, lambda path: True, torch.bfloat16), MasterWeightLinear, backward)
    assert len(leading) == 2 * 4, "queries, values and keys are one"


@KINDS
@pytest.mark.parametrize("several", [False, True])
def test_gradients_in_float64(kind: str, several: bool) -> None:
    """Of two micro-batches, added up by PyTorch or by the matmuls, compared with a model without replaced layers."""
    (plain, _), (made, layers) = model(kind, None), model(kind, torch.float64)
    plain.double()
    for seed in (0, 1):
        backward(plain, seed)
    wanted = taken(plain)
    for _ in range(2):
        with accumulate_weight_grads(layers if several else []):
            for seed in (0, 1):
                backward(made, seed)
        found = taken(made)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13, msg=name)


@KINDS
def test_all_gradients_are_added_by_their_products(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is returned and added by autograd, which would give the same sums."""
    made, layers = model(kind, torch.float64)
    add, added = master_weight_linear.weight_grad_addmm, []
    monkeypatch.setattr(
        master_weight_linear, "weight_grad_addmm", lambda total, *factors: (added.append(total.data_ptr()), add(total, *factors))
    )
    with accumulate_weight_grads(layers):
        totals = [layer.total for layer in layers]
        backward(made)
    assert sorted(added) == sorted(total.data_ptr() for total in totals if total is not None)


def test_gradients_that_are_there_are_kept() -> None:
    """Those of a pass before are added to."""
    (plain, _), (made, layers) = model(dtype=None), model(dtype=torch.float64)
    plain.double()
    for seed in (0, 1):
        backward(plain, seed)
    backward(made, 0)
    with accumulate_weight_grads(layers):
        backward(made, 1)
    found = taken(made)
    for name, gradient in taken(plain).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13, msg=name)


def test_weights_are_cast_once() -> None:
    """Matmuls read what was cast and cast nothing again: with zeros in its place a model has no blocks."""
    (plain, _), (made, layers) = model(dtype=None), model()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(ids()), plain(ids()))
    backward(made)  # what was cast without gradients serves with them
    for layer in layers:
        assert layer.rows is not None
        layer.rows.zero_()
    with torch.no_grad():
        for name, p in plain.decoder.named_parameters():
            if "attention" in name or "feedforward" in name:
                p.mul_(name.endswith("bias"))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(made(ids()), plain(ids()))


def test_weights_that_were_replaced_are_cast_again() -> None:
    """By others that were written as often."""
    (plain, _), (made, _) = model(dtype=None), model()
    backward(made)
    for p in (*plain.parameters(), *made.parameters()):
        p.data = 1.5 * p.data
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(ids()), plain(ids()))


def test_products_of_another_type_are_as_they_were() -> None:
    (plain, _), (made, layers) = model(dtype=None), model()
    backward(made)
    with accumulate_weight_grads(layers):
        assert torch.equal(made(ids()), plain(ids()))


@KINDS
def test_gradients_in_bfloat16_are_no_farther_than_autocasts(kind: str) -> None:
    wide, _ = model(kind, torch.float64)
    backward(wide)
    right, sides = taken(wide), []
    for dtype in (None, torch.bfloat16):
        made, layers = model(kind, dtype)
        with accumulate_weight_grads(layers):
            backward(made)
        sides.append(taken(made))
    far = [sum(float((side[name] - exact).norm() / exact.norm()) for name, exact in right.items()) for side in sides]
    assert 0.01 < far[1] < 1.05 * far[0]


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("backend", ["", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_and_recomputed(kind: str, backend: str) -> None:
    """One graph for all layers without a break, also after the weights have changed; added up where they are kept."""
    near = 0.02 if backend == "inductor" else 1e-5
    plain, made = model(dtype=torch.bfloat16), model(dtype=torch.bfloat16)
    checkpoint_blocks(made[0], kind)
    counter = CompileCounterWithBackend(backend) if backend else None
    for block in made[0].decoder.blocks:
        if counter:
            block.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        with accumulate_weight_grads(made[1]):
            kept = [layer.total for layer in made[1]]
            for seed in (0, 1):
                backward(made[0], seed)
        for seed in (0, 1):
            backward(plain[0], seed)
        wanted = taken(plain[0])
        for layer, total in zip(made[1], kept, strict=True):
            assert total is not None
            assert layer.weight.grad is not None
            assert layer.weight.grad.data_ptr() == total.data_ptr()
            assert layer.total is None
        for name, gradient in taken(made[0]).items():
            assert (gradient - wanted[name]).norm() <= near * wanted[name].norm(), name
        with torch.no_grad():
            for p in (*made[0].parameters(), *plain[0].parameters()):
                p.mul_(1.5)
    assert counter is None or counter.frame_count == 1


def test_frozen_weights_get_no_gradient() -> None:
    """Also one of those that are joined; the others of it get theirs."""
    made, layers = model(dtype=torch.float64)
    attention = made.decoder.blocks[0].attention
    attention.key.weight.requires_grad_(False)  # type: ignore[union-attr]
    attention.out.weight.requires_grad_(False)  # type: ignore[union-attr]
    with accumulate_weight_grads(layers):
        backward(made)
    found = taken(made)
    whole, _ = model(dtype=None)
    backward(whole.double())
    wanted = taken(whole)
    missing = {"decoder.blocks.0.attention.key.weight", "decoder.blocks.0.attention.out.weight"}
    assert wanted.keys() - found.keys() == missing
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw8bit"])
def test_a_step_is_seen(kind: str) -> None:
    """Whatever the optimizer, the next pass is that of a model which never held another weight, in the same memory."""
    made, layers = model()
    with accumulate_weight_grads(layers):
        backward(made)
    places = [layer.rows.data_ptr() for layer in layers if layer.rows is not None]
    build_optimizer(made, OptimizerConfig(kind=kind, lr=1e-1), "off").step()  # type: ignore[arg-type]
    made.zero_grad()
    fresh, _ = model()
    fresh.load_state_dict(made.state_dict())
    for each in (made, fresh):
        backward(each)
    assert [layer.rows.data_ptr() for layer in layers if layer.rows is not None] == places
    found, wanted = taken(made), taken(fresh)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
    first, _ = model()
    backward(first)
    assert not torch.equal(found["head.weight"], taken(first)["head.weight"])


def test_a_model_that_was_moved_to_another_type() -> None:
    made, layers = model()
    backward(made)
    made.double().float()
    backward(made)
    assert all(layer.rows is not None and layer.rows.dtype == torch.bfloat16 for layer in layers)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "selective"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches, compiled and recomputed, compared with float64; no farther than autocast's."""
    if interpreted.INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.undo()
    right, _ = model(dtype=None)
    right.double()
    sides = []
    for exchanged in (False, True):
        made, layers = model(dtype=dtype if exchanged else None)
        made.cuda()
        if exchanged:
            checkpoint_blocks(made, kind)
            for block in made.decoder.blocks:
                block.compile(fullgraph=True, options={"comprehensive_padding": False})
        with accumulate_weight_grads(layers):
            for seed in (0, 1):
                backward(made, seed, "cuda", dtype)
        sides.append({name: gradient.cpu() for name, gradient in taken(made).items()})
    for seed in (0, 1):
        backward(right, seed)
    exact = taken(right)
    far = [sum(float((side[name] - wanted).norm() / wanted.norm()) for name, wanted in exact.items()) for side in sides]
    assert far[1] < 1.1 * far[0]
