"""Every Triton kernel compiles for Hopper at the sizes of real models, with all its values in registers, of which it leaves enough for
a second program on the same multiprocessor. Needs Triton, but no GPU.

The launchers run on tensors without contents, so that sizes cost no memory, under a stand-in for Triton's driver that names the
target. NVIDIA's cuobjdump, which comes with Triton, reads from the machine code what a thread keeps in local memory: a stack
or spilled registers, which would cost a kernel that only moves memory much of its speed.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver, jit  # noqa: E402

from andromeda.ops.triton import (  # noqa: E402
    activation,
    add_norm_shift,
    cross_entropy,
    decode_attention,
    embedding,
    float8,
    gelu,
    qk_preprocess,
)
from tests.ops import interpreted  # noqa: E402

pytestmark = pytest.mark.skipif(interpreted.INTERPRETED, reason="the interpreter compiles nothing")

LARGEST_GRID = 2**31 - 1
REGISTERS, PROGRAMS = 65536, 2
"""Registers of a Hopper multiprocessor, and programs that must fit into them, so that one computes while the other waits for memory."""
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Hopper:
    """What the compiler asks a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """The number of programs and the compiled kernel of every launch."""
    real = jit.JITFunction.run
    found: list[tuple[int, Any]] = []

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        kernel = real(self, *args, grid=grid, warmup=True, **options)
        found.append((grid[0], kernel))
        return kernel

    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(driver, "_active", Hopper())
    return found


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def loss(tokens: int, vocabulary: int, softcap: float) -> None:
    cross_entropy.logits_loss(empty(tokens, vocabulary), empty(tokens, dtype=torch.long), softcap, 1e-4, True, -100)


def head_gradient(dtype: torch.dtype) -> None:
    cross_entropy.scale_grad(empty(50432, 2560, dtype=torch.float32), empty(1, dtype=torch.float32), dtype, dtype == torch.float32)


def inner(tokens: int, hidden: int) -> None:
    u, bias = empty(tokens, hidden), empty(hidden, dtype=torch.float32)
    gelu.gelu(u, bias)
    gelu.gelu_backward(u, u, bias)


def trained8(tokens: int, width: int, hidden: int) -> None:
    """A layer's activations and gradients in 8 bits, and its weights."""
    scale, values, gradients = empty(dtype=torch.float32), torch.float8_e4m3fn, torch.float8_e5m2
    float8.amax_and_norm_partials(empty(width, hidden, dtype=values), 16)
    for x in (empty(tokens, width), empty(hidden, width, dtype=torch.float32)):
        float8.amax_and_norm_partials(x, 16)
        float8.cast_to_float8(x, scale, values)
    float8.cast_to_float8(empty(tokens, width), scale, gradients, row_sum=True)
    u, bias = empty(tokens, hidden), empty(hidden, dtype=torch.float32)
    gelu.gelu_fp8(u, bias, scale, values)
    gelu.gelu_fp8_backward(u, u, bias, scale, scale, values, gradients)


def table(tokens: int, width: int, parts: int, dtype: torch.dtype) -> None:
    dys = [empty(tokens, width // parts) for _ in range(parts)]
    embedding.embedding_weight_grad(empty(tokens, dtype=torch.long), dys, 50304, dtype)


def heads(tokens: int, H: int, G: int, D: int, norm: str, layout: str, turned: int, fold: bool = False) -> None:
    raw = [empty(1, tokens, count * D).unflatten(-1, (count, D)) for count in (H, G)]
    tables = [empty(1, tokens, 1, turned // 2, dtype=torch.float32) for _ in range(4)]
    tails = [empty(H), empty(tokens, 4, dtype=torch.long)] if fold else []
    scales = (empty(H, D, dtype=torch.float32), empty(G, D, dtype=torch.float32)) if norm == "l2" else (None, None)
    prepared = qk_preprocess.preprocess_qk((raw[0], raw[1]), scales, tables, tails, norm, layout)
    qk_preprocess.preprocess_qk_backward(prepared, raw, scales, tables, norm, layout, (empty(1, tokens, H, D), empty(1, tokens, G, D)))


def one_query(rows: int, keys: int, H: int, G: int, D: int, numbered: bool) -> None:
    documents = (empty(rows, 1, dtype=torch.long), empty(rows, keys, dtype=torch.long)) if numbered else None
    decode_attention.decode_attention(empty(rows, 1, H, D), empty(rows, keys, G, D), empty(rows, keys, G, D), 0.1, 0, documents, None, 0.0)


def rows_activated(tokens: int, width: int) -> None:
    activation.activate(empty(tokens, width), "gelu")


def between(tokens: int, width: int, eight_bits: bool) -> None:
    x, row = empty(1, tokens, width), empty(width)
    y = empty(1, tokens, width, dtype=torch.float8_e4m3fn if eight_bits else torch.bfloat16)
    made = add_norm_shift.NormShiftOutputs(y, empty(tokens, dtype=torch.float32) if eight_bits else None, x, row)
    given = add_norm_shift.NormShiftInputs(x, x, row, row, row, empty(1, tokens, dtype=torch.long))
    add_norm_shift.add_norm_shift(given, made, True, 1e-5, (width // 2, width), 448.0 if eight_bits else 0.0)
    add_norm_shift.add_norm_shift_backward(x, row, given.documents, x, x, True, 1e-5, (width // 2, width))


WORKS: dict[str, Callable[[], None]] = {
    "loss": lambda: loss(32768, 50432, 0.0),
    "loss, soft cap": lambda: loss(65536, 50304, 15.0),
    "gradient of the head": lambda: head_gradient(torch.float32),
    "gradient of the head, 16 bits": lambda: head_gradient(torch.bfloat16),
    "gelu and its gradients": lambda: inner(200_000, 10240),
    "training in 8 bits": lambda: trained8(16384, 2560, 10240),
    "training in 8 bits, a tail": lambda: trained8(200_000, 3328, 4224),
    "table of value embeddings": lambda: table(65536, 9216, 1, torch.bfloat16),
    "table of value embeddings, by layers": lambda: table(65536, 9216, 12, torch.float32),
    "activation in 8 bits": lambda: activation.activate_quantize(empty(200_000, 10240), "gelu", 448.0) and None,
    "activation in 8 bits, gated width": lambda: activation.activate_quantize(empty(32768, 4224), "relu2", 448.0) and None,
    "activation": lambda: rows_activated(200_000, 10240),
    "between matmuls": lambda: between(200_000, 2560, False),
    "between matmuls, 8 bits": lambda: between(32768, 2560, True),
    "heads, folded ALiBi": lambda: heads(200_000, 24, 1, 124, "l2", "interleaved", 62, fold=True),
    "heads, xPos": lambda: heads(32768, 24, 1, 128, "l2", "interleaved", 64),
    "heads, scales and RoPE": lambda: heads(32768, 24, 1, 128, "l2", "half", 128),
    "heads, few tokens": lambda: [heads(tokens, 24, 1, 124, "l2", "interleaved", 62, fold=True) for tokens in (1, 500)] and None,
    "heads, narrow": lambda: heads(32768, 16, 4, 64, "l2", "half", 64),
    "heads, RoPE": lambda: heads(32768, 16, 4, 64, "rms", "half", 64),
    "one query": lambda: one_query(1, 32768 + 256, 24, 1, 128, numbered=True),
    "one query, grouped heads": lambda: one_query(8, 8192, 16, 4, 64, numbered=False),
}


@pytest.mark.parametrize("work", WORKS.values(), ids=WORKS)
def test_a_kernel_fits_into_registers(work: Callable[[], None], launched: list[tuple[int, Any]], tmp_path: Path) -> None:
    work()
    assert launched
    for programs, kernel in launched:
        assert 0 < programs <= LARGEST_GRID
        file = tmp_path / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        report = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
        registers, stack, local = (int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
        print("REGS", kernel.name, registers, kernel.metadata.num_warps, kernel.metadata.shared)
        assert PROGRAMS * kernel.metadata.num_warps * 32 * registers <= REGISTERS, (kernel.name, registers)
        assert (stack, local) == (0, 0), report
        # Without a stack nothing reads the register that points to it, unless ptxas has lost a value and reads some register; only
        # where one number is converted as a pair, the other may be any.
        code = subprocess.run([CUOBJDUMP, "--dump-sass", file], capture_output=True, text=True, check=True).stdout
        assert not [line for line in code.splitlines() if re.search(r"\bR1\b", line) and not re.search(r"LDC R1|F2FP", line)]
