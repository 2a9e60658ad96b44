"""Triton kernels for matrix-vector multiplication in decoding: a weight times a few sequences' vectors, limited by reading the weight.

A program computes a few outputs, which are rows of the weight, and reads them in blocks of 16 bytes per thread. It requests its
first blocks, about 16 KiB, before anything else, so that a multiprocessor with six to twelve programs always has at least 100 KiB
in flight. The prologue (norm, token shift) is recomputed by every program from a vector in the cache; the epilogue (bias,
activation, residual) is computed in registers. Accumulation is in float32.

A norm takes no pass of its own: mean and variance are summed during the matmul and applied at the end,

    sum_k w_k g_k (x_k - mean) / std = (sum_k w_k g_k (x_k - p) - (mean - p) sum_k w_k g_k) / std

with the row's first value as pivot p: like every value of the row it is within sqrt(K) standard deviations of the mean, which
bounds the cancellation in the differences.

With programmatic dependent launch a kernel starts while the one before it still runs, and requests its weights, which no kernel
writes; it waits for the end of that kernel before it touches anything else.

Shapes: M rows (one token of each sequence), K inputs, N outputs, J previous tokens of the token shift.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.activation import apply_activation
from andromeda.ops.triton.common import tuple_append
from andromeda.ops.triton.pdl import pdl_launch_dependents, pdl_launch_options, pdl_wait, supports_pdl

BYTES_PER_THREAD = 16
"""Bytes that a thread loads at once."""
LONG_ROW_BYTES = 8192
"""For weight rows above this size a program has at most two outputs, and as many threads as it can use."""
MANY_OUTPUTS = 8192
"""From this number of outputs on, not all programs are resident at once."""


class GemvLaunchConfig(NamedTuple):
    """Work of one program."""

    rows: int
    """Outputs of a program: 1, 2 or 4."""
    warps: int
    prefetch: int
    """Blocks of each weight row that are loaded before the program waits for the previous kernel."""


class GemvConstants(NamedTuple):
    """Values that are known when a kernel is compiled."""

    M: int
    K: int
    rows: int
    """Outputs of a program."""
    block: int
    """Inputs that a program loads at once."""
    blocks: int
    prefetch: int
    vector: int
    """Inputs that a thread loads at once."""
    norm: str
    """none, layer or rms."""
    tokens: int
    """J; 0 without token shift."""
    has_index: bool
    """The position of the current token among the keys is a tensor on the device."""
    activation: str
    pending_tokens: int
    """J of the past that this kernel updates on behalf of an earlier one; 0 if none."""
    pending_channels: int
    """Channels of that past."""
    pdl: bool
    """Launch with programmatic dependent launch."""


class TokenShiftPointers(NamedTuple):
    """What a token shift reads; None where absent."""

    past: Any = None
    """Normalized vectors of the previous tokens (M, J, K), the most recent one last."""
    q_documents: Any = None
    """Document numbers of the current tokens (M, 1)."""
    k_documents: Any = None
    """Document numbers of all keys (M, S)."""
    index: Any = None
    """Position of the current token among the keys ()."""
    q_documents_m: Any = 0
    k_documents_m: Any = 0
    last: Any = 0
    """The same as a number, where it is known on the host."""


@triton.jit
def _block_columns(block, constants: tl.constexpr):
    """Input indices of a block (n,), and their mask."""
    column = block * constants.block + tl.arange(0, constants.block)
    return column, column < constants.K


@triton.jit
def _load_block(row, block: tl.constexpr, constants: tl.constexpr):
    """A block of a row in float32 (n,), zero beyond the end."""
    column, mask = _block_columns(block, constants)
    is_full: tl.constexpr = (block + 1) * constants.block <= constants.K
    value = tl.load(row + column) if is_full else tl.load(row + column, mask=mask, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _mean_and_rstd(x, eps, constants: tl.constexpr):
    """Mean (zero for RMS norm) and inverse standard deviation of a row."""
    BLOCK: tl.constexpr = constants.block
    mean = 0.0
    if constants.norm == "layer":
        total = tl.zeros((BLOCK,), tl.float32)
        for block in tl.static_range(tl.constexpr(constants.blocks)):
            total += _load_block(x, block, constants)
        mean = tl.sum(total, 0) / constants.K
    square = tl.zeros((BLOCK,), tl.float32)
    for block in tl.static_range(tl.constexpr(constants.blocks)):
        value = _load_block(x, block, constants) - mean
        if (block + 1) * constants.block > constants.K:
            _, mask = _block_columns(block, constants)
            value = tl.where(mask, value, 0.0)
        square += value * value
    return mean, 1.0 / tl.sqrt(tl.sum(square, 0) / constants.K + eps)


@triton.jit
def _load_normalized(x, gain, block: tl.constexpr, mean, rstd, constants: tl.constexpr):
    """A block of a row, normalized (n,). Beyond the end its values are arbitrary: the weights there are zero."""
    value = _load_block(x, block, constants)
    if constants.norm != "none":
        value = (value - mean) * rstd
        if gain is not None:
            value *= _load_block(gain, block, constants)
    return value


@triton.jit
def _same_document(shift, m, distance: tl.constexpr, constants: tl.constexpr):
    """1.0 where the token `distance` positions before that of row m belongs to the same document, otherwise 0.0."""
    same = tl.full((), 1.0, tl.float32)
    if shift.q_documents is not None:
        # A sum, because the compiler specializes an argument of 1 to a constant, which has no `.to`.
        last = tl.load(shift.index).to(tl.int64) if constants.has_index else tl.full((), 0, tl.int64) + shift.last
        previous = tl.load(shift.k_documents + m * shift.k_documents_m + tl.maximum(last - distance, 0))
        same = tl.where(previous == tl.load(shift.q_documents + m * shift.q_documents_m), 1.0, 0.0)
    return same


@triton.jit
def _apply_token_shift(value, shift, same, m, first: tl.constexpr, block: tl.constexpr, constants: tl.constexpr):
    """A block of a normalized row (n,) with the channels of previous tokens filled in. same[first + d - 1]: factor for distance d."""
    size: tl.constexpr = constants.K // (constants.tokens + 1)
    column, _ = _block_columns(block, constants)
    for distance in tl.static_range(1, tl.constexpr(constants.tokens + 1)):
        # Most blocks hold channels of a single token.
        if block * constants.block < (distance + 1) * size and (block + 1) * constants.block > distance * size:
            inside = (column >= distance * size) & (column < (distance + 1) * size)
            row = shift.past + (m * constants.tokens + constants.tokens - distance) * constants.K
            previous = tl.load(row + column, mask=inside, other=0.0).to(tl.float32) * same[first + distance - 1]
            value = tl.where(inside, previous, value)
    return value


@triton.jit
def _push_past(past, column, mask, value, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
    """Append the normalized vector `value` to a row's past (J, WIDTH) and drop the oldest token."""
    for token in tl.static_range(tl.constexpr(TOKENS - 1)):
        older = tl.load(past + (token + 1) * WIDTH + column, mask=mask, other=0.0)
        tl.store(past + token * WIDTH + column, older, mask=mask)
    tl.store(past + (TOKENS - 1) * WIDTH + column, value.to(past.dtype.element_ty), mask=mask)


@triton.jit
def _document_factors(same, shift, m, constants: tl.constexpr):
    """`same` with the document factors of row m for distances 1 to J appended."""
    for distance in tl.static_range(1, tl.constexpr(constants.tokens + 1)):
        same = tuple_append(same, _same_document(shift, m, distance, constants))
    return same


@triton.jit
def _normalize_kernel(x, gain, shift, y, eps, constants: tl.constexpr):
    """Norm and token shift of one row, whose past is updated."""
    m = tl.program_id(0)
    pdl_launch_dependents(constants)
    pdl_wait(constants)
    row = x + m * constants.K
    mean, rstd = _mean_and_rstd(row, eps, constants)
    same = _document_factors((), shift, m, constants)
    for block in tl.static_range(tl.constexpr(constants.blocks)):
        column, mask = _block_columns(block, constants)
        value = _load_normalized(row, gain, block, mean, rstd, constants)
        shifted = _apply_token_shift(value, shift, same, m, 0, block, constants)
        tl.store(y + m * constants.K + column, shifted.to(y.dtype.element_ty), mask=mask)
        if constants.tokens > 0:
            _push_past(
                shift.past + m * constants.tokens * constants.K,
                column,
                mask,
                value,
                tl.constexpr(constants.K),
                tl.constexpr(constants.tokens),
            )


@triton.jit
def _load_weights(weight, n, N, block: tl.constexpr, constants: tl.constexpr):
    """A block of each of this program's weight rows, a tuple of (n,)."""
    column, mask = _block_columns(block, constants)
    weights = ()
    for r in tl.static_range(tl.constexpr(constants.rows)):
        at = weight + tl.minimum(n + r, N - 1).to(tl.int64) * constants.K + column
        if (block + 1) * constants.block <= constants.K:
            read = tl.load(at, eviction_policy="evict_first")
        else:
            read = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first")
        weights = tuple_append(weights, read)
    return weights


@triton.jit
def _stack_sums(sums, first: tl.constexpr, constants: tl.constexpr):
    """The per-thread sums of one row's outputs as (threads, outputs), so that they are reduced together."""
    THREADS: tl.constexpr = constants.block // constants.vector
    if constants.rows == 1:
        stacked = sums[first][:, None]
    elif constants.rows == 2:
        stacked = tl.join(sums[first], sums[first + 1])
    else:
        even, odd = tl.join(sums[first], sums[first + 2]), tl.join(sums[first + 1], sums[first + 3])
        stacked = tl.reshape(tl.join(even, odd), (THREADS, 4))
    return stacked


@triton.jit
def _store_outputs(y, slot, total, m: tl.constexpr, n, N, at):
    """Store one row's outputs, and those that belong into a cache there too."""
    tl.store(y + m * N + n, total.to(y.dtype.element_ty), mask=n < N)
    if slot.cache is not None:
        row = slot.cache + tl.full((), m, tl.int64) * slot.cache_m + at * slot.cache_s
        tl.store(row + (n - slot.begin), total.to(y.dtype.element_ty), mask=(n >= slot.begin) & (n < slot.end))


@triton.jit
def _thread_sums(terms, constants: tl.constexpr):
    """Sums (threads,) over the terms (n,) of a block that the same thread holds, without communication."""
    THREADS: tl.constexpr = constants.block // constants.vector
    VECTOR: tl.constexpr = constants.vector
    return tl.sum(tl.reshape(terms, (THREADS, VECTOR)), 1)


@triton.jit
def _zero_sums(count: tl.constexpr, constants: tl.constexpr):
    """A tuple of `count` zero sums (threads,)."""
    THREADS: tl.constexpr = constants.block // constants.vector
    sums = ()
    for _ in tl.static_range(count):
        sums = tuple_append(sums, tl.zeros((THREADS,), tl.float32))
    return sums


@triton.constexpr_function
def _has_current_channels(start, end, K, tokens):
    """Whether some of these channels come from the current token, which also has the remainder of the division into chunks."""
    return start < K // (tokens + 1) or end > (tokens + 1) * (K // (tokens + 1))


@triton.constexpr_function
def _has_past_channels(start, end, K, tokens):
    """Whether some of these channels come from previous tokens."""
    return tokens > 0 and end > K // (tokens + 1) and start < (tokens + 1) * (K // (tokens + 1))


@triton.jit
def _load_centered(row, pivot, block: tl.constexpr, constants: tl.constexpr):
    """A block of a row minus its pivot (n,), zero beyond the end."""
    value = _load_block(row, block, constants) - pivot
    if (block + 1) * constants.block > constants.K:
        _, mask = _block_columns(block, constants)
        value = tl.where(mask, value, 0.0)
    return value


@triton.jit
def _load_gain(gain, block: tl.constexpr, constants: tl.constexpr):
    """Gains of the channels of a block that come from the current token (n,), zero for others."""
    column, mask = _block_columns(block, constants)
    BLOCK: tl.constexpr = constants.block
    value = tl.full((BLOCK,), 1.0, tl.float32)
    if gain is not None:
        value = _load_block(gain, block, constants)
    size: tl.constexpr = constants.K // (constants.tokens + 1)
    if (block + 1) * constants.block > size:
        # The remainder of the division into chunks comes from the current token too.
        value = tl.where(mask & ((column < size) | (column >= (constants.tokens + 1) * size)), value, 0.0)
    return value


@triton.jit
def _load_past_channels(shift, same, m, first: tl.constexpr, block: tl.constexpr, constants: tl.constexpr):
    """Channels of a block that come from previous tokens (n,), normalized already; zero for those of the current token."""
    BLOCK: tl.constexpr = constants.block
    return _apply_token_shift(tl.zeros((BLOCK,), tl.float32), shift, same, m, first, block, constants)


@triton.jit
def _store_normalized(normalized, row, gain, pivot, mean, rstd, constants: tl.constexpr):
    """Store a row's normalized vector, before the token shift."""
    for block in tl.static_range(tl.constexpr(constants.blocks)):
        column, mask = _block_columns(block, constants)
        value = (_load_block(row, block, constants) - pivot - mean) * rstd
        if gain is not None:
            value *= _load_block(gain, block, constants)
        tl.store(normalized + column, value.to(normalized.dtype.element_ty), mask=mask)


@triton.jit
def _accumulate_outputs(sums, terms, weights, first: tl.constexpr, block: tl.constexpr, present: tl.constexpr, constants: tl.constexpr):
    """sums[first : first + outputs] plus a block's terms (n,) times the weights, if they are `present`."""
    updated = ()
    for r in tl.static_range(tl.constexpr(constants.rows)):
        if present:
            updated = tuple_append(
                updated, sums[first + r] + _thread_sums(terms * weights[block * constants.rows + r].to(tl.float32), constants)
            )
        else:
            updated = tuple_append(updated, sums[first + r])
    return updated


@triton.jit
def _accumulate_block(
    x,
    weights,
    gain,
    shift,
    pivots,
    same,
    sums,
    block: tl.constexpr,
    has_current: tl.constexpr,
    has_past: tl.constexpr,
    constants: tl.constexpr,
):
    """`sums` plus the terms of a block. has_current, has_past: whether it has channels of the current and of previous tokens."""
    outputs, past_outputs, gains, totals, squares = sums
    # Unused where the block has none of these channels.
    block_gain = _load_gain(gain, block, constants) if constants.norm != "none" and has_current else 0.0
    updated, updated_past, updated_totals, updated_squares = (), (), (), ()
    for m in tl.static_range(tl.constexpr(constants.M)):
        value = _load_centered(x + m * constants.K, pivots[m], block, constants)
        if constants.norm != "none":
            updated_totals = tuple_append(updated_totals, totals[m] + _thread_sums(value, constants))
            updated_squares = tuple_append(updated_squares, squares[m] + _thread_sums(value * value, constants))
            value *= block_gain
        past = _load_past_channels(shift, same, m, m * constants.tokens, block, constants) if has_past else 0.0
        updated = updated + _accumulate_outputs(outputs, value, weights, m * constants.rows, block, has_current, constants)
        updated_past = updated_past + _accumulate_outputs(past_outputs, past, weights, m * constants.rows, block, has_past, constants)
    if constants.norm != "none":
        totals, squares = updated_totals, updated_squares
    gains = _accumulate_outputs(gains, block_gain, weights, 0, block, constants.norm == "layer" and has_current, constants)
    return updated, updated_past, gains, totals, squares


@triton.jit
def _gemv_kernel(x, weight, epilogue, prologue, shift, pending, slot, y, N, eps, constants: tl.constexpr):
    """A few outputs of all rows."""
    ACTIVATION: tl.constexpr = constants.activation
    EXACT: tl.constexpr = y.dtype.element_ty == tl.float32
    ROWS: tl.constexpr = constants.rows
    SUMS: tl.constexpr = constants.M * constants.rows
    first = tl.program_id(0) * constants.rows
    weights = ()
    for block in tl.static_range(tl.constexpr(constants.prefetch)):
        weights = weights + _load_weights(weight, first, N, block, constants)
    n = first + tl.arange(0, constants.rows)
    bias = 0.0 if epilogue.bias is None else tl.load(epilogue.bias + n, mask=n < N, other=0.0).to(tl.float32)
    pdl_launch_dependents(constants)
    pdl_wait(constants)
    residuals, pivots, same = (), (), ()
    for m in tl.static_range(tl.constexpr(constants.M)):
        if epilogue.residual is not None:
            residuals = tuple_append(residuals, tl.load(epilogue.residual + m * N + n, mask=n < N, other=0.0).to(tl.float32))
        else:
            residuals = tuple_append(residuals, 0.0)
        pivots = tuple_append(pivots, tl.load(x + m * constants.K).to(tl.float32) if constants.norm == "layer" else 0.0)
        same = _document_factors(same, shift, m, constants)
    at = 0 if slot.cache is None else tl.load(slot.index).to(tl.int64)
    # For each row and output: sums over current and over past channels. For each output: sums of weight times gain. For each row:
    # sum and sum of squares for the norm.
    sums = (
        _zero_sums(SUMS, constants),
        _zero_sums(SUMS, constants),
        _zero_sums(ROWS, constants),
        _zero_sums(tl.constexpr(constants.M), constants),
        _zero_sums(tl.constexpr(constants.M), constants),
    )
    for block in tl.static_range(tl.constexpr(constants.blocks)):
        if block + constants.prefetch < constants.blocks:
            weights = weights + _load_weights(weight, first, N, block + constants.prefetch, constants)
        sums = _accumulate_block(
            *(x, weights, prologue.gain, shift, pivots, same, sums, block),
            _has_current_channels(block * constants.block, (block + 1) * constants.block, constants.K, constants.tokens),
            _has_past_channels(block * constants.block, (block + 1) * constants.block, constants.K, constants.tokens),
            constants,
        )
    for m in tl.static_range(tl.constexpr(constants.M)):
        total = tl.sum(_stack_sums(sums[0], m * constants.rows, constants), 0)
        if constants.norm != "none":
            mean = tl.sum(sums[3][m], 0) / constants.K if constants.norm == "layer" else 0.0
            rstd = 1.0 / tl.sqrt(tl.maximum(tl.sum(sums[4][m], 0) / constants.K - mean * mean, 0.0) + eps)
            if constants.norm == "layer":
                total -= mean * tl.sum(_stack_sums(sums[2], 0, constants), 0)
            total *= rstd
            if constants.tokens > 0:
                total += tl.sum(_stack_sums(sums[1], m * constants.rows, constants), 0)
            if prologue.normalized is not None and first == 0:
                _store_normalized(
                    prologue.normalized + m * constants.K, x + m * constants.K, prologue.gain, pivots[m], mean, rstd, constants
                )
        _store_outputs(y, slot, apply_activation(total + bias, ACTIVATION, EXACT) + residuals[m], m, n, N, at)
    if constants.pending_tokens > 0 and tl.program_id(0) == tl.num_programs(0) - 1:
        _push_pending(pending, constants)


@triton.jit
def _push_pending(pending, constants: tl.constexpr):
    """Append the vectors that an earlier kernel normalized to the past of all rows."""
    for m in tl.static_range(tl.constexpr(constants.M)):
        for block in tl.static_range(tl.constexpr((constants.pending_channels + constants.block - 1) // constants.block)):
            column = block * constants.block + tl.arange(0, constants.block)
            mask = column < constants.pending_channels
            value = tl.load(pending.normalized + m * constants.pending_channels + column, mask=mask, other=0.0)
            _push_past(
                pending.past + m * constants.pending_tokens * constants.pending_channels,
                column,
                mask,
                value,
                tl.constexpr(constants.pending_channels),
                tl.constexpr(constants.pending_tokens),
            )


class GemvPrologue(NamedTuple):
    """What is applied to the rows before the matmul; None where absent."""

    gain: Any = None
    normalized: Any = None
    """Output for the normalized rows (M, K)."""


class GemvEpilogue(NamedTuple):
    """What is added after the matmul; None where absent."""

    bias: Any = None
    residual: Any = None


class PendingShiftPointers(NamedTuple):
    """What an earlier kernel normalized (M, C), and the past (M, J, C) to which it is appended; None where absent."""

    past: Any = None
    normalized: Any = None


class CacheSlotPointers(NamedTuple):
    """The cache into which outputs `begin` to `end` are written too, and at which index; None where absent."""

    cache: Any = None
    index: Any = None
    begin: Any = 0
    end: Any = 0
    cache_m: Any = 0
    cache_s: Any = 0


def launch_config(N: int, K: int, M: int, size: int) -> GemvLaunchConfig:
    """Launch configuration for a weight (N, K) of `size` bytes per element and M rows.

    Measured on an H100 in the whole step of preset andromeda (2.10 ms a token became 2.01 after 2,048 tokens). More loads in
    flight do not help: their registers are missing to the programs of the next kernel, which could load its weights meanwhile.
    """
    long = K * size > LONG_ROW_BYTES
    # Prefer blocks that divide K.
    warps = next((w for w in ((4, 2, 1) if long else (2, 1)) if K % (w * 32 * BYTES_PER_THREAD // size) == 0), 4 if K > 1024 else 1)
    blocks = triton.cdiv(K, warps * 32 * BYTES_PER_THREAD // size)
    # The prologue is computed once for all outputs of a program, so that more outputs pay with more rows.
    rows = 2 if long and M <= 2 else 4
    # Loads in flight per thread, with four registers each.
    reads = 8 if long else 12 if N >= MANY_OUTPUTS else 16
    return GemvLaunchConfig(rows, warps, min(blocks, reads // rows))


class GemvInput(NamedTuple):
    """The rows and what the prologue does with them."""

    x: Tensor
    """(M, K), contiguous, like the other tensors except document numbers."""
    norm: str = "none"
    """none, layer or rms."""
    eps: float = 0.0
    gain: Tensor | None = None
    past: Tensor | None = None
    """Normalized vectors of the previous tokens (M, J, K)."""
    q_documents: Tensor | None = None
    k_documents: Tensor | None = None
    at: Tensor | None = None
    """Position of the current token among the keys ()."""

    def shift(self) -> TokenShiftPointers:
        """The token shift's arguments of the kernels."""
        if self.q_documents is None or self.k_documents is None or self.past is None:
            return TokenShiftPointers(self.past)
        strides = (self.q_documents.stride(0), self.k_documents.stride(0), self.k_documents.shape[1] - 1)
        return TokenShiftPointers(self.past, self.q_documents, self.k_documents, self.at, *strides)


def normalize(inputs: GemvInput) -> Tensor:
    """Rows (M, K) after norm and token shift; `past` is updated."""
    x, y = inputs.x, torch.empty_like(inputs.x)
    config = GemvLaunchConfig(1, 8, 1)
    constants = _constants(inputs, x.element_size(), config)
    with torch.cuda.device_of(x):
        _normalize_kernel[(x.shape[0],)](
            x, inputs.gain, inputs.shift(), y, inputs.eps, constants=constants, num_warps=config.warps, **pdl_launch_options(constants.pdl)
        )
    return y


def gemv(
    inputs: GemvInput,
    weight: Tensor,
    y: Tensor,
    epilogue: GemvEpilogue = GemvEpilogue(),
    activation: str = "none",
    normalized: Tensor | None = None,
    pending: PendingShiftPointers = PendingShiftPointers(),
    slot: CacheSlotPointers = CacheSlotPointers(),
    config: GemvLaunchConfig | None = None,
) -> None:
    """Compute y (M, N) from the rows and weight (N, K).

    normalized: output (M, K) for the rows after the norm. pending: an update of the token shift that an earlier kernel left to
    this one. slot: a cache that some of the outputs are written to as well.
    """
    x, N = inputs.x, weight.shape[0]
    config = config or launch_config(N, x.shape[1], x.shape[0], weight.element_size())
    constants = _constants(inputs, weight.element_size(), config)._replace(activation=activation)
    if pending.past is not None:
        constants = constants._replace(pending_tokens=pending.past.shape[1], pending_channels=pending.past.shape[2])
    with torch.cuda.device_of(x):
        _gemv_kernel[(triton.cdiv(N, config.rows),)](
            *(x, weight, epilogue, GemvPrologue(inputs.gain, normalized), inputs.shift(), pending, slot, y, N, inputs.eps),
            constants=constants,
            num_warps=config.warps,
            **pdl_launch_options(constants.pdl),
        )


def _constants(inputs: GemvInput, size: int, config: GemvLaunchConfig) -> GemvConstants:
    (M, K), vector = inputs.x.shape, BYTES_PER_THREAD // size
    block = config.warps * 32 * vector
    blocks = triton.cdiv(K, block)
    tokens = 0 if inputs.past is None else inputs.past.shape[1]
    return GemvConstants(
        *(M, K, config.rows, block, blocks, min(config.prefetch, blocks), vector, inputs.norm, tokens, inputs.at is not None),
        activation="none",
        pending_tokens=0,
        pending_channels=0,
        pdl=supports_pdl(inputs.x),
    )
