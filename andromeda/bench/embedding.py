"""Speed of the gradient of an embedding table: by sort and segment sums, and by PyTorch.

    python -m andromeda.bench.embedding --out benchmarks/results/embedding.json

The table is that of value embeddings: 12 layers of 768 columns. PyTorch runs what autograd runs for it: the layers' gradients are
stacked if they are separate, cast to the table's dtype, and summed by `embedding_dense_backward`. The bound is the time to read
the gradient once and to write the dense gradient once, zeros included, at the measured bandwidth. Ids are uniform, or Zipf
distributed as words are (frequency 1 / rank). Errors are relative, in the Euclidean norm, against float64.

The same for lookups: rows gathered and RMS-normalized, by PyTorch and as fused by torch.compile.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from andromeda.bench.record import BenchmarkParser, command_line, record, save
from andromeda.bench.timing import measured_hardware, median_ms
from andromeda.ops.embedding import embedding_weight_grad, is_supported

TOKENS, VOCABULARY, LAYERS, WIDTH = 65536, 50304, 12, 768


@dataclass
class EmbeddingTiming:
    """One measurement; times in milliseconds."""

    case: str
    ids: str
    table: str
    """Dtype of the table and of its gradient."""
    implementation: str
    ms: float
    floor_ms: float | None
    error: float | None = None
    repeats: bool | None = None
    """Whether two runs gave identical bits."""

    def __str__(self) -> str:
        figures = (f"{name} {value:.3g}" for name, value in asdict(self).items() if isinstance(value, float))
        return f"{self.case:22s} {self.ids:8s} {self.table:9s} {self.implementation:9s} " + ", ".join(figures) + f", repeats {self.repeats}"


def draw(kind: str, tokens: int, vocabulary: int, device: torch.device) -> Tensor:
    """Ids (tokens,): uniform, or Zipf distributed over a random permutation of the vocabulary."""
    generator = torch.Generator(device).manual_seed(0)
    if kind == "uniform":
        return torch.randint(vocabulary, (tokens,), device=device, generator=generator)
    weights = 1 / torch.arange(1, vocabulary + 1, device=device, dtype=torch.float64)
    ranks = torch.searchsorted(
        weights.cumsum(0) / weights.sum(), torch.rand(tokens, device=device, dtype=torch.float64, generator=generator)
    )
    return torch.randperm(vocabulary, device=device, generator=generator)[ranks.clamp(max=vocabulary - 1)]


def floor(moved: float, device: torch.device) -> float | None:
    """Least milliseconds to move these bytes."""
    known = measured_hardware(device)
    return 1e3 * moved / known.bandwidth if known else None


def pytorch(ids: Tensor, dys: list[Tensor], rows: int, dtype: torch.dtype) -> Tensor:
    """What autograd does for a table whose columns were split."""
    dy = dys[0] if len(dys) == 1 else torch.stack(dys, 1).flatten(1)
    gradient: Tensor = torch.ops.aten.embedding_dense_backward(dy.to(dtype), ids, rows, -1, False)
    return gradient


def relative_error(found: Tensor, ids: Tensor, dys: list[Tensor]) -> float:
    """Relative error against float64, some columns at a time to save memory."""
    square = norm = 0.0
    for columns, dy in zip(found.split([dy.shape[1] for dy in dys], 1), dys, strict=True):
        for part, source in zip(columns.split(1024, 1), dy.split(1024, 1), strict=True):
            exact = torch.zeros(part.shape, dtype=torch.float64, device=part.device).index_add_(0, ids, source.double())
            square += float((part.double() - exact).square().sum())
            norm += float(exact.square().sum())
    return math.sqrt(square / norm)


def gradients(tokens: int, vocabulary: int, device: torch.device, rep: int) -> Iterator[EmbeddingTiming]:
    """Both implementations on every distribution of ids, dtype and split."""
    generator = torch.Generator(device).manual_seed(1)
    whole = torch.randn(tokens, LAYERS * WIDTH, device=device, generator=generator, dtype=torch.bfloat16)
    cuts = {"gradient": [whole], "gradient, by layers": [part.contiguous() for part in whole.chunk(LAYERS, 1)]}
    implementations: dict[str, Callable[[Tensor, list[Tensor], int, torch.dtype], Tensor]] = {"pytorch": pytorch}
    if is_supported(torch.empty(0, device=device)):
        implementations["kernel"] = embedding_weight_grad
    for kind in ("uniform", "zipf"):
        ids = draw(kind, tokens, vocabulary, device)
        for case, dys in cuts.items():
            for dtype in (torch.bfloat16, torch.float32):
                bytes_ = whole.numel() * 2 + vocabulary * LAYERS * WIDTH * dtype.itemsize
                for implementation, function in implementations.items():
                    first, second = (function(ids, dys, vocabulary, dtype) for _ in range(2))
                    row = EmbeddingTiming(case, kind, str(dtype).removeprefix("torch."), implementation, 0.0, floor(bytes_, device))
                    row.repeats, row.error = torch.equal(first, second), relative_error(first, ids, dys)
                    del first, second
                    row.ms = median_ms(partial(function, ids, dys, vocabulary, dtype), device.type, rep)
                    yield row


def reading(tokens: int, vocabulary: int, device: torch.device, rep: int, width: int = 2560) -> Iterator[EmbeddingTiming]:
    """Gather and norm: whether a hand-written fusion could be faster."""
    ids = draw("zipf", tokens, vocabulary, device)
    weight = torch.randn(vocabulary, width, device=device, dtype=torch.bfloat16)

    def gather(ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(ids, weight)

    def normed(ids: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(F.embedding(ids, weight), (width,))

    # A row that is read again can come from the cache.
    bytes_ = (ids.unique().numel() + tokens) * width * 2
    for case, function in (("gather", gather), ("gather, RMS norm", normed)):
        for implementation, run in (("pytorch", function), ("compiled", torch.compile(function))):
            run(ids, weight)  # compiles
            yield EmbeddingTiming(
                case, "zipf", "bfloat16", implementation, median_ms(partial(run, ids, weight), device.type, rep), floor(bytes_, device)
            )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = BenchmarkParser(prog="andromeda bench embedding", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="file for the result, JSON")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rep", type=int, default=50, help="milliseconds for which each function is timed")
    options = parser.parse_args(arguments)
    command = command_line("embedding", sys.argv[1:] if arguments is None else arguments)
    shape = {"tokens": options.tokens, "vocabulary": options.vocabulary, "layers": LAYERS, "width": WIDTH, "gradient": "bfloat16"}
    device, rows = torch.device(options.device), list[dict[str, Any]]()
    for source in (gradients, reading):
        for row in source(options.tokens, options.vocabulary, device, options.rep):
            print(row, flush=True)
            rows.append(asdict(row))
            save(options.out, record(command, {"shape": shape, "rows": rows}))


if __name__ == "__main__":
    main()
