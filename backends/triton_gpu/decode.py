"""The Triton kernels of a few queries over many keys, forward alone; notation of kernels.py.

Here memory is what takes time, so k is read once, and v only where there is weight. The keys of a head are split over
programs. Each forms the scores of its keys, and keeps of every *group* of keys the largest one alone. A program per row
then has a lower bound of tau from these maxima, which are a subset of the scores; forms again the scores of the groups
that are above it, finds tau from those, and gathers the rows of v in the support. Where there are more of them than
CAPACITY, FLAGS says so for all heads that share these keys, and the kernels of kernels.py do them instead.

The queries of all heads that share keys are rows of one product. A group is the keys that a thread holds of a row in
it, 32 a + 8 b + 2 l + e for one b and one l of 4 each; over the products of a *slot*, where the keys are very many.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import INTEGERS as _INTEGERS
from .kernels import _exponent, _keys_seen, _lengths, _load_block, _load_tile, _newton_step, _powers, _saturate, _signed

__all__ = ["CAPACITY", "GROUPS", "KEYS", "entmax_attn_decode_output", "entmax_attn_decode_scan"]

CAPACITY = tl.constexpr(2048)  # groups, and keys, that a row may have above the bound
KEYS = tl.constexpr(128)  # of a product
GROUPS = tl.constexpr(16)  # of a product

# What ends the steps to the bound, in units of the mean u: the next one is of the order of its square.
BOUND_TARGET = tl.constexpr(0.1)

INTEGERS = [*_INTEGERS, "n_row_tiles", "n_slots", "n_splits", "products", "slot"]


@triton.jit
def _by_group(b_x):
    """[rows, KEYS // 32, 4, 4, 2] of a product."""
    return tl.reshape(b_x, [b_x.shape[0], KEYS // 32, 4, 4, 2])


@triton.jit
def _scan_product(
    b_q,
    K,
    MAXIMA,
    j,
    last,
    slot,
    stride_kn,
    o_places,
    is_row,
    b_seen,
    b_max,
    b_bad,
    len_k,
    MASKED: tl.constexpr,
    VEC: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Product j: the maxima of its groups, and NaN where one of the scores is not finite; stored when a slot ends."""
    if MASKED:
        b_k = _load_tile(K, j * KEYS, 0, len_k, stride_kn, VEC, KEYS, HEAD_DIM, BLOCK_D)
    else:
        b_k = _load_block(K, j * KEYS, stride_kn, VEC, KEYS, HEAD_DIM, BLOCK_D)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_zero = b_s * 0
    if MASKED:
        is_seen = j * KEYS + tl.arange(0, KEYS)[None, :] < b_seen[:, None]
        b_s = tl.where(is_seen, b_s, float("-inf"))
        b_zero = tl.where(is_seen, b_zero, 0.0)
    b_max = tl.maximum(b_max, tl.max(tl.max(_by_group(b_s), 4), 1))  # [rows, 4, 4]
    b_bad += tl.sum(tl.sum(_by_group(b_zero), 4), 1)
    if (j % slot == slot - 1) | (j == last):
        tl.store(MAXIMA + o_places + j // slot * GROUPS, b_max + b_bad, mask=is_row[:, None, None])
        b_max = tl.full(b_max.shape, float("-inf"), tl.float32)
        b_bad = tl.zeros(b_bad.shape, tl.float32)
    return b_max, b_bad


@triton.jit(do_not_specialize=INTEGERS)
def entmax_attn_decode_scan(
    Q,
    K,
    MAXIMA,
    FLAGS,
    SEQLENS_Q,
    SEQLENS_K,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    heads_kv,
    group,
    seqlen_q,
    seqlen_k,
    n_row_tiles,
    n_slots,
    n_splits,
    products,
    slot,
    IS_CAUSAL: tl.constexpr,
    HAS_SEQLENS_Q: tl.constexpr,
    HAS_SEQLENS_K: tl.constexpr,
    SIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC_Q: tl.constexpr,
    VEC_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scan of one split: in MAXIMA the largest score of each group that a row sees, NaN where one is not finite."""
    i_split = tl.program_id(0) % n_splits
    i_tile = tl.program_id(0) // n_splits % n_row_tiles
    i_unit = tl.program_id(0) // n_splits // n_row_tiles
    i_b = (i_unit // heads_kv).to(tl.int64)
    i_kv = (i_unit % heads_kv).to(tl.int64)
    len_q, len_k = _lengths(SEQLENS_Q, SEQLENS_K, i_b, seqlen_q, seqlen_k, HAS_SEQLENS_Q, HAS_SEQLENS_K)
    Q += (i_b * stride_qb + i_kv * group * stride_qh) * VEC_Q
    K += (i_b * stride_kb + i_kv * stride_kh) * VEC_K
    MAXIMA += (i_unit.to(tl.int64) * (group * seqlen_q) + i_tile * BLOCK_M) * n_slots * GROUPS
    if i_split + i_tile == 0:
        tl.store(FLAGS + i_unit, 0)

    o_tile = tl.arange(0, BLOCK_M)
    o_rows = i_tile * BLOCK_M + o_tile
    is_row = o_rows < group * seqlen_q
    o_queries = o_rows % seqlen_q
    b_seen = tl.where(is_row, _keys_seen(o_queries, len_q, len_k, IS_CAUSAL), 0)
    o_d = tl.arange(0, BLOCK_D)
    o_q = (o_rows // seqlen_q).to(tl.int64) * stride_qh + o_queries.to(tl.int64) * stride_qm
    is_q = is_row[:, None] & (o_d[None, :] < HEAD_DIM)
    b_q = _signed(tl.load(Q + (o_q * VEC_Q)[:, None] + o_d[None, :], mask=is_q, other=0.0), SIGN)

    o_groups = tl.arange(0, 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    o_places = (o_tile.to(tl.int64) * n_slots * GROUPS)[:, None, None] + o_groups[None, :, :]
    b_max = tl.full([BLOCK_M, 4, 4], float("-inf"), tl.float32)
    b_bad = tl.zeros([BLOCK_M, 4, 4], tl.float32)
    begin = i_split * products
    end = tl.minimum(begin + products, tl.cdiv(tl.max(b_seen, 0), KEYS))
    # Products that every row sees whole; rows that see nothing do not count, as no one reads their maxima.
    n_whole = tl.min(tl.where(b_seen > 0, b_seen, seqlen_k), 0) // KEYS
    for step in tl.range(0, tl.minimum(end, n_whole) - begin):
        b_max, b_bad = _scan_product(
            b_q, K, MAXIMA, begin + step, end - 1, slot, stride_kn, o_places, is_row, b_seen, b_max, b_bad, len_k,
            False, VEC_K, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip
    begin = tl.maximum(begin, n_whole)
    for step in tl.range(0, end - begin):
        b_max, b_bad = _scan_product(
            b_q, K, MAXIMA, begin + step, end - 1, slot, stride_kn, o_places, is_row, b_seen, b_max, b_bad, len_k,
            True, VEC_K, HEAD_DIM, BLOCK_D, PRECISION,
        )  # fmt: skip


@triton.jit
def _sums(S, count, top, c, tau, r, ALPHA: tl.constexpr, BLOCK: tl.constexpr):
    """f = sum u ** r and g = sum u ** (r - 1) of ``count`` scores, their z and tau above that of ``top``."""
    b_f = tl.zeros([BLOCK], tl.float32)
    b_g = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        o_scores = first + tl.arange(0, BLOCK)
        b_s = tl.load(S + o_scores, mask=o_scores < count, other=float("-inf"))
        b_p, b_w = _powers(_saturate((b_s - top) * c - tau), r, ALPHA)
        b_f += b_p
        b_g += b_w
    return tl.sum(b_f, 0), tl.sum(b_g, 0)


@triton.jit(do_not_specialize=INTEGERS)
def entmax_attn_decode_output(
    Q,
    K,
    V,
    OUT,
    TAU,
    MAXIMA,
    LIST,
    SCORES,
    FOUND,
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
    n_slots,
    slot,
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
    MAX_STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS_K: tl.constexpr,
    ROWS_V: tl.constexpr,
):
    """Init, refine and output of one row: tau from the scores of the groups that may hold support, and the sum of p v.

    Up to the end tau is that above the largest z.
    """
    row = tl.program_id(0).to(tl.int64)
    i_m = tl.program_id(0) % seqlen_q
    i_bh = tl.program_id(0) // seqlen_q
    i_b = (i_bh // heads_q).to(tl.int64)
    i_h = (i_bh % heads_q).to(tl.int64)
    len_q, len_k = _lengths(SEQLENS_Q, SEQLENS_K, i_b, seqlen_q, seqlen_k, HAS_SEQLENS_Q, HAS_SEQLENS_K)
    exponent = _exponent(ALPHA_HEADS, alpha_minus_1, i_h, PER_HEAD)
    c = exponent * scale
    r = 1 / exponent
    Q += (i_b * stride_qb + i_h * stride_qh + i_m.to(tl.int64) * stride_qm) * VEC_Q
    K += (i_b * stride_kb + i_h // group * stride_kh) * VEC_K
    V += (i_b * stride_vb + i_h // group * stride_vh) * VEC_V
    MAXIMA += row * n_slots * GROUPS
    LIST += row * CAPACITY
    SCORES += row * CAPACITY
    FOUND += row * CAPACITY
    seen = _keys_seen(i_m, len_q, len_k, IS_CAUSAL)
    o_d = tl.arange(0, BLOCK_D)
    b_q = _signed(tl.load(Q + o_d, mask=o_d < HEAD_DIM, other=0.0), SIGN).to(tl.float32)

    seen_slots = tl.cdiv(seen, KEYS * slot)
    n_seen = seen_slots * GROUPS
    o_block = tl.arange(0, BLOCK)
    b_top = tl.full([BLOCK], float("-inf"), tl.float32)
    b_bad = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n_seen, BLOCK):
        b_s = tl.load(MAXIMA + first + o_block, mask=first + o_block < n_seen, other=float("-inf"))
        b_top = tl.maximum(b_top, b_s)
        b_bad |= (b_s != b_s).to(tl.int32)
    is_bad = tl.max(b_bad, 0) > 0
    n_seen = tl.where(is_bad, 0, seen_slots) * GROUPS
    top = tl.where(n_seen > 0, tl.max(b_top, 0), 0.0)

    tau = exponent * 0 - 1
    steps = 0
    is_far = n_seen > 0
    while (steps < MAX_STEPS) & is_far:
        f, g = _sums(MAXIMA, n_seen, top, c, tau, r, ALPHA, BLOCK)
        change = tl.maximum(_newton_step(f, g, r, ALPHA), 0.0)
        tau += change
        is_far = change * g > BOUND_TARGET * f
        steps += 1

    listed = n_seen * 0
    # By fours, which one thread holds: a sum over threads takes long.
    o_fours = tl.arange(0, BLOCK // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    for first in range(0, n_seen, BLOCK):
        b_s = tl.load(MAXIMA + first + o_fours, mask=first + o_fours < n_seen, other=float("-inf"))
        b_listed = ((b_s - top) * c > tau).to(tl.int32)
        b_four = tl.sum(b_listed, 1)
        b_places = (listed + tl.cumsum(b_four, 0) - b_four)[:, None] + tl.cumsum(b_listed, 1) - 1
        tl.store(LIST + b_places, first + o_fours, mask=(b_listed > 0) & (b_places < CAPACITY))
        listed += tl.sum(b_four, 0)
    # Written by some threads, read by all.
    tl.debug_barrier()

    members = slot * (KEYS // GROUPS)
    count = n_seen * 0
    o_members = tl.arange(0, ROWS_K)
    n_members = tl.where(listed > CAPACITY, 0, listed * members)
    for first in range(0, n_members, ROWS_K):
        i_member = first + o_members
        b_group = tl.load(LIST + i_member // members, mask=i_member < n_members, other=0)
        i_member = tl.where(i_member < n_members, i_member % members, 0)
        b_keys = (b_group // GROUPS * slot + i_member // 8) * KEYS
        b_keys += i_member % 8 // 2 * 32 + b_group % GROUPS * 2 + i_member % 2
        is_key = (first + o_members < n_members) & (b_keys < seen)
        is_k = is_key[:, None] & (o_d[None, :] < HEAD_DIM)
        b_k = tl.load(K + (b_keys.to(tl.int64) * stride_kn * VEC_K)[:, None] + o_d[None, :], mask=is_k, other=0.0)
        b_s = tl.sum(b_k.to(tl.float32) * b_q[None, :], 1)
        b_above = (is_key & ((b_s - top) * c > tau)).to(tl.int32)
        b_places = count + tl.cumsum(b_above, 0) - 1
        is_kept = (b_above > 0) & (b_places < CAPACITY)
        tl.store(SCORES + b_places, b_s, mask=is_kept)
        tl.store(FOUND + b_places, b_keys, mask=is_kept)
        count += tl.sum(b_above, 0)
    if (listed > CAPACITY) | (count > CAPACITY):
        tl.store(FLAGS + i_b * (heads_q // group) + i_h // group, 1)
    count = tl.minimum(count, CAPACITY)
    tl.debug_barrier()

    steps = 0
    change = exponent * 0 + 1
    while (steps < MAX_STEPS) & (change != 0) & (count > 0):
        f, g = _sums(SCORES, count, top, c, tau, r, ALPHA, ROWS_K)
        change = _newton_step(f, g, r, ALPHA)
        # Below the rounding of u it is noise.
        change = tl.where(tl.abs(change) > 1.2e-7, change, 0.0)
        tau += change
        steps += 1

    o_dv = tl.arange(0, BLOCK_DV)
    o_found = tl.arange(0, ROWS_V)
    b_out = tl.zeros([ROWS_V, BLOCK_DV], tl.float32)
    for first in range(0, count, ROWS_V):
        is_found = first + o_found < count
        b_s = tl.load(SCORES + first + o_found, mask=is_found, other=float("-inf"))
        b_keys = tl.load(FOUND + first + o_found, mask=is_found, other=0)
        b_p, _b_w = _powers(_saturate((b_s - top) * c - tau), r, ALPHA)
        is_v = (b_p > 0)[:, None] & (o_dv[None, :] < HEAD_DIM_V)
        b_v = tl.load(V + (b_keys.to(tl.int64) * stride_vn * VEC_V)[:, None] + o_dv[None, :], mask=is_v, other=0.0)
        b_out += b_p[:, None] * b_v.to(tl.float32)
    nan = tl.where(is_bad, float("nan"), 0.0)
    b_out = tl.sum(b_out, 0) + nan
    tl.store(OUT + row * HEAD_DIM_V + o_dv, b_out.to(OUT.dtype.element_ty), mask=o_dv < HEAD_DIM_V)
    tl.store(TAU + row, tl.where(seen > 0, tau + top * c, float("inf")) + nan)
