"""The host side: buffers, arguments and the order of the kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from adasplash2.contract import AttentionGrads, AttentionRequest, AttentionResult, EntmaxRequest, SupportStats

from .._math import (
    SHORT,
    TARGET,
    in_dtype_of,
    is_decoding,
    is_dq_one_pass,
    live_blocks,
    multiprocessors,
    readable,
    support_stats,
    tiles_and_blocks,
    wide_heads,
)
from . import decode, kernels
from .config import Config, Launch, configure, decode_launch, padded

__all__ = ["BACKEND", "TritonBackend"]

KEYS_PER_CHECK = 128
CHECKS_PER_MULTIPROCESSOR = 16

# Where keys are split: programs for each multiprocessor by the rows of one, as many as run on it at once; products of
# one at least; and slots at most, each with 16 maxima that the program of a row goes through.
PROGRAMS_PER_MULTIPROCESSOR = {16: 3, 32: 3, 64: 2}
PRODUCTS_PER_SPLIT = 4
SLOTS = 512

# Dtypes that would show what TARGET leaves, and the passes that finding tau may take.
CORRECTED = (torch.float16, torch.float32)
MAX_STEPS = 16
MAX_ROW_STEPS = 64

_DTYPES = tuple(TARGET)


def _is_interpreted() -> bool:
    return not isinstance(kernels.entmax_attn_fwd_scan, triton.runtime.JITFunction)


_STRIDES = {name: [f"stride_{name}{axis}" for axis in ("bhm" if name in "qo" else "bhn")] for name in "qkvo"}


def _layout(name: str, t: Tensor) -> tuple[int, dict[str, int]]:
    """How many elements, at most 16 bytes, every row is aligned to, and the strides of batch, heads and rows in those.

    The stride of a dimension of size 1 is never used.
    """
    size = t.element_size()
    strides = [stride if length > 1 else 0 for length, stride in zip(t.shape, t.stride(), strict=True)]
    bits = t.data_ptr() // size | 16 // size | strides[0] | strides[1] | strides[2]
    vector = bits & -bits
    return vector, {argument: stride // vector for argument, stride in zip(_STRIDES[name], strides, strict=False)}


def _configure(request: AttentionRequest) -> Config:
    # While a graph is traced, sizes are symbols; what is compiled here hangs on the heads' sizes, so these are fixed.
    return configure(
        request.q.dtype,
        int(request.head_dim),
        int(request.head_dim_v),
        bool(request.seqlen_q <= SHORT),
        _shared_memory(request.q.device),
    )


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; an H100's where the kernels are interpreted."""
    if device.type != "cuda":
        return 232_448
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


class _Call:
    """What the kernels of one call share."""

    def __init__(self, request: AttentionRequest, histogram: bool) -> None:
        self.request = request
        self.histogram = histogram
        self.q, self.k, self.v = (readable(t) for t in (request.q, request.k, request.v))
        self.config = _configure(request)
        # Read once: every property of the request reads a shape.
        self.batch, self.heads_q, self.seqlen_q, self.head_dim = self.q.shape
        _, self.heads_kv, self.seqlen_k, self.head_dim_v = self.v.shape
        self.n_tiles, self.n_blocks = tiles_and_blocks(request, self.config.block_m, self.config.block_n)
        self.programs = self.batch * self.heads_q * self.n_tiles
        self.is_empty = 0 in (self.batch, self.heads_q, self.seqlen_q, self.seqlen_k)
        alphas = request.alpha_heads
        self.alpha_heads = None if alphas is None else alphas.detach().float().contiguous()
        self.seqlens = [None if t is None else t.detach().contiguous() for t in (request.seqlens_q, request.seqlens_k)]

    def arguments(self) -> dict[str, Any]:
        """Of every kernel over tiles of queries."""
        request = self.request
        vector_q, strides_q = _layout("q", self.q)
        vector_k, strides_k = _layout("k", self.k)
        sign = (request.scale > 0) - (request.scale < 0)
        return {
            "Q": self.q,
            "K": self.k,
            "ALPHA_HEADS": self.alpha_heads,
            "SEQLENS_Q": self.seqlens[0],
            "SEQLENS_K": self.seqlens[1],
            **strides_q,
            **strides_k,
            "alpha_minus_1": request.alpha - 1,
            "scale": abs(request.scale) or 1.0,
            "heads_q": self.heads_q,
            "heads_kv": self.heads_kv,
            "group": self.heads_q // self.heads_kv,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "n_tiles": self.n_tiles,
            "n_blocks": self.n_blocks,
            "ALPHA": _alpha_class(request.alpha, self.alpha_heads),
            "PER_HEAD": self.alpha_heads is not None,
            "IS_CAUSAL": request.is_causal,
            "HAS_SEQLENS_Q": self.seqlens[0] is not None,
            "HAS_SEQLENS_K": self.seqlens[1] is not None,
            "SIGN": sign,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": padded(self.head_dim),
            "VEC_Q": vector_q,
            "VEC_K": vector_k,
            "BLOCK_M": self.config.block_m,
            "BLOCK_N": self.config.block_n,
            "PRECISION": _precision(self.q),
        }

    def arguments_of_v(self) -> dict[str, Any]:
        vector, strides = _layout("v", self.v)
        return {
            "V": self.v,
            **strides,
            "HEAD_DIM_V": self.head_dim_v,
            "BLOCK_DV": padded(self.head_dim_v),
            "VEC_V": vector,
        }

    def list_like(self, entries: int, per_row: int) -> Tensor:
        """Room for lists of ``per_row`` indices each."""
        dtype = torch.int16 if per_row < 2**15 else torch.int32
        return torch.empty((entries, per_row), dtype=dtype, device=self.q.device)


_ALPHA_ANY = int(kernels.ALPHA_ANY.value)
_ALPHAS = {1.5: int(kernels.ALPHA_1_5.value), 2.0: int(kernels.ALPHA_2.value)}


def _alpha_class(alpha: float, alphas: Tensor | None) -> int:
    """The powers that the kernels are compiled for."""
    return _ALPHA_ANY if alphas is not None else _ALPHAS.get(alpha, _ALPHA_ANY)


def _precision(t: Tensor) -> str:
    """How products of float32 are taken: as torch takes its own, and exactly unless it is told otherwise."""
    if t.dtype != torch.float32 or torch.version.hip or torch.version.xpu:
        return "ieee"
    return "tf32" if torch.get_float32_matmul_precision() != "highest" else "tf32x3"


class _Places(NamedTuple):
    """Where the arguments of a kernel stand: what is left are floats.

    ``constants_of`` and ``integers_of`` take these from all values, which ``values_of`` takes from arguments by name.
    """

    pointers: list[int]
    integers: list[int]
    values_of: Callable[[dict[str, Any]], tuple[Any, ...]]
    constants_of: Callable[[Sequence[Any]], tuple[Any, ...]]
    integers_of: Callable[[Sequence[Any]], tuple[int, ...]]


# By the function that was compiled: a kernel of Triton hashes its source.
_known_places: dict[Any, _Places] = {}


def _places(kernel: Any) -> _Places:
    places = _known_places.get(kernel.fn)
    if places is None:
        own = [i for i, parameter in enumerate(kernel.params) if not parameter.is_constexpr]
        integers = [i for i in own if kernel.params[i].do_not_specialize]
        places = _known_places[kernel.fn] = _Places(
            [i for i in own if kernel.arg_names[i].isupper()],
            integers,
            itemgetter(*kernel.arg_names),
            itemgetter(*[i for i, parameter in enumerate(kernel.params) if parameter.is_constexpr]),
            itemgetter(*integers),
        )
    return places


def _variant(kernel: Any, launch: Launch, values: Sequence[Any]) -> tuple[tuple[Any, ...], list[Any]]:
    """What Triton compiles for, and the values with addresses in place of tensors.

    That is constants, dtype and alignment of a tensor, and which integers need 64 bits.
    """
    places = _places(kernel)
    key, addresses = [kernel.fn, launch, *places.constants_of(values)], list(values)
    for i in places.pointers:
        t = values[i]
        if t is None:
            key.append(None)
        else:
            addresses[i] = address = t.data_ptr()
            key += t.dtype, address % 16
    integers = places.integers_of(values)
    if max(integers) >= 2**31 or min(integers) < -(2**31):
        key += [i for i, value in enumerate(integers) if not -(2**31) <= value < 2**31]
    return tuple(key), addresses


_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(kernel: Any, programs: int, launch: Launch, **arguments: Any) -> None:
    """Run a kernel on those of the arguments that it has.

    Triton binds and specialises the arguments of each variant once, which takes it 50 us; after that it gets addresses,
    as it asks the driver about every tensor.
    """
    if _is_interpreted():
        kernel[(programs,)](**{name: arguments[name] for name in kernel.arg_names})
        return
    places = _places(kernel)
    values = places.values_of(arguments)
    variant, addresses = _variant(kernel, launch, values)
    key = values[places.pointers[0]].device, variant
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[(programs,)](*values, **launch.options)
    else:
        compiled[(programs, 1, 1)](*addresses)


def _on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if not t.is_cuda or t.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)


class TritonBackend:
    """alpha-entmax attention on a GPU: one dense pass over the scores, then only the blocks that hold support.

    Extra memory beyond the results: a byte and a list entry (two in backward) per tile of queries and block of keys,
    two or three float32 numbers per row; with few queries over many keys 56 KiB, at most, for each query and head. No
    call but ``support`` waits for the device, so forward and backward can be captured in a CUDA graph.

    Args:
        init: how the lower bound of tau after the scan is found: "maxima" (exact tau of the kept maxima of groups of
            keys) or "histogram" (of the same maxima, in 16 bins). The results agree to rounding; the time differs.
    """

    name = "triton"
    features = frozenset({"alpha per head", "causal mask", "padded seqlens"})

    def __init__(self, init: Literal["maxima", "histogram"] = "maxima") -> None:
        self._histogram = init == "histogram"

    def unavailable_reason(self) -> str | None:
        if _is_interpreted() or torch.cuda.is_available():
            return None
        return "no CUDA device is visible to torch"

    def unsupported_reasons(self, request: AttentionRequest) -> tuple[str, ...]:
        return _tensor_reasons(request.q) + wide_heads(request)

    def entmax_unsupported_reasons(self, request: EntmaxRequest) -> tuple[str, ...]:
        return _tensor_reasons(request.x)

    def saved_like(self, request: AttentionRequest) -> list[Tensor]:
        if not request.save_for_backward:
            return []
        config = _configure(request)
        return [live_blocks(request, config.block_m, config.block_n)]

    def forward(self, request: AttentionRequest) -> AttentionResult:
        call = _Call(request, self._histogram)
        with _on_device(call.q):
            return self._forward(call)

    def _forward(self, call: _Call) -> AttentionResult:
        request, config = call.request, call.config
        rows = (call.batch, call.heads_q, call.seqlen_q)
        device = call.q.device
        out = torch.empty((*rows, call.head_dim_v), dtype=call.q.dtype, device=device)
        tau = torch.empty(rows, dtype=torch.float32, device=device)
        saved = self.saved_like(request)
        live = saved[0] if saved else None
        if call.is_empty:
            out.zero_(), tau.fill_(torch.inf)
            for t in saved:
                t.zero_()
            return AttentionResult(out, tau, saved)
        arguments = call.arguments()
        flags = self._decode(call, arguments, out, tau)
        programs = call.programs
        # Longer chunks where the heads alone are many: most of these programs may have nothing to do.
        per_head = -(-CHECKS_PER_MULTIPROCESSOR * multiprocessors(device) // (call.batch * call.heads_kv))
        n_checks = -(-call.seqlen_k // KEYS_PER_CHECK)
        chunk = -(-n_checks // per_head) * KEYS_PER_CHECK
        n_chunks = -(-call.seqlen_k // chunk)
        first_bad = torch.empty(call.batch * call.heads_kv * n_chunks, dtype=torch.int32, device=device)
        _launch(
            kernels.entmax_attn_check_keys,
            first_bad.numel(),
            Launch(4, 1),
            FIRST_BAD=first_bad,
            FLAGS=flags,
            chunk=chunk,
            n_chunks=n_chunks,
            BLOCK=KEYS_PER_CHECK,
            VEC=arguments["VEC_K"],
            **arguments,
        )
        lists = call.list_like(programs, call.n_blocks)
        # A program of the output kernel has words of its own; the kernels before it take the first of its tile.
        n_words = config.output_programs * (-(-call.n_blocks // kernels.WORD.value) + 1)
        words = torch.empty((programs, n_words), dtype=torch.int32, device=device)
        counts = torch.empty((programs, 2), dtype=torch.int32, device=device)
        shared = arguments | {
            "TAU": tau,
            "WORDS": words,
            "LIST": lists,
            "COUNTS": counts,
            "FLAGS": flags,
            "n_words": n_words,
            "WORD": kernels.WORD.value,
        }
        _launch(
            kernels.entmax_attn_fwd_scan,
            programs,
            config.scan,
            FIRST_BAD=first_bad,
            n_chunks=n_chunks,
            HISTOGRAM=call.histogram,
            BLOCKS=config.scan_blocks,
            BOUND_EVERY=config.bound_every,
            **shared,
        )
        corrected = call.q.dtype in CORRECTED
        slopes = None if corrected else tau.new_empty(*tau.shape, 3)
        shared |= {"LIVE": live, "SAVE": live is not None, "CORRECTED": corrected, "SLOPES": slopes}
        _launch(
            kernels.entmax_attn_fwd_refine,
            programs,
            config.refine,
            target=TARGET[call.q.dtype],
            MAX_STEPS=MAX_STEPS,
            **shared,
        )
        _launch(
            kernels.entmax_attn_fwd_output,
            programs * config.output_programs,
            config.output,
            OUT=out,
            TILE_PROGRAMS=config.output_programs,
            **shared,
            **call.arguments_of_v(),
        )
        return AttentionResult(out, tau, saved)

    def _decode(self, call: _Call, arguments: dict[str, Any], out: Tensor, tau: Tensor) -> Tensor | None:
        """Few queries over many keys; the flags of what is left to the other kernels, or None if that is all."""
        if not is_decoding(call.request):
            return None
        rows = call.seqlen_q * (call.heads_q // call.heads_kv)
        launch, block_m = decode_launch(call.q.dtype, call.head_dim, rows)
        if launch is None:
            return None
        n_row_tiles = -(-rows // block_m)
        units = call.batch * call.heads_kv
        products = -(-call.seqlen_k // decode.KEYS.value)
        slot = -(-products // SLOTS)
        wanted = PROGRAMS_PER_MULTIPROCESSOR[block_m] * multiprocessors(call.q.device) // (units * n_row_tiles)
        split = max(-(-products // max(wanted, 1)), PRODUCTS_PER_SPLIT)
        split = -(-split // slot) * slot
        n_splits = -(-products // split)
        n_slots = -(-products // slot)
        rows, device = units * rows, call.q.device
        flags = torch.empty(units, dtype=torch.int32, device=device)
        found = (rows, decode.CAPACITY.value)
        shared = arguments | {
            "MAXIMA": torch.empty((rows, n_slots * decode.GROUPS.value), dtype=torch.float32, device=device),
            "FLAGS": flags,
            "n_slots": n_slots,
            "slot": slot,
        }
        _launch(
            decode.entmax_attn_decode_scan,
            units * n_row_tiles * n_splits,
            launch,
            n_row_tiles=n_row_tiles,
            n_splits=n_splits,
            products=split,
            **shared | {"BLOCK_M": block_m},
        )
        of_v = call.arguments_of_v()
        _launch(
            decode.entmax_attn_decode_output,
            rows,
            Launch(4, 1, 128),
            OUT=out,
            TAU=tau,
            LIST=torch.empty(found, dtype=torch.int32, device=device),
            SCORES=torch.empty(found, dtype=torch.float32, device=device),
            FOUND=torch.empty(found, dtype=torch.int32, device=device),
            MAX_STEPS=MAX_ROW_STEPS,
            BLOCK=4096,
            ROWS_K=min(8192 // arguments["BLOCK_D"], 128),
            ROWS_V=min(8192 // of_v["BLOCK_DV"], 128),
            **shared,
            **of_v,
        )
        return flags

    def backward(
        self, request: AttentionRequest, out: Tensor, tau: Tensor, saved: Sequence[Tensor], dout: Tensor
    ) -> AttentionGrads:
        call = _Call(request, self._histogram)
        with _on_device(call.q):
            return self._backward(call, out, tau, saved, readable(dout))

    def _backward(self, call: _Call, out: Tensor, tau: Tensor, saved: Sequence[Tensor], dout: Tensor) -> AttentionGrads:
        request, config = call.request, call.config
        (live,) = saved
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (call.q, call.k, call.v))
        # tau and delta of a row side by side: the dkv kernel loads both at once.
        tau_delta, dalpha = tau.new_empty((*tau.shape, 2)), None
        if request.alpha_heads is not None:
            dalpha = torch.empty_like(tau)
        if call.is_empty:
            dq.zero_(), dk.zero_(), dv.zero_()
            if dalpha is not None:
                dalpha.zero_()
        else:
            vector_o, strides_o = _layout("o", dout)
            shared = {
                **call.arguments(),
                **call.arguments_of_v(),
                **strides_o,
                "DOUT": dout,
                "TAU_DELTA": tau_delta,
                "LIVE": live,
                "VEC_O": vector_o,
            }
            _launch(
                kernels.entmax_attn_bwd_dq,
                call.programs * config.dq_programs,
                config.dq,
                OUT=out,
                TAU=tau,
                DQ=dq,
                DALPHA=dalpha,
                LIST=call.list_like(call.programs * config.dq_programs, call.n_blocks),
                TILE_PROGRAMS=config.dq_programs,
                ONE_PASS=is_dq_one_pass(request),
                **shared,
            )
            programs = call.batch * call.heads_kv * call.n_blocks
            _launch(
                kernels.entmax_attn_bwd_dkv,
                programs,
                config.dkv,
                DK=dk,
                DV=dv,
                LIST=call.list_like(programs, call.n_tiles),
                PARTS=config.dkv_parts,
                **shared,
            )
        summed = None if dalpha is None else dalpha.sum((0, 2), dtype=torch.float64)
        return AttentionGrads(dq, dk, dv, in_dtype_of(request.alpha_heads, summed))

    def support(self, request: AttentionRequest, block_m: int, block_n: int) -> SupportStats:
        # Values of width 1: the support is a matter of q and k alone.
        request = replace(request, v=request.k[..., :1], save_for_backward=True)
        call = _Call(request, self._histogram)
        rows = (request.batch, request.heads_q, request.seqlen_q)
        map_shape = (*rows[:2], -(-request.seqlen_q // block_m), -(-request.seqlen_k // block_n))
        with _on_device(call.q):
            _, tau, (live,) = self._forward(call)
            sizes = torch.zeros(rows, dtype=torch.int32, device=tau.device)
            block_map = torch.zeros(map_shape, dtype=torch.int8, device=tau.device)
            if not call.is_empty:
                _launch(
                    kernels.entmax_attn_support,
                    call.programs,
                    call.config.dq,
                    TAU=tau,
                    SIZES=sizes,
                    BLOCK_MAP=block_map,
                    LIVE=live,
                    LIST=call.list_like(call.programs, call.n_blocks),
                    map_m=block_m,
                    map_n=block_n,
                    map_rows=map_shape[2],
                    map_columns=map_shape[3],
                    **call.arguments(),
                )
        return support_stats(request, tau, sizes, block_map, block_m, block_n)

    def entmax(self, request: EntmaxRequest) -> Tensor:
        x = request.x.detach()
        rows, n = x.shape
        p = torch.empty((rows, n), dtype=x.dtype, device=x.device)
        if p.numel():
            with _on_device(x):
                _launch(
                    kernels.entmax_rows_fwd,
                    rows,
                    Launch(4, 1),
                    X=x,
                    P=p,
                    stride_xm=x.stride(0),
                    stride_xn=x.stride(1),
                    n=n,
                    MAX_STEPS=MAX_ROW_STEPS,
                    **_row_arguments(request.alpha, request.alpha_rows, n),
                )
        return p

    def entmax_backward(
        self, p: Tensor, dp: Tensor, alpha: float, alpha_rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        rows, n = p.shape
        p, dp = p.detach().contiguous(), dp.detach()
        dx = torch.empty_like(p)
        dalpha = None if alpha_rows is None else torch.zeros(rows, dtype=torch.float32, device=p.device)
        if dx.numel():
            with _on_device(p):
                _launch(
                    kernels.entmax_rows_bwd,
                    rows,
                    Launch(4, 1),
                    P=p,
                    DP=dp,
                    DX=dx,
                    DALPHA=dalpha,
                    stride_dm=dp.stride(0),
                    stride_dn=dp.stride(1),
                    n=n,
                    **_row_arguments(alpha, alpha_rows, n),
                )
        return dx, in_dtype_of(alpha_rows, dalpha)


def _row_arguments(alpha: float, alpha_rows: Tensor | None, n: int) -> dict[str, Any]:
    return {
        "ALPHA_ROWS": None if alpha_rows is None else alpha_rows.detach().float().contiguous(),
        "alpha_minus_1": alpha - 1,
        "ALPHA": _alpha_class(alpha, alpha_rows),
        "PER_ROW": alpha_rows is not None,
        "BLOCK": 1024 if n <= 1024 else 4096,
    }


def _tensor_reasons(t: Tensor) -> tuple[str, ...]:
    reasons: tuple[str, ...] = ()
    dtype, device, is_interpreted = t.dtype, t.device, _is_interpreted()
    if dtype not in _DTYPES:
        reasons += (f"got {dtype}; needs float16, bfloat16 or float32",)
    if is_interpreted and dtype == torch.bfloat16:
        reasons += (f"got {dtype} in Triton's interpreter, which cannot multiply it; needs float16 or float32",)
    expected = "cpu" if is_interpreted else "cuda"
    if device.type != expected:
        reasons += (f"got a tensor on {device}; needs one on {expected}",)
    elif not is_interpreted and (capability := _capability(device)) < (8, 0):
        reasons += ("got a device of compute capability {}.{}; needs 8.0".format(*capability),)
    return reasons


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


BACKEND = TritonBackend()
