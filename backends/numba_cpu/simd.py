"""Vector micro-kernels, emitted as LLVM vector IR through Numba intrinsics.

LLVM's own vectoriser stays at short registers and at a fraction of the rate of the products below, so the inner loops
are written with explicit vectors and register tiles, once, for every instruction set: LLVM lowers them to AVX-512,
AVX2, NEON or plain SSE. All addresses are integers (bytes), all strides are in bytes, so that a kernel can walk any
tensor in place. The element type (float32 or float64) follows from an argument called ``like`` or ``tau``.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from typing import NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.extending import intrinsic

__all__ = [
    "GEMM_COLS",
    "GROUPS",
    "LANES",
    "MR",
    "NR",
    "accumulate_rows",
    "cast",
    "dot_rows",
    "fetch_add",
    "fetch_scores",
    "gemm_tile",
    "keep_above",
    "load",
    "maximum",
    "multiply_rows",
    "outlined",
    "power_row",
    "power_sums",
    "quantise",
    "raise_groups",
    "scale_row",
    "scan_row",
    "scan_tile",
    "shift_row",
    "spread_pairs",
    "store",
]


class RegisterTile(NamedTuple):
    """What fits the registers: bytes per vector, rows of the tile, vectors per row."""

    vector_bytes: int
    rows: int
    vectors: int


def _features() -> Mapping[str, bool]:
    """What Numba compiles for: the host's, unless NUMBA_CPU_FEATURES, or NUMBA_CPU_NAME=generic, says otherwise."""
    named: str | None = vars(config)["CPU_FEATURES"]
    if named is None:
        host: Mapping[str, bool] = llvm.get_host_cpu_features()
        return host
    baseline = {"sse2": platform.machine().lower() in ("x86_64", "amd64")}
    return baseline | {name[1:]: name[0] == "+" for name in named.split(",") if name}


_FEATURES = _features()


def _register_tile(features: Mapping[str, bool]) -> RegisterTile:
    """12 accumulators of 16 registers, or 24 of 32: the rest holds the operands."""
    if features.get("avx512f") and features.get("avx512bw"):
        return RegisterTile(64, 6, 4)
    if features.get("avx2"):
        return RegisterTile(32, 6, 2)
    return RegisterTile(16, 6, 2 if features.get("sse2") else 4)


_TILE = _register_tile(_FEATURES)
MR = _TILE.rows
LANES = _TILE.vector_bytes // 4  # of 32-bit elements
NR = _TILE.vectors * LANES  # keys per panel
GROUPS = 2 * LANES  # groups of keys whose maxima bound tau
GEMM_COLS = _TILE.vectors  # vectors per row of gemm_tile

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
ADDRESS = types.intp


def _const(n: int) -> ir.Constant:
    return ir.Constant(I64, n)


def _float(numba_type: types.Float) -> ir.Type:
    return ir.FloatType() if numba_type.bitwidth == 32 else ir.DoubleType()


def _vector(element: ir.Type) -> ir.VectorType:
    """The vector of this element that fills a register."""
    bits = 32 if isinstance(element, ir.FloatType) else 64 if isinstance(element, ir.DoubleType) else element.width
    return ir.VectorType(element, _TILE.vector_bytes * 8 // bits)


def _bytes(element: ir.Type) -> int:
    return 4 if isinstance(element, ir.FloatType) else 8 if isinstance(element, ir.DoubleType) else element.width // 8


def _at(b, address, offset, ty):
    if isinstance(offset, int):
        offset = _const(offset)
    return b.inttoptr(b.add(address, offset), ty.as_pointer())


def _load(b, address, offset, ty):
    value = b.load(_at(b, address, offset, ty))
    value.align = _bytes(ty.element if isinstance(ty, ir.VectorType) else ty)
    return value


def _store(b, value, address, offset=0):
    element = value.type.element if isinstance(value.type, ir.VectorType) else value.type
    b.store(value, _at(b, address, offset, value.type)).align = _bytes(element)


def _splat(b, x, lanes):
    one = b.insert_element(ir.Constant(ir.VectorType(x.type, lanes), ir.Undefined), x, ir.Constant(I32, 0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def _suffix(ty):
    if isinstance(ty, ir.VectorType):
        return f"v{ty.count}{_suffix(ty.element)}"
    return {ir.FloatType(): "f32", ir.DoubleType(): "f64"}.get(ty) or f"i{ty.width}"


def _call(b, name, returns, args, overload=None):
    """Calls the LLVM intrinsic ``name`` for the vector or scalar type ``overload`` (default: of the result)."""
    full = f"llvm.{name}.{_suffix(overload or returns)}"
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(returns, [a.type for a in args]), full)
    return b.call(function, args)


def _fma(b, x, y, z):
    return _call(b, "fma", x.type, [x, y, z])


def _sum_lanes(b, v):
    """Pairwise: a fixed order, so that results repeat bit by bit."""
    count = v.type.count
    while count > 1:
        half = count // 2
        low = b.shuffle_vector(v, v, ir.Constant(ir.VectorType(I32, half), list(range(half))))
        high = b.shuffle_vector(v, v, ir.Constant(ir.VectorType(I32, half), list(range(half, count))))
        v = b.fadd(low, high)
        count = half
    return b.extract_element(v, ir.Constant(I32, 0))


def _loop(b, start, stop, carried, body, step=1):
    """for i in range(start, stop, step): carried = body(b, i, carried). Returns (i after the loop, carried)."""
    before = b.block
    head, inside, after = (b.function.append_basic_block(f"loop.{part}") for part in ("head", "body", "end"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    i.add_incoming(start, before)
    phis = []
    for value in carried:
        phi = b.phi(value.type)
        phi.add_incoming(value, before)
        phis.append(phi)
    b.cbranch(b.icmp_signed("<=", b.add(i, _const(step)), stop), inside, after)
    b.position_at_end(inside)
    results = body(b, i, phis)
    i.add_incoming(b.add(i, _const(step)), b.block)
    for phi, value in zip(phis, results, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return i, phis


def _lane_ids(lanes):
    return ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))


def _tail_mask(b, n, lanes):
    """Lanes below n, as a vector of bits."""
    return b.icmp_signed("<", _lane_ids(lanes), _splat(b, b.trunc(n, I32), lanes))


def _masked_load(b, address, offset, mask, vt):
    p = _at(b, address, offset, vt)
    zero = ir.Constant(vt, [0.0] * vt.count)
    mt = mask.type
    name = f"llvm.masked.load.{_suffix(vt)}.p0"
    align = ir.Constant(I32, _bytes(vt.element))
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(vt, [p.type, I32, mt, vt]), name)
    return b.call(function, [p, align, mask, zero])


def _masked_store(b, value, address, offset, mask):
    p = _at(b, address, offset, value.type)
    name = f"llvm.masked.store.{_suffix(value.type)}.p0"
    function = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(ir.VoidType(), [value.type, p.type, I32, mask.type]), name
    )
    b.call(function, [value, p, ir.Constant(I32, _bytes(value.type.element)), mask])


def _map_row(b, element, n, sources, out, function):
    """out[:n] = function(b, *vectors of the sources), vector by vector."""
    vt, size = _vector(element), _bytes(element)

    def full(b, i, _):
        at = b.mul(i, _const(size))
        _store(b, function(b, *[_load(b, source, at, vt) for source in sources]), out, at)
        return []

    done, _ = _loop(b, _const(0), n, [], full, vt.count)
    with b.if_then(b.icmp_signed("<", done, n)):
        at, mask = b.mul(done, _const(size)), _tail_mask(b, b.sub(n, done), vt.count)
        tail = [_masked_load(b, source, at, mask, vt) for source in sources]
        _masked_store(b, function(b, *tail), out, at, mask)


def _real(vt, x):
    return ir.Constant(vt, [x] * vt.count)


def _log2(b, x):
    """log2 of positive normal float32 lanes: x = 2**e m, m near 1, log m = 2 atanh((m - 1) / (m + 1)) in 5 terms."""
    vt, it = x.type, ir.VectorType(I32, x.type.count)
    root_half = ir.Constant(it, [0x3F3504F3] * it.count)
    bits = b.sub(b.bitcast(x, it), root_half)
    exponent = b.sitofp(b.ashr(bits, ir.Constant(it, [23] * it.count)), vt)
    m = b.bitcast(b.add(b.and_(bits, ir.Constant(it, [0x7FFFFF] * it.count)), root_half), vt)
    t = b.fdiv(b.fsub(m, _real(vt, 1.0)), b.fadd(m, _real(vt, 1.0)))
    square = b.fmul(t, t)
    series = _real(vt, 1 / 9)
    for k in (7, 5, 3, 1):
        series = _fma(b, series, square, _real(vt, 1 / k))
    return _fma(b, b.fmul(t, series), _real(vt, 2 / math.log(2)), exponent)


def _exp2(b, y):
    """2**y of float32 lanes below 128; 0 below -126. 2**f for |f| <= 1/2 by its Taylor series, off by 5e-9."""
    vt, it = y.type, ir.VectorType(I32, y.type.count)
    whole = _call(b, "rint", vt, [y])
    f = b.fsub(y, whole)
    series = _real(vt, math.log(2) ** 7 / math.factorial(7))
    for k in range(6, -1, -1):
        series = _fma(b, series, f, _real(vt, math.log(2) ** k / math.factorial(k)))
    alive = b.fcmp_ordered(">=", whole, _real(vt, -126.0))
    shift = b.shl(b.fptosi(b.select(alive, whole, _real(vt, 0.0)), it), ir.Constant(it, [23] * it.count))
    value = b.bitcast(b.add(b.bitcast(series, it), shift), vt)
    return b.select(alive, value, _real(vt, 0.0))


def _power(b, u, exponent):
    """u ** exponent of positive lanes; 0 where u is not positive."""
    vt = u.type
    alive = b.fcmp_ordered(">", u, _real(vt, 0.0))
    safe = b.select(alive, u, _real(vt, 1.0))
    if isinstance(vt.element, ir.FloatType):
        value = _exp2(b, b.fmul(_log2(b, safe), exponent))
    else:
        value = _call(b, "pow", vt, [safe, exponent])
    return b.select(alive, value, _real(vt, 0.0))


@intrinsic
def outlined(typingctx):
    """Keeps the enclosing function from being inlined: less code to compile where it is called from many places."""

    def codegen(context, b, signature, args):
        b.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def load(typingctx, address, like):
    """The element at ``address``, of the type of ``like``."""

    def codegen(context, b, signature, args):
        return _load(b, args[0], 0, context.get_value_type(signature.return_type))

    return like(ADDRESS, like), codegen


@intrinsic
def store(typingctx, address, value):
    """Writes ``value``, in its own type, to ``address``."""

    def codegen(context, b, signature, args):
        _store(b, args[1], args[0])
        return context.get_dummy_value()

    return types.void(ADDRESS, value), codegen


@intrinsic
def cast(typingctx, x, like):
    """x, a float64, in the type of ``like``."""

    def codegen(context, b, signature, args):
        to = context.get_value_type(signature.return_type)
        return args[0] if to == args[0].type else b.fptrunc(args[0], to)

    return like(types.float64, like), codegen


@intrinsic
def fetch_add(typingctx, address, amount):
    """Adds to the int64 at ``address`` atomically; returns what it held before."""

    def codegen(context, b, signature, args):
        return b.atomic_rmw("add", _at(b, args[0], 0, I64), args[1], "monotonic")

    return types.int64(ADDRESS, types.int64), codegen


@intrinsic
def quantise(typingctx, src, n, inverse_step, dst):
    """dst[:n] (int16) = round(src[:n] * inverse_step), ties to even."""

    def codegen(context, b, signature, args):
        src, n, inverse, dst = args
        element = _float(signature.args[2])
        size = _bytes(element)
        vt = ir.VectorType(element, LANES)

        def convert(b, x, scale):
            rounded = _call(b, "rint", x.type, [b.fmul(x, scale)])
            wide = ir.VectorType(I32, x.type.count) if isinstance(x.type, ir.VectorType) else I32
            narrow = ir.VectorType(I16, x.type.count) if isinstance(x.type, ir.VectorType) else I16
            return b.trunc(b.fptosi(rounded, wide), narrow)

        scale = _splat(b, inverse, LANES)

        def full(b, i, _):
            x = _load(b, src, b.mul(i, _const(size)), vt)
            _store(b, convert(b, x, scale), dst, b.mul(i, _const(2)))
            return []

        def single(b, i, _):
            x = _load(b, src, b.mul(i, _const(size)), element)
            _store(b, convert(b, x, inverse), dst, b.mul(i, _const(2)))
            return []

        done, _ = _loop(b, _const(0), n, [], full, LANES)
        _loop(b, done, n, [], single)
        return context.get_dummy_value()

    return types.void(ADDRESS, types.int64, inverse_step, ADDRESS), codegen


@intrinsic
def spread_pairs(typingctx, src, n, dst, stride):
    """dst[i * stride] (int32) = src[i] for i < n: one row of int16 pairs into a panel."""

    def codegen(context, b, signature, args):
        src, n, dst, stride = args

        def body(b, i, _):
            _store(b, _load(b, src, b.mul(i, _const(4)), I32), dst, b.mul(i, stride))
            return []

        _loop(b, _const(0), n, [], body)
        return context.get_dummy_value()

    return types.void(ADDRESS, types.int64, ADDRESS, ADDRESS), codegen


def _multiply_add_pairs(b, x, y):
    """x[2i] * y[2i] + x[2i+1] * y[2i+1] of int16 vectors, in int32."""
    wide = ir.VectorType(I32, LANES)
    name = {64: "x86.avx512.pmaddw.d.512", 32: "x86.avx2.pmadd.wd", 16: "x86.sse2.pmadd.wd"}[_TILE.vector_bytes]
    if _FEATURES.get("sse2"):
        function = cgutils.get_or_insert_function(b.module, ir.FunctionType(wide, [x.type, y.type]), f"llvm.{name}")
        return b.call(function, [x, y])
    picks = [ir.Constant(wide, list(range(parity, 2 * LANES, 2))) for parity in (0, 1)]
    products = [
        b.mul(b.sext(b.shuffle_vector(x, x, pick), wide), b.sext(b.shuffle_vector(y, y, pick), wide)) for pick in picks
    ]
    return b.add(products[0], products[1])


@intrinsic
def scan_tile(typingctx, q, k, n_pairs, scores, stride):
    """scores[MR, NR] (int32) = q . k for int16 pairs.

    q is (n_pairs, MR) and k (n_pairs, NR) int16 pairs, contiguous; rows of scores are ``stride`` bytes apart.
    """

    def codegen(context, b, signature, args):
        q, k, n_pairs, scores, stride = args
        vectors = _TILE.vectors
        vt, pairs = ir.VectorType(I32, LANES), ir.VectorType(I16, 2 * LANES)

        def body(b, i, acc):
            acc = list(acc)
            k_row, q_row = b.add(k, b.mul(i, _const(NR * 4))), b.add(q, b.mul(i, _const(MR * 4)))
            keys = [b.bitcast(_load(b, k_row, v * LANES * 4, vt), pairs) for v in range(vectors)]
            for r in range(MR):
                query = b.bitcast(_splat(b, _load(b, q_row, r * 4, I32), LANES), pairs)
                for v in range(vectors):
                    t = r * vectors + v
                    acc[t] = b.add(acc[t], _multiply_add_pairs(b, query, keys[v]))
            return acc

        zero = ir.Constant(vt, [0] * LANES)
        _, acc = _loop(b, _const(0), n_pairs, [zero] * (MR * vectors), body)
        for r in range(MR):
            row = b.add(scores, b.mul(stride, _const(r)))
            for v in range(vectors):
                _store(b, acc[r * vectors + v], row, v * LANES * 4)
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, types.int64, ADDRESS, ADDRESS), codegen


@intrinsic
def raise_groups(typingctx, maxima, step, shift, groups):
    """groups[GROUPS] = max(groups, maxima[GROUPS] * step - shift); a maximum of the lowest int32 counts as -inf.

    maxima are int32, groups have the type of ``step``.
    """

    def codegen(context, b, signature, args):
        maxima, step, shift, groups = args
        element = _float(signature.args[1])
        it, vt = ir.VectorType(I32, LANES), ir.VectorType(element, LANES)
        lowest = ir.Constant(it, [-(2**31)] * LANES)
        minus_inf = ir.Constant(vt, [float("-inf")] * LANES)
        steps, shifts = _splat(b, step, LANES), _splat(b, shift, LANES)
        for half in range(2):
            raw = _load(b, maxima, half * LANES * 4, it)
            value = b.fsub(b.fmul(b.sitofp(raw, vt), steps), shifts)
            value = b.select(b.icmp_signed("==", raw, lowest), minus_inf, value)
            offset = half * LANES * _bytes(element)
            old = _load(b, groups, offset, vt)
            _store(b, b.select(b.fcmp_ordered(">", value, old), value, old), groups, offset)
        return context.get_dummy_value()

    return types.void(ADDRESS, step, step, ADDRESS), codegen


def _join(b, vectors):
    """The concatenation of a power of two of vectors."""
    while len(vectors) > 1:
        count = vectors[0].type.count
        order = ir.Constant(ir.VectorType(I32, 2 * count), list(range(2 * count)))
        vectors = [b.shuffle_vector(x, y, order) for x, y in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def _emit_bits(b, bits, base, out, count):
    """out[count:] = base + t (int32) for each set bit t of an int64; returns the new count.

    The first four are written whether the bits are there or not: a branch on rare bits would be mispredicted, and what
    lies past the end is overwritten later.
    """

    def call(name, *args):
        function = cgutils.get_or_insert_function(
            b.module, ir.FunctionType(I64, [a.type for a in args]), f"llvm.{name}.i64"
        )
        return b.call(function, args)

    def emit(rest, at):
        position = call("cttz", rest, ir.Constant(I1, 0))
        _store(b, b.trunc(b.add(base, position), I32), out, b.mul(at, _const(4)))
        return b.and_(rest, b.sub(rest, _const(1)))

    rest = bits
    for i in range(4):
        rest = emit(rest, b.add(count, _const(i)))
    total, fifth = b.add(count, call("ctpop", bits)), b.add(count, _const(4))
    before = b.block
    head, after = b.function.append_basic_block("bits.more"), b.function.append_basic_block("bits.end")
    b.cbranch(b.icmp_unsigned("!=", rest, _const(0)), head, after)
    b.position_at_end(head)
    left, at = b.phi(I64), b.phi(I64)
    left.add_incoming(rest, before)
    at.add_incoming(fifth, before)
    following, next_at = emit(left, at), b.add(at, _const(1))
    left.add_incoming(following, head)
    at.add_incoming(next_at, head)
    b.cbranch(b.icmp_unsigned("!=", following, _const(0)), head, after)
    b.position_at_end(after)
    return total


@intrinsic
def scan_row(typingctx, scores, n, threshold, base, keys, maxima):
    """Appends base + position (int32) of each of the int32 scores[:n] above ``threshold``; returns how many.

    Reads whole groups of 64 scores, and ``keys`` needs room for four more. Leaves in maxima[GROUPS] the maxima of
    GROUPS groups of the scores.
    """

    def codegen(context, b, signature, args):
        scores, n, threshold, base, keys, maxima = args
        vt = ir.VectorType(I32, LANES)
        lowest = ir.Constant(vt, [-(2**31)] * LANES)
        limit = _splat(b, b.trunc(threshold, I32), LANES)

        def word(b, i, carried, masked=False):
            """64 scores from position i on."""
            count, *best = carried
            bits = _const(0)
            for half in range(2):
                hits = []
                for v in range(32 // LANES):
                    at = half * 32 + v * LANES
                    x = _load(b, b.add(scores, b.mul(i, _const(4))), at * 4, vt)
                    if masked:
                        x = b.select(_tail_mask(b, b.sub(b.sub(n, i), _const(at)), LANES), x, lowest)
                    hits.append(b.icmp_signed(">", x, limit))
                    best[v % 2] = _call(b, "smax", vt, [best[v % 2], x])
                joined = b.zext(b.bitcast(_join(b, hits), I32), I64)
                bits = b.or_(bits, b.shl(joined, _const(32 * half)))
            return [_emit_bits(b, bits, b.add(base, i), keys, count), *best]

        done, carried = _loop(b, _const(0), n, [_const(0), lowest, lowest], word, 64)
        _, (count, low, high) = _loop(
            b, done, b.add(n, _const(63)), carried, lambda b, i, carried: word(b, i, carried, masked=True), 64
        )
        _store(b, low, maxima)
        _store(b, high, maxima, LANES * 4)
        return count

    int64 = types.int64
    return int64(ADDRESS, int64, int64, int64, ADDRESS, ADDRESS), codegen


@intrinsic
def fetch_scores(typingctx, scores, keys, n, step, shift, values):
    """values[t] = scores[keys[t]] * step + shift for t < n; scores and keys int32, values of the type of ``step``."""

    def codegen(context, b, signature, args):
        scores, keys, n, step, shift, values = args
        size = _bytes(_float(signature.args[3]))

        def body(b, t, _):
            key = b.sext(_load(b, keys, b.mul(t, _const(4)), I32), I64)
            raw = _load(b, scores, b.mul(key, _const(4)), I32)
            _store(b, b.fadd(b.fmul(b.sitofp(raw, step.type), step), shift), values, b.mul(t, _const(size)))
            return []

        _loop(b, _const(0), n, [], body)
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, types.int64, step, step, ADDRESS), codegen


@intrinsic
def keep_above(typingctx, values, keys, n, tau):
    """Keeps, in place and in order, the entries whose value is above ``tau`` (or NaN); returns how many are left."""

    def codegen(context, b, signature, args):
        values, keys, n, tau = args
        element = _float(signature.args[3])
        size = _bytes(element)

        def body(b, i, carried):
            (count,) = carried
            x = _load(b, values, b.mul(i, _const(size)), element)
            key = _load(b, keys, b.mul(i, _const(4)), I32)
            _store(b, x, values, b.mul(count, _const(size)))
            _store(b, key, keys, b.mul(count, _const(4)))
            return [b.add(count, b.zext(b.fcmp_unordered(">", x, tau), I64))]

        _, (count,) = _loop(b, _const(0), n, [_const(0)], body)
        return count

    return types.int64(ADDRESS, ADDRESS, types.int64, tau), codegen


@intrinsic
def maximum(typingctx, values, n, like):
    """The largest of values[:n]; -inf for n = 0, NaN if there is one."""

    def codegen(context, b, signature, args):
        values, n, _ = args
        element = _float(signature.args[2])
        size = _bytes(element)
        vt = _vector(element)

        def full(b, i, best):
            return [_call(b, "maximum", vt, [best[0], _load(b, values, b.mul(i, _const(size)), vt)])]

        def single(b, i, best):
            return [_call(b, "maximum", element, [best[0], _load(b, values, b.mul(i, _const(size)), element)])]

        done, (lanes,) = _loop(b, _const(0), n, [ir.Constant(vt, [float("-inf")] * vt.count)], full, vt.count)
        best = _call(b, "vector.reduce.fmaximum", element, [lanes], vt)
        _, (best,) = _loop(b, done, n, [best], single)
        return best

    return like(ADDRESS, types.int64, like), codegen


@intrinsic
def scale_row(typingctx, src, n, factor, out):
    """out[:n] = src[:n] * factor."""

    def codegen(context, b, signature, args):
        src, n, factor, out = args
        element = _float(signature.args[2])
        factors = _splat(b, factor, _vector(element).count)
        _map_row(b, element, n, [src], out, lambda b, x: b.fmul(x, factors))
        return context.get_dummy_value()

    return types.void(ADDRESS, types.int64, factor, ADDRESS), codegen


@intrinsic
def shift_row(typingctx, src, n, amount, out):
    """out[:n] = src[:n] - amount."""

    def codegen(context, b, signature, args):
        src, n, amount, out = args
        element = _float(signature.args[2])
        amounts = _splat(b, amount, _vector(element).count)
        _map_row(b, element, n, [src], out, lambda b, x: b.fsub(x, amounts))
        return context.get_dummy_value()

    return types.void(ADDRESS, types.int64, amount, ADDRESS), codegen


@intrinsic
def multiply_rows(typingctx, x, y, n, factor, out):
    """out[:n] = x[:n] * y[:n] * factor."""

    def codegen(context, b, signature, args):
        x, y, n, factor, out = args
        element = _float(signature.args[3])
        factors = _splat(b, factor, _vector(element).count)
        _map_row(b, element, n, [x, y], out, lambda b, s, t: b.fmul(b.fmul(s, t), factors))
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS, types.int64, factor, ADDRESS), codegen


def _by_exponent(b, exponent, special, general):
    """Emits ``special[e](b)`` for exponents equal to e and ``general(b)`` for the rest."""
    done = b.function.append_basic_block("exponent.done")
    for e, emit in special.items():
        match, other = b.function.append_basic_block("exponent.is"), b.function.append_basic_block("exponent.else")
        b.cbranch(b.fcmp_ordered("==", exponent, ir.Constant(exponent.type, e)), match, other)
        b.position_at_end(match)
        emit(b)
        b.branch(done)
        b.position_at_end(other)
    general(b)
    b.branch(done)
    b.position_at_end(done)


@intrinsic
def power_row(typingctx, src, n, exponent, out):
    """out[:n] = max(src[:n], 0) ** exponent, with 0 ** 0 = 0."""

    def codegen(context, b, signature, args):
        src, n, exponent, out = args
        element = _float(signature.args[2])
        vt = _vector(element)
        zero, one = _real(vt, 0.0), _real(vt, 1.0)
        exponents = _splat(b, exponent, vt.count)

        def positive(b, x):
            return b.select(b.fcmp_ordered(">", x, zero), x, zero)

        def square(b, x):
            u = positive(b, x)
            return b.fmul(u, u)

        def indicator(b, x):
            return b.select(b.fcmp_ordered(">", x, zero), one, zero)

        def mapped(function):
            return lambda b: _map_row(b, element, n, [src], out, function)

        def root(b, x):
            return _call(b, "sqrt", vt, [positive(b, x)])

        special = {2.0: mapped(square), 1.0: mapped(positive), 0.5: mapped(root), 0.0: mapped(indicator)}
        _by_exponent(b, exponent, special, mapped(lambda b, x: _power(b, x, exponents)))
        return context.get_dummy_value()

    return types.void(ADDRESS, types.int64, exponent, ADDRESS), codegen


@intrinsic
def power_sums(typingctx, values, n, tau, r):
    """(sum of u**(r-1), sum of u**r) with u = max(values[:n] - tau, 0), 0 ** 0 = 0; tau and r of the values' type."""
    result = types.UniTuple(tau, 2)

    def codegen(context, b, signature, args):
        values, n, tau, r = args
        element = _float(signature.args[2])
        size, vt = _bytes(element), _vector(element)
        zero, one = _real(vt, 0.0), _real(vt, 1.0)
        limit, exponents = _splat(b, tau, vt.count), _splat(b, b.fsub(r, ir.Constant(element, 1.0)), vt.count)
        slot = cgutils.alloca_once(b, ir.ArrayType(element, 2))

        def square(b, u, lower, upper):
            return [b.fadd(lower, u), _fma(b, u, u, upper)]

        def linear(b, u, lower, upper):
            return [b.fadd(lower, b.select(b.fcmp_ordered(">", u, zero), one, zero)), b.fadd(upper, u)]

        def power(b, u, lower, upper):
            w = _power(b, u, exponents)
            return [b.fadd(lower, w), _fma(b, w, u, upper)]

        def sums(add):
            def emit(b):
                def body(b, i, carried, mask=None):
                    at = b.mul(i, _const(size))
                    x = _load(b, values, at, vt) if mask is None else _masked_load(b, values, at, mask, vt)
                    u = b.fsub(x, limit)
                    alive = b.fcmp_ordered(">", u, zero)
                    u = b.select(alive if mask is None else b.and_(alive, mask), u, zero)
                    return add(b, u, *carried)

                done, carried = _loop(b, _const(0), n, [zero, zero], body, vt.count)
                carried = body(b, done, carried, _tail_mask(b, b.sub(n, done), vt.count))
                for i, total in enumerate(carried):
                    b.store(_sum_lanes(b, total), cgutils.gep_inbounds(b, slot, 0, i))

            return emit

        _by_exponent(b, r, {2.0: sums(square), 1.0: sums(linear)}, sums(power))
        return context.make_tuple(b, result, [b.load(cgutils.gep_inbounds(b, slot, 0, i)) for i in range(2)])

    return result(ADDRESS, types.int64, tau, r), codegen


def _strips(lanes_per_vector):
    """Widths, in vectors, in which a row of head_dim elements is walked: wide first, single vectors for the rest."""
    return (8, 2, 1) if _TILE.vector_bytes == 32 else (16, 4, 1) if _TILE.vector_bytes == 16 else (8, 4, 1)


@intrinsic
def dot_rows(typingctx, x, rows, stride, keys, n, dim, out, like):
    """out[t] = sum_d x[d] * rows[keys[t]][d] for t < n, d < dim. keys int32; rows are ``stride`` bytes apart."""

    def codegen(context, b, signature, args):
        x, rows, stride, keys, n, dim, out, _ = args
        element = _float(signature.args[7])
        size = _bytes(element)
        vt = _vector(element)
        lanes = vt.count
        zero = ir.Constant(vt, [0.0] * lanes)
        mask = _tail_mask(b, b.srem(dim, _const(lanes)), lanes)

        def body(b, t, _):
            key = b.sext(_load(b, keys, b.mul(t, _const(4)), I32), I64)
            row = b.add(rows, b.mul(key, stride))
            acc = [zero] * 4

            def quad(b, d, acc):
                at = b.mul(d, _const(size))
                return [
                    _fma(
                        b,
                        _load(b, x, b.add(at, _const(v * lanes * size)), vt),
                        _load(b, row, b.add(at, _const(v * lanes * size)), vt),
                        acc[v],
                    )
                    for v in range(4)
                ]

            def single(b, d, acc):
                at = b.mul(d, _const(size))
                return [_fma(b, _load(b, x, at, vt), _load(b, row, at, vt), acc[0])]

            done, acc = _loop(b, _const(0), dim, acc, quad, 4 * lanes)
            total = b.fadd(b.fadd(acc[0], acc[1]), b.fadd(acc[2], acc[3]))
            done, (total,) = _loop(b, done, dim, [total], single, lanes)
            at = b.mul(done, _const(size))
            total = _fma(b, _masked_load(b, x, at, mask, vt), _masked_load(b, row, at, mask, vt), total)
            _store(b, _sum_lanes(b, total), out, b.mul(t, _const(size)))
            return []

        _loop(b, _const(0), n, [], body)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(ADDRESS, ADDRESS, ADDRESS, ADDRESS, int64, int64, ADDRESS, like), codegen


@intrinsic
def accumulate_rows(typingctx, rows, stride, keys, weights, n, dim, out, like):
    """out[d] += sum_t weights[t] * rows[keys[t]][d] for t < n, d < dim. keys int32; rows are ``stride`` bytes apart."""

    def codegen(context, b, signature, args):
        rows, stride, keys, weights, n, dim, out, _ = args
        element = _float(signature.args[7])
        size = _bytes(element)
        vt = _vector(element)
        lanes = vt.count

        def strip(b, d, width, mask=None):
            at = b.mul(d, _const(size))
            base, target = b.add(rows, at), b.add(out, at)

            def read(b, address, v):
                if mask is not None:
                    return _masked_load(b, address, 0, mask, vt)
                return _load(b, address, v * lanes * size, vt)

            def body(b, t, acc):
                key = b.sext(_load(b, keys, b.mul(t, _const(4)), I32), I64)
                row = b.add(base, b.mul(key, stride))
                weight = _splat(b, _load(b, weights, b.mul(t, _const(size)), element), lanes)
                return [_fma(b, weight, read(b, row, v), acc[v]) for v in range(width)]

            _, acc = _loop(b, _const(0), n, [read(b, target, v) for v in range(width)], body)
            for v in range(width):
                if mask is None:
                    _store(b, acc[v], target, v * lanes * size)
                else:
                    _masked_store(b, acc[v], target, 0, mask)

        done = _const(0)
        for width in _strips(lanes):

            def body(b, d, _, width=width):
                strip(b, d, width)
                return []

            done, _ = _loop(b, done, dim, [], body, width * lanes)
        with b.if_then(b.icmp_signed("<", done, dim)):
            strip(b, done, 1, _tail_mask(b, b.sub(dim, done), lanes))
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(ADDRESS, ADDRESS, ADDRESS, ADDRESS, int64, int64, ADDRESS, like), codegen


@intrinsic
def gemm_tile(typingctx, a, a_row, a_col, x, x_stride, n, c, c_stride, accumulate, like):
    """c[MR, GEMM_COLS vectors] = a[MR, n] x[n, GEMM_COLS vectors], added to c where ``accumulate`` is not 0.

    Element (i, j) of a lies at i * a_row + j * a_col; rows of x and c are contiguous. Strides in bytes.
    """

    def codegen(context, b, signature, args):
        a, a_row, a_col, x, x_stride, n, c, c_stride, accumulate, _ = args
        element = _float(signature.args[9])
        size = _bytes(element)
        vt = _vector(element)
        lanes = vt.count
        at = [(r, v) for r in range(MR) for v in range(GEMM_COLS)]
        a_rows = [b.add(a, b.mul(a_row, _const(r))) for r in range(MR)]
        c_rows = [b.add(c, b.mul(c_stride, _const(r))) for r in range(MR)]

        fresh = b.block
        old, begin = b.function.append_basic_block("gemm.old"), b.function.append_basic_block("gemm.begin")
        b.cbranch(b.icmp_signed("!=", accumulate, _const(0)), old, begin)
        b.position_at_end(old)
        loaded = [_load(b, c_rows[r], v * lanes * size, vt) for r, v in at]
        b.branch(begin)
        b.position_at_end(begin)
        start = []
        for value in loaded:
            phi = b.phi(vt)
            phi.add_incoming(ir.Constant(vt, [0.0] * lanes), fresh)
            phi.add_incoming(value, old)
            start.append(phi)

        def body(b, i, acc):
            step, x_row = b.mul(i, a_col), b.add(x, b.mul(i, x_stride))
            columns = [_load(b, x_row, v * lanes * size, vt) for v in range(GEMM_COLS)]
            factors = [_splat(b, _load(b, a_rows[r], step, element), lanes) for r in range(MR)]
            return [_fma(b, factors[r], columns[v], acc[t]) for t, (r, v) in enumerate(at)]

        _, acc = _loop(b, _const(0), n, start, body)
        for t, (r, v) in enumerate(at):
            _store(b, acc[t], c_rows[r], v * lanes * size)
        return context.get_dummy_value()

    int64 = types.int64
    signature = types.void(ADDRESS, int64, int64, ADDRESS, int64, int64, ADDRESS, int64, int64, like)
    return signature, codegen
