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

from andromeda.ops.triton.activation import activated
from andromeda.ops.triton.pdl import begin, early, options, wait
from andromeda.ops.triton.tuples import appended

BYTES = 16
"""That a thread reads at once."""
LONG = 8192
"""Bytes of a weight row from which on a program takes two outputs at most, and as many threads as it can."""
MANY = 8192
"""Outputs from which on not all programs run at once."""


class Launch(NamedTuple):
    """How the work is cut."""

    rows: int
    """Outputs of a program: 1, 2 or 4."""
    warps: int
    ahead: int
    """Blocks of each weight row that are asked for beforehand."""


class Form(NamedTuple):
    """What is known when a kernel is compiled."""

    M: int
    K: int
    rows: int
    block: int
    """Inputs that a program reads at once."""
    blocks: int
    ahead: int
    vector: int
    """Inputs that a thread reads at once."""
    norm: str
    """none, layer or rms."""
    tokens: int
    """J; 0 is no shift."""
    placed: bool
    """The pass has an index of its own among the keys."""
    activation: str
    kept: int
    """J of the past that this product keeps for an earlier one; 0 is none."""
    width: int
    """Channels of that past."""
    early: bool


class Shift(NamedTuple):
    """What a token shift reads; None where there is nothing."""

    past: Any = None
    """Normalized rows of the tokens before (M, J, K), the newest last."""
    own: Any = None
    """Document number of each row (M, 1)."""
    numbers: Any = None
    """Those of all keys (M, S)."""
    index: Any = None
    """Where the token of this pass lies among the keys ()."""
    own_m: Any = 0
    numbers_m: Any = 0
    last: Any = 0
    """The same, known on the host."""


@triton.jit
def _columns(block, form: tl.constexpr):
    """Inputs of a block (n,), and which of them there are."""
    column = block * form.block + tl.arange(0, form.block)
    return column, column < form.K


@triton.jit
def _read(row, block: tl.constexpr, form: tl.constexpr):
    """A block of a row in float32 (n,), zero where nothing is."""
    column, exists = _columns(block, form)
    whole: tl.constexpr = (block + 1) * form.block <= form.K
    value = tl.load(row + column) if whole else tl.load(row + column, mask=exists, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _moments(x, eps, form: tl.constexpr):
    """Mean, zero for RMS norm, and inverse deviation of a row."""
    BLOCK: tl.constexpr = form.block
    mean = 0.0
    if form.norm == "layer":
        total = tl.zeros((BLOCK,), tl.float32)
        for block in tl.static_range(tl.constexpr(form.blocks)):
            total += _read(x, block, form)
        mean = tl.sum(total, 0) / form.K
    square = tl.zeros((BLOCK,), tl.float32)
    for block in tl.static_range(tl.constexpr(form.blocks)):
        value = _read(x, block, form) - mean
        if (block + 1) * form.block > form.K:
            _, exists = _columns(block, form)
            value = tl.where(exists, value, 0.0)
        square += value * value
    return mean, 1.0 / tl.sqrt(tl.sum(square, 0) / form.K + eps)


@triton.jit
def _normalized(x, gain, block: tl.constexpr, mean, factor, form: tl.constexpr):
    """A block of a row, normalized (n,). What it is where nothing is meets weights that are zero."""
    value = _read(x, block, form)
    if form.norm != "none":
        value = (value - mean) * factor
        if gain is not None:
            value *= _read(gain, block, form)
    return value


@triton.jit
def _same(shift, m, distance: tl.constexpr, form: tl.constexpr):
    """One where the token so many before row m's is of its document, otherwise zero."""
    same = tl.full((), 1.0, tl.float32)
    if shift.own is not None:
        # A sum, as the compiler takes an argument of one for a constant, which has no type.
        last = tl.load(shift.index).to(tl.int64) if form.placed else tl.full((), 0, tl.int64) + shift.last
        before = tl.load(shift.numbers + m * shift.numbers_m + tl.maximum(last - distance, 0))
        same = tl.where(before == tl.load(shift.own + m * shift.own_m), 1.0, 0.0)
    return same


@triton.jit
def _shifted(value, shift, same, m, first: tl.constexpr, block: tl.constexpr, form: tl.constexpr):
    """A block of a normalized row with its channels from tokens before (n,); `same` has a factor for each distance, from `first` on."""
    size: tl.constexpr = form.K // (form.tokens + 1)
    column, _ = _columns(block, form)
    for distance in tl.static_range(1, tl.constexpr(form.tokens + 1)):
        # Most blocks have channels of one token only.
        if block * form.block < (distance + 1) * size and (block + 1) * form.block > distance * size:
            inside = (column >= distance * size) & (column < (distance + 1) * size)
            row = shift.past + (m * form.tokens + form.tokens - distance) * form.K
            before = tl.load(row + column, mask=inside, other=0.0).to(tl.float32) * same[first + distance - 1]
            value = tl.where(inside, before, value)
    return value


@triton.jit
def _keep(past, column, exists, value, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
    """Move a row's past (J, WIDTH) on by one token, whose normalized vector is `value`."""
    for token in tl.static_range(tl.constexpr(TOKENS - 1)):
        older = tl.load(past + (token + 1) * WIDTH + column, mask=exists, other=0.0)
        tl.store(past + token * WIDTH + column, older, mask=exists)
    tl.store(past + (TOKENS - 1) * WIDTH + column, value.to(past.dtype.element_ty), mask=exists)


@triton.jit
def _factors(same, shift, m, form: tl.constexpr):
    """`same` with what row m's vectors of 1, 2, ... J tokens before are multiplied with."""
    for distance in tl.static_range(1, tl.constexpr(form.tokens + 1)):
        same = appended(same, _same(shift, m, distance, form))
    return same


@triton.jit
def _normalize(x, gain, shift, y, eps, form: tl.constexpr):
    """One row: norm and token shift; the row's past is moved on."""
    m = tl.program_id(0)
    begin(form)
    wait(form)
    row = x + m * form.K
    mean, factor = _moments(row, eps, form)
    same = _factors((), shift, m, form)
    for block in tl.static_range(tl.constexpr(form.blocks)):
        column, exists = _columns(block, form)
        value = _normalized(row, gain, block, mean, factor, form)
        moved = _shifted(value, shift, same, m, 0, block, form)
        tl.store(y + m * form.K + column, moved.to(y.dtype.element_ty), mask=exists)
        if form.tokens > 0:
            _keep(shift.past + m * form.tokens * form.K, column, exists, value, tl.constexpr(form.K), tl.constexpr(form.tokens))


@triton.jit
def _weights(weight, n, N, block: tl.constexpr, form: tl.constexpr):
    """A block of each of the program's weight rows, a tuple of (n,)."""
    column, exists = _columns(block, form)
    held = ()
    for r in tl.static_range(tl.constexpr(form.rows)):
        at = weight + tl.minimum(n + r, N - 1).to(tl.int64) * form.K + column
        if (block + 1) * form.block <= form.K:
            read = tl.load(at, eviction_policy="evict_first")
        else:
            read = tl.load(at, mask=exists, other=0.0, eviction_policy="evict_first")
        held = appended(held, read)
    return held


@triton.jit
def _stacked(sums, first: tl.constexpr, form: tl.constexpr):
    """One row's sums of the program's outputs (n, rows), so that they are added up together."""
    THREADS: tl.constexpr = form.block // form.vector
    if form.rows == 1:
        together = sums[first][:, None]
    elif form.rows == 2:
        together = tl.join(sums[first], sums[first + 1])
    else:
        even, odd = tl.join(sums[first], sums[first + 2]), tl.join(sums[first + 1], sums[first + 3])
        together = tl.reshape(tl.join(even, odd), (THREADS, 4))
    return together


@triton.jit
def _store(y, place, total, m: tl.constexpr, n, N, at):
    """One row's outputs, some of them also to where the pass lies in a cache."""
    tl.store(y + m * N + n, total.to(y.dtype.element_ty), mask=n < N)
    if place.cache is not None:
        row = place.cache + tl.full((), m, tl.int64) * place.cache_m + at * place.cache_s
        tl.store(row + (n - place.begin), total.to(y.dtype.element_ty), mask=(n >= place.begin) & (n < place.end))


@triton.jit
def _within(terms, form: tl.constexpr):
    """Sums (threads,) of a block's terms (n,) that one thread holds: nothing is exchanged."""
    THREADS: tl.constexpr = form.block // form.vector
    VECTOR: tl.constexpr = form.vector
    return tl.sum(tl.reshape(terms, (THREADS, VECTOR)), 1)


@triton.jit
def _none(count: tl.constexpr, form: tl.constexpr):
    """So many sums (threads,) of nothing yet."""
    THREADS: tl.constexpr = form.block // form.vector
    sums = ()
    for _ in tl.static_range(count):
        sums = appended(sums, tl.zeros((THREADS,), tl.float32))
    return sums


@triton.constexpr_function
def _has_own(start, end, K, tokens):
    """Whether some of these channels are the token's own, with those that no whole chunk takes in."""
    return start < K // (tokens + 1) or end > (tokens + 1) * (K // (tokens + 1))


@triton.constexpr_function
def _has_before(start, end, K, tokens):
    """Whether some of these channels are of tokens before."""
    return tokens > 0 and end > K // (tokens + 1) and start < (tokens + 1) * (K // (tokens + 1))


@triton.jit
def _centered(row, pivot, block: tl.constexpr, form: tl.constexpr):
    """A block of a row less its pivot (n,), zero where nothing is."""
    value = _read(row, block, form) - pivot
    if (block + 1) * form.block > form.K:
        _, exists = _columns(block, form)
        value = tl.where(exists, value, 0.0)
    return value


@triton.jit
def _gain(gain, block: tl.constexpr, form: tl.constexpr):
    """Gains of those channels of a block that are the token's own (n,), zero for others."""
    column, exists = _columns(block, form)
    BLOCK: tl.constexpr = form.block
    value = tl.full((BLOCK,), 1.0, tl.float32)
    if gain is not None:
        value = _read(gain, block, form)
    size: tl.constexpr = form.K // (form.tokens + 1)
    if (block + 1) * form.block > size:
        # Channels that no whole chunk takes in are the token's own too.
        value = tl.where(exists & ((column < size) | (column >= (form.tokens + 1) * size)), value, 0.0)
    return value


@triton.jit
def _before(shift, same, m, first: tl.constexpr, block: tl.constexpr, form: tl.constexpr):
    """A block's channels from tokens before (n,), which are normalized already, and zero for its own."""
    BLOCK: tl.constexpr = form.block
    return _shifted(tl.zeros((BLOCK,), tl.float32), shift, same, m, first, block, form)


@triton.jit
def _write_fresh(fresh, row, gain, pivot, mean, factor, form: tl.constexpr):
    """A row as the norm leaves it."""
    for block in tl.static_range(tl.constexpr(form.blocks)):
        column, exists = _columns(block, form)
        value = (_read(row, block, form) - pivot - mean) * factor
        if gain is not None:
            value *= _read(gain, block, form)
        tl.store(fresh + column, value.to(fresh.dtype.element_ty), mask=exists)


@triton.jit
def _grown(sums, terms, held, first: tl.constexpr, block: tl.constexpr, there: tl.constexpr, form: tl.constexpr):
    """Sums of the program's outputs, those of a row from `first` on, with a block's terms (n,) times the weights, if `there` are any."""
    grown = ()
    for r in tl.static_range(tl.constexpr(form.rows)):
        if there:
            grown = appended(grown, sums[first + r] + _within(terms * held[block * form.rows + r].to(tl.float32), form))
        else:
            grown = appended(grown, sums[first + r])
    return grown


@triton.jit
def _add(x, held, gain, shift, pivots, same, sums, block: tl.constexpr, own: tl.constexpr, before: tl.constexpr, form: tl.constexpr):
    """`sums` with a block, of which some channels are the token's `own`, and some of tokens `before`."""
    products, others, gains, totals, squares = sums
    # What is not there is not used.
    gains_here = _gain(gain, block, form) if form.norm != "none" and own else 0.0
    grown, grown_others, grown_totals, grown_squares = (), (), (), ()
    for m in tl.static_range(tl.constexpr(form.M)):
        value = _centered(x + m * form.K, pivots[m], block, form)
        if form.norm != "none":
            grown_totals = appended(grown_totals, totals[m] + _within(value, form))
            grown_squares = appended(grown_squares, squares[m] + _within(value * value, form))
            value *= gains_here
        past = _before(shift, same, m, m * form.tokens, block, form) if before else 0.0
        grown = grown + _grown(products, value, held, m * form.rows, block, own, form)
        grown_others = grown_others + _grown(others, past, held, m * form.rows, block, before, form)
    if form.norm != "none":
        totals, squares = grown_totals, grown_squares
    gains = _grown(gains, gains_here, held, 0, block, form.norm == "layer" and own, form)
    return grown, grown_others, gains, totals, squares


@triton.jit
def _product(x, weight, after, before, shift, keep, place, y, N, eps, form: tl.constexpr):
    """Some outputs of all rows."""
    ACTIVATION: tl.constexpr = form.activation
    EXACT: tl.constexpr = y.dtype.element_ty == tl.float32
    ROWS: tl.constexpr = form.rows
    SUMS: tl.constexpr = form.M * form.rows
    first = tl.program_id(0) * form.rows
    held = ()
    for block in tl.static_range(tl.constexpr(form.ahead)):
        held = held + _weights(weight, first, N, block, form)
    n = first + tl.arange(0, form.rows)
    bias = 0.0 if after.bias is None else tl.load(after.bias + n, mask=n < N, other=0.0).to(tl.float32)
    begin(form)
    wait(form)
    residuals, pivots, same = (), (), ()
    for m in tl.static_range(tl.constexpr(form.M)):
        if after.residual is not None:
            residuals = appended(residuals, tl.load(after.residual + m * N + n, mask=n < N, other=0.0).to(tl.float32))
        else:
            residuals = appended(residuals, 0.0)
        pivots = appended(pivots, tl.load(x + m * form.K).to(tl.float32) if form.norm == "layer" else 0.0)
        same = _factors(same, shift, m, form)
    at = 0 if place.cache is None else tl.load(place.index).to(tl.int64)
    # Of each row and output: own channels, those of tokens before. Of each output: gains. Of each row: what the norm is made of.
    sums = (_none(SUMS, form), _none(SUMS, form), _none(ROWS, form), _none(tl.constexpr(form.M), form), _none(tl.constexpr(form.M), form))
    for block in tl.static_range(tl.constexpr(form.blocks)):
        if block + form.ahead < form.blocks:
            held = held + _weights(weight, first, N, block + form.ahead, form)
        sums = _add(
            *(x, held, before.gain, shift, pivots, same, sums, block),
            _has_own(block * form.block, (block + 1) * form.block, form.K, form.tokens),
            _has_before(block * form.block, (block + 1) * form.block, form.K, form.tokens),
            form,
        )
    for m in tl.static_range(tl.constexpr(form.M)):
        total = tl.sum(_stacked(sums[0], m * form.rows, form), 0)
        if form.norm != "none":
            mean = tl.sum(sums[3][m], 0) / form.K if form.norm == "layer" else 0.0
            factor = 1.0 / tl.sqrt(tl.maximum(tl.sum(sums[4][m], 0) / form.K - mean * mean, 0.0) + eps)
            if form.norm == "layer":
                total -= mean * tl.sum(_stacked(sums[2], 0, form), 0)
            total *= factor
            if form.tokens > 0:
                total += tl.sum(_stacked(sums[1], m * form.rows, form), 0)
            if before.fresh is not None and first == 0:
                _write_fresh(before.fresh + m * form.K, x + m * form.K, before.gain, pivots[m], mean, factor, form)
        _store(y, place, activated(total + bias, ACTIVATION, EXACT) + residuals[m], m, n, N, at)
    if form.kept > 0 and tl.program_id(0) == tl.num_programs(0) - 1:
        _keep_all(keep, form)


@triton.jit
def _keep_all(keep, form: tl.constexpr):
    """Move the past of all rows on by what an earlier product has normalized."""
    for m in tl.static_range(tl.constexpr(form.M)):
        for block in tl.static_range(tl.constexpr((form.width + form.block - 1) // form.block)):
            column = block * form.block + tl.arange(0, form.block)
            exists = column < form.width
            value = tl.load(keep.fresh + m * form.width + column, mask=exists, other=0.0)
            _keep(keep.past + m * form.kept * form.width, column, exists, value, tl.constexpr(form.width), tl.constexpr(form.kept))


class Before(NamedTuple):
    """What happens to the rows first; None where nothing does."""

    gain: Any = None
    fresh: Any = None
    """Where the normalized rows are written (M, K)."""


class After(NamedTuple):
    """What is added to the product; None where nothing is."""

    bias: Any = None
    residual: Any = None


class Keep(NamedTuple):
    """What an earlier product has normalized, and the past that it belongs to; None where there is nothing."""

    past: Any = None
    fresh: Any = None


class Place(NamedTuple):
    """Where outputs from `begin` to `end` go as well: into a cache at an index; None where there is none."""

    cache: Any = None
    index: Any = None
    begin: Any = 0
    end: Any = 0
    cache_m: Any = 0
    cache_s: Any = 0


def launch(N: int, K: int, M: int, size: int) -> Launch:
    """How to cut a product of weights (N, K) of `size` bytes a number with M rows.

    Measured on an H100 in the whole step of preset andromeda (2.10 ms a token became 2.01 after 2,048 tokens). More reads at once
    are no gain: their registers are taken from the programs of the next kernel, which could have asked for its weights meanwhile.
    """
    long = K * size > LONG
    # Blocks that divide the inputs waste nothing.
    warps = next((w for w in ((4, 2, 1) if long else (2, 1)) if K % (w * 32 * BYTES // size) == 0), 4 if K > 1024 else 1)
    blocks = triton.cdiv(K, warps * 32 * BYTES // size)
    # What is computed of x is computed once for all outputs of a program: more of them where there are many rows.
    rows = 2 if long and M <= 2 else 4
    # Of a thread: four registers each.
    reads = 8 if long else 12 if N >= MANY else 16
    return Launch(rows, warps, min(blocks, reads // rows))


class Input(NamedTuple):
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
    numbers: Tensor | None = None
    at: Tensor | None = None
    """Where the token of this pass lies among the keys."""

    def shift(self) -> Shift:
        """For the kernels."""
        if self.own is None or self.numbers is None or self.past is None:
            return Shift(self.past)
        strides = (self.own.stride(0), self.numbers.stride(0), self.numbers.shape[1] - 1)
        return Shift(self.past, self.own, self.numbers, self.at, *strides)


def normalize(given: Input) -> Tensor:
    """Rows (M, K) after norm and token shift; `past` is moved on."""
    x, y = given.x, torch.empty_like(given.x)
    cut = Launch(1, 8, 1)
    form = _form(given, x.element_size(), cut)
    with torch.cuda.device_of(x):
        _normalize[(x.shape[0],)](x, given.gain, given.shift(), y, given.eps, form=form, num_warps=cut.warps, **options(form.early))
    return y


def product(
    given: Input,
    weight: Tensor,
    y: Tensor,
    after: After = After(),
    activation: str = "none",
    fresh: Tensor | None = None,
    keep: Keep = Keep(),
    place: Place = Place(),
    cut: Launch | None = None,
) -> None:
    """Fill y (M, N) with the product of the rows with weight (N, K), and `fresh` (M, K) with the rows as the norm leaves them.

    keep: a past (M, J, C) that is moved on by `fresh` (M, C) of an earlier product.
    """
    x, N = given.x, weight.shape[0]
    cut = cut or launch(N, x.shape[1], x.shape[0], weight.element_size())
    form = _form(given, weight.element_size(), cut)._replace(activation=activation)
    if keep.past is not None:
        form = form._replace(kept=keep.past.shape[1], width=keep.past.shape[2])
    with torch.cuda.device_of(x):
        _product[(triton.cdiv(N, cut.rows),)](
            *(x, weight, after, Before(given.gain, fresh), given.shift(), keep, place, y, N, given.eps),
            form=form,
            num_warps=cut.warps,
            **options(form.early),
        )


def _form(given: Input, size: int, cut: Launch) -> Form:
    (M, K), vector = given.x.shape, BYTES // size
    block = cut.warps * 32 * vector
    blocks = triton.cdiv(K, block)
    tokens = 0 if given.past is None else given.past.shape[1]
    return Form(
        *(M, K, cut.rows, block, blocks, min(cut.ahead, blocks), vector, given.norm, tokens, given.at is not None),
        activation="none",
        kept=0,
        width=0,
        early=early(given.x),
    )
