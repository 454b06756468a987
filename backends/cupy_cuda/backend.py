"""The host side: buffers, arguments and the order of the kernels."""

from __future__ import annotations

import contextlib
import functools
import operator
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from adasplash2.contract import AttentionGrads, AttentionRequest, AttentionResult, EntmaxRequest, SupportStats

from .._math import (
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
from .config import (
    CAPABILITIES,
    ENTRY_BLOCKS,
    ENTRY_ROOM,
    ENTRY_WARPS,
    GROUPS,
    Config,
    Launch,
    configure,
    configure_decode,
    decode_memory,
    head_class,
    shared_memory,
)
from .launcher import MAP_ALIGNMENT, MAP_BYTES, CupyLauncher, Record, unavailable_reason

__all__ = ["BACKEND", "PARAMS", "ROW_PARAMS", "CupyBackend", "Launcher"]

BOX_ROWS = 64  # that the bulk copy engine brings at once

KEYS_PER_CHECK = 128
CHECK_WARPS = 4
CHECKS_PER_MULTIPROCESSOR = 16
ROW_WARPS = 8
SHORTEST_CAPABILITY = CAPABILITIES[0]
WORD = 32

# Where keys are split: a program has so many at least, and a row so many slots at most, each with GROUPS maxima.
KEYS_PER_SPLIT = 256
SLOTS = 512
KEYS_PER_SLOT = 128

_TYPES = {torch.float16: "half", torch.bfloat16: "bf16", torch.float32: "float"}
_ALPHAS = {1.5: "ALPHA_1_5", 2.0: "ALPHA_2"}

_pointers = (
    *("q", "k", "v", "dout", "out", "entries", "tau", "delta", "dq", "dk", "dv", "dalpha", "transposed"),
    *("live", "words", "list", "counts", "first_bad", "alpha_heads", "seqlens_q", "seqlens_k", "sizes", "block_map"),
    *("flags", "maxima", "slopes"),
)
_strides = tuple(f"stride_{tensor}{axis}" for tensor in "qkvo" for axis in ("bhm" if tensor in "qo" else "bhn"))
_integers = (
    *("sign", "is_causal", "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v"),
    *("n_tiles", "n_blocks", "n_chunks", "n_checks", "aligned_q", "aligned_k", "aligned_v", "aligned_o"),
    *("map_m", "map_n", "map_rows", "map_columns", "by_entries"),
    *("n_row_tiles", "n_splits", "n_slots", "split", "slot"),
    *(f"heads_apart_{tensor}" for tensor in "qkvo"),
)
_map_names = tuple(f"map_of_{tensor}" for tensor in "qkvo")


class _Structure(NamedTuple):
    """The argument of kernels: maps of tensors, pointers, numbers."""

    dtype: np.dtype[Any]
    maps: tuple[str, ...]
    pointers: tuple[str, ...]
    numbers: tuple[str, ...]
    packer: struct.Struct


def _structure(
    pointers: tuple[str, ...],
    longs: tuple[str, ...],
    floats: tuple[str, ...],
    integers: tuple[str, ...] = (),
    maps: tuple[str, ...] = (),
) -> _Structure:
    kinds = {f"V{MAP_BYTES}": maps, "u8": pointers, "i8": longs, "f4": floats, "i4": integers}
    fields = [(name, kind) for kind, names in kinds.items() for name in names]
    layout = f"@{f'{MAP_BYTES}s' * len(maps)}{len(pointers)}Q{len(longs)}q{len(floats)}f{len(integers)}i"
    # To a multiple of the largest alignment, as the compiler has it.
    padding = -struct.calcsize(layout) % (MAP_ALIGNMENT if maps else 8)
    dtype = np.dtype([*fields, ("padding", f"V{padding}")] if padding else fields)
    return _Structure(dtype, maps, pointers, longs + floats + integers, struct.Struct(f"{layout}{padding}x"))


# As the kernels declare them (common.cuh, rows.cu).
PARAMS = _structure(_pointers, _strides, ("alpha_minus_1", "scale", "target"), _integers, _map_names)
ROW_PARAMS = _structure(
    ("x", "p", "dp", "dx", "dalpha", "alpha_rows"), ("stride_m", "stride_n", "n"), ("alpha_minus_1",)
)
_LAYOUTS = {
    name: (*(stride for stride in _strides if stride.startswith(f"stride_{name}")), f"aligned_{name}")
    for name in "qkvo"
}

_SOURCES = {
    "entmax_attn_decode_scan": "decode.cu",
    "entmax_attn_decode_output": "decode.cu",
    "entmax_attn_check_keys": "scan.cu",
    "entmax_attn_fwd_scan": "scan.cu",
    "entmax_attn_fwd_refine": "refine.cu",
    "entmax_attn_fwd_output": "output.cu",
    "entmax_attn_bwd_dq": "backward.cu",
    "entmax_attn_bwd_dq_entries": "entries.cu",
    "entmax_attn_bwd_dkv": "backward.cu",
    "entmax_attn_bwd_dkv_entries": "entries.cu",
    "entmax_attn_support": "backward.cu",
    "entmax_rows_fwd": "rows.cu",
    "entmax_rows_bwd": "rows.cu",
}


class Launcher(Protocol):
    """Runs a kernel on tensors that the caller keeps alive."""

    def launch(
        self,
        source: str,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        args: Record,
        follows: bool,
    ) -> None:
        """Put a kernel on torch's current stream.

        Args:
            source: the file that holds it, as ``"scan.cu"``.
            kernel: name with template arguments, as ``"entmax_attn_check_keys<bf16>"``.
            grid: programs along x, y and z.
            block: threads along x, y and z.
            shared_bytes: dynamic shared memory of a program.
            args: the kernel's one argument, of ``PARAMS`` or ``ROW_PARAMS``.
            follows: whether it comes behind another kernel of the same call, and waits itself for what that one
                leaves behind: then it may begin before (``wait_for_kernel_before`` in ptx.cuh).
        """

    def tensor_map(
        self, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
    ) -> bytes | None:
        """What the bulk copy engine needs to know of a tensor of numbers of two bytes; None if it cannot read it.

        Args:
            address: of its first number.
            sizes: of its dimensions, the innermost first.
            strides: of all but the innermost, in bytes.
            box: sizes of what is copied at once, with its chunks permuted as ``place_of`` in common.cuh has it.
        """


def _record(structure: _Structure, values: dict[str, Any]) -> Record:
    """What is not among the values is 0, and so is the pointer of None. NumPy would take four times as long."""
    packed = structure.packer.pack(
        *[values.get(name, b"") for name in structure.maps],
        *[0 if (tensor := values.get(name)) is None else tensor.data_ptr() for name in structure.pointers],
        *[values.get(name, 0) for name in structure.numbers],
    )
    return np.ndarray((), structure.dtype, bytearray(packed))


@functools.lru_cache(maxsize=1024)
def _layout_of(
    name: str, shape: tuple[int, ...], strides: tuple[int, ...], element_size: int, misaligned: int
) -> dict[str, int]:
    *sizes, width = shape
    steps = [stride if size > 1 else 0 for size, stride in zip(sizes, strides, strict=False)]
    places = functools.reduce(operator.or_, steps, width) * element_size | misaligned
    return dict(zip(_LAYOUTS[name], (*steps, places % 16 == 0 and steps[-1] < 2**31), strict=True))


def _layout(name: str, t: Tensor) -> dict[str, int]:
    """Strides of batch, heads and rows (those of a dimension of size 1 are never used), and alignment to 16 bytes.

    Where rows are aligned, the kernels take their stride for one of 32 bits.
    """
    return _layout_of(name, t.shape, t.stride(), t.element_size(), t.data_ptr() % 16)


def _map(launcher: Launcher, name: str, t: Tensor, layout: dict[str, int], head: int) -> dict[str, Any]:
    """For the bulk copy engine, which has to do with heads of that width alone: nothing if it cannot read the tensor.

    In a map, 64 channels of eight rows lie together, then the next 64 channels of these, then the next eight rows, as
    they do in shared memory (``place_of`` in common.cuh); then the next head. Two sequences are ``heads_apart``.
    """
    batch_step, head_step, row_step, is_aligned = layout.values()
    batch, heads, rows, width = t.shape
    unit = head_step or batch_step or width
    is_regular = (head_step > 0 or heads == 1) and batch_step % unit == 0
    if not is_aligned or not is_regular or width != head or rows < BOX_ROWS:
        return {}
    heads_apart = batch_step // unit
    all_heads = (batch - 1) * heads_apart + heads
    if all_heads >= 2**31:
        return {}
    row = row_step * t.element_size()
    found = launcher.tensor_map(
        t.data_ptr(),
        (64, 8, head // 64, rows // 8, all_heads),
        (row, 128, 8 * row, unit * t.element_size()),
        (64, 8, head // 64, BOX_ROWS // 8, 1),
    )
    return {} if found is None else {f"map_of_{name}": found, f"heads_apart_{name}": heads_apart}


@functools.cache
def _of(name: str, *values: Any) -> str:
    """The instantiation of a kernel."""
    texts = (str(value).lower() if isinstance(value, bool) else str(value) for value in values)
    return f"{name}<{', '.join(texts)}>"


class _Kernel(NamedTuple):
    """An instantiation, and what one of its programs takes."""

    name: str
    warps: int
    shared_bytes: int


@functools.cache
def _kernel(
    dtype: torch.dtype, head: int, capability: tuple[int, int], stage: str, name: str, is_bulk: bool, *values: Any
) -> _Kernel:
    """Of a stage, or of what follows it by entries; ``values`` are its template's first."""
    config = cast(Config, configure(dtype, head, capability))
    tail: tuple[int, ...]
    if stage in ENTRY_WARPS:
        warps = ENTRY_WARPS[stage]
        tail = (warps,)
    else:
        launch: Launch = getattr(config, stage)
        tail = (launch.columns, launch.warps, launch.stages, launch.programs)
        producers = launch.producers if is_bulk else 0
        warps = launch.warps + producers
        if name != "entmax_attn_support":
            tail += (launch.wgmma, is_bulk)
        if producers:
            tail += (producers,)
    instantiation = _of(name, _TYPES[dtype], head, *values, config.block_m, config.block_n, *tail)
    return _Kernel(instantiation, warps, shared_memory(config, stage, dtype))


def _on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


class _Call:
    """What the kernels of one call share."""

    def __init__(self, backend: CupyBackend, request: AttentionRequest, dout: Tensor | None = None) -> None:
        self.request = request
        self.q, self.k, self.v = (readable(t) for t in (request.q, request.k, request.v))
        self.config = backend.config_of(request)
        self.setting = backend.setting_of(request)
        self.n_tiles, self.n_blocks = tiles_and_blocks(request, self.config.block_m, self.config.block_n)
        self.has_entries = _has_entries(self.config, self.n_blocks)
        self.programs = request.batch * request.heads_q * self.n_tiles
        self.is_empty = 0 in (request.batch, request.heads_q, request.seqlen_q, request.seqlen_k)
        alphas = request.alpha_heads
        self.alpha_heads = None if alphas is None else alphas.detach().float().contiguous()
        self.seqlens = [
            None if t is None else t.detach().to(torch.int64).contiguous()
            for t in (request.seqlens_q, request.seqlens_k)
        ]
        self.dtype = _TYPES[self.q.dtype]
        self.alpha_class = _alpha_class(request.alpha, self.alpha_heads)
        tensors = {"q": self.q, "k": self.k, "v": self.v} | ({} if dout is None else {"o": dout})
        self._layouts: dict[str, Any] = {}
        self._maps: dict[str, Any] = {}
        for name, t in tensors.items():
            layout = _layout(name, t)
            self._layouts |= layout
            # Forward has its queries by the threads.
            if self.config.scan.wgmma and not self.is_empty and (dout is not None or name != "q"):
                self._maps |= _map(backend.launcher, name, t, layout, self.config.head)

    def has_maps(self, names: str) -> bool:
        """Whether the bulk copy engine can read all of these."""
        return all(f"map_of_{name}" in self._maps for name in names)

    def arguments(self) -> dict[str, Any]:
        """Of every kernel of attention."""
        request = self.request
        return {
            "q": self.q,
            "k": self.k,
            "v": self.v,
            "alpha_heads": self.alpha_heads,
            "seqlens_q": self.seqlens[0],
            "seqlens_k": self.seqlens[1],
            **self._layouts,
            **self._maps,
            "alpha_minus_1": request.alpha - 1,
            "scale": abs(request.scale) or 1.0,
            "target": TARGET[self.q.dtype],
            "sign": (request.scale > 0) - (request.scale < 0),
            "is_causal": request.is_causal,
            "heads_q": request.heads_q,
            "heads_kv": request.heads_kv,
            "seqlen_q": request.seqlen_q,
            "seqlen_k": request.seqlen_k,
            "head_dim": request.head_dim,
            "head_dim_v": request.head_dim_v,
            "n_tiles": self.n_tiles,
            "n_blocks": self.n_blocks,
            "n_chunks": -(-request.seqlen_k // KEYS_PER_CHECK),
        }

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.q.device)


def _has_entries(config: Config, n_blocks: int) -> bool:
    """Whether tiles may be taken by their entries: of longer sequences, an entry's key has no room in 16 bits."""
    return config.entries and n_blocks <= ENTRY_BLOCKS


def _alpha_class(alpha: float, alphas: Tensor | None) -> str:
    """The powers that the kernels are compiled for."""
    return "ALPHA_ANY" if alphas is not None else _ALPHAS.get(alpha, "ALPHA_ANY")


class CupyBackend:
    """alpha-entmax attention on a GPU in CUDA C++: one dense pass over the scores, then blocks or entries of support.

    The stages are those of the Triton backend. Extra memory beyond the results: a byte and a list entry per tile of
    queries and block of keys; in bfloat16 12 bytes for each query and head; where tiles may be taken by their
    entries, 256 bytes for each query and head, at most, that backward needs, and as much again during it; with few
    queries over many keys 32 KiB, at most, for each query and head. Once its kernels are compiled, no call but
    ``support`` waits for the device.

    Args:
        init: how the lower bound of tau after the scan is found: "maxima" (tau of the kept maxima of groups of keys) or
            "histogram" (of the same maxima, in 16 bins in shared memory). The results agree to rounding.
        launcher: what runs the kernels; by default CuPy, on torch's current stream.
        capability: of the device, for which the kernels are configured, as (9, 0); by default that of each tensor's.
    """

    name = "cupy"
    features = frozenset({"alpha per head", "causal mask", "padded seqlens"})

    def __init__(
        self,
        init: Literal["maxima", "histogram"] = "maxima",
        launcher: Launcher | None = None,
        capability: tuple[int, int] | None = None,
    ) -> None:
        self._histogram = init == "histogram"
        self.launcher: Launcher = launcher or CupyLauncher()
        self._capability = capability

    def unavailable_reason(self) -> str | None:
        return unavailable_reason() if isinstance(self.launcher, CupyLauncher) else None

    def unsupported_reasons(self, request: AttentionRequest) -> tuple[str, ...]:
        reasons = self._tensor_reasons(request.q) + wide_heads(request)
        if not reasons and configure(*self.setting_of(request)) is None:
            device = "{}.{}".format(*self._capability_of(request.q.device))
            wide = max(request.head_dim, request.head_dim_v)
            reasons += (f"got a head of {wide} {request.q.dtype} on compute capability {device}; needs at most 128",)
        return reasons

    def entmax_unsupported_reasons(self, request: EntmaxRequest) -> tuple[str, ...]:
        return self._tensor_reasons(request.x)

    def _tensor_reasons(self, t: Tensor) -> tuple[str, ...]:
        reasons: tuple[str, ...] = ()
        if t.dtype not in _TYPES:
            reasons += (f"got {t.dtype}; needs float16, bfloat16 or float32",)
        if isinstance(self.launcher, CupyLauncher) and t.device.type != "cuda":
            return (*reasons, f"got a tensor on {t.device}; needs one on cuda")
        capability = self._capability_of(t.device)
        lowest = (8, 0) if t.dtype == torch.bfloat16 else SHORTEST_CAPABILITY
        if capability < lowest:
            reasons += (
                "got {} on a device of compute capability {}.{}; needs {}.{}".format(t.dtype, *capability, *lowest),
            )
        return reasons

    def _capability_of(self, device: torch.device) -> tuple[int, int]:
        return self._capability or _capability_of(device)

    def setting_of(self, request: AttentionRequest) -> tuple[torch.dtype, int, tuple[int, int]]:
        """What ``configure`` takes."""
        # While a graph is traced, sizes are symbols; kernels are compiled for the heads' sizes, so these are fixed.
        head = head_class(int(request.head_dim), int(request.head_dim_v))
        return request.q.dtype, head, self._capability_of(request.q.device)

    def config_of(self, request: AttentionRequest) -> Config:
        """How a call that has no reason against it is cut up."""
        config = configure(*self.setting_of(request))
        if config is None:
            raise ValueError("; ".join(self.unsupported_reasons(request)))
        return config

    def saved_like(self, request: AttentionRequest) -> list[Tensor]:
        if not request.save_for_backward:
            return []
        config = self.config_of(request)
        saved = [live_blocks(request, config.block_m, config.block_n)]
        if _has_entries(config, saved[0].shape[-1]):
            shape = (request.batch, request.heads_q, request.seqlen_q, min(request.head_dim_v, ENTRY_ROOM))
            saved.append(request.q.new_empty(shape, dtype=torch.int32))
        return saved

    def _launch(self, kernel: str, programs: int, warps: int, shared_bytes: int, record: Record, follows: bool) -> None:
        source = _SOURCES[kernel.partition("<")[0]]
        self.launcher.launch(source, kernel, (programs, 1, 1), (32 * warps, 1, 1), shared_bytes, record, follows)

    def _launch_stage(
        self,
        call: _Call,
        stage: str,
        name: str,
        programs: int,
        record: Record,
        *values: int | str,
        follows: bool = True,
        is_bulk: bool = False,
    ) -> None:
        """A kernel as the configuration has it; ``values`` are its template's first.

        With ``is_bulk`` its tiles come by the bulk copy engine.
        """
        kernel, warps, shared_bytes = _kernel(*call.setting, stage, name, is_bulk, *values)
        self._launch(kernel, programs, warps, shared_bytes, record, follows)

    def forward(self, request: AttentionRequest) -> AttentionResult:
        call = _Call(self, request)
        with _on_device(call.q):
            return self._forward(call, by_entries=call.has_entries)

    def _forward(self, call: _Call, by_entries: bool = False) -> AttentionResult:
        request, config = call.request, call.config
        rows = (request.batch, request.heads_q, request.seqlen_q)
        out = call.empty(*rows, request.head_dim_v, dtype=call.q.dtype)
        tau = call.empty(*rows, dtype=torch.float32)
        saved = self.saved_like(request)
        live, entries = (*saved, None, None)[:2]
        if call.is_empty:
            out.zero_(), tau.fill_(torch.inf)
            for t in saved:
                t.zero_()
            return AttentionResult(out, tau, saved)
        arguments = call.arguments()
        # Named, so that they live until the last launch; after it, torch's allocator orders their reuse on the stream.
        flags, _maxima = self._decode(call, arguments, out, tau)
        units = request.batch * request.heads_kv
        # Few programs where the heads alone are many: most of them may have nothing to do.
        n_checks = min(arguments["n_chunks"], -(-CHECKS_PER_MULTIPROCESSOR * multiprocessors(call.q.device) // units))
        first_bad = call.empty(units * arguments["n_chunks"], dtype=torch.int32)
        words = call.empty(call.programs, -(-call.n_blocks // WORD), dtype=torch.int32)
        lists = call.empty(call.programs, call.n_blocks, dtype=torch.int32)
        counts = call.empty(call.programs, dtype=torch.int32)
        slopes = call.empty(*tau.shape, 3, dtype=torch.float32) if call.q.dtype == torch.bfloat16 else None
        record = _record(
            PARAMS,
            arguments
            | {"out": out, "tau": tau, "live": live, "words": words, "list": lists, "counts": counts, "flags": flags}
            | {"first_bad": first_bad, "n_checks": n_checks, "by_entries": by_entries, "entries": entries}
            | {"slopes": slopes},
        )
        follows = flags is not None
        self._launch(_of("entmax_attn_check_keys", call.dtype), units * n_checks, CHECK_WARPS, 128, record, follows)
        programs, alpha = call.programs, call.alpha_class
        values: tuple[int | str, ...] = alpha, self._histogram
        is_bulk = call.has_maps("k")
        self._launch_stage(call, "scan", "entmax_attn_fwd_scan", programs, record, *values, is_bulk=is_bulk)
        values = alpha, config.entries
        self._launch_stage(call, "refine", "entmax_attn_fwd_refine", programs, record, *values, is_bulk=is_bulk)
        programs *= config.parts("output")
        values, is_bulk = (config.head_v, alpha), call.has_maps("kv")
        self._launch_stage(call, "output", "entmax_attn_fwd_output", programs, record, *values, is_bulk=is_bulk)
        return AttentionResult(out, tau, saved)

    def _decode(
        self, call: _Call, arguments: dict[str, Any], out: Tensor, tau: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Few queries over many keys; the flags of what is left to the other kernels, and what must live as long."""
        request, dtype = call.request, call.q.dtype
        if not is_decoding(request):
            return None, None
        rows = request.seqlen_q * (request.heads_q // request.heads_kv)
        head = call.config.head
        config = configure_decode(dtype, head, self._capability_of(call.q.device), rows)
        scan, output = config.scan, config.output
        n_row_tiles = -(-rows // config.block_m)
        units = request.batch * request.heads_kv
        products = -(-request.seqlen_k // scan.columns)
        # A power of two.
        slot = max(1 << (-(-products // SLOTS) - 1).bit_length(), KEYS_PER_SLOT // scan.columns)
        n_slots = -(-products // slot)
        wanted = scan.programs * multiprocessors(call.q.device) // (units * n_row_tiles)
        split = max(-(-products // max(wanted, 1)), KEYS_PER_SPLIT // scan.columns)
        split = -(-split // slot) * slot
        n_splits = -(-products // split)
        flags = call.empty(units, dtype=torch.int32)
        maxima = call.empty(units * rows, n_slots * GROUPS, dtype=torch.float32)
        record = _record(
            PARAMS,
            arguments
            | {"out": out, "tau": tau, "flags": flags, "maxima": maxima, "n_row_tiles": n_row_tiles}
            | {"n_splits": n_splits, "n_slots": n_slots, "split": split, "slot": slot},
        )
        row = head * dtype.itemsize
        self._launch(
            _of(
                "entmax_attn_decode_scan",
                *(call.dtype, head, config.block_m // 16, scan.columns, scan.stages, scan.programs),
            ),
            units * n_row_tiles * n_splits,
            scan.warps,
            decode_memory("scan", scan, config.block_m, row),
            record,
            follows=False,
        )
        self._launch(
            _of(
                "entmax_attn_decode_output",
                *(call.dtype, head, call.alpha_class, scan.columns, output.columns, output.warps, output.stages),
                output.programs,
            ),
            units * rows,
            output.warps,
            decode_memory("output", output, config.block_m, row),
            record,
            follows=True,
        )
        return flags, maxima

    def backward(
        self, request: AttentionRequest, out: Tensor, tau: Tensor, saved: Sequence[Tensor], dout: Tensor
    ) -> AttentionGrads:
        dout = readable(dout)
        call = _Call(self, request, dout)
        with _on_device(call.q):
            return self._backward(call, out, tau, saved, dout)

    def _backward(self, call: _Call, out: Tensor, tau: Tensor, saved: Sequence[Tensor], dout: Tensor) -> AttentionGrads:
        request = call.request
        live, entries = (*saved, None)[:2]
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (call.q, call.k, call.v))
        dalpha = None if request.alpha_heads is None else torch.empty_like(tau)
        if call.is_empty:
            for t in (dq, dk, dv, dalpha):
                if t is not None:
                    t.zero_()
        else:
            delta = torch.empty_like(tau)
            transposed = None if entries is None else torch.empty_like(entries)
            record = _record(
                PARAMS,
                call.arguments()
                | {"out": out, "dout": dout, "tau": tau, "delta": delta, "live": live, "entries": entries}
                | {"dq": dq, "dk": dk, "dv": dv, "dalpha": dalpha, "transposed": transposed},
            )
            alpha = call.alpha_class
            programs = call.programs * call.config.parts("dq")
            per_head = dalpha is not None
            # Beyond 128 channels a thread has no registers for two sums.
            one_pass = is_dq_one_pass(request) and call.config.head <= 128
            values, is_bulk = (alpha, per_head, one_pass), call.has_maps("kv")
            name = "entmax_attn_bwd_dq"
            self._launch_stage(call, "dq", name, programs, record, *values, follows=False, is_bulk=is_bulk)
            if call.has_entries:
                name = "entmax_attn_bwd_dq_entries"
                self._launch_stage(call, "dq_entries", name, call.programs, record, alpha, per_head)
            blocks = request.batch * request.heads_kv * call.n_blocks
            # tau and delta of each head, too, begin at a multiple of 16 bytes.
            is_bulk = call.has_maps("qo") and request.seqlen_q % 4 == 0 and tau.data_ptr() % 16 == 0
            self._launch_stage(call, "dkv", "entmax_attn_bwd_dkv", blocks, record, alpha, is_bulk=is_bulk)
            if call.has_entries:
                blocks *= 2  # dk's and dv's
                self._launch_stage(call, "dkv_entries", "entmax_attn_bwd_dkv_entries", blocks, record)
        summed = None if dalpha is None else dalpha.sum((0, 2), dtype=torch.float64)
        return AttentionGrads(dq, dk, dv, in_dtype_of(request.alpha_heads, summed))

    def support(self, request: AttentionRequest, block_m: int, block_n: int) -> SupportStats:
        # Values of width 1: the support is a matter of q and k alone.
        request = replace(request, v=request.k[..., :1], save_for_backward=True)
        call = _Call(self, request)
        rows = (request.batch, request.heads_q, request.seqlen_q)
        map_shape = (*rows[:2], -(-request.seqlen_q // block_m), -(-request.seqlen_k // block_n))
        with _on_device(call.q):
            _, tau, (live, *_) = self._forward(call)
            sizes = torch.zeros(rows, dtype=torch.int32, device=tau.device)
            block_map = torch.zeros(map_shape, dtype=torch.int8, device=tau.device)
            if not call.is_empty:
                record = _record(
                    PARAMS,
                    call.arguments()
                    | {"tau": tau, "live": live, "sizes": sizes, "block_map": block_map}
                    | {"map_m": block_m, "map_n": block_n, "map_rows": map_shape[2], "map_columns": map_shape[3]},
                )
                programs = call.programs * call.config.parts("dq")
                self._launch_stage(call, "dq", "entmax_attn_support", programs, record, follows=False)
        return support_stats(request, tau, sizes, block_map, block_m, block_n)

    def entmax(self, request: EntmaxRequest) -> Tensor:
        x = request.x.detach()
        p = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if p.numel():
            with _on_device(x):
                self._launch_rows("entmax_rows_fwd", x, request.alpha, request.alpha_rows, {"x": x, "p": p}, x)
        return p

    def entmax_backward(
        self, p: Tensor, dp: Tensor, alpha: float, alpha_rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        p, dp = p.detach().contiguous(), dp.detach()
        dx = torch.empty_like(p)
        dalpha = None if alpha_rows is None else torch.zeros(len(p), dtype=torch.float32, device=p.device)
        if dx.numel():
            with _on_device(p):
                tensors = {"p": p, "dp": dp, "dx": dx, "dalpha": dalpha}
                self._launch_rows("entmax_rows_bwd", p, alpha, alpha_rows, tensors, dp)
        return dx, in_dtype_of(alpha_rows, dalpha)

    def _launch_rows(
        self,
        name: str,
        like: Tensor,
        alpha: float,
        alpha_rows: Tensor | None,
        tensors: dict[str, Tensor | None],
        strided: Tensor,
    ) -> None:
        rows, n = like.shape
        alphas = None if alpha_rows is None else alpha_rows.detach().float().contiguous()
        record = _record(
            ROW_PARAMS,
            tensors
            | {
                "alpha_rows": alphas,
                "stride_m": strided.stride(0),
                "stride_n": strided.stride(1),
                "n": n,
                "alpha_minus_1": alpha - 1,
            },
        )
        kernel = _of(name, _TYPES[like.dtype], _alpha_class(alpha, alphas))
        self._launch(kernel, rows, ROW_WARPS, 128, record, follows=False)


@functools.cache
def _capability_of(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


BACKEND = CupyBackend()
