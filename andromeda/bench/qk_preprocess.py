"""Speed of the preprocessing of queries and keys: by the fused kernel, by the separate parts, and by the parts under torch.compile.

    python -m andromeda.bench.qk_preprocess --out benchmarks/results/qk.json

The bound is the time to read and write each byte once at the measured bandwidth: forward the inputs, the rotary tables and the
outputs; backward the gradient of the outputs, the inputs again if they are normalized, the tables, and the gradient of the
inputs. Backward is measured together with forward. Errors are relative, of all outputs and gradients, in the Euclidean norm,
against the parts in float64 on the same bfloat16 inputs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from andromeda.bench.record import BenchmarkParser, command_line, record, save
from andromeda.bench.timing import measured_hardware, median_ms
from andromeda.config.model import AlibiConfig, AttentionConfig, ModelConfig, RotaryConfig
from andromeda.model.position import build_alibi, build_rotary
from andromeda.model.qk_norm import build_qk_norm
from andromeda.model.qk_preprocess import apply, reference

TOKENS, HEADS, KV_HEADS, HEAD_DIM = 32768, 24, 1, 128
LONG_RANGE = RotaryConfig(kind="xpos", fraction=0.5, layout="interleaved", scale_base=TOKENS)
QK_CASES: dict[str, dict[str, Any]] = {
    "RMS norm, RoPE on whole heads": {"norm": "rms", "rotary": RotaryConfig(kind="rope"), "fold": False},
    "learned L2 norm, xPos on half heads, interleaved": {"norm": "l2_dim_scale", "rotary": LONG_RANGE, "fold": False},
    "the same, ALiBi folded": {"norm": "l2_dim_scale", "rotary": LONG_RANGE, "fold": True},
    "RMS norm, RoPE on whole heads, ALiBi folded": {"norm": "rms", "rotary": RotaryConfig(kind="rope"), "fold": True},
}

Function = Callable[..., tuple[Tensor, Tensor]]


@dataclass
class QKTiming:
    """One measurement; times in milliseconds."""

    case: str
    implementation: str
    forward_ms: float
    forward_floor_ms: float | None
    forward_backward_ms: float
    forward_backward_floor_ms: float | None
    error: float

    def __str__(self) -> str:
        figures = (f"{name} {value:.3g}" for name, value in asdict(self).items() if isinstance(value, float))
        return f"{self.case:50s} {self.implementation:9s} " + ", ".join(figures)


def inputs(
    norm: str, rotary: RotaryConfig, fold: bool, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[Any], list[Tensor]]:
    """Arguments of `prepare` for one row of tokens, and the leaves among them; the same numbers in every dtype."""
    config = ModelConfig(
        max_seq_len=tokens,
        attention=AttentionConfig(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, qk_norm=norm),
        rotary=rotary,
        alibi=AlibiConfig(num_heads=HEADS // 2 * fold, fold_into_qk=fold),
    )
    wide = torch.promote_types(dtype, torch.float32)
    part = build_qk_norm(config).to(device, wide)
    rotation = build_rotary(config)(torch.arange(tokens, device=device)[None], tokens, wide)
    bias = build_alibi(config)(0, tokens, device)
    generator = torch.Generator(device).manual_seed(0)
    D = HEAD_DIM - 4 * fold
    q, k = (
        torch.randn(1, tokens, heads, D, device=device, generator=generator).bfloat16().to(dtype).requires_grad_()
        for heads in (HEADS, KV_HEADS)
    )
    return [q, k, part, rotation, bias, part.scale], [q, k, *part.parameters()]


def moved(arguments: list[Any], out: tuple[Tensor, Tensor]) -> tuple[int, int]:
    """Bytes moved forward, and forward and backward."""
    q, k, norm, rotation, bias, _ = arguments
    raw, prepared = (sum(x.numel() * x.element_size() for x in pair) for pair in ((q, k), out))
    # Tables that queries and keys share are read once.
    tables = {t.data_ptr(): t.numel() * t.element_size() for t in (*rotation.query, *rotation.key)}
    digits = bias.digits.numel() * bias.digits.element_size() if hasattr(bias, "digits") else 0
    normalized = raw if norm.fused_spec().kind != "none" else 0
    forward = raw + prepared + sum(tables.values()) + digits
    # The folded bias columns of the output gradient are not needed.
    return forward, forward + raw + normalized + sum(tables.values()) + raw


def results(function: Function, arguments: list[Any], leaves: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients for a random output gradient."""
    out = function(*arguments)
    generator = torch.Generator(out[0].device).manual_seed(1)
    gradients = [torch.randn(x.shape, device=x.device, generator=generator).bfloat16().to(x.dtype) for x in out]
    return [x.detach() for x in (*out, *torch.autograd.grad(out, leaves, gradients))]


def measure(
    case: str, implementation: str, function: Function, exact: list[Tensor], tokens: int, device: torch.device, rep: int
) -> QKTiming:
    """One implementation of one case."""
    arguments, leaves = inputs(**QK_CASES[case], tokens=tokens, device=device, dtype=torch.bfloat16)
    found = results(function, arguments, leaves)
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
    gradients = [torch.randn_like(x) for x in found[:2]]

    def forward_backward() -> None:
        torch.autograd.grad(function(*arguments), leaves, gradients)

    known = measured_hardware(device)
    floors = [1e3 * size / known.bandwidth if known else None for size in moved(arguments, (found[0], found[1]))]
    with torch.no_grad():
        forward_ms = median_ms(lambda: function(*arguments), device.type, rep, graph=True)
    return QKTiming(
        case, implementation, forward_ms, floors[0], median_ms(forward_backward, device.type, rep, graph=True), floors[1], max(errors)
    )


def sweep(tokens: int, device: torch.device, rep: int) -> Iterator[QKTiming]:
    """All implementations of all cases."""
    for case, parts in QK_CASES.items():
        arguments, leaves = inputs(**parts, tokens=tokens, device=device, dtype=torch.float64)
        exact = results(reference, arguments, leaves)
        del arguments, leaves
        torch._dynamo.reset()
        implementations: dict[str, Function] = {"kernel": apply, "compiled": torch.compile(reference), "parts": reference}
        for implementation, function in implementations.items():
            yield measure(case, implementation, function, exact, tokens, device, rep)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = BenchmarkParser(prog="andromeda bench qk", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="file for the result, JSON")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="sequence length")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rep", type=int, default=50, help="milliseconds for which each function is timed")
    options = parser.parse_args(arguments)
    command = command_line("qk", sys.argv[1:] if arguments is None else arguments)
    shape = {"tokens": options.tokens, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"}
    rows: list[dict[str, Any]] = []
    for row in sweep(options.tokens, torch.device(options.device), options.rep):
        print(row, flush=True)
        rows.append(asdict(row))
        save(options.out, record(command, {"shape": shape, "rows": rows}))


if __name__ == "__main__":
    main()
