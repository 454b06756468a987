"""The stages of entmax attention on a CPU, each a function that any number of threads run at once.

Forward: ``pack`` (keys as int16 panels), then per tile of queries **scan** (int16 products with a proven error bound,
maxima of groups of keys, a list of candidates per row), **init** (lower bound of tau, from the group maxima or from a
histogram of the candidates), **refine** (Newton on the norm, over candidates scored again in full precision) and
**output**. Backward: **dq** per tile of queries and **dkv** per range of keys, over the entries of the support.

Threads take work items from a shared counter and write disjoint outputs, so a result does not depend on which thread
took what. Addresses and strides are in bytes; ``size`` is the item size of the element type, that of ``like``.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .cache import stage
from .simd import (
    GROUPS,
    MR,
    NR,
    accumulate_rows,
    cast,
    dot_rows,
    fetch_add,
    fetch_scores,
    gemm_tile,
    keep_above,
    load,
    maximum,
    multiply_rows,
    outlined,
    power_row,
    power_sums,
    quantise,
    raise_groups,
    scale_row,
    scan_row,
    scan_tile,
    shift_row,
    spread_pairs,
    store,
)

BLOCK_M = 48  # queries per tile, a multiple of MR
BLOCK_N = 1024  # keys per chunk, a multiple of NR; a chunk has one int16 step
PANELS = BLOCK_N // NR

QUANTISED_NORM = 32767.0
LOWEST, HIGHEST = -(2**31), 2**31 - 1

INIT_MAXIMA, INIT_HISTOGRAM = 0, 1
HISTOGRAM_BINS = 16
TIGHTEN_AT = 64  # candidates of a row that make its bound worth another Newton step
DENSE_SHARE = 0.25  # candidates per scanned key from which on a tile is cheaper dense
DENSE_AFTER, DENSE_ROWS = 128, 4  # scanned keys per row, and rows, before that is judged

ENTMAX_ROWS = 8  # rows per work item

STORED, RESCAN, DENSE = 0, 1, 2


inlined = njit(nogil=True, error_model="numpy", inline="always")
helper = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


@njit
def workspace_layout(shape, size):
    """Offsets of the buffers of one thread, each on its own cache line, and their total, in bytes."""
    _, _, _, _, seqlen_k, dim, _ = shape
    rows, pairs, capacity = BLOCK_M, (dim + 1) // 2, seqlen_k + 64
    scaled = 0
    packed = scaled + (rows * dim * size + 127) // 64 * 64
    strip = packed + (rows * pairs * 4 + 127) // 64 * 64
    maxima = strip + MR * BLOCK_N * 4
    groups = maxima + GROUPS * 4
    values = groups + rows * GROUPS * size
    keys = values + (rows * capacity * size + 127) // 64 * 64
    weights = keys + (rows * capacity * 4 + 127) // 64 * 64
    scratch = weights + (capacity * size + 127) // 64 * 64
    total = scratch + (pairs * 4 + 255) // 64 * 64
    return scaled, packed, strip, maxima, groups, values, keys, weights, scratch, total


@helper
def epsilon_of(size):
    """Machine epsilon of the element type."""
    return 2.0**-23 if size == 4 else 2.0**-52


@helper
def row_norm(row, dim, zero, scratch, size, like):
    """Euclidean norm, finite for finite elements also where their squares leave the range of float32."""
    dot_rows(row, row, 0, zero, 1, dim, scratch, like)
    square = np.float64(load(scratch, like))
    if not 1e-30 < square < 1e30:
        square = 0.0
        for d in range(dim):
            x = np.float64(load(row + d * size, like))
            square += x * x
    return math.sqrt(square)


@helper
def scan_error(dim):
    """Bound of the error of an int16 score, in its own units.

    With q = s (q' + e), |e_d| <= 1/2 and |q'| <= QUANTISED_NORM + sqrt(dim) / 2, and k likewise, the product of the
    two is off by at most sqrt(dim) / 2 (|q'| + |k'|) + dim / 4. What the score in full precision itself is off by
    (less than 1e-6 of the product of the norms, also in float32) is added.
    """
    root = math.sqrt(dim)
    return root * (QUANTISED_NORM + root) + dim + 1e-6 * QUANTISED_NORM * QUANTISED_NORM


@stage
def pack(counter, shape, k, k_strides, lengths_k, panels, steps, bad_keys, size, like):
    """Keys as int16 panels of (pairs of head_dim, NR), scaled per chunk so that the largest norm is QUANTISED_NORM.

    steps[chunk] is that scale; bad_keys[chunk] the first key that is not finite, or HIGHEST.
    """
    batch, _, heads_kv, _, seqlen_k, dim, _ = shape
    n_chunks = (seqlen_k + BLOCK_N - 1) // BLOCK_N
    n_pairs = (dim + 1) // 2
    pairs = np.zeros(n_pairs, np.int32)
    zeros = np.zeros(n_pairs, np.int32)
    norms = np.empty(BLOCK_N, np.float64)
    scratch = np.zeros(2, np.float64)
    zero = scratch.ctypes.data + 8
    while True:
        item = fetch_add(counter, 1)
        if item >= batch * heads_kv * n_chunks:
            return
        head, chunk = item // n_chunks, item % n_chunks
        b, h = head // heads_kv, head % heads_kv
        first = chunk * BLOCK_N
        n = max(0, min(BLOCK_N, load(lengths_k + b * 8, np.int64(0)) - first))
        rows = k + b * k_strides[0] + h * k_strides[1] + first * k_strides[2]
        largest, bad = 0.0, HIGHEST
        for j in range(n):
            norm = row_norm(rows + j * k_strides[2], dim, zero, scratch.ctypes.data, size, like)
            if not norm < np.inf:
                bad = min(bad, first + j)
                norm = np.inf
            else:
                largest = max(largest, norm)
            norms[j] = norm
        step = largest / QUANTISED_NORM
        store(steps + item * 8, step)
        store(bad_keys + item * 8, np.int64(bad))
        inverse = cast(1.0 / step if step > 0.0 else 0.0, like)
        for j in range((n + NR - 1) // NR * NR):
            panel = panels + (item * PANELS + j // NR) * n_pairs * NR * 4
            source = zeros.ctypes.data
            if j < n and norms[j] < np.inf:
                source = pairs.ctypes.data
                quantise(rows + j * k_strides[2], dim, inverse, source)
            spread_pairs(source, n_pairs, panel + j % NR * 4, NR * 4)


@helper
def refine(values, n, lower, r, steps, tolerance, like):
    """Newton on the norm of max(values[:n] - tau, 0) from a lower bound of tau: it rises and never passes tau."""
    outlined()
    tau = lower
    for _ in range(steps):
        g, f = power_sums(values, n, cast(tau, like), cast(r, like))
        step = (f - norm_power(np.float64(f), r)) / g
        if not step > tolerance:
            break
        tau += step
    return tau


@helper
def norm_power(f, r):
    """f ** (1 - 1/r), which makes Newton's step (f - f ** (1 - 1/r)) / g that of the norm f ** (1/r)."""
    if r == 2.0:
        return math.sqrt(f)
    return f ** (1.0 - 1.0 / r)


@helper
def histogram_bound(values, n, r, size, like):
    """Lower bound of tau of values[:n]: counts on [max - 1, max], taken at the lower edges of the bins."""
    outlined()
    counts = np.zeros(HISTOGRAM_BINS + 1, np.int64)
    top = np.float64(maximum(values, n, like))
    for j in range(n):
        x = np.float64(load(values + j * size, like)) - (top - 1.0)
        if x > 0.0:
            counts[int(x * HISTOGRAM_BINS)] += 1
    tau = 0.0
    for _ in range(8):
        f, g = 0.0, 0.0
        for i in range(HISTOGRAM_BINS + 1):
            u = i / HISTOGRAM_BINS - tau
            if counts[i] and u > 0.0:
                w = counts[i] * u ** (r - 1.0)
                g += w
                f += w * u
        if not f > 1.0:
            break
        tau += (f - norm_power(f, r)) / g
    return top - 1.0 + tau


@helper
def group_bound(maxima, step, margin, groups, lower, r, init, epsilon, size, like):
    """Takes the maxima of a chunk into the groups; returns the lower bound of tau that they give, if above ``lower``.

    The maxima of groups of keys are scores of a subset of the keys, whose tau is a lower bound.
    """
    raise_groups(maxima, step, margin, groups)
    top = np.float64(maximum(groups, GROUPS, like))
    bound = top - 1.0
    if init == INIT_MAXIMA:
        bound = refine(groups, GROUPS, max(bound, lower), r, 3, 1e-3, like)
    return max(lower, bound - 4.0 * epsilon * (abs(top) + 1.0))


@helper
def int_threshold(lower, step, error):
    """The int16 score at or below which a key is certain to lie at or below ``lower``."""
    if step > 0.0:
        return np.int64(max(LOWEST, min(HIGHEST, math.floor(lower / step - error) - 1.0)))
    return np.int64(-1 if lower <= 0.0 else HIGHEST)


@helper
def last_key(row, is_causal, length_q, length_k):
    """How many keys, from the first one, query ``row`` sees."""
    if row >= length_q:
        return 0
    if is_causal:
        return max(0, min(length_k, row + 1 + length_k - length_q))
    return length_k


@inlined
def load_queries(row0, n_rows, q, stride, dim, factor, scaled, packed, steps, bad, scratch, size, like):
    """scaled = q * factor; packed = these as int16 pairs in groups of MR rows, of scale ``steps``; bad = not finite."""
    n_pairs = (dim + 1) // 2
    zero = scratch
    pairs = scratch + 64
    store(zero, np.int64(0))
    store(pairs + (n_pairs - 1) * 4, np.int32(0))
    for i in range((n_rows + MR - 1) // MR * MR):
        target = packed + (i // MR * n_pairs * MR + i % MR) * 4
        norm = 0.0
        if i < n_rows:
            row = scaled + i * dim * size
            scale_row(q + (row0 + i) * stride, dim, cast(factor, like), row)
            norm = row_norm(row, dim, zero, scratch + 8, size, like)
            bad[i] = not norm < np.inf
            if bad[i]:
                norm = 0.0
            steps[i] = norm / QUANTISED_NORM
            quantise(row, dim, cast(1.0 / steps[i] if norm > 0.0 else 0.0, like), pairs)
        spread_pairs(pairs, n_pairs, target, MR * 4)


@inlined
def find_support(
    row0,
    n_rows,
    is_causal,
    length_q,
    length_k,
    panels,
    k_steps,
    dim,
    packed,
    q_steps,
    bad,
    scaled,
    k,
    k_stride,
    r,
    init,
    may_be_dense,
    strip,
    maxima,
    groups,
    values,
    keys,
    capacity,
    counts,
    lower,
    pivots,
    size,
    like,
):
    """scan, init and refine for one tile of queries.

    Leaves, for each row i, counts[i] entries of the support (u = z - tau in ``values``, key in ``keys``), the row
    maximum in pivots[i] and tau - maximum in lower[i]. Returns False where the tile is cheaper dense.
    """
    n_pairs = (dim + 1) // 2
    error = scan_error(dim)
    epsilon = epsilon_of(size)
    limits = np.full(BLOCK_M, TIGHTEN_AT, np.int64)
    errors = np.zeros(BLOCK_M, np.float64)
    for i in range(n_rows):
        counts[i] = 0
        lower[i] = -np.inf
        fill(groups + i * GROUPS * size, GROUPS, cast(-np.inf, like), size)

    last_row = row0 + n_rows - 1
    end = last_key(min(last_row, length_q - 1), is_causal, length_q, length_k)
    n_chunks = (end + BLOCK_N - 1) // BLOCK_N
    # The keys near the diagonal first: where attention is local, their bound drops the rest at once.
    near = min(max(row0 + length_k - length_q, 0) // BLOCK_N, n_chunks - 1)
    scanned = 0
    for visit in range(n_chunks):
        chunk = near if visit == 0 else visit - 1 if visit <= near else visit
        key0 = chunk * BLOCK_N
        key1 = min(key0 + BLOCK_N, end)
        k_step = load(k_steps + chunk * 8, 0.0)
        total = 0
        for group0 in range(0, n_rows, MR):
            group1 = min(group0 + MR, n_rows)
            visible = min(last_key(row0 + group1 - 1, is_causal, length_q, length_k), key1) - key0
            for p in range((visible + NR - 1) // NR):
                panel = panels + (chunk * PANELS + p) * n_pairs * NR * 4
                scan_tile(packed + group0 * n_pairs * 4, panel, n_pairs, strip + p * NR * 4, BLOCK_N * 4)
            for i in range(group0, group1):
                seen = last_key(row0 + i, is_causal, length_q, length_k)
                if bad[i] or seen <= key0:
                    continue
                scanned += min(seen, key1) - key0
                step = q_steps[i] * k_step
                margin = error * step
                if not margin < (1e37 if size == 4 else 1e307):
                    bad[i] = True
                    counts[i] = 0
                    continue
                errors[i] = max(errors[i], margin)
                visible = min(seen, key1) - key0
                f_step, f_margin = cast(step, like), cast(margin, like)
                scores, group = strip + (i - group0) * BLOCK_N * 4, groups + i * GROUPS * size
                vals, idxs = values + i * capacity * size, keys + i * capacity * 4
                n = counts[i]
                if lower[i] == -np.inf:
                    scan_row(scores, visible, HIGHEST, 0, idxs, maxima)
                    lower[i] = group_bound(maxima, f_step, f_margin, group, lower[i], r, init, epsilon, size, like)
                threshold = int_threshold(lower[i], step, error)
                found = scan_row(scores, visible, threshold, key0, idxs + n * 4, maxima)
                # Scores by key: the row of the strip starts at key0.
                fetch_scores(scores - key0 * 4, idxs + n * 4, found, f_step, f_margin, vals + n * size)
                n += found
                if n > counts[i]:
                    lower[i] = group_bound(maxima, f_step, f_margin, group, lower[i], r, init, epsilon, size, like)
                    if init == INIT_HISTOGRAM:
                        bound = histogram_bound(vals, n, r, size, like) - 2.0 * errors[i]
                        lower[i] = max(lower[i], bound - 4.0 * epsilon * (abs(bound) + 1.0))
                        n = keep_above(vals, idxs, n, cast(lower[i], like))
                if n > limits[i]:
                    start = max(lower[i] + 2.0 * errors[i], np.float64(maximum(vals, n, like)) - 1.0)
                    bound = refine(vals, n, start, r, 3, 1e-3, like)
                    lower[i] = max(lower[i], bound - 2.0 * errors[i] - 4.0 * epsilon * (abs(start) + 1.0))
                    n = keep_above(vals, idxs, n, cast(lower[i], like))
                    limits[i] = max(TIGHTEN_AT, 2 * n)
                counts[i] = n
                total += n
                rows = i + 1
                judged = may_be_dense and rows >= DENSE_ROWS and scanned >= DENSE_AFTER * rows
                if judged and total > DENSE_SHARE * scanned:
                    return False

    for i in range(n_rows):
        n = counts[i]
        if n == 0:
            pivots[i], lower[i] = 0.0, np.inf
            continue
        vals, idxs = values + i * capacity * size, keys + i * capacity * 4
        if n > TIGHTEN_AT:
            top = np.float64(maximum(vals, n, like))
            bound = refine(vals, n, max(top - 1.0, lower[i] + 2.0 * errors[i]), r, 4, 1e-3, like)
            lower[i] = max(lower[i], bound - 2.0 * errors[i] - 4.0 * epsilon * (abs(top) + 1.0))
            n = keep_above(vals, idxs, n, cast(lower[i], like))
        dot_rows(scaled + i * dim * size, k, k_stride, idxs, n, dim, vals, like)
        top = np.float64(maximum(vals, n, like))
        if not abs(top) < np.inf:
            bad[i] = True
            counts[i] = 0
            continue
        shift_row(vals, n, cast(top, like), vals)
        tau = refine(vals, n, max(lower[i] - top, -1.0), r, 50, 0.5 * epsilon, like)
        limit = cast(tau, like)
        n = keep_above(vals, idxs, n, limit)
        shift_row(vals, n, limit, vals)
        counts[i] = n
        pivots[i], lower[i] = top, np.float64(limit)
    return True


@helper
def fill(address, n, value, size):
    """n elements of ``value``, of ``size`` bytes, from the address on."""
    for j in range(n):
        store(address + j * size, value)


@helper
def store_row(tau, shifts, sizes, row, top, shift, n, is_bad, size, like):
    """tau, tau - maximum and the support size of one row; a bad row has NaN and no support."""
    store(tau + row * size, cast(np.nan if is_bad else top + shift, like))
    store(shifts + row * size, cast(np.nan if is_bad else shift, like))
    store(sizes + row * 4, np.int32(0 if is_bad else n))


@stage
def forward(
    counter,
    workspace,
    shape,
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    panels,
    k_steps,
    first_bad,
    lengths_q,
    lengths_k,
    alphas,
    scale,
    is_causal,
    init,
    n_items,
    items,
    with_output,
    out,
    tau,
    shifts,
    sizes,
    tile_states,
    tile_keys,
    tile_entries,
    tile_capacity,
    block_map,
    block_m,
    block_n,
    size,
    like,
):
    """Forward of the tiles listed in ``items``, but for the dense ones, which it marks DENSE in ``tile_states``.

    The support of a tile goes to the addresses in tile_keys and tile_entries if it has at most ``tile_capacity``
    entries; if not, the tile is marked RESCAN. block_map (heads, blocks of block_m queries, blocks of block_n keys),
    if its address is not 0, gets a 1 for every block that holds support. Without output (to find such a support again)
    nothing else is written.
    """
    _, heads_q, heads_kv, seqlen_q, seqlen_k, dim, dim_v = shape
    n_tiles = (seqlen_q + BLOCK_M - 1) // BLOCK_M
    n_chunks = (seqlen_k + BLOCK_N - 1) // BLOCK_N
    n_pairs = (dim + 1) // 2
    capacity = seqlen_k + 64
    scaled, packed, strip, maxima, groups, values, keys, weights, scratch, total = workspace_layout(shape, size)
    base = workspace + fetch_add(counter + 8, 1) * total
    scaled, packed, strip, maxima, groups = base + scaled, base + packed, base + strip, base + maxima, base + groups
    values, keys, weights, scratch = base + values, base + keys, base + weights, base + scratch
    q_steps, lower, pivots = np.empty(BLOCK_M), np.empty(BLOCK_M), np.empty(BLOCK_M)
    counts, bad = np.empty(BLOCK_M, np.int64), np.empty(BLOCK_M, np.bool_)
    nan = cast(np.nan, like)
    while True:
        item = fetch_add(counter, 1)
        if item >= n_items:
            break
        item = load(items + item * 8, np.int64(0))
        head, tile = item // n_tiles, item % n_tiles
        b, h = head // heads_q, head % heads_q
        head_kv = b * heads_kv + h // (heads_q // heads_kv)
        length_q, length_k = load(lengths_q + b * 8, np.int64(0)), load(lengths_k + b * 8, np.int64(0))
        alpha = load(alphas + h * 8, 0.0)
        r = 1.0 / (alpha - 1.0)
        row0 = tile * BLOCK_M
        n_rows = min(BLOCK_M, seqlen_q - row0)
        n_valid = max(0, min(n_rows, length_q - row0))
        k_rows = k + b * k_strides[0] + h // (heads_q // heads_kv) * k_strides[1]
        v_rows = v + b * v_strides[0] + h // (heads_q // heads_kv) * v_strides[1]
        if n_valid:
            load_queries(
                row0,
                n_valid,
                q + b * q_strides[0] + h * q_strides[1],
                q_strides[2],
                dim,
                (alpha - 1.0) * scale,
                scaled,
                packed,
                q_steps,
                bad,
                scratch,
                size,
                like,
            )
            first = load(first_bad + head_kv * 8, np.int64(0))
            for i in range(n_valid):
                seen = last_key(row0 + i, is_causal, length_q, length_k)
                bad[i] = seen > 0 and (bad[i] or seen > first)
            if not find_support(
                row0,
                n_valid,
                is_causal,
                length_q,
                length_k,
                panels + head_kv * n_chunks * PANELS * n_pairs * NR * 4,
                k_steps + head_kv * n_chunks * 8,
                dim,
                packed,
                q_steps,
                bad,
                scaled,
                k_rows,
                k_strides[2],
                r,
                init,
                with_output,
                strip,
                maxima,
                groups,
                values,
                keys,
                capacity,
                counts,
                lower,
                pivots,
                size,
                like,
            ):
                store(tile_states + item, np.int8(DENSE))
                continue
        saved_keys = load(tile_keys + item * 8, np.int64(0))
        saved_entries = load(tile_entries + item * 8, np.int64(0))
        used = 0
        for i in range(n_valid):
            if bad[i]:
                continue
            n = counts[i]
            vals, idxs = values + i * capacity * size, keys + i * capacity * 4
            if used + n <= tile_capacity:
                for j in range(n):
                    store(saved_keys + (used + j) * 4, load(idxs + j * 4, np.int32(0)))
                    store(saved_entries + (used + j) * size, load(vals + j * size, like))
            used += n
        if not with_output:
            continue
        store(tile_states + item, np.int8(STORED if used <= tile_capacity else RESCAN))
        for i in range(n_rows):
            row = head * seqlen_q + row0 + i
            target = out + row * dim_v * size
            is_bad = i < n_valid and bad[i]
            n = counts[i] if i < n_valid and not is_bad else 0
            fill(target, dim_v, nan if is_bad else cast(0.0, like), size)
            store_row(
                tau, shifts, sizes, row, pivots[i] if n else 0.0, lower[i] if n else np.inf, n, is_bad, size, like
            )
            vals = values + i * capacity * size
            power_row(vals, n, cast(r, like), weights)
            accumulate_rows(v_rows, v_strides[2], keys + i * capacity * 4, weights, n, dim_v, target, like)
            if block_map:
                blocks_n = (seqlen_k + block_n - 1) // block_n
                blocks_m = (seqlen_q + block_m - 1) // block_m
                blocks = block_map + (head * blocks_m + (row0 + i) // block_m) * blocks_n
                for j in range(n):
                    store(blocks + load(keys + (i * capacity + j) * 4, np.int32(0)) // block_n, np.int8(1))


@njit
def panel_columns(size):
    """Elements in a row of gemm_tile."""
    return NR * 4 // size


@njit
def dense_columns(n_keys, size):
    """n_keys rounded up to whole panels, and to whole groups of MR."""
    whole = panel_columns(size) * MR
    return (n_keys + whole - 1) // whole * whole


@njit
def dense_layout(shape, columns_q, columns_v, size):
    """workspace_layout for the dense stages: two strips of scores, and rows of q, of dout and of a product."""
    _, _, _, _, seqlen_k, dim, _ = shape
    strip_bytes = dense_columns(seqlen_k, size) * size
    scaled = 0
    packed = scaled + (BLOCK_M * dim * size + 127) // 64 * 64
    strip = packed + (BLOCK_M * (dim + 1) * 2 + 127) // 64 * 64
    second = strip + BLOCK_M * strip_bytes
    weights = second + BLOCK_M * strip_bytes
    rows_q = weights + strip_bytes
    rows_v = rows_q + BLOCK_M * columns_q * size
    product = rows_v + BLOCK_M * columns_v * size
    scratch = product + BLOCK_M * max(columns_q, columns_v) * size
    total = scratch + (dim * 2 + 255) // 64 * 64
    return scaled, packed, strip, second, weights, rows_q, rows_v, product, scratch, total


@helper
def product_strip(rows, row_stride, n_rows, dim, panels, n_keys, strip, stride, size, like):
    """strip[BLOCK_M, n_keys] = rows @ keys^T, for keys packed in panels of (dim, panel_columns)."""
    columns = panel_columns(size)
    for p in range((n_keys + columns - 1) // columns):
        panel = panels + p * dim * columns * size
        target = strip + p * columns * size
        for i in range(0, n_rows, MR):
            gemm_tile(
                rows + i * row_stride,
                row_stride,
                size,
                panel,
                columns * size,
                dim,
                target + i * stride,
                stride,
                0,
                like,
            )


@helper
def weighted_rows(strip, stride, n_rows, rows, columns, n_keys, out, size, like):
    """out[BLOCK_M, columns] = strip[:, :n_keys] @ rows, both with ``columns`` contiguous elements a row."""
    tile = panel_columns(size)
    for key in range(0, n_keys, 128):
        n = min(128, n_keys - key)
        for c in range(0, columns, tile):
            for i in range(0, n_rows, MR):
                gemm_tile(
                    strip + i * stride + key * size,
                    stride,
                    size,
                    rows + (key * columns + c) * size,
                    columns * size,
                    n,
                    out + (i * columns + c) * size,
                    columns * size,
                    key,
                    like,
                )


@helper
def add_transposed(strip, stride, n_rows, rows, columns, n_keys, out, size, like):
    """out[n_keys, columns] += strip^T @ rows, over n_rows rows."""
    tile = panel_columns(size)
    for key in range(0, n_keys, MR):
        for c in range(0, columns, tile):
            gemm_tile(
                strip + key * size,
                size,
                stride,
                rows + c * size,
                columns * size,
                n_rows,
                out + (key * columns + c) * size,
                columns * size,
                1,
                like,
            )


@stage
def dense_forward(
    counter,
    workspace,
    shape,
    q,
    q_strides,
    k_panels,
    v_rows,
    columns_v,
    first_bad,
    lengths_q,
    lengths_k,
    alphas,
    scale,
    is_causal,
    n_items,
    items,
    out,
    tau,
    shifts,
    sizes,
    block_map,
    block_m,
    block_n,
    size,
    like,
):
    """Forward of the tiles listed in ``items`` with a strip of all their scores.

    k_panels are (batch, heads_kv, panels, dim, panel_columns), v_rows (batch, heads_kv, seqlen_k, columns_v).
    """
    _, heads_q, heads_kv, seqlen_q, seqlen_k, dim, dim_v = shape
    n_tiles = (seqlen_q + BLOCK_M - 1) // BLOCK_M
    scaled, packed, strip, _, _, _, _, product, scratch, total = dense_layout(shape, 0, columns_v, size)
    base = workspace + fetch_add(counter + 8, 1) * total
    scaled, packed, strip, product, scratch = base + scaled, base + packed, base + strip, base + product, base + scratch
    padded = (seqlen_k + panel_columns(size) - 1) // panel_columns(size) * panel_columns(size)
    stride = dense_columns(seqlen_k, size) * size
    q_steps, bad = np.empty(BLOCK_M), np.empty(BLOCK_M, np.bool_)
    epsilon = epsilon_of(size)
    zero = cast(0.0, like)
    while True:
        item = fetch_add(counter, 1)
        if item >= n_items:
            break
        item = load(items + item * 8, np.int64(0))
        head, tile = item // n_tiles, item % n_tiles
        b, h = head // heads_q, head % heads_q
        head_kv = b * heads_kv + h // (heads_q // heads_kv)
        length_q, length_k = load(lengths_q + b * 8, np.int64(0)), load(lengths_k + b * 8, np.int64(0))
        first = load(first_bad + head_kv * 8, np.int64(0))
        alpha = load(alphas + h * 8, 0.0)
        r = 1.0 / (alpha - 1.0)
        row0 = tile * BLOCK_M
        n_rows = min(BLOCK_M, seqlen_q - row0)
        n_valid = min(n_rows, length_q - row0)
        load_queries(
            row0,
            n_valid,
            q + b * q_strides[0] + h * q_strides[1],
            q_strides[2],
            dim,
            (alpha - 1.0) * scale,
            scaled,
            packed,
            q_steps,
            bad,
            scratch,
            size,
            like,
        )
        end = last_key(row0 + n_valid - 1, is_causal, length_q, length_k)
        product_strip(
            scaled, dim * size, n_valid, dim, k_panels + head_kv * padded * dim * size, end, strip, stride, size, like
        )
        for i in range(n_valid):
            scores = strip + i * stride
            seen = last_key(row0 + i, is_causal, length_q, length_k)
            top, shift, n = 0.0, np.inf, 0
            bad[i] = bad[i] and seen > 0
            if seen:
                top = np.float64(maximum(scores, seen, like))
                bad[i] = bad[i] or seen > first or not abs(top) < np.inf
                shift_row(scores, seen, cast(top, like), scores)
                shift = refine(scores, seen, -1.0, r, 50, 0.5 * epsilon, like)
                shift = np.float64(cast(shift, like))
                shift_row(scores, seen, cast(shift, like), scores)
                n, _ = power_sums(scores, seen, zero, cast(1.0, like))
                power_row(scores, seen, cast(r, like), scores)
            fill(scores + seen * size, end - seen, zero, size)
            row = head * seqlen_q + row0 + i
            store_row(tau, shifts, sizes, row, top, shift, np.int64(n), bad[i], size, like)
            if block_map and not bad[i]:
                blocks_n = (seqlen_k + block_n - 1) // block_n
                blocks_m = (seqlen_q + block_m - 1) // block_m
                blocks = block_map + (head * blocks_m + (row0 + i) // block_m) * blocks_n
                for j in range(seen):
                    if load(scores + j * size, like) > zero:
                        store(blocks + j // block_n, np.int8(1))
        weighted_rows(
            strip,
            stride,
            n_valid,
            v_rows + head_kv * seqlen_k * columns_v * size,
            columns_v,
            end,
            product,
            size,
            like,
        )
        for i in range(n_rows):
            row = head * seqlen_q + row0 + i
            target = out + row * dim_v * size
            if i >= n_valid:
                fill(target, dim_v, zero, size)
                store_row(tau, shifts, sizes, row, 0.0, np.inf, 0, False, size, like)
            elif bad[i]:
                fill(target, dim_v, cast(np.nan, like), size)
            else:
                scale_row(product + i * columns_v * size, dim_v, cast(1.0, like), target)


@helper
def exp_remainder(y):
    """exp(y) - 1 - y, without cancellation."""
    if abs(y) > 0.1:
        return math.expm1(y) - y
    series = 1.0
    for k in range(10, 2, -1):
        series = 1.0 + series * y / k
    return 0.5 * y * y * series


@helper
def alpha_gradient(p, dp, n, alpha, size, like):
    """sum_j dp_j dp_j/dalpha of one row (Correia et al. 2019), rearranged so that nothing cancels as alpha nears 1.

    With y = -(alpha - 1) log p, e = exp(y) - 1 and g = e - y, and their means Y, E, G under p:
    dp/dalpha = p (G - Y e + E y - g) / ((1 + E) (alpha - 1)**2).
    """
    y_mean, e_mean, g_mean = 0.0, 0.0, 0.0
    for j in range(n):
        x = np.float64(load(p + j * size, like))
        if x > 0.0:
            y = (1.0 - alpha) * math.log(x)
            g = exp_remainder(y)
            y_mean += x * y
            e_mean += x * (g + y)
            g_mean += x * g
    total = 0.0
    for j in range(n):
        x = np.float64(load(p + j * size, like))
        if x > 0.0:
            y = (1.0 - alpha) * math.log(x)
            g = exp_remainder(y)
            total += x * load(dp + j * size, like) * (g_mean - y_mean * (g + y) + e_mean * y - g)
    return total / ((1.0 + e_mean) * (alpha - 1.0) * (alpha - 1.0))


@stage
def dq(
    counter,
    workspace,
    shape,
    q,
    q_strides,
    k,
    k_strides,
    v,
    v_strides,
    dout,
    dout_strides,
    alphas,
    scale,
    tau,
    sizes,
    tile_states,
    tile_keys,
    tile_entries,
    tile_offsets,
    p,
    ds,
    dq_out,
    dalpha,
    size,
    like,
):
    """dq of every tile but the dense ones, and dalpha per row if its address is not 0.

    Leaves p and ds (times scale) of each entry of the support for ``dkv``, from tile_offsets[tile] on.
    """
    batch, heads_q, heads_kv, seqlen_q, seqlen_k, dim, dim_v = shape
    n_tiles = (seqlen_q + BLOCK_M - 1) // BLOCK_M
    weights = workspace + fetch_add(counter + 8, 1) * (seqlen_k + 64) * size
    while True:
        item = fetch_add(counter, 1)
        if item >= batch * heads_q * n_tiles:
            break
        if load(tile_states + item, np.int8(0)) == DENSE:
            continue
        head, tile = item // n_tiles, item % n_tiles
        b, h = head // heads_q, head % heads_q
        h_kv = h // (heads_q // heads_kv)
        alpha = load(alphas + h * 8, 0.0)
        r = 1.0 / (alpha - 1.0)
        k_rows = k + b * k_strides[0] + h_kv * k_strides[1]
        v_rows = v + b * v_strides[0] + h_kv * v_strides[1]
        keys, entries = load(tile_keys + item * 8, np.int64(0)), load(tile_entries + item * 8, np.int64(0))
        offset = load(tile_offsets + item * 8, np.int64(0)) * size
        row_p, row_ds = p + offset, ds + offset
        row0 = tile * BLOCK_M
        for i in range(row0, min(row0 + BLOCK_M, seqlen_q)):
            row = head * seqlen_q + i
            n = np.int64(load(sizes + row * 4, np.int32(0)))
            target = dq_out + row * dim * size
            t = load(tau + row * size, like)
            fill(target, dim, cast(np.nan if t != t else 0.0, like), size)
            dalpha_row = np.nan if t != t else 0.0
            if n:
                dout_row = dout + b * dout_strides[0] + h * dout_strides[1] + i * dout_strides[2]
                dot_rows(dout_row, v_rows, v_strides[2], keys, n, dim_v, row_ds, like)
                power_row(entries, n, cast(r, like), row_p)
                power_row(entries, n, cast(r - 1.0, like), weights)
                w_sum, w_dp = 0.0, 0.0
                for j in range(n):
                    w = np.float64(load(weights + j * size, like))
                    w_sum += w
                    w_dp += w * load(row_ds + j * size, like)
                delta = w_dp / w_sum
                if dalpha:
                    dalpha_row = alpha_gradient(row_p, row_ds, n, alpha, size, like)
                d, s = cast(delta, like), cast(scale, like)
                for j in range(n):
                    w = load(weights + j * size, like)
                    store(row_ds + j * size, w * (load(row_ds + j * size, like) - d) * s)
                accumulate_rows(k_rows, k_strides[2], keys, row_ds, n, dim, target, like)
                keys += n * 4
                entries += n * size
                row_p += n * size
                row_ds += n * size
            if dalpha:
                store(dalpha + row * 8, dalpha_row)


@stage
def dkv(
    counter,
    workspace,
    workspace_bytes,
    shape,
    q,
    q_strides,
    dout,
    dout_strides,
    sizes,
    tile_states,
    tile_keys,
    tile_offsets,
    p,
    ds,
    n_parts,
    dk_out,
    dv_out,
    size,
    like,
):
    """dk and dv from the entries of the support, transposed range of keys by range of keys.

    Each thread's ``workspace_bytes`` hold seqlen_k + 1 positions and, for the entries of one query head, their query,
    p and ds.
    """
    batch, heads_q, heads_kv, seqlen_q, seqlen_k, dim, dim_v = shape
    n_tiles = (seqlen_q + BLOCK_M - 1) // BLOCK_M
    group = heads_q // heads_kv
    most = (workspace_bytes - (seqlen_k + 2) * 8) // (4 + 2 * size)
    starts = workspace + fetch_add(counter + 8, 1) * workspace_bytes
    t_p = starts + (seqlen_k + 2) * 8
    t_ds = t_p + most * size
    t_rows = t_ds + most * size
    zero = cast(0.0, like)
    while True:
        item = fetch_add(counter, 1)
        if item >= batch * heads_kv * n_parts:
            break
        head_kv, part = item // n_parts, item % n_parts
        b = head_kv // heads_kv
        key0, key1 = part * seqlen_k // n_parts, (part + 1) * seqlen_k // n_parts
        dk_rows, dv_rows = dk_out + head_kv * seqlen_k * dim * size, dv_out + head_kv * seqlen_k * dim_v * size
        fill(dk_rows + key0 * dim * size, (key1 - key0) * dim, zero, size)
        fill(dv_rows + key0 * dim_v * size, (key1 - key0) * dim_v, zero, size)
        for h in range(head_kv % heads_kv * group, (head_kv % heads_kv + 1) * group):
            head = b * heads_q + h
            fill(starts, key1 - key0 + 2, np.int64(0), 8)
            for count_only in (True, False):
                for tile in range(head * n_tiles, (head + 1) * n_tiles):
                    if load(tile_states + tile, np.int8(0)) == DENSE:
                        continue
                    keys = load(tile_keys + tile * 8, np.int64(0))
                    entry = load(tile_offsets + tile * 8, np.int64(0)) * size
                    row0 = (tile - head * n_tiles) * BLOCK_M
                    for i in range(row0, min(row0 + BLOCK_M, seqlen_q)):
                        n = np.int64(load(sizes + (head * seqlen_q + i) * 4, np.int32(0)))
                        for j in range(n):
                            key = np.int64(load(keys + j * 4, np.int32(0)))
                            if key < key0 or key >= key1:
                                continue
                            slot = starts + (key - key0 + 1) * 8
                            at = load(slot, np.int64(0))
                            if count_only:
                                store(slot + 8, load(slot + 8, np.int64(0)) + 1)
                            else:
                                store(slot, at + 1)
                                store(t_rows + at * 4, np.int32(i))
                                store(t_p + at * size, load(p + entry + j * size, like))
                                store(t_ds + at * size, load(ds + entry + j * size, like))
                        keys += n * 4
                        entry += n * size
                if count_only:
                    for key in range(key1 - key0):
                        slot = starts + (key + 1) * 8
                        store(slot, load(slot, np.int64(0)) + load(slot - 8, np.int64(0)))
            q_rows = q + b * q_strides[0] + h * q_strides[1]
            dout_rows = dout + b * dout_strides[0] + h * dout_strides[1]
            for key in range(key0, key1):
                first = load(starts + (key - key0) * 8, np.int64(0))
                n = load(starts + (key - key0 + 1) * 8, np.int64(0)) - first
                if n:
                    rows = t_rows + first * 4
                    dk_row, dv_row = dk_rows + key * dim * size, dv_rows + key * dim_v * size
                    accumulate_rows(q_rows, q_strides[2], rows, t_ds + first * size, n, dim, dk_row, like)
                    accumulate_rows(dout_rows, dout_strides[2], rows, t_p + first * size, n, dim_v, dv_row, like)


@stage
def dense_backward(
    counter,
    workspace,
    shape,
    q,
    q_strides,
    dout,
    dout_strides,
    k_panels,
    v_panels,
    k_rows,
    columns_q,
    columns_v,
    lengths_q,
    lengths_k,
    alphas,
    scale,
    is_causal,
    n_parts,
    tau,
    shifts,
    tile_states,
    dq_out,
    dalpha,
    dk_sums,
    dv_sums,
    padded_k,
    size,
    like,
):
    """All gradients of the tiles marked DENSE, scores computed again.

    dk_sums and dv_sums are (n_parts, batch, heads_kv, padded_k, columns), zeroed: each part sums over its own share of
    the tiles. k_rows are (batch, heads_kv, seqlen_k, columns_q).
    """
    batch, heads_q, heads_kv, seqlen_q, seqlen_k, dim, dim_v = shape
    n_tiles = (seqlen_q + BLOCK_M - 1) // BLOCK_M
    group = heads_q // heads_kv
    scaled, _, strip, second, weights, rows_q, rows_v, product, scratch, total = dense_layout(
        shape, columns_q, columns_v, size
    )
    base = workspace + fetch_add(counter + 8, 1) * total
    scaled, strip, second, weights = base + scaled, base + strip, base + second, base + weights
    rows_q, rows_v, product, scratch = base + rows_q, base + rows_v, base + product, base + scratch
    zeros = scratch + 64
    store(zeros, np.int64(0))
    padded = (seqlen_k + panel_columns(size) - 1) // panel_columns(size) * panel_columns(size)
    stride = dense_columns(seqlen_k, size) * size
    zero, one = cast(0.0, like), cast(1.0, like)
    while True:
        item = fetch_add(counter, 1)
        if item >= batch * heads_kv * n_parts:
            break
        head_kv, part = item // n_parts, item % n_parts
        b = head_kv // heads_kv
        length_q, length_k = load(lengths_q + b * 8, np.int64(0)), load(lengths_k + b * 8, np.int64(0))
        sums_at = (part * batch * heads_kv + head_kv) * padded_k
        for step in range(part, group * n_tiles, n_parts):
            h, tile = head_kv % heads_kv * group + step // n_tiles, step % n_tiles
            head = b * heads_q + h
            if load(tile_states + head * n_tiles + tile, np.int8(0)) != DENSE:
                continue
            alpha = load(alphas + h * 8, 0.0)
            r = 1.0 / (alpha - 1.0)
            row0 = tile * BLOCK_M
            n_rows = min(BLOCK_M, seqlen_q - row0)
            n_valid = min(n_rows, length_q - row0)
            for i in range(n_valid):
                q_row = q + b * q_strides[0] + h * q_strides[1] + (row0 + i) * q_strides[2]
                dout_row = dout + b * dout_strides[0] + h * dout_strides[1] + (row0 + i) * dout_strides[2]
                scale_row(q_row, dim, cast((alpha - 1.0) * scale, like), scaled + i * dim * size)
                scale_row(q_row, dim, one, rows_q + i * columns_q * size)
                fill(rows_q + (i * columns_q + dim) * size, columns_q - dim, zero, size)
                scale_row(dout_row, dim_v, one, rows_v + i * columns_v * size)
                fill(rows_v + (i * columns_v + dim_v) * size, columns_v - dim_v, zero, size)
            end = last_key(row0 + n_valid - 1, is_causal, length_q, length_k)
            keys_at = head_kv * padded * size
            product_strip(scaled, dim * size, n_valid, dim, k_panels + keys_at * dim, end, strip, stride, size, like)
            product_strip(
                rows_v, columns_v * size, n_valid, dim_v, v_panels + keys_at * dim_v, end, second, stride, size, like
            )
            for i in range(n_valid):
                row = head * seqlen_q + row0 + i
                u, dp = strip + i * stride, second + i * stride
                seen = last_key(row0 + i, is_causal, length_q, length_k)
                t = load(tau + row * size, like)
                dalpha_row = np.nan if t != t else 0.0
                if t != t:
                    seen = 0
                if seen:
                    shift_row(u, seen, maximum(u, seen, like), u)
                    shift_row(u, seen, load(shifts + row * size, like), u)
                    w_sum, _ = power_sums(u, seen, zero, cast(r, like))
                    power_row(u, seen, cast(r - 1.0, like), weights)
                    power_row(u, seen, cast(r, like), u)
                    dot_rows(weights, dp, 0, zeros, 1, seen, scratch, like)
                    delta = load(scratch, like) / w_sum
                    if dalpha:
                        dalpha_row = alpha_gradient(u, dp, seen, alpha, size, like)
                    shift_row(dp, seen, delta, dp)
                    multiply_rows(dp, weights, seen, cast(scale, like), dp)
                fill(u + seen * size, dense_columns(end, size) - seen, zero, size)
                fill(dp + seen * size, dense_columns(end, size) - seen, zero, size)
                if dalpha:
                    store(dalpha + row * 8, np.float64(dalpha_row))
            weighted_rows(
                second,
                stride,
                n_valid,
                k_rows + head_kv * seqlen_k * columns_q * size,
                columns_q,
                end,
                product,
                size,
                like,
            )
            add_transposed(
                second, stride, n_valid, rows_q, columns_q, end, dk_sums + sums_at * columns_q * size, size, like
            )
            add_transposed(
                strip, stride, n_valid, rows_v, columns_v, end, dv_sums + sums_at * columns_v * size, size, like
            )
            for i in range(n_rows):
                row = head * seqlen_q + row0 + i
                target = dq_out + row * dim * size
                if i >= n_valid:
                    fill(target, dim, zero, size)
                    if dalpha:
                        store(dalpha + row * 8, 0.0)
                elif load(tau + row * size, like) != load(tau + row * size, like):
                    fill(target, dim, cast(np.nan, like), size)
                else:
                    scale_row(product + i * columns_q * size, dim, one, target)


@stage
def entmax_rows(counter, workspace, n_rows, n, x, stride, alphas, out, size, like):
    """out = entmax of each row; ``stride`` bytes from row to row of x, out contiguous."""
    z = workspace + fetch_add(counter + 8, 1) * ((n * size + 127) // 64 * 64)
    epsilon = epsilon_of(size)
    while True:
        row0 = fetch_add(counter, ENTMAX_ROWS)
        if row0 >= n_rows:
            break
        for row in range(row0, min(row0 + ENTMAX_ROWS, n_rows)):
            alpha = load(alphas + row * 8, 0.0)
            r = 1.0 / (alpha - 1.0)
            target = out + row * n * size
            scale_row(x + row * stride, n, cast(alpha - 1.0, like), z)
            top = maximum(z, n, like)
            if not abs(top) < np.inf:
                fill(target, n, cast(np.nan, like), size)
                continue
            shift_row(z, n, top, z)
            shift_row(z, n, cast(refine(z, n, -1.0, r, 50, 0.5 * epsilon, like), like), z)
            power_row(z, n, cast(r, like), target)


@stage
def entmax_rows_backward(counter, workspace, n_rows, n, p, dp, alphas, dx, dalpha, size, like):
    """dx of each row, all contiguous, and dalpha per row if its address is not 0."""
    w = workspace + fetch_add(counter + 8, 1) * ((n * size + 191) // 64 * 64)
    scratch = w + n * size // 64 * 64 + 64
    store(scratch, np.int64(0))
    while True:
        row0 = fetch_add(counter, ENTMAX_ROWS)
        if row0 >= n_rows:
            break
        for row in range(row0, min(row0 + ENTMAX_ROWS, n_rows)):
            alpha = load(alphas + row * 8, 0.0)
            row_p, row_dp, row_dx = p + row * n * size, dp + row * n * size, dx + row * n * size
            power_row(row_p, n, cast(2.0 - alpha, like), w)
            w_sum, _ = power_sums(w, n, cast(0.0, like), cast(2.0, like))
            dot_rows(w, row_dp, 0, scratch, 1, n, scratch + 8, like)
            delta = load(scratch + 8, like) / w_sum
            shift_row(row_dp, n, delta, row_dx)
            multiply_rows(row_dx, w, n, cast(1.0, like), row_dx)
            if dalpha:
                gradient = alpha_gradient(row_p, row_dp, n, alpha, size, like)
                store(dalpha + row * 8, np.nan if delta != delta else gradient)
