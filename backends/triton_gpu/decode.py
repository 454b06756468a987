"""The Triton kernels of a few queries over many keys, forward alone; notation of kernels.py.

Here memory is what takes time, so k is read once and v only where there is weight. The keys of a head are split over
programs. Each forms the scores of its keys, raises a lower bound of tau on the way, and appends what is above it: z and
the key, CAPACITY of them at most. A program per row then finds tau of what was found, and gathers the rows of v in the
support. Where the capacity was not enough, FLAGS says so for all heads that share these keys, and the kernels of
kernels.py do them instead.

The queries of all heads that share keys are rows of one *unit*.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .kernels import INTEGERS as _INTEGERS
from .kernels import (
    _exponent,
    _insert,
    _keys_seen,
    _lengths,
    _load_tile,
    _newton_step,
    _powers,
    _raise_by_maxima,
    _signed,
)

__all__ = ["CAPACITY", "KEYS", "MAX_SPLITS", "entmax_attn_decode_output", "entmax_attn_decode_scan"]

CAPACITY = tl.constexpr(256)
MAX_SPLITS = tl.constexpr(32)
KEYS = tl.constexpr(128)  # of a product
BOUND_EVERY = tl.constexpr(4)  # products after which the bound is raised

INTEGERS = [*_INTEGERS, "fold", "n_units", "n_row_tiles", "n_splits", "products"]


@triton.jit
def _by_warp_and_thread(b_x):
    """[rows, 4, 4] maxima over the keys that a thread holds of a row of a product: warp by thread of its quad."""
    return tl.max(tl.max(tl.reshape(b_x, [b_x.shape[0], KEYS // 32, 4, 4, 2]), 4), 1)


@triton.jit(do_not_specialize=INTEGERS)
def entmax_attn_decode_scan(
    Q,
    K,
    Z,
    FOUND,
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
    alpha,
    scale,
    heads_q,
    group,
    seqlen_q,
    seqlen_k,
    fold,
    n_units,
    n_row_tiles,
    n_splits,
    products,
    ALPHA: tl.constexpr,
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
    PRECISION: tl.constexpr,
):
    """Scan and init of one split: the scores above the running bound, in Z, and their keys, in FOUND.

    COUNTS has how many there are of each row, more than the capacity where some were left out, and -1 where a score is
    not finite.
    """
    i_split = tl.program_id(0) % n_splits
    i_tile = tl.program_id(0) // n_splits % n_row_tiles
    i_bu = tl.program_id(0) // n_splits // n_row_tiles
    i_b = (i_bu // n_units).to(tl.int64)
    first_head = i_bu % n_units * fold
    i_kv = (first_head // group).to(tl.int64)
    len_q, len_k = _lengths(SEQLENS_Q, SEQLENS_K, i_b, seqlen_q, seqlen_k, HAS_SEQLENS_Q, HAS_SEQLENS_K)
    exponent = _exponent(ALPHA_HEADS, alpha, first_head, PER_HEAD)
    c = exponent * scale
    r = 1 / exponent
    Q += i_b * stride_qb * VEC_Q
    K += (i_b * stride_kb + i_kv * stride_kh) * VEC_K
    Z += tl.program_id(0).to(tl.int64) * BLOCK_M * CAPACITY
    FOUND += tl.program_id(0).to(tl.int64) * BLOCK_M * CAPACITY
    if i_split + i_tile == 0:
        tl.store(FLAGS + i_b * (heads_q // group) + i_kv, 0)

    o_rows = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = o_rows < fold * seqlen_q
    o_queries = o_rows % seqlen_q
    b_seen = tl.where(is_row, _keys_seen(o_queries, len_q, len_k, IS_CAUSAL), 0)
    o_d = tl.arange(0, BLOCK_D)
    o_q = (first_head + o_rows // seqlen_q).to(tl.int64) * stride_qh + o_queries.to(tl.int64) * stride_qm
    is_q = is_row[:, None] & (o_d[None, :] < HEAD_DIM)
    b_q = _signed(tl.load(Q + (o_q * VEC_Q)[:, None] + o_d[None, :], mask=is_q, other=0.0), SIGN)

    b_tau = tl.where(b_seen > 0, float("-inf"), float("inf"))
    b_0 = tl.full([BLOCK_M, 4, 4], float("-inf"), tl.float32)
    b_1 = b_0
    b_2 = b_0
    b_count = tl.zeros([BLOCK_M], tl.int32)
    b_bad = tl.zeros([BLOCK_M, 4, 4], tl.int32)
    o_places = (tl.arange(0, BLOCK_M) * CAPACITY)[:, None]
    begin = i_split * products
    for j in tl.range(begin, tl.minimum(begin + products, tl.cdiv(tl.max(b_seen, 0), KEYS))):
        b_k = _load_tile(K, j * KEYS, 0, len_k, stride_kn, VEC_K, KEYS, HEAD_DIM, BLOCK_D)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        o_keys = j * KEYS + tl.arange(0, KEYS)
        is_seen = o_keys[None, :] < b_seen[:, None]
        b_bad |= _by_warp_and_thread((is_seen & (b_s - b_s != 0)).to(tl.int32))
        b_z = tl.where(is_seen, b_s * c, float("-inf"))
        b_max = _by_warp_and_thread(b_z)
        b_0, b_1, b_2 = _insert(b_max, b_0, b_1, b_2)
        if (j - begin) % BOUND_EVERY == 0:
            b_tau = tl.maximum(b_tau, tl.max(tl.max(b_0, 1), 1) - 1)
            b_tau = _raise_by_maxima(b_tau, b_0, b_1, b_2, 1.0, r, ALPHA)
        if tl.max(tl.reshape((b_max > b_tau[:, None, None]).to(tl.int32), [BLOCK_M * 16]), 0) > 0:
            b_above = (b_z > b_tau[:, None]).to(tl.int32)
            b_place = b_count[:, None] + tl.cumsum(b_above, 1) - 1
            is_kept = (b_above > 0) & (b_place < CAPACITY)
            tl.store(Z + o_places + b_place, b_z, mask=is_kept)
            tl.store(FOUND + o_places + b_place, tl.broadcast_to(o_keys[None, :], b_z.shape), mask=is_kept)
            b_count += tl.sum(b_above, 1)
    is_bad = tl.max(tl.max(b_bad, 1), 1) > 0
    o_counts = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(COUNTS + o_counts, tl.where(is_bad, -1, b_count))


@triton.jit(do_not_specialize=INTEGERS)
def entmax_attn_decode_output(
    V,
    OUT,
    TAU,
    Z,
    FOUND,
    COUNTS,
    FLAGS,
    ALPHA_HEADS,
    stride_vb,
    stride_vh,
    stride_vn,
    alpha,
    heads_q,
    group,
    seqlen_q,
    fold,
    n_units,
    n_row_tiles,
    n_splits,
    ALPHA: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    VEC_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MAX_STEPS: tl.constexpr,
    ROWS_V: tl.constexpr,
):
    """Refine and output of one row: tau of all that its splits found, and the sum of p v over the support."""
    i_m = tl.program_id(0) % seqlen_q
    i_bh = tl.program_id(0) // seqlen_q
    i_b = (i_bh // heads_q).to(tl.int64)
    i_h = i_bh % heads_q
    i_row = i_h % fold * seqlen_q + i_m
    i_tile = (i_b * n_units + i_h // fold) * n_row_tiles + i_row // BLOCK_M
    exponent = _exponent(ALPHA_HEADS, alpha, i_h, PER_HEAD)
    r = 1 / exponent
    V += (i_b * stride_vb + (i_h // group).to(tl.int64) * stride_vh) * VEC_V
    # Of this row's place in the first split, and from one split to the next.
    place = i_tile * n_splits * BLOCK_M + i_row % BLOCK_M
    Z += place * CAPACITY
    FOUND += place * CAPACITY
    STEP: tl.constexpr = BLOCK_M * CAPACITY

    o_splits = tl.arange(0, MAX_SPLITS)
    b_counts = tl.load(COUNTS + place + o_splits * BLOCK_M, mask=o_splits < n_splits, other=0)
    if tl.max(b_counts, 0) > CAPACITY:
        tl.store(FLAGS + i_b * (heads_q // group) + i_h // group, 1)
    o_found = tl.arange(0, MAX_SPLITS * CAPACITY)
    o_split = o_found // CAPACITY
    b_found = tl.load(COUNTS + place + o_split * BLOCK_M, mask=o_split < n_splits, other=0)
    is_found = o_found % CAPACITY < b_found
    o_places = o_split * STEP + o_found % CAPACITY
    b_z = tl.load(Z + o_places, mask=is_found, other=float("-inf"))
    top = tl.max(b_z, 0)
    has_keys = tl.max(b_counts, 0) > 0
    # A query or a key that is not finite gives scores that are not.
    is_bad = tl.min(b_counts, 0) < 0
    b_z = b_z - tl.where(has_keys, top, 0.0)
    tau = exponent * 0 - 1
    steps = 0
    change = exponent * 0 + 1
    while (steps < MAX_STEPS) & (change > 0) & has_keys:
        b_p, b_w = _powers(tl.maximum(b_z - tau, 0.0), r, ALPHA)
        change = _newton_step(tl.sum(b_p, 0), tl.sum(b_w, 0), r, ALPHA)
        # Below the rounding of u it is noise.
        change = tl.where(change > 1.2e-7, change, 0.0)
        tau += change
        steps += 1

    b_p, _b_w = _powers(tl.maximum(b_z - tau, 0.0), r, ALPHA)
    b_kept = (b_p > 0).to(tl.int32)
    b_keys = tl.load(FOUND + o_places, mask=b_kept > 0, other=0)
    b_place = tl.cumsum(b_kept, 0) - 1
    b_place = (b_place // CAPACITY) * STEP + b_place % CAPACITY
    # All has been read: the support takes its place.
    tl.debug_barrier()
    tl.store(Z + b_place, b_p, mask=b_kept > 0)
    tl.store(FOUND + b_place, b_keys, mask=b_kept > 0)
    tl.debug_barrier()
    o_dv = tl.arange(0, BLOCK_DV)
    b_out = tl.zeros([BLOCK_DV], tl.float32)
    count = tl.sum(b_kept, 0)
    for first in range(0, count, ROWS_V):
        o_kept = first + tl.arange(0, ROWS_V)
        is_kept = o_kept < count
        o_kept = (o_kept // CAPACITY) * STEP + o_kept % CAPACITY
        b_weight = tl.load(Z + o_kept, mask=is_kept, other=0.0)
        b_key = tl.load(FOUND + o_kept, mask=is_kept, other=0)
        is_v = is_kept[:, None] & (o_dv[None, :] < HEAD_DIM_V)
        b_v = tl.load(V + (b_key.to(tl.int64) * stride_vn * VEC_V)[:, None] + o_dv[None, :], mask=is_v, other=0.0)
        b_out += tl.sum(b_weight[:, None] * b_v.to(tl.float32), 0)
    nan = tl.where(is_bad, float("nan"), 0.0)
    row = tl.program_id(0).to(tl.int64)
    tl.store(OUT + row * HEAD_DIM_V + o_dv, (b_out + nan).to(OUT.dtype.element_ty), mask=o_dv < HEAD_DIM_V)
    tl.store(TAU + row, tl.where(has_keys | is_bad, tau + top, float("inf")) + nan)
