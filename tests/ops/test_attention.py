"""Every attention backend on every pattern: what it can do, it does as exactly as the reference does in the same type; what it
cannot, it refuses. The matrix of refusals is written down here, so that nothing falls back in silence.

The same tests run on a GPU with `pytest -m gpu tests/ops`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from andromeda.ops.attention import AttentionSpec, attend, backends, eager
from andromeda.utils.errors import ConfigError

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

FEATURES = (
    "causal",
    "window",
    "documents",
    "slopes",
    "softcap",
    "window documents",
    "window slopes",
    "documents slopes",
    "window documents slopes",
    "window documents slopes softcap",
)
EVERYTHING = FEATURES[-1]
SHAPES = {
    # T, S, H, G, D, Dv; no length is a multiple of a kernel's blocks
    "whole": (300, 300, 4, 2, 64, 64),
    "chunk": (70, 300, 4, 2, 64, 64),
    "token": (1, 300, 4, 2, 64, 64),
    "one key head": (300, 300, 4, 1, 64, 64),
    "as many key heads": (300, 300, 4, 4, 64, 64),
    "narrow values": (300, 300, 4, 2, 64, 32),
}

PLAIN_ONLY = ({"window"}, {"documents"}, {"slopes"}, {"softcap"}, {"narrow values"})
HALF_ON_CUDA = ({"cpu"}, {"float32"}, {"float64"})
REFUSALS: dict[str, tuple[set[str], ...]] = {
    "eager": (),
    "sdpa": ({"softcap"}, {"slopes", "cuda", "bfloat16"}, {"slopes", "cuda", "float16"}),
    "decode": ({"whole"}, {"chunk"}, {"one key head"}, {"as many key heads"}, {"narrow values"}, {"gradients"}, {"cpu", "bfloat16"}),
    "flash": (*HALF_ON_CUDA, *PLAIN_ONLY),
    "cudnn": (*HALF_ON_CUDA, *PLAIN_ONLY, {"chunk"}, {"token"}),
    "flex": ({"cpu", "gradients"}, {"cuda", "float64"}),
    "fa4": (*HALF_ON_CUDA, {"slopes"}, {"documents", "chunk"}, {"documents", "token"}, {"narrow values", "gradients"}),
}
"""A backend refuses a call that has all traits of one of its sets, and no other call."""


SELDOM = {("flex", "whole", "bfloat16"), ("flex", "chunk", "float32"), ("flex", "narrow values", "float64")}
"""Where FlexAttention computes all features on a CPU, which takes it a second each."""

ON_GPU = {
    "whole": ("causal", "window", "documents", "slopes", "softcap", "window documents", EVERYTHING),
    "chunk": ("causal", "window", EVERYTHING),
    "token": ("causal", EVERYTHING),
}
"""Where kernels differ: compiling all patterns in all shapes would take a GPU ten minutes."""


@dataclass(frozen=True)
class Case:
    """One call. Its traits are its words, the device and `gradients`."""

    backend: str
    device: str
    dtype: str
    features: str
    shape: str
    gradients: bool

    @property
    def traits(self) -> set[str]:
        traits = {self.device, self.dtype, self.shape, *self.features.split()}
        if self.gradients:
            traits.add("gradients")
        # All that one token sees is what lies in its window, so that nothing is left to mask.
        return traits - {"window"} if self.shape == "token" else traits

    @property
    def refused(self) -> bool:
        return any(refusal <= self.traits for refusal in REFUSALS[self.backend])

    def __str__(self) -> str:
        return "-".join((self.backend, self.device, self.dtype, self.features, self.shape, "both" if self.gradients else "forward"))


def cases() -> Iterator[Case]:
    """On a CPU everything that runs there, FlexAttention where it need not be compiled too often; on a GPU what kernels differ in."""
    for backend in REFUSALS:
        for features in FEATURES:
            for shape in SHAPES:
                common = features in ("causal", EVERYTHING) or shape in ("whole", "chunk", "token")
                for dtype in ("float64", "float32", "bfloat16"):
                    for gradients in (False, True):
                        case = Case(backend, "cpu", dtype, features, shape, gradients)
                        if common and (
                            backend in ("eager", "sdpa")
                            or (backend == "decode" and shape == "token")
                            or (backend, shape, dtype) in SELDOM
                            or (features, shape) == ("causal", "whole")
                        ):
                            yield case
                if features in ON_GPU.get(shape, ("causal", "window documents")):
                    yield Case(backend, "cuda", "bfloat16", features, shape, shape not in ("chunk", "token"))
        for dtype in ("float64", "float32", "float16"):
            yield Case(backend, "cuda", dtype, "causal", "whole", True)
            yield Case(backend, "cuda", dtype, EVERYTHING, "whole", True)


def inputs(case: Case, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, AttentionSpec]:
    """q, k, v and the pattern. The same numbers for every backend and device."""
    g = torch.Generator().manual_seed(seed)
    B, (T, S, H, G, D, Dv) = 2, SHAPES[case.shape]
    device, dtype = torch.device(case.device), TYPES[case.dtype]
    q, k, v = (torch.randn(B, *size, generator=g).to(device, dtype) for size in ((T, H, D), (S, G, D), (S, G, Dv)))
    options: dict[str, Any] = {}
    if "window" in case.features:
        options["window"] = 130
    if "documents" in case.features:
        numbers = (torch.rand(B, S, generator=g) < 0.015).cumsum(1).to(device, torch.int32)
        options["documents"] = numbers[:, S - T :], numbers
    if "slopes" in case.features:
        options["slopes"] = torch.tensor([0.5, 2**-5, 0.0, 2**-8][:H], dtype=torch.float64, device=device)
    if "softcap" in case.features:
        options["softcap"] = 1.5
    return q, k, v, AttentionSpec(D**-0.5, **options)


def results(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionSpec, backend: str, dtype: torch.dtype, gradients: bool) -> list[Tensor]:
    """The output, and with `gradients` those of q, k and v for a fixed gradient of the output; all in float64."""
    leaves = [x.to(dtype).requires_grad_(gradients) for x in (q.detach(), k.detach(), v.detach())]
    out = attend(*leaves, pattern, backend)
    if not gradients:
        return [out.double()]
    g = torch.Generator().manual_seed(1)
    grad = torch.randn(out.shape, generator=g).to(v)
    return [x.double() for x in (out, *torch.autograd.grad(out, leaves, grad.to(dtype)))]


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("case", [pytest.param(c, marks=GPU if c.device == "cuda" else [], id=str(c)) for c in cases()])
def test_a_backend_is_as_exact_as_the_reference_or_refuses(case: Case) -> None:
    q, k, v, pattern = inputs(case)
    dtype = TYPES[case.dtype]
    if case.refused:
        with pytest.raises(
            ConfigError, match=f"Attention backend '{case.backend}' cannot compute this call: .+; use backend auto or eager"
        ):
            results(q, k, v, pattern, case.backend, dtype, case.gradients)
        return
    if case.backend == "fa4":
        pytest.importorskip("flash_attn.cute", reason="needs flash-attn-4")
    exact = results(q, k, v, pattern, "eager", torch.float64, case.gradients)
    same_type = results(q, k, v, pattern, "eager", dtype, case.gradients)
    actual = results(q, k, v, pattern, case.backend, dtype, case.gradients)
    floor = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for what, a, s, e in zip(("output", "dq", "dk", "dv"), actual, same_type, exact, strict=False):
        assert a.shape == e.shape
        bar = 2 * error(s, e) + floor
        assert error(a, e) <= bar, f"{what}: {error(a, e):.2e} is {error(a, e) / bar * 2:.2f} times the reference's own {error(s, e):.2e}"


def test_the_matrix_names_every_backend() -> None:
    assert set(REFUSALS) == set(backends())


def one_by_one(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionSpec) -> Tensor:
    """Attention as the contract says it, one pair of query and key after the other."""
    (B, T, H, _), (S, G), out = q.shape, k.shape[1:3], torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, t, h in ((b, t, h) for b in range(B) for t in range(T) for h in range(H)):
        position, weights, group = t + S - T, {}, h // (H // G)
        for s in range(position + 1):
            if pattern.window and position - s >= pattern.window:
                continue
            if pattern.documents is not None and pattern.documents[0][b, t] != pattern.documents[1][b, s]:
                continue
            logit = pattern.scale * sum(x * y for x, y in zip(q[b, t, h].tolist(), k[b, s, group].tolist(), strict=True))
            if pattern.softcap:
                logit = pattern.softcap * math.tanh(logit / pattern.softcap)
            slope = 0.0 if pattern.slopes is None else pattern.slopes[h].item()
            weights[s] = math.exp(logit - slope * (position - s))
        for s, weight in weights.items():
            out[b, t, h] += weight / math.fsum(weights.values()) * v[b, s, group]
    return out


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(("T", "G"), [(9, 2), (4, 1), (1, 4)])
def test_the_reference_does_what_the_contract_says(features: str, T: int, G: int) -> None:
    g = torch.Generator().manual_seed(3)
    B, S, H = 2, 9, 4
    q, k, v = (torch.randn(B, n, heads, D, generator=g, dtype=torch.float64) for n, heads, D in ((T, H, 3), (S, G, 3), (S, G, 2)))
    numbers = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 6]])
    pattern = AttentionSpec(
        0.7,
        window=3 if "window" in features else 0,
        documents=(numbers[:, S - T :], numbers) if "documents" in features else None,
        slopes=torch.tensor([1.0, 0.25, 0.0, 0.1], dtype=torch.float64) if "slopes" in features else None,
        softcap=0.8 if "softcap" in features else 0.0,
    )
    torch.testing.assert_close(eager.attend(q, k, v, pattern), one_by_one(q, k, v, pattern), atol=1e-13, rtol=0)
