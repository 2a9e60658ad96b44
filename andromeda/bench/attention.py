"""Speed and error of every attention backend on the mask patterns that models use, with roofline bounds.

    python -m andromeda.bench.attention --out benchmarks/results/attention.json

Only pairs allowed by the mask are counted: 4 D FLOPs per pair forward, 3.5 times as many forward and backward (arXiv 2307.08691).
The bound is the larger of these FLOPs at the measured matmul rate and of all inputs and outputs at the measured bandwidth. Errors
are relative, in the Euclidean norm, of the last 64 queries against float64, with that of the eager reference in the same
dtype. Times are medians with a cold L2 cache. `first` is the first call, with all compilation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from andromeda.bench import qk_preprocess
from andromeda.bench.record import BenchmarkParser, command_line, record, save
from andromeda.bench.timing import measured_hardware
from andromeda.model.flops import attention_pairs
from andromeda.model.position.alibi import FoldedBias, slopes
from andromeda.model.qk_preprocess import apply
from andromeda.ops.attention import AttentionSpec, backends, eager, flex

HEADS, KV_HEADS, HEAD_DIM, ALIBI_HEADS = 24, 1, 128, 12
WINDOW, DOCUMENT = 1024, 2000
"""Tokens of a sliding window, and mean tokens of a document."""
CHECKED = 64
"""Queries whose error is measured."""
TOTAL_TOKENS = 32768
"""Tokens of a batch."""
PREPARED = "the same, ALiBi folded"
"""The case of `bench qk` with the parts of preset `andromeda`."""


@dataclass(frozen=True)
class AttentionCase:
    """One attention pattern and the backends to measure."""

    name: str
    backends: tuple[str, ...]
    window: int = 0
    documents: bool = False
    alibi: str = ""
    """`slopes` or `folded`."""
    prepared: bool = False
    """Include QK norm, xPos and folding of ALiBi in the time, as in a layer of preset `andromeda`; else q and k are inputs."""
    queries: int = 0
    """0 is all (training). Otherwise only the last ones, forward only."""
    rows: int = 0
    """Batch size; 0 is as many as make 32,768 tokens."""


ATTENTION_CASES = (
    AttentionCase("causal", ("fa4", "cudnn", "flex", "flash")),
    AttentionCase("causal, ALiBi folded", ("fa4", "cudnn", "flash"), alibi="folded"),
    AttentionCase("causal, QK norm + xPos + ALiBi folded", ("fa4", "cudnn", "flash"), alibi="folded", prepared=True),
    AttentionCase("causal, ALiBi slopes", ("flex",), alibi="slopes"),
    AttentionCase("window", ("fa4", "flex"), WINDOW),
    AttentionCase("window, documents, ALiBi folded", ("fa4", "flex"), WINDOW, documents=True, alibi="folded"),
    AttentionCase("documents", ("fa4",), documents=True),
    AttentionCase("one query", ("flash", "decode", "sdpa", "fa4"), queries=1, rows=1),
    AttentionCase("one query, documents", ("decode", "sdpa"), queries=1, documents=True, rows=1),
    AttentionCase("one query, ALiBi slopes", ("decode",), alibi="slopes", queries=1, rows=1),
    AttentionCase("1024 queries", ("fa4", "flash"), queries=1024, rows=1),
)


@dataclass
class AttentionTiming:
    """One measurement. Times in milliseconds, rates in TFLOP/s; None was not measured."""

    case: str
    backend: str
    tokens: int
    rows: int
    refused: str | None = None
    first_s: float | None = None
    forward_ms: float | None = None
    forward_floor_ms: float | None = None
    forward_tflops: float | None = None
    forward_backward_ms: float | None = None
    forward_backward_floor_ms: float | None = None
    forward_backward_tflops: float | None = None
    error: float | None = None
    reference_error: float | None = None

    def __str__(self) -> str:
        if self.refused:
            return f"{self.case:40s} {self.tokens:6d} {self.backend:6s} refuses: {self.refused}"
        figures = (f"{name} {value:.3g}" for name, value in asdict(self).items() if isinstance(value, float))
        return f"{self.case:40s} {self.tokens:6d} {self.backend:6s} " + ", ".join(figures)


Ready = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Projected queries and keys -> those that attention takes."""


def inputs(case: AttentionCase, tokens: int, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, AttentionSpec]:
    """q, k, v in bfloat16 and the pattern, normalized; as they were before, if the work prepares them."""
    g = torch.Generator(device).manual_seed(0)
    content = HEAD_DIM - 4 * (case.alibi == "folded")

    def random(heads: int, width: int, normalized: bool) -> Tensor:
        x = torch.randn(rows, tokens, heads, width, device=device, generator=g)
        return (torch.nn.functional.rms_norm(x, (width,)) if normalized else x).bfloat16()

    q, k, v = random(HEADS, content, True), random(KV_HEADS, content, True), random(KV_HEADS, HEAD_DIM, False)
    scale = HEAD_DIM**-0.5
    heads = torch.nn.functional.pad(slopes(ALIBI_HEADS, device), (0, HEADS - ALIBI_HEADS))
    if case.alibi == "folded" and not case.prepared:
        index = torch.arange(tokens, device=device)
        digits = torch.stack([index // 65536, index // 256 % 256, index % 256, torch.zeros_like(index)], -1)
        q, k = FoldedBias(heads, digits).fold(q, k, scale)
    numbers = None
    if case.documents:
        numbers = (torch.rand(rows, tokens, device=device, generator=g) < 1 / DOCUMENT).cumsum(1)
    queries = case.queries or tokens
    documents = None if numbers is None else (numbers if queries == tokens else numbers[:, -queries:].contiguous(), numbers)
    pattern = AttentionSpec(scale, case.window, documents, heads if case.alibi == "slopes" else None)
    return q[:, -queries:].contiguous(), k, v, pattern


def preparation(case: AttentionCase, tokens: int, device: torch.device) -> tuple[Ready, list[Tensor], float | None]:
    """The timed preprocessing of queries and keys, its learned scales, and its softmax scale."""
    if not case.prepared:
        return (lambda q, k: (q, k)), [], None
    arguments, leaves = qk_preprocess.inputs(**qk_preprocess.QK_CASES[PREPARED], tokens=tokens, device=device, dtype=torch.bfloat16)
    return (lambda q, k: apply(q, k, *arguments[2:])), leaves[2:], arguments[-1]


def pairs(pattern: AttentionSpec, queries: int, tokens: int, rows: int) -> int:
    """Query-key pairs that the mask allows, over the batch, per head."""
    if queries < tokens:
        return rows * (attention_pairs(tokens) - attention_pairs(tokens - queries))
    if pattern.documents is None:
        return rows * attention_pairs(tokens, pattern.window)
    lengths = (row.unique_consecutive(return_counts=True)[1].tolist() for row in pattern.documents[0])
    return sum(attention_pairs(length, pattern.window) for row in lengths for length in row)


def floors(operations: float, moved: float, device: torch.device) -> float | None:
    """Least milliseconds for these FLOPs and bytes on this device, if its rates are known."""
    known = measured_hardware(device)
    rate = known and known.rate("bf16")
    return 1e3 * max(operations / rate, moved / known.bandwidth) if known and rate else None


def median_ms(function: Callable[[], Any], device: torch.device, rep: int) -> float:
    """Median time of a call, over about `rep` milliseconds."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=20, rep=rep, return_mode="median"))
    from torch.utils.benchmark import Timer

    return Timer("function()", globals={"function": function}).blocked_autorange(min_run_time=rep / 1e3).median * 1e3


def measure(case: AttentionCase, backend: str, tokens: int, device: torch.device, rep: int) -> AttentionTiming:
    """One backend on one case."""
    B = case.rows or max(1, TOTAL_TOKENS // tokens)
    row = AttentionTiming(case.name, backend, tokens, B)
    q, k, v, pattern = inputs(case, tokens, B, device)
    ready, scales, scale = preparation(case, tokens, device)
    pattern = replace(pattern, scale=scale or pattern.scale)
    trains = not case.queries
    leaves = [x.requires_grad_(trains) for x in (q, k, v, *scales)]
    module = backends()[backend]
    row.refused = module.unsupported_reason(pattern, *ready(q, k), v)
    if row.refused:
        return row
    grad = torch.randn_like(v[:, : q.shape[1]].expand(-1, -1, HEADS, -1))

    def forward() -> Tensor:
        with torch.set_grad_enabled(trains):
            out: Tensor = module.attend(*ready(q, k), v, pattern)
            return out

    def forward_backward() -> None:
        torch.autograd.grad(forward(), leaves, grad)

    row.first_s = _seconds(forward_backward if trains else forward, device)
    operations = 4 * HEADS * HEAD_DIM * pairs(pattern, q.shape[1], tokens, B)
    moved = sum(x.numel() * x.element_size() for x in (q, k, v, grad))
    row.forward_ms = median_ms(forward, device, rep)
    row.forward_tflops = operations / row.forward_ms / 1e9
    row.forward_floor_ms = floors(operations, moved, device)
    if trains:
        row.forward_backward_ms = median_ms(forward_backward, device, rep)
        row.forward_backward_tflops = 3.5 * operations / row.forward_backward_ms / 1e9
        # Backward reads the inputs, the output and its gradient, and writes three gradients.
        row.forward_backward_floor_ms = floors(3.5 * operations, 3 * moved, device)
    with torch.no_grad():
        row.error, row.reference_error = errors(forward(), *ready(q, k), v, pattern)
    return row


def _seconds(function: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def errors(out: Tensor, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionSpec) -> tuple[float, float]:
    """Relative errors of the last queries of the first sequence, of a backend and of the reference in the same dtype."""
    few = min(CHECKED, q.shape[1])
    q, k, v = q[:1, -few:], k[:1], v[:1]
    if pattern.documents is not None:
        pattern = replace(pattern, documents=(pattern.documents[0][:1, -few:], pattern.documents[1][:1]))
    exact = eager.attend(q.double(), k.double(), v.double(), pattern)
    same_type = eager.attend(q, k, v, pattern)
    found, own = (((x.double() - exact).norm() / exact.norm()).item() for x in (out[:1, -few:].detach(), same_type))
    return found, own


def sweep(lengths: list[int], device: torch.device, rep: int, budget: float) -> Iterator[AttentionTiming]:
    """All measurements within `budget` seconds; the rest are marked as not measured."""
    start = time.perf_counter()
    for tokens in lengths:
        # Code compiled for one length must not serve another: in training the length is fixed.
        torch._dynamo.reset()
        flex._compiled_flex_attention.cache_clear()
        for case in ATTENTION_CASES:
            for backend in case.backends:
                if time.perf_counter() - start > budget:
                    yield AttentionTiming(case.name, backend, tokens, 0, refused="time budget exhausted")
                    continue
                yield measure(case, backend, tokens, device, rep)
                if device.type == "cuda":
                    torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write the result after every measurement."""
    parser = BenchmarkParser(prog="andromeda bench attention", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="file for the result, JSON")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 8192], help="sequence lengths")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rep", type=int, default=100, help="milliseconds for which each function is timed")
    parser.add_argument("--budget", type=float, default=160.0, help="seconds after which no new measurement starts")
    options = parser.parse_args(arguments)
    command = command_line("attention", sys.argv[1:] if arguments is None else arguments)
    rows: list[dict[str, Any]] = []
    for row in sweep(options.lengths, torch.device(options.device), options.rep, options.budget):
        print(row, flush=True)
        rows.append(asdict(row))
        shape = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16", "window": WINDOW, "document": DOCUMENT}
        save(options.out, record(command, {"shape": shape, "rows": rows}))


if __name__ == "__main__":
    main()
