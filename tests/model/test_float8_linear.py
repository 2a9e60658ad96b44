"""Models that train in 8 bits: the same parameters, casts that follow them, and the same gradients compiled and recomputed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from andromeda.config.model import AlibiConfig, AttentionConfig, FeedForwardConfig, ModelConfig
from andromeda.config.train import OptimizerConfig
from andromeda.model import fused_qkv
from andromeda.model.cached_cast_linear import refresh
from andromeda.model.float8_linear import Float8TrainingLinear
from andromeda.model.transformer import Transformer
from andromeda.ops import float8
from andromeda.optim import build_optimizer
from andromeda.train.activation_checkpoint import checkpoint_blocks
from andromeda.train.convert_float8 import convert_to_float8
from andromeda.train.precision import Float8
from tests.model.exchanged import CONFIG, parameters_stay
from tests.ops import emulated8, interpreted

assert emulated8


@pytest.fixture(autouse=True)
def accepted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The path that a GPU takes, on a CPU."""
    monkeypatch.setattr(float8, "has_kernels", lambda x: True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(eight: bool = True, config: ModelConfig = CONFIG) -> Transformer:
    """A model whose layers were exchanged."""
    made = Transformer(config, seed=1)
    if eight:
        convert_to_float8(made.decoder, lambda path: True)
    return made


def ids() -> Tensor:
    return torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))


def gradients(made: Transformer) -> dict[str, Tensor]:
    """Of one micro-batch, under autocast as a step has it."""
    made.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        made(ids()).float().square().mean().backward()
    return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def test_parameters_and_what_is_saved_stay_the_same() -> None:
    parameters_stay(lambda root: convert_to_float8(root, lambda path: True), Float8TrainingLinear, gradients)


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_gradients_are_as_near_those_of_bfloat16_as_with_exact_maxima(kind: str) -> None:
    """torchao takes every scale from the largest value. A network with no kernel of its own computes its matmuls one by one."""
    pytest.importorskip("torchao")
    config = CONFIG.model_copy(update={"feedforward": FeedForwardConfig(kind=kind, intermediate_size=64, bias=True)})  # type: ignore[arg-type]
    plain, ours = gradients(model(False, config)), gradients(model(True, config))
    theirs = gradients(Float8(torch.device("cpu")).convert_model(model(False, config)))
    assert plain.keys() == ours.keys() == theirs.keys()
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())

    def far(found: dict[str, Tensor]) -> float:
        return sum(float((found[name] - wanted).norm() / wanted.norm()) for name, wanted in plain.items()) / len(plain)

    assert 0.01 < far(ours) < 1.3 * far(theirs)


def test_a_key_that_alone_is_too_narrow_for_8_bits_is_joined() -> None:
    """Folded ALiBi takes four of its columns. What is filled up around it is in no gradient."""
    config = CONFIG.model_copy(update={"alibi": AlibiConfig(num_heads=2, fold_into_qk=True)})
    plain, made = gradients(model(False, config)), model(True, config)
    key = made.decoder.blocks[0].attention.key
    assert isinstance(key, Float8TrainingLinear)
    assert key.out_features % 16
    ours = gradients(made)
    assert ours.keys() == plain.keys()
    for name, wanted in plain.items():
        assert float((ours[name] - wanted).norm()) < 0.35 * float(wanted.norm()), name
    x = torch.randn(1, 32, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(key(x), torch.nn.functional.linear(x, key.weight, key.bias))


@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("backend", ["", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_and_recomputed(kind: str, backend: str) -> None:
    """One graph for all layers without a break, also after the weights have changed; the same numbers.

    Inductor leaves out roundings to bfloat16 between, which turns some of the roundings to 8 bits over, and these some of those
    that follow: what comes out is as far from the eager numbers as these are from exact ones.
    """
    near = 0.25 if backend == "inductor" else 0.02
    plain, made = model(), model()
    checkpoint_blocks(made, kind)
    counter = CompileCounterWithBackend(backend) if backend else None
    for block in made.decoder.blocks:
        if counter:
            block.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        wanted, found = gradients(plain), gradients(made)
        for name, gradient in wanted.items():
            assert (found[name] - gradient).norm() <= near * gradient.norm(), name
        with torch.no_grad():
            for p in (*plain.parameters(), *made.parameters()):
                p.mul_(1.5)
    assert counter is None or counter.frame_count == 1


@pytest.mark.parametrize("kind", ["none", "selective"])
def test_passes_of_a_compiled_block(kind: str) -> None:
    """Forward: two inputs bounded by their norms, attention's output measured. Backward: three gradients measured, nothing cast again."""
    graphs: list[Counter[str]] = []

    def counted(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return make_boxed_func(graph.forward)

    made = model()
    checkpoint_blocks(made, kind)
    backend = aot_autograd(fw_compiler=counted, bw_compiler=counted, partition_fn=min_cut_rematerialization_partition)
    for block in made.decoder.blocks:
        block.compile(backend=backend)
    gradients(made)
    names = ("andromeda.amax_and_norm_partials.default", "andromeda.cast_to_float8.default", "aten._scaled_mm.default")
    assert [[graph[name] for name in names] for graph in graphs] == [[1, 3, 4], [3, 3, 8]]
    assert [graphs[0]["andromeda.gelu_fp8.default"], graphs[1]["andromeda.gelu_fp8_gradients.default"]] == [1, 1]


@pytest.mark.parametrize("norm", ["layer", "rms", "rms_plain"])
@pytest.mark.parametrize("kind", ["serial", "parallel"])
@pytest.mark.parametrize("shift", ["none", "chunks"])
def test_inputs_keep_to_the_bounds_of_their_norms(norm: str, kind: str, shift: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a gain is far larger than the others, and changes; what a norm feeds is not measured."""
    config = CONFIG.model_copy(
        update={
            "block": CONFIG.block.model_copy(update={"norm": norm, "kind": kind}),
            "shift": CONFIG.shift.model_copy(update={"kind": shift, "tokens": 3}),
        }
    )
    made, shares, real = model(True, config), [], emulated8.rounded

    def rounded(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        shares.append(float((x.float() / scale).abs().max() / torch.finfo(dtype).max))
        return real(x, scale, dtype)

    monkeypatch.setattr(emulated8, "rounded", rounded)
    bounds = []
    for size in (1.0, 100.0):
        with torch.no_grad():
            for name, p in made.decoder.named_parameters():
                if "norm" in name:
                    p[3] = size
        gradients(made)
        bounds.append([layer.bound for layer in made.modules() if isinstance(layer, Float8TrainingLinear) and layer.bound is not None])
    assert len(bounds[0]) == 2 * 2
    assert max(shares) <= 1
    for before, after in zip(*bounds, strict=True):
        assert float(after / before) == pytest.approx(1.0 if norm == "rms_plain" else 100.0)


def test_each_weight_is_cast_once_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined weights as one; again only after a step."""
    made, count = model(), 0
    real = float8.quantize_weights

    def counted(weights: Sequence[Tensor]) -> list[float8.Float8Weight]:
        nonlocal count
        count += len(weights)
        return real(weights)

    monkeypatch.setattr(float8, "quantize_weights", counted)
    for expected in (8, 8):
        gradients(made)
        assert count == expected
    build_optimizer(made, OptimizerConfig(kind="adamw", lr=1e-3)).step()
    gradients(made)
    assert count == 16


@pytest.mark.parametrize("kind", ["adamw", "muon", "adamw8bit"])
def test_a_step_is_seen(kind: str) -> None:
    """Whatever the optimizer, the next pass is that of a model which never held another weight."""
    made = model()
    gradients(made)
    build_optimizer(made, OptimizerConfig(kind=kind, lr=1e-1), "off").step()  # type: ignore[arg-type]
    fresh = model()
    fresh.load_state_dict(made.state_dict())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(made(ids()), fresh(ids()))
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert not torch.equal(made(ids()), fresh(ids()))


def test_layers_that_nobody_refreshed_cast_as_they_go() -> None:
    """Blocks that are called without the decoder: compiled too, the same numbers."""
    found = []
    for fresh in (True, False):
        made = model()
        attention: Any = made.decoder.blocks[0].attention
        layers = (attention.query, attention.value, attention.key)
        assert attention.project_qkv is fused_qkv.cached
        if fresh:
            refresh([attention.query])
            attention.query.bound = None
        x = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            out = fused_qkv.split(torch.compile(attention.project_qkv, backend="aot_eager", fullgraph=True)(x, layers), layers)
            alone = attention.query(x)
        torch.cat([*out, alone], -1).float().square().sum().backward()
        found.append([out[0], alone, *(layer.weight.grad for layer in layers)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_number_of_tokens_that_does_not_fit_keeps_bfloat16() -> None:
    made, plain = model(), model(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(ids()[:, :9]), plain(ids()[:, :9]))
        assert not torch.equal(made(ids()), plain(ids()))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "selective"])
def test_a_block_on_a_gpu(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients in 8 bits compared with those of bfloat16; compiled and recomputed they are as near."""
    if interpreted.INTERPRETED or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with fp8 matmuls")
    monkeypatch.undo()
    config = CONFIG.model_copy(
        update={
            "hidden_size": 256,
            "attention": AttentionConfig(num_heads=4, num_kv_heads=1, head_dim=64),
            "feedforward": FeedForwardConfig(kind="gelu", intermediate_size=1024, bias=True),
        }
    )

    def on_gpu(made: Transformer, compiled: bool) -> dict[str, Tensor]:
        if compiled:
            checkpoint_blocks(made, kind)
            for block in made.decoder.blocks:
                block.compile(fullgraph=True, options={"comprehensive_padding": False})
        with torch.autocast("cuda", torch.bfloat16):
            made(ids().cuda()).float().square().mean().backward()
        return {name: p.grad for name, p in made.named_parameters() if p.grad is not None}

    plain = on_gpu(model(False, config).cuda(), False)
    eager = on_gpu(model(True, config).cuda(), False)
    compiled = on_gpu(model(True, config).cuda(), True)
    for name, wanted in plain.items():
        assert (eager[name] - wanted).norm() < 0.2 * wanted.norm(), name
        assert (compiled[name] - eager[name]).norm() < 0.25 * wanted.norm(), name


def test_layers_that_cast_when_they_are_called_compute_the_same() -> None:
    """As under FSDP: with the same bounds of inputs, which follow the norms' gains, and gradients."""
    cached, made = model(), Transformer(CONFIG, seed=1)
    convert_to_float8(made.decoder, lambda path: True, cached=False)
    for _ in range(2):
        expected, found = gradients(cached), gradients(made)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        bounds = [[layer.bound for layer in each.modules() if isinstance(layer, Float8TrainingLinear)] for each in (cached, made)]
        assert [bound is None for bound in bounds[0]] == [bound is None for bound in bounds[1]]
        assert any(bound is not None for bound in bounds[1])
        assert all(layer.rows is None for layer in made.modules() if isinstance(layer, Float8TrainingLinear))
        with torch.no_grad():
            for each in (cached, made):
                for parameter in each.parameters():
                    parameter.mul_(1.5)
