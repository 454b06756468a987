"""The Triton kernels of entmax attention, in the order in which a call runs them.

Notation of adasplash2/contract.py: z = c * s with s = q . k and c = (alpha - 1) * |scale| (the sign of the scale goes
into q), u = max(z - tau, 0), p = u ** r, w = u ** (r - 1), r = 1 / (alpha - 1).

Names: ``i_`` index of a tile or block, ``o_`` offsets, ``b_`` values of a block; upper case is a compile-time
constant or a pointer. Strides come in units of VEC elements, so that the compiler sees what they are multiples of, and
no integer is specialised: a new length, batch or number of heads compiles nothing.

A *tile* is BLOCK_M queries of one head, a *block* BLOCK_N keys. LIST has the blocks of a tile that still count, in
order; LIVE a byte for each tile and block, 1 where it holds support. While a loop over blocks runs, what it finds is
kept as a bit per block in registers and written to WORDS 32 at a time: a store for each block would move its mask
through shared memory. Rows that see no key have tau = +inf, rows with a query that is not finite or a key in sight that
is not have tau = NaN.

With FLAGS (decode.py) a kernel of forward works on the heads that are flagged, by the keys that they share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

__all__ = [
    "ALPHA_1_5",
    "ALPHA_2",
    "ALPHA_ANY",
    "entmax_attn_bwd_dkv",
    "entmax_attn_bwd_dq",
    "entmax_attn_check_keys",
    "entmax_attn_fwd_output",
    "entmax_attn_fwd_refine",
    "entmax_attn_fwd_scan",
    "entmax_attn_support",
    "entmax_rows_bwd",
    "entmax_rows_fwd",
]

# No integer is specialised on being 1 or a multiple of 16.
INTEGERS = [
    *(f"stride_{tensor}{axis}" for tensor in "qo" for axis in "bhm"),
    *(f"stride_{tensor}{axis}" for tensor in "kv" for axis in "bhn"),
    *("stride_xm", "stride_xn", "stride_dm", "stride_dn", "n"),
    *("heads_q", "heads_kv", "group", "seqlen_q", "seqlen_k", "n_tiles", "n_blocks", "chunk", "n_chunks", "n_words"),
    *("map_m", "map_n", "map_rows", "map_columns"),
]

ALPHA_ANY = tl.constexpr(0)
ALPHA_1_5 = tl.constexpr(1)
ALPHA_2 = tl.constexpr(2)

LARGE = tl.constexpr(3e38)
SMALL = tl.constexpr(1e-30)
SMALLEST = tl.constexpr(1.2e-38)  # whose logarithm is taken, and whose reciprocal is finite
LN_2 = tl.constexpr(0.6931471805599453)

# Not in the interpreter, and not in builds of torch for others' GPUs.
IS_CUDA = tl.constexpr(
    not triton.knobs.runtime.interpret and torch.version.hip is None and getattr(torch.version, "xpu", None) is None
)

# Blocks that a compaction looks at together, and that a word has bits for.
CHUNK = tl.constexpr(256)
WORD = tl.constexpr(32)

BINS = tl.constexpr(16)

# Numbers of k that programs which run at the same time may read, and as many of v, so that they stay in the L2 cache.
READ_TOGETHER = tl.constexpr(1 << 23)

# Newton steps on the kept maxima after the scan; each costs a few thousandths of it.
INIT_STEPS = tl.constexpr(4)


@triton.jit
def _saturate(b_x):
    """Inside [0, 1]; NaN is 0.

    So u comes from z - tau, which a bound of tau from below, too, leaves at most 1. On NVIDIA's GPUs a product that is
    clamped to [0, 1] costs nothing more, a maximum an instruction at half rate.
    """
    return tl.minimum(tl.maximum(b_x, 0.0), 1.0)


@triton.jit
def _log2(b_x):
    """To 1e-7 between 1/2 and 2, elsewhere to 22 bits: one instruction instead of the twenty of tl.log2."""
    if IS_CUDA:
        return libdevice.fast_log2f(b_x)
    else:
        return tl.log2(b_x)


@triton.jit
def _powers(b_u, r, ALPHA: tl.constexpr):
    """p and w of u; 0 and 0 at u = 0."""
    if ALPHA == ALPHA_1_5:
        return b_u * b_u, b_u
    elif ALPHA == ALPHA_2:
        return b_u, _saturate(b_u * LARGE)
    else:
        # At u = 0 the logarithm is -inf, and w is 0, as long as it is multiplied by more than 0, which alpha = 2 needs.
        b_w = tl.exp2(tl.maximum(r - 1, SMALL) * _log2(b_u))
        return b_w * b_u, b_w


@triton.jit
def _newton_step(b_f, b_g, r, ALPHA: tl.constexpr):
    """The step on the norm of u from f = sum u ** r and g = sum u ** (r - 1): from below it does not pass tau."""
    if ALPHA == ALPHA_1_5:
        b_power = tl.sqrt(b_f)
    elif ALPHA == ALPHA_2:
        b_power = tl.where(b_f > 0, 1.0, 0.0)
    else:
        b_power = tl.where(b_f > 0, tl.exp2((1 - 1 / r) * tl.log2(b_f)), 0.0)
    return tl.where(b_g > 0, (b_f - b_power) / tl.where(b_g > 0, b_g, 1.0), 0.0)


@triton.jit
def _store_slopes(SLOPES, b_f, b_g, b_step, r, o_rows, mask):
    """What _load_slope needs of the step from f and g.

    f falls by r times the step, times the mean of the slopes before and after: so the latter is (a - b f) g. Where it
    falls by less than two thousandths, its rounding would show; and g, which falls no faster, is as good.
    """
    b_fall = r * b_step * b_g
    is_far = b_fall > 2e-3 * b_f
    b_fall = tl.where(is_far, b_fall, 1.0)
    tl.store(SLOPES + 3 * o_rows, b_g, mask=mask)
    tl.store(SLOPES + 3 * o_rows + 1, tl.where(is_far, 2 * b_f / b_fall - 1, 1.0), mask=mask)
    tl.store(SLOPES + 3 * o_rows + 2, tl.where(is_far, 2 / b_fall, 0.0), mask=mask)


@triton.jit
def _load_slope(SLOPES, b_f, o_rows, mask):
    """sum w after the last step of the refine kernel, from sum p."""
    b_g = tl.load(SLOPES + 3 * o_rows, mask=mask, other=0.0)
    b_a = tl.load(SLOPES + 3 * o_rows + 1, mask=mask, other=0.0)
    b_b = tl.load(SLOPES + 3 * o_rows + 2, mask=mask, other=0.0)
    return b_g * tl.minimum(tl.maximum(b_a - b_b * b_f, 0.5), 1.0)


@triton.jit
def _exponent(ALPHA_HEADS, alpha_minus_1, i_h, PER_HEAD: tl.constexpr):
    """alpha - 1 of a head."""
    if PER_HEAD:
        return tl.load(ALPHA_HEADS + i_h) - 1
    else:
        return alpha_minus_1


@triton.jit
def _lengths(SEQLENS_Q, SEQLENS_K, i_b, seqlen_q, seqlen_k, HAS_SEQLENS_Q: tl.constexpr, HAS_SEQLENS_K: tl.constexpr):
    """The valid lengths of a sequence; whatever the tensors hold, inside the memory."""
    len_q = seqlen_q
    len_k = seqlen_k
    if HAS_SEQLENS_Q:
        len_q = tl.minimum(tl.maximum(tl.load(SEQLENS_Q + i_b).to(tl.int32), 0), seqlen_q)
    if HAS_SEQLENS_K:
        len_k = tl.minimum(tl.maximum(tl.load(SEQLENS_K + i_b).to(tl.int32), 0), seqlen_k)
    return len_q, len_k


@triton.jit
def _turn(program, programs, n, seqlen_k, HEAD_DIM: tl.constexpr):
    """A head, and which of its n tiles or blocks, of a program among all.

    The first ones of several heads come first, then the second ones: where these are the longest, those that begin
    last, when others are through, are short.
    """
    heads = programs // n
    most = tl.minimum(tl.maximum(READ_TOGETHER // HEAD_DIM // seqlen_k, 1), heads)
    first = program // (most * n) * most
    rest = program - first * n
    together = tl.minimum(most, heads - first)
    return first + rest % together, rest // together


@triton.jit
def _keys_seen(o_rows, len_q, len_k, IS_CAUSAL: tl.constexpr):
    """How many keys, from the first one, each query sees."""
    seen = tl.where(o_rows < len_q, len_k, 0)
    if IS_CAUSAL:
        seen = tl.minimum(seen, tl.maximum(o_rows + 1 + len_k - len_q, 0))
    return seen


@triton.jit
def _tile_keys(i_m, len_q, len_k, BLOCK_M: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """How many keys every valid query of a tile sees, and how many any of them does."""
    everyone = len_k
    anyone = len_k
    if IS_CAUSAL:
        last = tl.minimum(i_m * BLOCK_M + BLOCK_M, len_q) - 1
        everyone = tl.minimum(tl.maximum(i_m * BLOCK_M + 1 + len_k - len_q, 0), len_k)
        anyone = tl.minimum(tl.maximum(last + 1 + len_k - len_q, 0), len_k)
    has_rows = i_m * BLOCK_M < len_q
    return tl.where(has_rows, everyone, 0), tl.where(has_rows, anyone, 0)


@triton.jit
def _load_tile(
    base, first, low, high, stride, VEC: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[ROWS, BLOCK_D] rows from ``first`` on; those outside low <= row < high are read from its ends instead.

    So no address is out of bounds and no padding is read; what such rows give must be masked by the caller.
    """
    o_rows = tl.minimum(tl.maximum(first + tl.arange(0, ROWS), low), high - 1)
    o_d = tl.arange(0, BLOCK_D)
    pointers = base + (o_rows.to(tl.int64) * stride * VEC)[:, None] + o_d[None, :]
    if DIM == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=o_d[None, :] < DIM, other=0.0)


@triton.jit
def _load_block(base, first, stride, VEC: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The same where all rows are valid."""
    o_rows = tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    start = base + first.to(tl.int64) * stride * VEC
    pointers = start + (o_rows.to(tl.int64) * stride * VEC)[:, None] + o_d[None, :]
    if DIM == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=o_d[None, :] < DIM, other=0.0)


@triton.jit
def _store_tile(base, first, high, stride, b_values, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows from ``first`` on, up to ``high``, of a contiguous result."""
    o_rows = first + tl.arange(0, ROWS)
    o_d = tl.arange(0, BLOCK_D)
    pointers = base + (o_rows.to(tl.int64) * stride)[:, None] + o_d[None, :]
    tl.store(pointers, b_values.to(base.dtype.element_ty), mask=(o_rows[:, None] < high) & (o_d[None, :] < DIM))


@triton.jit
def _signed(b_q, SIGN: tl.constexpr):
    if SIGN == 1:
        return b_q
    else:
        return (b_q.to(tl.float32) * SIGN).to(b_q.dtype)


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _bits_of(WORDS, o_places, end):
    """Whether the bit at each place is set; 0 from ``end`` on."""
    b_words = tl.load(WORDS + o_places // WORD, mask=o_places < end, other=0)
    return (b_words >> (o_places % WORD)) & 1


@triton.jit
def _list_blocks(LIST, SOURCE, n_blocks, n_whole, FROM_LIVE: tl.constexpr):
    """Write to LIST, in order, the blocks that are set in SOURCE, which is LIVE or WORDS.

    Returns how many of the first ``n_whole`` blocks are listed, and how many of all.
    """
    whole = n_blocks * 0
    count = n_blocks * 0
    o_chunk = tl.arange(0, CHUNK)
    for first in range(0, n_blocks, CHUNK):
        o_blocks = first + o_chunk
        if FROM_LIVE:
            b_listed = tl.load(SOURCE + o_blocks, mask=o_blocks < n_blocks, other=0).to(tl.int32)
        else:
            b_listed = _bits_of(SOURCE, o_blocks, n_blocks)
        places = count + tl.cumsum(b_listed, 0) - 1
        tl.store(LIST + places, o_blocks.to(LIST.dtype.element_ty), mask=b_listed > 0)
        whole += tl.sum(tl.where(o_blocks < n_whole, b_listed, 0), 0)
        count += tl.sum(b_listed, 0)
    # Written by some threads, read by all.
    tl.debug_barrier()
    return whole, count


@triton.jit
def _shorten_list(LIST, WORDS, whole, count):
    """Keep the entries of LIST whose bit is set, in place; how many of the first ``whole``, and how many of all."""
    kept_whole = whole * 0
    kept = count * 0
    o_chunk = tl.arange(0, CHUNK)
    for first in range(0, count, CHUNK):
        o_places = first + o_chunk
        b_kept = _bits_of(WORDS, o_places, count)
        b_blocks = tl.load(LIST + o_places, mask=o_places < count, other=0)
        places = kept + tl.cumsum(b_kept, 0) - 1
        # The places written to may be among those that other threads have yet to read.
        tl.debug_barrier()
        tl.store(LIST + places, b_blocks, mask=b_kept > 0)
        kept_whole += tl.sum(tl.where(o_places < whole, b_kept, 0), 0)
        kept += tl.sum(b_kept, 0)
    tl.debug_barrier()
    return kept_whole, kept


@triton.jit
def _fill(pointer, n, value):
    """``value`` in the first ``n`` places, seen by all threads."""
    o_chunk = tl.arange(0, CHUNK)
    for first in range(0, n, CHUNK):
        tl.store(pointer + first + o_chunk, value, mask=first + o_chunk < n)
    tl.debug_barrier()


@triton.jit
def _mark_live(LIVE, LIST, WORDS, count):
    """1 in LIVE for the entries of LIST whose bit is set."""
    o_chunk = tl.arange(0, CHUNK)
    for first in range(0, count, CHUNK):
        o_places = first + o_chunk
        b_blocks = tl.load(LIST + o_places, mask=o_places < count, other=0).to(tl.int32)
        tl.store(LIVE + b_blocks, 1, mask=_bits_of(WORDS, o_places, count) > 0)


@triton.jit(do_not_specialize=INTEGERS)
def entmax_attn_check_keys(
    K,
    FIRST_BAD,
    FLAGS,
    SEQLENS_K,
    stride_kb,
    stride_kh,
    stride_kn,
    heads_kv,
    seqlen_k,
    chunk,
    n_chunks,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    HAS_SEQLENS_K: tl.constexpr,
):
    """The first key that is not finite in each chunk of ``chunk`` keys, or seqlen_k."""
    i_c = tl.program_id(0) % n_chunks
    i_bh = tl.program_id(0) // n_chunks
    if FLAGS is not None:
        if tl.load(FLAGS + i_bh) == 0:
            return
    i_b = (i_bh // heads_kv).to(tl.int64)
    i_h = (i_bh % heads_kv).to(tl.int64)
    _, len_k = _lengths(SEQLENS_K, SEQLENS_K, i_b, seqlen_k, seqlen_k, False, HAS_SEQLENS_K)
    base = K + (i_b * stride_kb + i_h * stride_kh) * VEC
    b_bad = tl.zeros([BLOCK], tl.int32) + seqlen_k
    for first in range(i_c * chunk, tl.minimum(i_c * chunk + chunk, len_k), BLOCK):
        o_rows = first + tl.arange(0, BLOCK)
        b_k = _load_tile(base, first, 0, seqlen_k, stride_kn, VEC, BLOCK, HEAD_DIM, BLOCK_D).to(tl.float32)
        # x - x is 0 for a finite x and NaN for all others.
        is_bad = (tl.sum(b_k - b_k, 1) != 0) & (o_rows < len_k)
        b_bad = tl.minimum(b_bad, tl.where(is_bad, o_rows, seqlen_k))
    tl.store(FIRST_BAD + tl.program_id(0), tl.min(b_bad, 0))


@triton.jit
def _insert(b_new, b_0, b_1):
    """Each slot keeps its two largest, in order."""
    return tl.maximum(b_0, b_new), tl.maximum(b_1, tl.minimum(b_0, b_new))


@triton.jit
def _raise_by_maxima(b_tau, b_0, b_1, c, r, ALPHA: tl.constexpr):
    """One Newton step towards tau of the kept maxima, a subset of the scores: a lower bound of tau."""
    b_p0, b_w0 = _powers(_saturate(b_0 * c - b_tau[:, None, None]), r, ALPHA)
    b_p1, b_w1 = _powers(_saturate(b_1 * c - b_tau[:, None, None]), r, ALPHA)
    # The sum over blocks stays inside a thread, so it comes first.
    b_f = tl.sum(tl.sum(b_p0 + b_p1, 1), 1)
    b_g = tl.sum(tl.sum(b_w0 + b_w1, 1), 1)
    return b_tau + tl.maximum(_newton_step(b_f, b_g, r, ALPHA), 0.0)


@triton.jit
def _bin_counts(b_kept, b_low, c):
    """[rows, BINS] how many kept maxima of one rank fall into each bin of [max z - 1, max z]."""
    b_bin = tl.floor(tl.maximum(b_kept * c - b_low[:, None, None], -1.0) * BINS)
    o_bins = tl.arange(0, BINS)
    b_bin = tl.minimum(b_bin, BINS - 1)
    is_in = b_bin[:, :, :, None] == o_bins[None, None, None, :]
    return tl.sum(tl.sum(is_in.to(tl.float32), 2), 1)


@triton.jit
def _init_histogram(b_low, b_0, b_1, c, r, ALPHA: tl.constexpr):
    """tau of the histogram of the kept maxima, which count at the lower edges of their bins: a lower bound of tau."""
    b_counts = _bin_counts(b_0, b_low, c) + _bin_counts(b_1, b_low, c)
    b_edges = tl.arange(0, BINS).to(tl.float32)[None, :] / BINS  # above b_low = max z - 1
    b_shift = b_low * 0
    for _ in tl.static_range(INIT_STEPS + 2):
        b_p, b_w = _powers(_saturate(b_edges - b_shift[:, None]), r, ALPHA)
        b_step = _newton_step(tl.sum(b_counts * b_p, 1), tl.sum(b_counts * b_w, 1), r, ALPHA)
        b_shift += tl.maximum(b_step, 0.0)
    return b_low + b_shift


@triton.jit
def _maxima(b_s, BLOCKS: tl.constexpr):
    """[rows, BLOCKS, 4] largest scores of each row in each block.

    A thread holds keys 8 i + 2 l and 8 i + 2 l + 1 of a row, for one l of 4: these maxima stay inside it. Those over i
    come first, as a chain, of which the compiler takes two at once where it can.
    """
    return tl.max(tl.max(tl.reshape(b_s, [b_s.shape[0], BLOCKS, b_s.shape[1] // BLOCKS // 8, 4, 2]), 2), 3)


@triton.jit
def _scan_block(
    b_q,
    K,
    WORDS,
    j,
    is_last,
    stride_kn,
    b_seen,
    b_tau,
    b_0,
    b_1,
    b_bits,
    is_positive,
    len_k,
    c,
    r,
    ALPHA: tl.constexpr,
    MASKED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    WINDOW: tl.constexpr,
    BOUND_EVERY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores of BLOCKS blocks from block j * BLOCKS on: the kept maxima, the bound of tau, and who is above it.

    The bound is raised, and the bits are written, after BOUND_EVERY of these. Both stand in one branch, because the
    store keeps the compiler from taking it each time.
    """
    KEYS: tl.constexpr = BLOCK_N * BLOCKS
    if MASKED:
        b_k = _load_tile(K, j * KEYS, 0, len_k, stride_kn, VEC, KEYS, HEAD_DIM, BLOCK_D)
    else:
        b_k = _load_block(K, j * KEYS, stride_kn, VEC, KEYS, HEAD_DIM, BLOCK_D)
    # [BLOCK_M, KEYS]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if MASKED:
        b_s = tl.where(j * KEYS + tl.arange(0, KEYS)[None, :] < b_seen[:, None], b_s, float("-inf"))
    # Numbers that are not negative have the order of their bits, and of integers the compiler takes the largest of
    # three at once. Of negative ones it may be the smallest, but then none is above the bound. Triton 3.6 compiles no
    # loop in which a branch takes a product as it is.
    b_i = b_s.to(tl.int32, bitcast=True)
    if is_positive:
        b_max = _maxima(b_i, BLOCKS).to(tl.float32, bitcast=True)
    else:
        b_max = _maxima(b_i.to(tl.float32, bitcast=True), BLOCKS)
    b_0, b_1 = _insert(b_max, b_0, b_1)
    b_above = (b_max * c > b_tau[:, None, None]).to(tl.int32)
    b_bits = b_bits | (b_above << ((j % WINDOW) * BLOCKS + tl.arange(0, BLOCKS))[None, :, None])
    if (j % BOUND_EVERY == 0) | is_last:
        b_tau = tl.maximum(b_tau, tl.max(tl.max(b_0, 1), 1) * c - 1)
        b_tau = _raise_by_maxima(b_tau, b_0, b_1, c, r, ALPHA)
        word = tl.reduce(tl.reduce(tl.reduce(b_bits, 2, _or), 1, _or), 0, _or)
        tl.store(WORDS + j // WINDOW, tl.load(WORDS + j // WINDOW) | word)
        b_bits = b_bits & 0
        is_positive = tl.min(b_tau, 0) >= 0
    return b_tau, b_0, b_1, b_bits, is_positive


@triton.jit(do_not_specialize=INTEGERS)
def entmax_attn_fwd_scan(
    Q,
    K,
    TAU,
    WORDS,
    LIST,
    COUNTS,
    FIRST_BAD,
    FLAGS,
    ALPHA_HEADS,
    SEQLENS_Q,
    SEQLENS_K,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    alpha_minus_1,
    scale,
    heads_q,
    group,
    seqlen_q,
    seqlen_k,
    n_tiles,
    n_blocks,
    n_chunks,
    n_words,
    ALPHA: tl.constexpr,
    PER_HEAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_SEQLENS_Q: tl.constexpr,
    HAS_SEQLENS_K: tl.constexpr,
    SIGN: tl.constexpr,
    HISTOGRAM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_Q: tl.constexpr,
    VEC_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORD: tl.constexpr,
    BOUND_EVERY: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scan and init: all scores once; a lower bound of tau per row (in TAU) and the list of blocks above it.

    Of each row the two largest maxima of each of 4 * BLOCKS interleaved sets of keys are kept. tau of that subset of
    the scores, followed by Newton steps on the way, is the bound that later blocks must pass.
    """
    KEYS: tl.constexpr = BLOCK_N * BLOCKS
    i_bh, i_turn = _turn(tl.program_id(0), tl.num_programs(0), n_tiles, seqlen_k, HEAD_DIM)
    i_m = n_tiles - 1 - i_turn
    i_b = (i_bh // heads_q).to(tl.int64)
    i_h = (i_bh % heads_q).to(tl.int64)
    i_tile = i_bh.to(tl.int64) * n_tiles + i_m
    i_kv = i_b * (heads_q // group) + i_h // group
    if FLAGS is not None:
        if tl.load(FLAGS + i_kv) == 0:
            return
    len_q, len_k = _lengths(SEQLENS_Q, SEQLENS_K, i_b, seqlen_q, seqlen_k, HAS_SEQLENS_Q, HAS_SEQLENS_K)
    exponent = _exponent(ALPHA_HEADS, alpha_minus_1, i_h, PER_HEAD)
    c = exponent * scale
    r = 1 / exponent
    Q += (i_b * stride_qb + i_h * stride_qh) * VEC_Q
    K += (i_b * stride_kb + (i_h // group) * stride_kh) * VEC_K
    WORDS += i_tile * n_words
    LIST += i_tile * n_blocks

    o_rows = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b_seen = _keys_seen(o_rows, len_q, len_k, IS_CAUSAL)
    everyone, anyone = _tile_keys(i_m, len_q, len_k, BLOCK_M, IS_CAUSAL)
    _fill(WORDS, tl.cdiv(n_blocks, WORD) + 1, 0)

    o_chunks = tl.arange(0, CHUNK)
    first_bad = seqlen_k
    for first in range(0, n_chunks, CHUNK):
        b_bad = tl.load(
            FIRST_BAD + i_kv * n_chunks + first + o_chunks, mask=first + o_chunks < n_chunks, other=seqlen_k
        )
        first_bad = tl.minimum(first_bad, tl.min(b_bad, 0))
    b_q = _signed(_load_tile(Q, i_m * BLOCK_M, 0, seqlen_q, stride_qm, VEC_Q, BLOCK_M, HEAD_DIM, BLOCK_D), SIGN)
    b_q_wide = b_q.to(tl.float32)
    is_bad = (b_seen > 0) & ((b_seen > first_bad) | (tl.sum(b_q_wide - b_q_wide, 1) != 0))

    # Rows without keys take no part: nothing is above +inf.
    b_tau = tl.where(b_seen > 0, float("-inf"), float("inf"))
    b_0 = tl.full([BLOCK_M, BLOCKS, 4], float("-inf"), tl.float32)
    b_1 = b_0
    b_bits = tl.zeros([BLOCK_M, BLOCKS, 4], tl.int32)
    is_positive = False  # the bound of each row: scores below 0 do not count then
    n_whole = everyone // KEYS
    # The blocks that hold the diagonal, or the end of the keys, first: where attention is local, they give the bound.
    for j in tl.range(n_whole, tl.cdiv(anyone, KEYS)):
        b_tau, b_0, b_1, b_bits, is_positive = _scan_block(
            b_q, K, WORDS, j, True, stride_kn, b_seen, b_tau, b_0, b_1, b_bits, is_positive,
            len_k, c, r, ALPHA, True, VEC_K, BLOCK_N, BLOCKS, WORD // BLOCKS, BOUND_EVERY,
            HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
    nearest = n_whole - 1
    if not IS_CAUSAL:
        nearest = tl.minimum(i_m * BLOCK_M // KEYS, nearest)
    for step in tl.range(0, n_whole):
        j = nearest - step
        j = tl.where(j < 0, j + n_whole, j)
        b_tau, b_0, b_1, b_bits, is_positive = _scan_block(
            b_q, K, WORDS, j, step == n_whole - 1, stride_kn, b_seen, b_tau, b_0, b_1, b_bits, is_positive,
            len_k, c, r, ALPHA, False, VEC_K, BLOCK_N, BLOCKS, WORD // BLOCKS, BOUND_EVERY,
            HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip

    if HISTOGRAM:
        b_low = tl.max(tl.max(b_0, 2), 1) * c - 1
        b_tau = tl.where(b_low == float("-inf"), b_low, _init_histogram(b_low, b_0, b_1, c, r, ALPHA))
    else:
        for _ in tl.static_range(INIT_STEPS):
            b_tau = _raise_by_maxima(b_tau, b_0, b_1, c, r, ALPHA)
    b_tau = tl.where(b_seen > 0, b_tau, float("inf"))
    b_tau = tl.where(is_bad, float("nan"), b_tau)
    tl.store(TAU + i_bh.to(tl.int64) * seqlen_q + o_rows, b_tau, mask=o_rows < seqlen_q)

    n_seen = tl.cdiv(anyone, BLOCK_N)
    tl.debug_barrier()
    if tl.max(is_bad.to(tl.int32), 0) > 0:
        _fill(WORDS, tl.cdiv(n_seen, WORD), -1)
    whole, count = _list_blocks(LIST, WORDS, n_seen, everyone // BLOCK_N, False)
    tl.store(COUNTS + 2 * i_tile, whole)
    tl.store(COUNTS + 2 * i_tile + 1, count)


@triton.jit
def _next_block(LIST, i, end):
    """Entry i of a list, read one step ahead so that its latency is hidden; past the end the last one again."""
    return tl.load(LIST + tl.maximum(tl.minimum(i, end - 1), 0)).to(tl.int32)


@triton.jit
def _block_scores(
    b_q,
    K,
    j,
    stride_kn,
    b_seen,
    len_k,
    MASKED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] scores of one block, -inf where a key is not seen, and its keys."""
    if MASKED:
        b_k = _load_tile(K, j * BLOCK_N, 0, len_k, stride_kn, VEC, BLOCK_N, HEAD_DIM, BLOCK_D)
    else:
        b_k = _load_block(K, j * BLOCK_N, stride_kn, VEC, BLOCK_N, HEAD_DIM, BLOCK_D)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if MASKED:
        b_s = tl.where(j * BLOCK_N + tl.arange(0, BLOCK_N)[None, :] < b_seen[:, None], b_s, float("-inf"))
    return b_s, b_k


@triton.jit
def _by_thread(b_x):
    """[rows, 4, keys // 4]: of a product, a thread holds all keys of a row that have one index of the 4.

    Sums over them never leave their thread, and are one chain, in which a sum of products costs no more than a sum.
    """
    b_x = tl.permute(tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // 8, 4, 2]), (0, 2, 1, 3))
    return tl.reshape(b_x, [b_x.shape[0], 4, b_x.shape[2] * 2])


@triton.jit
def _sum_by_thread(b_x):
    """[rows, 4] sums."""
    return tl.sum(_by_thread(b_x), 2)


@triton.jit
def _keep_bits(WORDS, i, is_last, b_bits, b_added, WORD: tl.constexpr):
    """Bit i % WORD where ``b_added`` (any row) is positive; a full word, and the last one, is written."""
    b_bits = b_bits | ((b_added > 0).to(tl.int32) << (i % WORD))
    if (i % WORD == WORD - 1) | is_last:
        tl.store(WORDS + i // WORD, tl.reduce(tl.reduce(b_bits, 1, _or), 0, _or))
        b_bits = b_bits & 0
    return b_bits


@triton.jit
def _refine(
    b_q,
    K,
    WORDS,
    LIST,
    begin,
    end,
    count,
    stride_kn,
    b_seen,
    b_tau,
    b_f,
    b_g,
    b_bits,
    len_k,
    c,
    r,
    ALPHA: tl.constexpr,
    MASKED: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """f = sum u ** r and g = sum u ** (r - 1) over the listed blocks, and which hold a u > 0."""
    j_next = _next_block(LIST, begin, end)
    for i in tl.range(begin, end):
        j = j_next
        j_next = _next_block(LIST, i + 1, end)
        b_s, _b_k = _block_scores(
            b_q, K, j, stride_kn, b_seen, len_k, MASKED, VEC, BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION
        )
        # Here and not at the sums, where the compiler would move all numbers between threads.
        b_z = _by_thread(b_s) * c
        b_p, b_w = _powers(_saturate(b_z - b_tau[:, None, None]), r, ALPHA)
        b_added = tl.sum(b_w, 2)
        b_f += tl.sum(b_p, 2)
        b_g += b_added
        b_bits = _keep_bits(WORDS, i, i == count - 1, b_bits, b_added, WORD)
    return b_f, b_g, b_bits


@triton.jit(do_not_specialize=INTEGERS)
def entmax_attn_fwd_refine(
    Q,
    K,
    TAU,
    SLOPES,
    LIVE,
    WORDS,
    LIST,
    COUNTS,
    FLAGS,
    ALPHA_HEADS,
    SEQLENS_Q,
    SEQLENS_K,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    alpha_minus_1,
    scale,
    target,
    heads_q,
    group,
    seqlen_q,
    seqlen_k,
    n_tiles,
    n_blocks,
    n_words,
    ALPHA: tl.constexpr,
    PER_HEAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_SEQLENS_Q: tl.constexpr,
    HAS_SEQLENS_K: tl.constexpr,
    SIGN: tl.constexpr,
    SAVE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_Q: tl.constexpr,
    VEC_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORD: tl.constexpr,
    MAX_STEPS: tl.constexpr,
    CORRECTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Refine over the listed blocks: Newton steps in TAU until the next one is expected to be below ``target``.

    What is left of tau's error the output pass finds and corrects. After the first step, the list keeps the blocks that
    it had found above the bound of the scan. LIVE is cleared for the output pass, which is left SLOPES unless
    it is CORRECTED.
    """
    i_bh, i_turn = _turn(tl.program_id(0), tl.num_programs(0), n_tiles, seqlen_k, HEAD_DIM)
    i_m = n_tiles - 1 - i_turn
    i_b = (i_bh // heads_q).to(tl.int64)
    i_h = (i_bh % heads_q).to(tl.int64)
    if FLAGS is not None:
        if tl.load(FLAGS + i_b * (heads_q // group) + i_h // group) == 0:
            return
    i_tile = i_bh.to(tl.int64) * n_tiles + i_m
    len_q, len_k = _lengths(SEQLENS_Q, SEQLENS_K, i_b, seqlen_q, seqlen_k, HAS_SEQLENS_Q, HAS_SEQLENS_K)
    exponent = _exponent(ALPHA_HEADS, alpha_minus_1, i_h, PER_HEAD)
    c = exponent * scale
    r = 1 / exponent
    Q += (i_b * stride_qb + i_h * stride_qh) * VEC_Q
    K += (i_b * stride_kb + (i_h // group) * stride_kh) * VEC_K
    TAU += i_bh.to(tl.int64) * seqlen_q
    WORDS += i_tile * n_words
    LIST += i_tile * n_blocks
    if SAVE:
        _fill(LIVE + i_tile * n_blocks, n_blocks, 0)

    o_rows = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b_seen = _keys_seen(o_rows, len_q, len_k, IS_CAUSAL)
    b_q = _signed(_load_tile(Q, i_m * BLOCK_M, 0, seqlen_q, stride_qm, VEC_Q, BLOCK_M, HEAD_DIM, BLOCK_D), SIGN)
    b_tau = tl.load(TAU + o_rows, mask=o_rows < seqlen_q, other=float("inf"))
    is_bad = b_tau != b_tau
    b_tau = tl.where(is_bad, float("inf"), b_tau)
    whole = tl.load(COUNTS + 2 * i_tile)
    count = tl.load(COUNTS + 2 * i_tile + 1)

    # In units of the mean u, f / g. After a step d the next is of order d ** 2 for r >= 2, and of order d ** r below.
    tolerance = tl.exp2(tl.log2(target) * tl.maximum(0.5, exponent)) * tl.minimum(2 * exponent, 1.0)
    b_zero = tl.zeros([BLOCK_M, 4], tl.float32)
    b_no_bits = tl.zeros([BLOCK_M, 4], tl.int32)
    b_norm = tl.zeros([BLOCK_M], tl.float32)
    b_slope, b_step = b_norm, b_norm
    steps = 0
    largest = 2 * tolerance
    while (steps < MAX_STEPS) & (largest > tolerance):
        b_f, b_g, b_bits = _refine(
            b_q, K, WORDS, LIST, 0, whole, count, stride_kn, b_seen, b_tau, b_zero, b_zero, b_no_bits, len_k, c, r,
            ALPHA, False, VEC_K, BLOCK_N, WORD, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        b_f, b_g, b_bits = _refine(
            b_q, K, WORDS, LIST, whole, count, count, stride_kn, b_seen, b_tau, b_f, b_g, b_bits, len_k, c, r,
            ALPHA, True, VEC_K, BLOCK_N, WORD, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
        if steps == 0:
            tl.debug_barrier()
            if tl.max(is_bad.to(tl.int32), 0) > 0:
                _fill(WORDS, tl.cdiv(count, WORD), -1)
            whole, count = _shorten_list(LIST, WORDS, whole, count)
        b_norm = tl.sum(b_f, 1)
        b_slope = tl.sum(b_g, 1)
        b_step = _newton_step(b_norm, b_slope, r, ALPHA)
        b_tau += b_step
        largest = tl.max(tl.where(b_norm > 0, b_step * b_slope / b_norm, 0.0), 0)
        steps += 1
    tl.store(TAU + o_rows, tl.where(is_bad, float("nan"), b_tau), mask=o_rows < seqlen_q)
    if not CORRECTED:
        slopes = SLOPES + 3 * i_bh.to(tl.int64) * seqlen_q
        _store_slopes(slopes, b_norm, b_slope, b_step, r, o_rows, o_rows < seqlen_q)
    tl.store(COUNTS + 2 * i_tile, whole)
    tl.store(COUNTS + 2 * i_tile + 1, count)


@triton.jit
def _output(
    b_q,
    K,
    V,
    WORDS,
    LIST,
    begin,
    end,
    count,
    stride_kn,
    stride_vn,
    b_seen,
    b_tau,
    b_f,
    b_g,
    b_bits,
    b_out,
    b_wv,
    len_k,
    c,
    r,
    ALPHA: tl.constexpr,
    CORRECTED: tl.constexpr,
    MASKED: tl.constexpr,
    VEC_K: tl.constexpr,
    VEC_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum p and sum p v over the listed blocks, with CORRECTED sum w and sum w v, and which blocks hold a p > 0."""
    j_next = _next_block(LIST, begin, end)
    for i in tl.range(begin, end):
        j = j_next
        j_next = _next_block(LIST, i + 1, end)
        b_s, _b_k = _block_scores(
            b_q, K, j, stride_kn, b_seen, len_k, MASKED, VEC_K, BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION
        )
        if MASKED:
            b_v = _load_tile(V, j * BLOCK_N, 0, len_k, stride_vn, VEC_V, BLOCK_N, HEAD_DIM_V, BLOCK_DV)
        else:
            b_v = _load_block(V, j * BLOCK_N, stride_vn, VEC_V, BLOCK_N, HEAD_DIM_V, BLOCK_DV)
        b_p, b_w = _powers(_saturate(b_s * c - b_tau[:, None]), r, ALPHA)
        b_added = _sum_by_thread(b_p)
        b_f += b_added
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
        if CORRECTED:
            b_g += _sum_by_thread(b_w)
            b_wv = tl.dot(b_w.to(b_v.dtype), b_v, b_wv, input_precision=PRECISION)
        b_bits = _keep_bits(WORDS, i, i == count - 1, b_bits, b_added, WORD)
    return b_f, b_g, b_bits, b_out, b_wv


@triton.jit(do_not_specialize=INTEGERS)
def entmax_attn_fwd_output(
    Q,
    K,
    V,
    OUT,
    TAU,
    SLOPES,
    LIVE,
    WORDS,
    LIST,
    COUNTS,
    FLAGS,
    ALPHA_HEADS,
    SEQLENS_Q,
    SEQLENS_K,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    alpha_minus_1,
    scale,
    heads_q,
    group,
    seqlen_q,
    seqlen_k,
    n_tiles,
    n_blocks,
    n_words,
    ALPHA: tl.constexpr,
    PER_HEAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_SEQLENS_Q: tl.constexpr,
    HAS_SEQLENS_K: tl.constexpr,
    SIGN: tl.constexpr,
    SAVE: tl.constexpr,
    CORRECTED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    VEC_Q: tl.constexpr,
    VEC_K: tl.constexpr,
    VEC_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORD: tl.constexpr,
    TILE_PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output of one part of a tile over the listed blocks: tau, out, and for backward LIVE.

    If CORRECTED, the last step e of tau is applied to out itself: out(tau + e) = out(tau) - r e sum w v up to e ** 2.
    Else out is divided by the sum of p, which leaves r e (out - out1) sum w of the error, out1 = sum w v / sum w; and
    the slope, sum w, follows from that of p and SLOPES.
    """
    ROWS: tl.constexpr = BLOCK_M // TILE_PROGRAMS
    i_part = tl.program_id(0) % TILE_PROGRAMS
    programs = tl.num_programs(0) // TILE_PROGRAMS
    i_bh, i_turn = _turn(tl.program_id(0) // TILE_PROGRAMS, programs, n_tiles, seqlen_k, HEAD_DIM)
    i_m = n_tiles - 1 - i_turn
    i_b = (i_bh // heads_q).to(tl.int64)
    i_h = (i_bh % heads_q).to(tl.int64)
    if FLAGS is not None:
        if tl.load(FLAGS + i_b * (heads_q // group) + i_h // group) == 0:
            return
    i_tile = i_bh.to(tl.int64) * n_tiles + i_m
    len_q, len_k = _lengths(SEQLENS_Q, SEQLENS_K, i_b, seqlen_q, seqlen_k, HAS_SEQLENS_Q, HAS_SEQLENS_K)
    exponent = _exponent(ALPHA_HEADS, alpha_minus_1, i_h, PER_HEAD)
    c = exponent * scale
    r = 1 / exponent
    Q += (i_b * stride_qb + i_h * stride_qh) * VEC_Q
    K += (i_b * stride_kb + (i_h // group) * stride_kh) * VEC_K
    V += (i_b * stride_vb + (i_h // group) * stride_vh) * VEC_V
    TAU += i_bh.to(tl.int64) * seqlen_q
    WORDS += i_tile * n_words + i_part * (n_words // TILE_PROGRAMS)
    LIST += i_tile * n_blocks

    first = i_m * BLOCK_M + i_part * ROWS
    o_rows = first + tl.arange(0, ROWS)
    b_seen = _keys_seen(o_rows, len_q, len_k, IS_CAUSAL)
    b_q = _signed(_load_tile(Q, first, 0, seqlen_q, stride_qm, VEC_Q, ROWS, HEAD_DIM, BLOCK_D), SIGN)
    b_tau = tl.load(TAU + o_rows, mask=o_rows < seqlen_q, other=float("inf"))
    is_bad = b_tau != b_tau
    b_tau = tl.where(is_bad, float("inf"), b_tau)
    whole = tl.load(COUNTS + 2 * i_tile)
    count = tl.load(COUNTS + 2 * i_tile + 1)

    b_zero = tl.zeros([ROWS, 4], tl.float32)
    b_no_bits = tl.zeros([ROWS, 4], tl.int32)
    b_out = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    b_wv = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    b_f, b_g, b_bits, b_out, b_wv = _output(
        b_q, K, V, WORDS, LIST, 0, whole, count, stride_kn, stride_vn, b_seen, b_tau, b_zero, b_zero, b_no_bits,
        b_out, b_wv, len_k, c, r,
        ALPHA, CORRECTED, False, VEC_K, VEC_V, BLOCK_N, WORD, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, PRECISION,
    )  # fmt: skip
    b_f, b_g, b_bits, b_out, b_wv = _output(
        b_q, K, V, WORDS, LIST, whole, count, count, stride_kn, stride_vn, b_seen, b_tau, b_f, b_g, b_bits,
        b_out, b_wv, len_k, c, r,
        ALPHA, CORRECTED, True, VEC_K, VEC_V, BLOCK_N, WORD, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, PRECISION,
    )  # fmt: skip
    b_norm = tl.sum(b_f, 1)
    if CORRECTED:
        b_slope = tl.sum(b_g, 1)
    else:
        slopes = SLOPES + 3 * i_bh.to(tl.int64) * seqlen_q
        b_slope = _load_slope(slopes, b_norm, o_rows, o_rows < seqlen_q)
    b_step = _newton_step(b_norm, b_slope, r, ALPHA)
    if CORRECTED:
        b_out = b_out - (r * b_step)[:, None] * b_wv
    else:
        b_out = b_out / tl.where(b_norm > 0, b_norm, 1.0)[:, None]
    b_nan = tl.where(is_bad, float("nan"), 0.0)
    row = i_bh.to(tl.int64) * seqlen_q * HEAD_DIM_V
    _store_tile(OUT + row, first, seqlen_q, HEAD_DIM_V, b_out + b_nan[:, None], ROWS, HEAD_DIM_V, BLOCK_DV)
    tl.store(TAU + o_rows, b_tau + b_step + b_nan, mask=o_rows < seqlen_q)
    if SAVE:
        tl.debug_barrier()
        if tl.max(is_bad.to(tl.int32), 0) > 0:
            _fill(WORDS, tl.cdiv(count, WORD), -1)
        _mark_live(LIVE + i_tile * n_blocks, LIST, WORDS, count)


@triton.jit
def _surprise(b_y):
    """phi(y) = exp(y) - 1 - y, by its series where the difference cancels."""
    series = 1 / 2 + b_y * (1 / 6 + b_y * (1 / 24 + b_y * (1 / 120 + b_y * (1 / 720 + b_y * (1 / 5040)))))
    return tl.where(b_y < 0.25, b_y * b_y * series, tl.exp(b_y) - 1 - b_y)


@triton.jit
def _u_and_dp(
    b_q,
    b_dout,
    K,
    V,
    j,
    stride_kn,
    stride_vn,
    b_seen,
    b_tau,
    len_k,
    c,
    MASKED: tl.constexpr,
    VEC_K: tl.constexpr,
    VEC_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """k, u and dp = dout . v of block j."""
    b_s, b_k = _block_scores(b_q, K, j, stride_kn, b_seen, len_k, MASKED, VEC_K, BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION)
    if MASKED:
        b_v = _load_tile(V, j * BLOCK_N, 0, len_k, stride_vn, VEC_V, BLOCK_N, HEAD_DIM_V, BLOCK_DV)
    else:
        b_v = _load_block(V, j * BLOCK_N, stride_vn, VEC_V, BLOCK_N, HEAD_DIM_V, BLOCK_DV)
    b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
    return b_k, _saturate(b_s * c - b_tau[:, None]), b_dp


@triton.jit
def _dp_sums(
    b_q,
    b_dout,
    K,
    V,
    LIST,
    begin,
    end,
    stride_kn,
    stride_vn,
    b_seen,
    b_tau,
    b_w_sum,
    b_w_dp,
    b_phi_sum,
    b_y_sum,
    b_b_dp,
    b_a_dp,
    len_k,
    c,
    r,
    ALPHA: tl.constexpr,
    PER_HEAD: tl.constexpr,
    MASKED: tl.constexpr,
    VEC_K: tl.constexpr,
    VEC_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum w and sum w dp over the listed blocks; with alpha per head also the other sums of its gradient."""
    j_next = _next_block(LIST, begin, end)
    for i in tl.range(begin, end):
        j = j_next
        j_next = _next_block(LIST, i + 1, end)
        _b_k, b_u, b_dp = _u_and_dp(
            b_q, b_dout, K, V, j, stride_kn, stride_vn, b_seen, b_tau, len_k, c,
            MASKED, VEC_K, VEC_V, BLOCK_N, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, PRECISION,
        )  # fmt: skip
        b_p, b_w = _powers(b_u, r, ALPHA)
        b_w_sum += _sum_by_thread(b_w)
        b_w_dp += _sum_by_thread(b_w * b_dp)
        if PER_HEAD:
            b_y = tl.where(b_u > 0, tl.maximum(-LN_2 * _log2(tl.maximum(b_u, SMALLEST)), 0.0), 0.0)
            b_a = b_p * _surprise(b_y)
            b_dp = tl.where(b_u > 0, b_dp, 0.0)
            b_phi_sum += _sum_by_thread(b_a)
            b_y_sum += _sum_by_thread(b_p * b_y)
            b_b_dp += _sum_by_thread(b_p * (1 + b_y) * b_dp)
            b_a_dp += _sum_by_thread(b_a * b_dp)
    return b_w_sum, b_w_dp, b_phi_sum, b_y_sum, b_b_dp, b_a_dp


@triton.jit
def _total(b_w_sum):
    """[rows] sum w, 1 where there is none."""
    b_total = tl.sum(b_w_sum, 1)
    return tl.where(b_total > 0, b_total, 1.0)


@triton.jit
def _dq(
    b_q,
    b_dout,
    K,
    V,
    LIST,
    begin,
    end,
    stride_kn,
    stride_vn,
    b_seen,
    b_tau,
    b_shift,
    b_w_sum,
    b_w_dp,
    b_wdp_k,
    b_w_k,
    len_k,
    c,
    r,
    ALPHA: tl.constexpr,
    ONE_PASS: tl.constexpr,
    MASKED: tl.constexpr,
    VEC_K: tl.constexpr,
    VEC_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum w dp k over the listed blocks, dp = dout . v - shift; with ONE_PASS also sum w, sum w dp and sum w k."""
    j_next = _next_block(LIST, begin, end)
    for i in tl.range(begin, end):
        j = j_next
        j_next = _next_block(LIST, i + 1, end)
        b_k, b_u, b_dp = _u_and_dp(
            b_q, b_dout, K, V, j, stride_kn, stride_vn, b_seen, b_tau, len_k, c,
            MASKED, VEC_K, VEC_V, BLOCK_N, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, PRECISION,
        )  # fmt: skip
        _b_p, b_w = _powers(b_u, r, ALPHA)
        b_wdp = b_w * (b_dp - b_shift[:, None])
        if ONE_PASS:
            b_w_sum += _sum_by_thread(b_w)
            b_w_dp += _sum_by_thread(b_wdp)
        b_wdp_k = tl.dot(b_wdp.to(b_k.dtype), b_k, b_wdp_k, input_precision=PRECISION)
        if ONE_PASS:
            b_w_k = tl.dot(b_w.to(b_k.dtype), b_k, b_w_k, input_precision=PRECISION)
    return b_w_sum, b_w_dp, b_wdp_k, b_w_k


@triton.jit(do_not_specialize=INTEGERS)
def entmax_attn_bwd_dq(
    Q,
    K,
    V,
    OUT,
    DOUT,
    TAU,
    TAU_DELTA,
    DQ,
    DALPHA,
    LIVE,
    LIST,
    ALPHA_HEADS,
    SEQLENS_Q,
    SEQLENS_K,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    alpha_minus_1,
    scale,
    heads_q,
    group,
    seqlen_q,
    seqlen_k,
    n_tiles,
    n_blocks,
    ALPHA: tl.constexpr,
    PER_HEAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_SEQLENS_Q: tl.constexpr,
    HAS_SEQLENS_K: tl.constexpr,
    SIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    VEC_Q: tl.constexpr,
    VEC_K: tl.constexpr,
    VEC_V: tl.constexpr,
    VEC_O: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILE_PROGRAMS: tl.constexpr,
    ONE_PASS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of one part of a tile, the gradient of alpha per row, and delta beside a finite tau or NaN in TAU_DELTA.

    delta = sum w dp / sum w, and ds = w (dp - delta). In general the sums take a pass of their own over the blocks.

    With ONE_PASS they do not. ds is linear in delta: with dp taken less a shift, delta is that shift and
    rest = sum w dp / sum w, and dq = sum w dp k - rest sum w k. Rounding w dp and w to half precision costs, in
    squares, sum w ** 2 (dp - shift) ** 2 + rest ** 2 sum w ** 2; rounding ds, sum w ** 2 (dp - delta) ** 2. With m, the
    mean of dp by w ** 2, the first is larger by sum w ** 2 times (shift - m) ** 2 + (shift - delta) ** 2
    - (m - delta) ** 2, which is not positive where the shift lies between m and delta. It is dout . out, the mean by p:
    at alpha = 1.5 that is m, and at smaller alpha p = u ** r lies between w = u ** (r - 1) and w ** 2; above 1.5 it
    does not.
    """
    ROWS: tl.constexpr = BLOCK_M // TILE_PROGRAMS
    i_part = tl.program_id(0) % TILE_PROGRAMS
    programs = tl.num_programs(0) // TILE_PROGRAMS
    i_bh, i_turn = _turn(tl.program_id(0) // TILE_PROGRAMS, programs, n_tiles, seqlen_k, HEAD_DIM)
    i_m = n_tiles - 1 - i_turn
    i_b = (i_bh // heads_q).to(tl.int64)
    i_h = (i_bh % heads_q).to(tl.int64)
    i_tile = i_bh.to(tl.int64) * n_tiles + i_m
    row = i_bh.to(tl.int64) * seqlen_q
    len_q, len_k = _lengths(SEQLENS_Q, SEQLENS_K, i_b, seqlen_q, seqlen_k, HAS_SEQLENS_Q, HAS_SEQLENS_K)
    exponent = _exponent(ALPHA_HEADS, alpha_minus_1, i_h, PER_HEAD)
    c = exponent * scale
    r = 1 / exponent
    Q += (i_b * stride_qb + i_h * stride_qh) * VEC_Q
    K += (i_b * stride_kb + (i_h // group) * stride_kh) * VEC_K
    V += (i_b * stride_vb + (i_h // group) * stride_vh) * VEC_V
    DOUT += (i_b * stride_ob + i_h * stride_oh) * VEC_O
    LIVE += i_tile * n_blocks
    LIST += (i_tile * TILE_PROGRAMS + i_part) * n_blocks

    first = i_m * BLOCK_M + i_part * ROWS
    o_rows = first + tl.arange(0, ROWS)
    b_seen = _keys_seen(o_rows, len_q, len_k, IS_CAUSAL)
    everyone, anyone = _tile_keys(i_m, len_q, len_k, BLOCK_M, IS_CAUSAL)
    whole, count = _list_blocks(LIST, LIVE, tl.cdiv(anyone, BLOCK_N), everyone // BLOCK_N, True)
    # Queries that see no key, and the padding, may hold anything.
    first_row = 0
    if IS_CAUSAL:
        first_row = tl.minimum(tl.maximum(len_q - len_k, 0), seqlen_q - 1)
    end_row = tl.maximum(len_q, first_row + 1)
    b_q = _signed(_load_tile(Q, first, first_row, end_row, stride_qm, VEC_Q, ROWS, HEAD_DIM, BLOCK_D), SIGN)
    b_dout = _load_tile(DOUT, first, first_row, end_row, stride_om, VEC_O, ROWS, HEAD_DIM_V, BLOCK_DV)
    b_tau = tl.load(TAU + row + o_rows, mask=o_rows < seqlen_q, other=float("inf"))
    is_bad = b_tau != b_tau
    b_zero = tl.zeros([ROWS, 4], tl.float32)
    b_w_sum, b_w_dp = b_zero, b_zero
    if ONE_PASS:
        out_head = OUT + row * HEAD_DIM_V
        b_out = _load_tile(out_head, first, first_row, end_row, HEAD_DIM_V, 1, ROWS, HEAD_DIM_V, BLOCK_DV)
        b_shift = tl.sum(b_out.to(tl.float32) * b_dout.to(tl.float32), 1)
    else:
        b_w_sum, b_w_dp, b_phi_sum, b_y_sum, b_b_dp, b_a_dp = _dp_sums(
            b_q, b_dout, K, V, LIST, 0, whole, stride_kn, stride_vn, b_seen, b_tau,
            b_zero, b_zero, b_zero, b_zero, b_zero, b_zero, len_k, c, r,
            ALPHA, PER_HEAD, False, VEC_K, VEC_V, BLOCK_N, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, PRECISION,
        )  # fmt: skip
        b_w_sum, b_w_dp, b_phi_sum, b_y_sum, b_b_dp, b_a_dp = _dp_sums(
            b_q, b_dout, K, V, LIST, whole, count, stride_kn, stride_vn, b_seen, b_tau,
            b_w_sum, b_w_dp, b_phi_sum, b_y_sum, b_b_dp, b_a_dp, len_k, c, r,
            ALPHA, PER_HEAD, True, VEC_K, VEC_V, BLOCK_N, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, PRECISION,
        )  # fmt: skip
        b_total = _total(b_w_sum)
        b_shift = tl.sum(b_w_dp, 1) / b_total
    b_wdp_k = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_w_k = tl.zeros([ROWS, BLOCK_D], tl.float32)
    b_w_sum, b_w_dp, b_wdp_k, b_w_k = _dq(
        b_q, b_dout, K, V, LIST, 0, whole, stride_kn, stride_vn, b_seen, b_tau, b_shift,
        b_w_sum, b_w_dp, b_wdp_k, b_w_k, len_k, c, r,
        ALPHA, ONE_PASS, False, VEC_K, VEC_V, BLOCK_N, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, PRECISION,
    )  # fmt: skip
    b_w_sum, b_w_dp, b_wdp_k, b_w_k = _dq(
        b_q, b_dout, K, V, LIST, whole, count, stride_kn, stride_vn, b_seen, b_tau, b_shift,
        b_w_sum, b_w_dp, b_wdp_k, b_w_k, len_k, c, r,
        ALPHA, ONE_PASS, True, VEC_K, VEC_V, BLOCK_N, HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, PRECISION,
    )  # fmt: skip
    b_dq, b_delta = b_wdp_k, b_shift
    if ONE_PASS:
        b_total = _total(b_w_sum)
        b_rest = tl.sum(b_w_dp, 1) / b_total
        b_dq -= b_rest[:, None] * b_w_k
        b_delta += b_rest
    b_nan = tl.where(is_bad, float("nan"), 0.0)
    b_delta = tl.where(b_seen > 0, b_delta, 0.0) + b_nan
    o_pairs = (row + o_rows)[:, None] * 2 + tl.arange(0, 2)[None, :]
    b_pairs = tl.join(tl.where(b_seen > 0, b_tau, LARGE), b_delta)
    tl.store(TAU_DELTA + o_pairs, b_pairs, mask=o_rows[:, None] < seqlen_q)
    b_dq = b_dq * (scale * SIGN) + b_nan[:, None]
    _store_tile(DQ + row * HEAD_DIM, first, seqlen_q, HEAD_DIM, b_dq, ROWS, HEAD_DIM, BLOCK_D)
    if PER_HEAD:
        b_dalpha = tl.sum(b_phi_sum, 1) * tl.sum(b_b_dp, 1) - (1 + tl.sum(b_y_sum, 1)) * tl.sum(b_a_dp, 1)
        # A product with the total may be 0.
        b_dalpha = b_dalpha / b_total / (exponent * exponent)
        tl.store(DALPHA + row + o_rows, b_dalpha + b_nan, mask=o_rows < seqlen_q)


@triton.jit
def _list_tiles(
    LIVE,
    LIST,
    count,
    j,
    n_tiles,
    n_blocks,
    len_q,
    len_k,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
):
    """Append the tiles of a head for which block j is live: those that need a mask, or those that do not."""
    o_chunk = tl.arange(0, CHUNK)
    for first in range(0, n_tiles, CHUNK):
        o_tiles = first + o_chunk
        is_listed = tl.load(LIVE + o_tiles.to(tl.int64) * n_blocks + j, mask=o_tiles < n_tiles, other=0) > 0
        b_seen = tl.zeros([CHUNK], tl.int32) + len_k
        if IS_CAUSAL:
            b_seen = tl.minimum(o_tiles * BLOCK_M + 1 + len_k - len_q, b_seen)
        is_whole = (b_seen >= (j + 1) * BLOCK_N) & ((o_tiles + 1) * BLOCK_M <= len_q)
        if MASKED:
            is_listed = is_listed & ~is_whole
        else:
            is_listed = is_listed & is_whole
        b_listed = is_listed.to(tl.int32)
        tl.store(LIST + count + tl.cumsum(b_listed, 0) - 1, o_tiles.to(LIST.dtype.element_ty), mask=is_listed)
        count += tl.sum(b_listed, 0)
    return count


@triton.jit
def _dkv(
    b_k,
    b_v,
    Q,
    DOUT,
    TAU_DELTA,
    LIST,
    begin,
    end,
    j,
    stride_qm,
    stride_om,
    first_row,
    end_row,
    seqlen_q,
    len_q,
    len_k,
    b_dk,
    b_dv,
    c,
    r,
    ALPHA: tl.constexpr,
    MASKED: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    SIGN: tl.constexpr,
    VEC_Q: tl.constexpr,
    VEC_O: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum ds^T q and sum p^T dout over the listed tiles of one head, each taken in PARTS parts."""
    ROWS: tl.constexpr = BLOCK_M // PARTS
    o_keys = j * BLOCK_N + tl.arange(0, BLOCK_N)
    o_pairs = tl.arange(0, 2 * ROWS)
    tile_next = _next_block(LIST, begin, end)
    for i in tl.range(begin * PARTS, end * PARTS):
        first = tile_next * BLOCK_M + (i % PARTS) * ROWS
        tile_next = _next_block(LIST, (i + 1) // PARTS, end)
        if MASKED:
            b_q = _load_tile(Q, first, first_row, end_row, stride_qm, VEC_Q, ROWS, HEAD_DIM, BLOCK_D)
            b_dout = _load_tile(DOUT, first, first_row, end_row, stride_om, VEC_O, ROWS, HEAD_DIM_V, BLOCK_DV)
            b_pairs = tl.load(TAU_DELTA + 2 * first + o_pairs, mask=2 * first + o_pairs < 2 * seqlen_q, other=0.0)
        else:
            b_q = _load_block(Q, first, stride_qm, VEC_Q, ROWS, HEAD_DIM, BLOCK_D)
            b_dout = _load_block(DOUT, first, stride_om, VEC_O, ROWS, HEAD_DIM_V, BLOCK_DV)
            b_pairs = tl.load(TAU_DELTA + 2 * first + o_pairs)
        b_tau, b_delta = tl.split(tl.reshape(b_pairs, [ROWS, 2]))
        b_q = _signed(b_q, SIGN)
        # [BLOCK_N, ROWS]
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
        b_u = _saturate(b_s * c - b_tau[None, :])
        b_dp -= b_delta[None, :]
        # A row without a tau, and so without a delta, takes all that it sees with it.
        b_nan = (b_tau * 0.0)[None, :]
        if MASKED:
            b_seen = _keys_seen(first + tl.arange(0, ROWS), len_q, len_k, IS_CAUSAL)
            is_seen = o_keys[:, None] < b_seen[None, :]
            b_u = tl.where(is_seen, b_u, 0.0)
            b_dp = tl.where(is_seen, b_dp, 0.0)
            b_nan = tl.where(is_seen, b_nan, 0.0)
        b_p, b_w = _powers(b_u, r, ALPHA)
        b_p += b_nan
        b_ds = b_w * b_dp
        b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit(do_not_specialize=INTEGERS)
def entmax_attn_bwd_dkv(
    Q,
    K,
    V,
    DOUT,
    TAU_DELTA,
    DK,
    DV,
    LIVE,
    LIST,
    ALPHA_HEADS,
    SEQLENS_Q,
    SEQLENS_K,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_ob,
    stride_oh,
    stride_om,
    alpha_minus_1,
    scale,
    heads_kv,
    group,
    seqlen_q,
    seqlen_k,
    n_tiles,
    n_blocks,
    ALPHA: tl.constexpr,
    PER_HEAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_SEQLENS_Q: tl.constexpr,
    HAS_SEQLENS_K: tl.constexpr,
    SIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    VEC_Q: tl.constexpr,
    VEC_K: tl.constexpr,
    VEC_V: tl.constexpr,
    VEC_O: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of one block of keys, over the tiles of all heads of its group for which it is live: no atomics."""
    i_bh, j = _turn(tl.program_id(0), tl.num_programs(0), n_blocks, seqlen_k, HEAD_DIM)
    i_b = (i_bh // heads_kv).to(tl.int64)
    i_h = (i_bh % heads_kv).to(tl.int64)
    len_q, len_k = _lengths(SEQLENS_Q, SEQLENS_K, i_b, seqlen_q, seqlen_k, HAS_SEQLENS_Q, HAS_SEQLENS_K)
    K += (i_b * stride_kb + i_h * stride_kh) * VEC_K
    V += (i_b * stride_vb + i_h * stride_vh) * VEC_V
    LIST += tl.program_id(0).to(tl.int64) * n_tiles

    # Queries that see no key, and the padding, may hold anything.
    first_row = 0
    if IS_CAUSAL:
        first_row = tl.minimum(tl.maximum(len_q - len_k, 0), seqlen_q - 1)
    end_row = tl.maximum(len_q, first_row + 1)
    end_key = tl.maximum(len_k, 1)
    b_k = _load_tile(K, j * BLOCK_N, 0, end_key, stride_kn, VEC_K, BLOCK_N, HEAD_DIM, BLOCK_D)
    b_v = _load_tile(V, j * BLOCK_N, 0, end_key, stride_vn, VEC_V, BLOCK_N, HEAD_DIM_V, BLOCK_DV)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for i_g in range(group):
        i_hq = i_h * group + i_g
        i_bhq = i_b * heads_kv * group + i_hq
        exponent = _exponent(ALPHA_HEADS, alpha_minus_1, i_hq, PER_HEAD)
        c = exponent * scale
        r = 1 / exponent
        q_head = Q + (i_b * stride_qb + i_hq * stride_qh) * VEC_Q
        dout_head = DOUT + (i_b * stride_ob + i_hq * stride_oh) * VEC_O
        pairs_head = TAU_DELTA + i_bhq * seqlen_q * 2
        live_head = LIVE + i_bhq * n_tiles * n_blocks
        # The list of the head before may still be read.
        tl.debug_barrier()
        masked = _list_tiles(
            live_head, LIST, n_tiles * 0, j, n_tiles, n_blocks, len_q, len_k, True, BLOCK_M, BLOCK_N, IS_CAUSAL
        )
        count = _list_tiles(
            live_head, LIST, masked, j, n_tiles, n_blocks, len_q, len_k, False, BLOCK_M, BLOCK_N, IS_CAUSAL
        )
        tl.debug_barrier()
        b_dk, b_dv = _dkv(
            b_k, b_v, q_head, dout_head, pairs_head, LIST, 0, masked, j, stride_qm, stride_om,
            first_row, end_row, seqlen_q, len_q, len_k, b_dk, b_dv, c, r,
            ALPHA, True, IS_CAUSAL, SIGN, VEC_Q, VEC_O, BLOCK_M, BLOCK_N, PARTS,
            HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, PRECISION,
        )  # fmt: skip
        b_dk, b_dv = _dkv(
            b_k, b_v, q_head, dout_head, pairs_head, LIST, masked, count, j, stride_qm, stride_om,
            first_row, end_row, seqlen_q, len_q, len_k, b_dk, b_dv, c, r,
            ALPHA, False, IS_CAUSAL, SIGN, VEC_Q, VEC_O, BLOCK_M, BLOCK_N, PARTS,
            HEAD_DIM, BLOCK_D, HEAD_DIM_V, BLOCK_DV, PRECISION,
        )  # fmt: skip
    row = i_bh.to(tl.int64) * seqlen_k
    _store_tile(DK + row * HEAD_DIM, j * BLOCK_N, seqlen_k, HEAD_DIM, b_dk * scale, BLOCK_N, HEAD_DIM, BLOCK_D)
    _store_tile(DV + row * HEAD_DIM_V, j * BLOCK_N, seqlen_k, HEAD_DIM_V, b_dv, BLOCK_N, HEAD_DIM_V, BLOCK_DV)


@triton.jit(do_not_specialize=INTEGERS)
def entmax_attn_support(
    Q,
    K,
    TAU,
    SIZES,
    BLOCK_MAP,
    LIVE,
    LIST,
    ALPHA_HEADS,
    SEQLENS_Q,
    SEQLENS_K,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    alpha_minus_1,
    scale,
    heads_q,
    group,
    seqlen_q,
    seqlen_k,
    n_tiles,
    n_blocks,
    map_m,
    map_n,
    map_rows,
    map_columns,
    PER_HEAD: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_SEQLENS_Q: tl.constexpr,
    HAS_SEQLENS_K: tl.constexpr,
    SIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_Q: tl.constexpr,
    VEC_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """How many keys of each row have u > 0, and which (map_m, map_n) blocks hold one."""
    i_bh, i_turn = _turn(tl.program_id(0), tl.num_programs(0), n_tiles, seqlen_k, HEAD_DIM)
    i_m = n_tiles - 1 - i_turn
    i_b = (i_bh // heads_q).to(tl.int64)
    i_h = (i_bh % heads_q).to(tl.int64)
    i_tile = i_bh.to(tl.int64) * n_tiles + i_m
    len_q, len_k = _lengths(SEQLENS_Q, SEQLENS_K, i_b, seqlen_q, seqlen_k, HAS_SEQLENS_Q, HAS_SEQLENS_K)
    c = _exponent(ALPHA_HEADS, alpha_minus_1, i_h, PER_HEAD) * scale
    Q += (i_b * stride_qb + i_h * stride_qh) * VEC_Q
    K += (i_b * stride_kb + (i_h // group) * stride_kh) * VEC_K
    BLOCK_MAP += i_bh.to(tl.int64) * map_rows * map_columns
    LIVE += i_tile * n_blocks
    LIST += i_tile * n_blocks
    row = i_bh.to(tl.int64) * seqlen_q

    o_rows = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    b_seen = _keys_seen(o_rows, len_q, len_k, IS_CAUSAL)
    _, anyone = _tile_keys(i_m, len_q, len_k, BLOCK_M, IS_CAUSAL)
    _, count = _list_blocks(LIST, LIVE, tl.cdiv(anyone, BLOCK_N), 0, True)
    b_q = _signed(_load_tile(Q, i_m * BLOCK_M, 0, seqlen_q, stride_qm, VEC_Q, BLOCK_M, HEAD_DIM, BLOCK_D), SIGN)
    b_tau = tl.load(TAU + row + o_rows, mask=o_rows < seqlen_q, other=float("inf"))
    b_tau = tl.where(b_tau == b_tau, b_tau, float("inf"))
    b_sizes = tl.zeros([BLOCK_M], tl.int32)
    for i in tl.range(0, count):
        j = tl.load(LIST + i).to(tl.int32)
        b_s, _b_k = _block_scores(
            b_q, K, j, stride_kn, b_seen, len_k, True, VEC_K, BLOCK_N, HEAD_DIM, BLOCK_D, PRECISION
        )
        is_support = b_s * c - b_tau[:, None] > 0
        b_sizes += tl.sum(is_support.to(tl.int32), 1)
        o_keys = j * BLOCK_N + tl.arange(0, BLOCK_N)
        o_map = (o_rows // map_m).to(tl.int64)[:, None] * map_columns + (o_keys // map_n)[None, :]
        tl.store(BLOCK_MAP + o_map, 1, mask=is_support)
    tl.store(SIZES + row + o_rows, b_sizes, mask=o_rows < seqlen_q)


@triton.jit(do_not_specialize=INTEGERS)
def entmax_rows_fwd(
    X,
    P,
    ALPHA_ROWS,
    stride_xm,
    stride_xn,
    alpha_minus_1,
    n,
    ALPHA: tl.constexpr,
    PER_ROW: tl.constexpr,
    MAX_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """p of one row, by Newton on the norm from max z - 1: as many passes over the row as it takes."""
    i_row = tl.program_id(0).to(tl.int64)
    exponent = _exponent(ALPHA_ROWS, alpha_minus_1, i_row, PER_ROW)
    r = 1 / exponent
    X += i_row * stride_xm
    P += i_row * n
    o_block = tl.arange(0, BLOCK)
    b_top = tl.full([BLOCK], float("-inf"), tl.float32)
    b_nan = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        o_n = first + o_block
        b_x = tl.load(X + o_n.to(tl.int64) * stride_xn, mask=o_n < n, other=float("-inf")).to(tl.float32)
        b_top = tl.maximum(b_top, b_x)
        b_nan = tl.where((b_x != b_x) | (b_x == float("inf")), float("nan"), b_nan)
    top = tl.max(b_top, 0)
    # Nothing but -inf, a NaN or +inf: the whole row is NaN.
    nan = tl.sum(b_nan, 0) + tl.where(top == float("-inf"), float("nan"), 0.0)
    top = tl.where(nan == 0, top, 0.0)

    # Relative to the largest score, so that its magnitude costs nothing.
    tau = exponent * 0 - 1
    steps = 0
    step = tau * 0 + 1
    while (steps < MAX_STEPS) & (step > 0) & (nan == 0):
        b_f = tl.zeros([BLOCK], tl.float32)
        b_g = tl.zeros([BLOCK], tl.float32)
        for first in range(0, n, BLOCK):
            o_n = first + o_block
            b_x = tl.load(X + o_n.to(tl.int64) * stride_xn, mask=o_n < n, other=float("-inf")).to(tl.float32)
            b_p, b_w = _powers(_saturate((b_x - top) * exponent - tau), r, ALPHA)
            b_f += b_p
            b_g += b_w
        step = _newton_step(tl.sum(b_f, 0), tl.sum(b_g, 0), r, ALPHA)
        # Below the rounding of u it is noise.
        step = tl.where(step > 1.2e-7, step, 0.0)
        tau += step
        steps += 1
    for first in range(0, n, BLOCK):
        o_n = first + o_block
        b_x = tl.load(X + o_n.to(tl.int64) * stride_xn, mask=o_n < n, other=float("-inf")).to(tl.float32)
        b_p, _ = _powers(_saturate((b_x - top) * exponent - tau), r, ALPHA)
        tl.store(P + o_n, (b_p + nan).to(P.dtype.element_ty), mask=o_n < n)


@triton.jit(do_not_specialize=INTEGERS)
def entmax_rows_bwd(
    P,
    DP,
    DX,
    DALPHA,
    ALPHA_ROWS,
    stride_dm,
    stride_dn,
    alpha_minus_1,
    n,
    ALPHA: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx of one row from p alone, and the gradient of its alpha; notation of ``_dq``, with y = (1 - alpha) log p."""
    i_row = tl.program_id(0).to(tl.int64)
    exponent = _exponent(ALPHA_ROWS, alpha_minus_1, i_row, PER_ROW)
    P += i_row * n
    DP += i_row * stride_dm
    DX += i_row * n
    o_block = tl.arange(0, BLOCK)
    b_w_sum = tl.zeros([BLOCK], tl.float32)
    b_w_dp = tl.zeros([BLOCK], tl.float32)
    b_phi_sum = tl.zeros([BLOCK], tl.float32)
    b_y_sum = tl.zeros([BLOCK], tl.float32)
    b_b_dp = tl.zeros([BLOCK], tl.float32)
    b_a_dp = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        o_n = first + o_block
        b_p = tl.load(P + o_n, mask=o_n < n, other=0.0).to(tl.float32)
        b_dp = tl.load(DP + o_n.to(tl.int64) * stride_dn, mask=o_n < n, other=0.0).to(tl.float32)
        b_w, b_y = _weights_of(b_p, exponent, ALPHA)
        b_dp = tl.where(b_p == 0, 0.0, b_dp)
        b_w_sum += b_w
        b_w_dp += b_w * b_dp
        if PER_ROW:
            b_a = b_p * _surprise(b_y)
            b_phi_sum += b_a
            b_y_sum += b_p * b_y
            b_b_dp += b_p * (1 + b_y) * b_dp
            b_a_dp += b_a * b_dp
    w_sum = tl.sum(b_w_sum, 0)
    w_sum = tl.where(w_sum == 0, 1.0, w_sum)
    delta = tl.sum(b_w_dp, 0) / w_sum
    for first in range(0, n, BLOCK):
        o_n = first + o_block
        b_p = tl.load(P + o_n, mask=o_n < n, other=0.0).to(tl.float32)
        b_dp = tl.load(DP + o_n.to(tl.int64) * stride_dn, mask=o_n < n, other=0.0).to(tl.float32)
        b_w, _ = _weights_of(b_p, exponent, ALPHA)
        b_dx = tl.where(b_p == 0, 0.0, b_w * (b_dp - delta))
        tl.store(DX + o_n, b_dx.to(DX.dtype.element_ty), mask=o_n < n)
    if PER_ROW:
        gradient = tl.sum(b_phi_sum, 0) * tl.sum(b_b_dp, 0) - (1 + tl.sum(b_y_sum, 0)) * tl.sum(b_a_dp, 0)
        tl.store(DALPHA + i_row, gradient / w_sum / (exponent * exponent))


@triton.jit
def _weights_of(b_p, exponent, ALPHA: tl.constexpr):
    """w = p ** (2 - alpha) and y = (1 - alpha) log p; 0 and 0 at p = 0, NaN at NaN."""
    b_log = tl.log(tl.where(b_p == 0, 1.0, b_p))
    if ALPHA == ALPHA_1_5:
        b_w = tl.sqrt(b_p)
    elif ALPHA == ALPHA_2:
        b_w = tl.where(b_p == 0, 0.0, b_p - b_p + 1.0)
    else:
        b_w = tl.where(b_p == 0, 0.0, tl.exp((1 - exponent) * b_log))
    return b_w, -exponent * b_log
