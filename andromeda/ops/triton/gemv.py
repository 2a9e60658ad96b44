"""Triton kernels for products of a matrix with the vectors of a few rows, as decoding asks: all time goes into reading the matrix.

A program takes a few outputs, which are rows of the weight, and reads them in blocks of 16 bytes a thread. It asks for its first
blocks, about 16 KiB, before anything else, so that a multiprocessor with its six to twelve programs always has 100 KiB and more
on the way. What comes before a product (norm, token shift) every program computes for itself from a vector that lies in the
cache; what comes after (bias, activation, residual sum) follows in registers. Sums are in float32.

A norm costs no time of its own: its mean and deviation are summed up beside the products, and put in at the end,

    sum_k w_k g_k (x_k - mean) / deviation = (sum_k w_k g_k (x_k - p) - (mean - p) sum_k w_k g_k) / deviation

with the row's first number as p: it is within sqrt(K) deviations of the mean, as any number of the row is, so that no more is lost
in the differences than a K-th part of what float32 holds.

A kernel starts while the one before it still runs (`early`) and asks for its weights, which nobody writes; it waits for the end of
that kernel before it touches anything else.

Shapes: M rows, K inputs, N outputs, J tokens of the shift.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.ops.triton.activation import apply_activation
from andromeda.ops.triton.pdl import pdl_launch_dependents, pdl_launch_options, pdl_wait, supports_pdl
from andromeda.ops.triton.tuples import tuple_append

BYTES_PER_THREAD = 16
"""That a thread reads at once."""
LONG_ROW_BYTES = 8192
"""Bytes of a weight row from which on a program takes two outputs at most, and as many threads as it can."""
MANY_OUTPUTS = 8192
"""Outputs from which on not all programs run at once."""


class GemvLaunchConfig(NamedTuple):
    """How the work is cut."""

    rows: int
    """Outputs of a program: 1, 2 or 4."""
    warps: int
    prefetch: int
    """Blocks of each weight row that are asked for beforehand."""


class GemvConstants(NamedTuple):
    """What is known when a kernel is compiled."""

    M: int
    K: int
    rows: int
    block: int
    """Inputs that a program reads at once."""
    blocks: int
    prefetch: int
    vector: int
    """Inputs that a thread reads at once."""
    norm: str
    """none, layer or rms."""
    tokens: int
    """J; 0 is no shift."""
    has_index: bool
    """The pass has an index of its own among the keys."""
    activation: str
    pending_tokens: int
    """J of the past that this product keeps for an earlier one; 0 is none."""
    pending_channels: int
    """Channels of that past."""
    pdl: bool


class TokenShiftPointers(NamedTuple):
    """What a token shift reads; None where there is nothing."""

    past: Any = None
    """Normalized rows of the tokens before (M, J, K), the newest last."""
    own: Any = None
    """Document number of each row (M, 1)."""
    k_documents: Any = None
    """Those of all keys (M, S)."""
    index: Any = None
    """Where the token of this pass lies among the keys ()."""
    q_documents_m: Any = 0
    k_documents_m: Any = 0
    last: Any = 0
    """The same, known on the host."""


@triton.jit
def _block_columns(block, constants: tl.constexpr):
    """Inputs of a block (n,), and which of them there are."""
    column = block * constants.block + tl.arange(0, constants.block)
    return column, column < constants.K


@triton.jit
def _load_block(row, block: tl.constexpr, constants: tl.constexpr):
    """A block of a row in float32 (n,), zero where nothing is."""
    column, exists = _block_columns(block, constants)
    is_full: tl.constexpr = (block + 1) * constants.block <= constants.K
    value = tl.load(row + column) if is_full else tl.load(row + column, mask=exists, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _mean_and_rstd(x, eps, constants: tl.constexpr):
    """Mean, zero for RMS norm, and inverse deviation of a row."""
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
            _, exists = _block_columns(block, constants)
            value = tl.where(exists, value, 0.0)
        square += value * value
    return mean, 1.0 / tl.sqrt(tl.sum(square, 0) / constants.K + eps)


@triton.jit
def _load_normalized(x, gain, block: tl.constexpr, mean, rstd, constants: tl.constexpr):
    """A block of a row, normalized (n,). What it is where nothing is meets weights that are zero."""
    value = _load_block(x, block, constants)
    if constants.norm != "none":
        value = (value - mean) * rstd
        if gain is not None:
            value *= _load_block(gain, block, constants)
    return value


@triton.jit
def _same_document(shift, m, distance: tl.constexpr, constants: tl.constexpr):
    """One where the token so many before row m's is of its document, otherwise zero."""
    same = tl.full((), 1.0, tl.float32)
    if shift.own is not None:
        # A sum, as the compiler takes an argument of one for a constant, which has no type.
        last = tl.load(shift.index).to(tl.int64) if constants.has_index else tl.full((), 0, tl.int64) + shift.last
        before = tl.load(shift.k_documents + m * shift.k_documents_m + tl.maximum(last - distance, 0))
        same = tl.where(before == tl.load(shift.own + m * shift.q_documents_m), 1.0, 0.0)
    return same


@triton.jit
def _apply_token_shift(value, shift, same, m, first: tl.constexpr, block: tl.constexpr, constants: tl.constexpr):
    """A block of a normalized row with its channels from tokens before (n,); `same` has a factor for each distance, from `first` on."""
    size: tl.constexpr = constants.K // (constants.tokens + 1)
    column, _ = _block_columns(block, constants)
    for distance in tl.static_range(1, tl.constexpr(constants.tokens + 1)):
        # Most blocks have channels of one token only.
        if block * constants.block < (distance + 1) * size and (block + 1) * constants.block > distance * size:
            inside = (column >= distance * size) & (column < (distance + 1) * size)
            row = shift.past + (m * constants.tokens + constants.tokens - distance) * constants.K
            before = tl.load(row + column, mask=inside, other=0.0).to(tl.float32) * same[first + distance - 1]
            value = tl.where(inside, before, value)
    return value


@triton.jit
def _push_past(past, column, exists, value, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
    """Move a row's past (J, WIDTH) on by one token, whose normalized vector is `value`."""
    for token in tl.static_range(tl.constexpr(TOKENS - 1)):
        older = tl.load(past + (token + 1) * WIDTH + column, mask=exists, other=0.0)
        tl.store(past + token * WIDTH + column, older, mask=exists)
    tl.store(past + (TOKENS - 1) * WIDTH + column, value.to(past.dtype.element_ty), mask=exists)


@triton.jit
def _document_factors(same, shift, m, constants: tl.constexpr):
    """`same` with what row m's vectors of 1, 2, ... J tokens before are multiplied with."""
    for distance in tl.static_range(1, tl.constexpr(constants.tokens + 1)):
        same = tuple_append(same, _same_document(shift, m, distance, constants))
    return same


@triton.jit
def _normalize_kernel(x, gain, shift, y, eps, constants: tl.constexpr):
    """One row: norm and token shift; the row's past is moved on."""
    m = tl.program_id(0)
    pdl_launch_dependents(constants)
    pdl_wait(constants)
    row = x + m * constants.K
    mean, rstd = _mean_and_rstd(row, eps, constants)
    same = _document_factors((), shift, m, constants)
    for block in tl.static_range(tl.constexpr(constants.blocks)):
        column, exists = _block_columns(block, constants)
        value = _load_normalized(row, gain, block, mean, rstd, constants)
        moved = _apply_token_shift(value, shift, same, m, 0, block, constants)
        tl.store(y + m * constants.K + column, moved.to(y.dtype.element_ty), mask=exists)
        if constants.tokens > 0:
            _push_past(
                shift.past + m * constants.tokens * constants.K,
                column,
                exists,
                value,
                tl.constexpr(constants.K),
                tl.constexpr(constants.tokens),
            )


@triton.jit
def _load_weights(weight, n, N, block: tl.constexpr, constants: tl.constexpr):
    """A block of each of the program's weight rows, a tuple of (n,)."""
    column, exists = _block_columns(block, constants)
    weights = ()
    for r in tl.static_range(tl.constexpr(constants.rows)):
        at = weight + tl.minimum(n + r, N - 1).to(tl.int64) * constants.K + column
        if (block + 1) * constants.block <= constants.K:
            read = tl.load(at, eviction_policy="evict_first")
        else:
            read = tl.load(at, mask=exists, other=0.0, eviction_policy="evict_first")
        weights = tuple_append(weights, read)
    return weights


@triton.jit
def _stack_sums(sums, first: tl.constexpr, constants: tl.constexpr):
    """One row's sums of the program's outputs (n, rows), so that they are added up together."""
    THREADS: tl.constexpr = constants.block // constants.vector
    if constants.rows == 1:
        together = sums[first][:, None]
    elif constants.rows == 2:
        together = tl.join(sums[first], sums[first + 1])
    else:
        even, odd = tl.join(sums[first], sums[first + 2]), tl.join(sums[first + 1], sums[first + 3])
        together = tl.reshape(tl.join(even, odd), (THREADS, 4))
    return together


@triton.jit
def _store_outputs(y, slot, total, m: tl.constexpr, n, N, at):
    """One row's outputs, some of them also to where the pass lies in a cache."""
    tl.store(y + m * N + n, total.to(y.dtype.element_ty), mask=n < N)
    if slot.cache is not None:
        row = slot.cache + tl.full((), m, tl.int64) * slot.cache_m + at * slot.cache_s
        tl.store(row + (n - slot.begin), total.to(y.dtype.element_ty), mask=(n >= slot.begin) & (n < slot.end))


@triton.jit
def _thread_sums(terms, constants: tl.constexpr):
    """Sums (threads,) of a block's terms (n,) that one thread holds: nothing is exchanged."""
    THREADS: tl.constexpr = constants.block // constants.vector
    VECTOR: tl.constexpr = constants.vector
    return tl.sum(tl.reshape(terms, (THREADS, VECTOR)), 1)


@triton.jit
def _zero_sums(count: tl.constexpr, constants: tl.constexpr):
    """So many sums (threads,) of nothing yet."""
    THREADS: tl.constexpr = constants.block // constants.vector
    sums = ()
    for _ in tl.static_range(count):
        sums = tuple_append(sums, tl.zeros((THREADS,), tl.float32))
    return sums


@triton.constexpr_function
def _has_current_channels(start, end, K, tokens):
    """Whether some of these channels are the token's own, with those that no whole chunk takes in."""
    return start < K // (tokens + 1) or end > (tokens + 1) * (K // (tokens + 1))


@triton.constexpr_function
def _has_past_channels(start, end, K, tokens):
    """Whether some of these channels are of tokens before."""
    return tokens > 0 and end > K // (tokens + 1) and start < (tokens + 1) * (K // (tokens + 1))


@triton.jit
def _load_centered(row, pivot, block: tl.constexpr, constants: tl.constexpr):
    """A block of a row less its pivot (n,), zero where nothing is."""
    value = _load_block(row, block, constants) - pivot
    if (block + 1) * constants.block > constants.K:
        _, exists = _block_columns(block, constants)
        value = tl.where(exists, value, 0.0)
    return value


@triton.jit
def _load_gain(gain, block: tl.constexpr, constants: tl.constexpr):
    """Gains of those channels of a block that are the token's own (n,), zero for others."""
    column, exists = _block_columns(block, constants)
    BLOCK: tl.constexpr = constants.block
    value = tl.full((BLOCK,), 1.0, tl.float32)
    if gain is not None:
        value = _load_block(gain, block, constants)
    size: tl.constexpr = constants.K // (constants.tokens + 1)
    if (block + 1) * constants.block > size:
        # Channels that no whole chunk takes in are the token's own too.
        value = tl.where(exists & ((column < size) | (column >= (constants.tokens + 1) * size)), value, 0.0)
    return value


@triton.jit
def _load_past_channels(shift, same, m, first: tl.constexpr, block: tl.constexpr, constants: tl.constexpr):
    """A block's channels from tokens before (n,), which are normalized already, and zero for its own."""
    BLOCK: tl.constexpr = constants.block
    return _apply_token_shift(tl.zeros((BLOCK,), tl.float32), shift, same, m, first, block, constants)


@triton.jit
def _store_normalized(normalized, row, gain, pivot, mean, rstd, constants: tl.constexpr):
    """A row as the norm leaves it."""
    for block in tl.static_range(tl.constexpr(constants.blocks)):
        column, exists = _block_columns(block, constants)
        value = (_load_block(row, block, constants) - pivot - mean) * rstd
        if gain is not None:
            value *= _load_block(gain, block, constants)
        tl.store(normalized + column, value.to(normalized.dtype.element_ty), mask=exists)


@triton.jit
def _accumulate_outputs(sums, terms, weights, first: tl.constexpr, block: tl.constexpr, present: tl.constexpr, constants: tl.constexpr):
    """Sums of the program's outputs, those of a row from `first` on, with a block's terms (n,) times the weights, if `there` are any."""
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
    x, weights, gain, shift, pivots, same, sums, block: tl.constexpr, own: tl.constexpr, before: tl.constexpr, constants: tl.constexpr
):
    """`sums` with a block, of which some channels are the token's `own`, and some of tokens `before`."""
    products, past_products, gains, totals, squares = sums
    # What is not there is not used.
    block_gain = _load_gain(gain, block, constants) if constants.norm != "none" and own else 0.0
    updated, updated_past, updated_totals, updated_squares = (), (), (), ()
    for m in tl.static_range(tl.constexpr(constants.M)):
        value = _load_centered(x + m * constants.K, pivots[m], block, constants)
        if constants.norm != "none":
            updated_totals = tuple_append(updated_totals, totals[m] + _thread_sums(value, constants))
            updated_squares = tuple_append(updated_squares, squares[m] + _thread_sums(value * value, constants))
            value *= block_gain
        past = _load_past_channels(shift, same, m, m * constants.tokens, block, constants) if before else 0.0
        updated = updated + _accumulate_outputs(products, value, weights, m * constants.rows, block, own, constants)
        updated_past = updated_past + _accumulate_outputs(past_products, past, weights, m * constants.rows, block, before, constants)
    if constants.norm != "none":
        totals, squares = updated_totals, updated_squares
    gains = _accumulate_outputs(gains, block_gain, weights, 0, block, constants.norm == "layer" and own, constants)
    return updated, updated_past, gains, totals, squares


@triton.jit
def _gemv_kernel(x, weight, epilogue, before, shift, pending, slot, y, N, eps, constants: tl.constexpr):
    """Some outputs of all rows."""
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
    # Of each row and output: own channels, those of tokens before. Of each output: gains. Of each row: what the norm is made of.
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
            *(x, weights, before.gain, shift, pivots, same, sums, block),
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
            if before.normalized is not None and first == 0:
                _store_normalized(before.normalized + m * constants.K, x + m * constants.K, before.gain, pivots[m], mean, rstd, constants)
        _store_outputs(y, slot, apply_activation(total + bias, ACTIVATION, EXACT) + residuals[m], m, n, N, at)
    if constants.pending_tokens > 0 and tl.program_id(0) == tl.num_programs(0) - 1:
        _push_pending(pending, constants)


@triton.jit
def _push_pending(pending, constants: tl.constexpr):
    """Move the past of all rows on by what an earlier product has normalized."""
    for m in tl.static_range(tl.constexpr(constants.M)):
        for block in tl.static_range(tl.constexpr((constants.pending_channels + constants.block - 1) // constants.block)):
            column = block * constants.block + tl.arange(0, constants.block)
            exists = column < constants.pending_channels
            value = tl.load(pending.normalized + m * constants.pending_channels + column, mask=exists, other=0.0)
            _push_past(
                pending.past + m * constants.pending_tokens * constants.pending_channels,
                column,
                exists,
                value,
                tl.constexpr(constants.pending_channels),
                tl.constexpr(constants.pending_tokens),
            )


class GemvPrologue(NamedTuple):
    """What happens to the rows first; None where nothing does."""

    gain: Any = None
    normalized: Any = None
    """Where the normalized rows are written (M, K)."""


class GemvEpilogue(NamedTuple):
    """What is added to the product; None where nothing is."""

    bias: Any = None
    residual: Any = None


class PendingShiftPointers(NamedTuple):
    """What an earlier product has normalized, and the past that it belongs to; None where there is nothing."""

    past: Any = None
    normalized: Any = None


class CacheSlotPointers(NamedTuple):
    """Where outputs from `begin` to `end` go as well: into a cache at an index; None where there is none."""

    cache: Any = None
    index: Any = None
    begin: Any = 0
    end: Any = 0
    cache_m: Any = 0
    cache_s: Any = 0


def launch_config(N: int, K: int, M: int, size: int) -> GemvLaunchConfig:
    """How to cut a product of weights (N, K) of `size` bytes a number with M rows.

    Measured on an H100 in the whole step of preset andromeda (2.10 ms a token became 2.01 after 2,048 tokens). More reads at once
    are no gain: their registers are taken from the programs of the next kernel, which could have asked for its weights meanwhile.
    """
    long = K * size > LONG_ROW_BYTES
    # Blocks that divide the inputs waste nothing.
    warps = next((w for w in ((4, 2, 1) if long else (2, 1)) if K % (w * 32 * BYTES_PER_THREAD // size) == 0), 4 if K > 1024 else 1)
    blocks = triton.cdiv(K, warps * 32 * BYTES_PER_THREAD // size)
    # What is computed of x is computed once for all outputs of a program: more of them where there are many rows.
    rows = 2 if long and M <= 2 else 4
    # Of a thread: four registers each.
    reads = 8 if long else 12 if N >= MANY_OUTPUTS else 16
    return GemvLaunchConfig(rows, warps, min(blocks, reads // rows))


class GemvInput(NamedTuple):
    """Rows as a product takes them."""

    x: Tensor
    """(M, K), contiguous, as are all the rest but document numbers."""
    norm: str = "none"
    """none, layer or rms."""
    eps: float = 0.0
    gain: Tensor | None = None
    past: Tensor | None = None
    """Normalized rows before (M, J, K)."""
    own: Tensor | None = None
    k_documents: Tensor | None = None
    at: Tensor | None = None
    """Where the token of this pass lies among the keys."""

    def shift(self) -> TokenShiftPointers:
        """For the kernels."""
        if self.own is None or self.k_documents is None or self.past is None:
            return TokenShiftPointers(self.past)
        strides = (self.own.stride(0), self.k_documents.stride(0), self.k_documents.shape[1] - 1)
        return TokenShiftPointers(self.past, self.own, self.k_documents, self.at, *strides)


def normalize(inputs: GemvInput) -> Tensor:
    """Rows (M, K) after norm and token shift; `past` is moved on."""
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
    """Fill y (M, N) with the product of the rows with weight (N, K), and `fresh` (M, K) with the rows as the norm leaves them.

    keep: a past (M, J, C) that is moved on by `fresh` (M, C) of an earlier product.
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
