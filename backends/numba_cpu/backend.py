"""The host side: buffers, work items and the order of the stages."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from adasplash2.contract import AttentionGrads, AttentionRequest, AttentionResult, EntmaxRequest, SupportStats

from .._math import in_dtype_of, keys_seen, support_stats
from . import kernels, simd
from .threads import run_stage

__all__ = ["BACKEND", "NumbaBackend"]

SAVED_PER_ROW = 48  # entries of the support kept for backward, on average over a tile; more is found again
SCRATCH_KEPT = 1 << 25
SMALL_WORK = 1 << 21  # products (query, key, channel) below which one thread is faster than two
INITS = {"maxima": kernels.INIT_MAXIMA, "histogram": kernels.INIT_HISTOGRAM}


class _Call:
    """What the stages of one call share: the tensors in the element type, and their description for the kernels."""

    def __init__(self, request: AttentionRequest, init: str) -> None:
        self.dtype = request.tau_dtype
        self.like: Any = np.float64(0) if self.dtype == torch.float64 else np.float32(0)
        self.size = self.like.itemsize
        self.q, self.k, self.v = (self.readable(t) for t in (request.q, request.k, request.v))
        self.shape = (
            request.batch,
            request.heads_q,
            request.heads_kv,
            request.seqlen_q,
            request.seqlen_k,
            request.head_dim,
            request.head_dim_v,
        )
        self.scale = float(request.scale)
        self.is_causal = request.is_causal
        self.init = INITS[init]
        self.lengths_q = self._lengths(request.seqlens_q, request.seqlen_q)
        self.lengths_k = self._lengths(request.seqlens_k, request.seqlen_k)
        self.alphas = np.full(request.heads_q, request.alpha)
        if request.alpha_heads is not None:
            self.alphas[:] = request.alpha_heads.detach().double().numpy()
        self.tiles_per_head = -(-request.seqlen_q // kernels.BLOCK_M)
        self.n_tiles = request.batch * request.heads_q * self.tiles_per_head
        products = request.batch * request.heads_q * request.seqlen_q * request.seqlen_k * request.head_dim
        self.threads = 1 if products < SMALL_WORK else torch.get_num_threads()

    def _lengths(self, seqlens: Tensor | None, full: int) -> np.ndarray:
        if seqlens is None:
            return np.full(self.shape[0], full, np.int64)
        return seqlens.detach().to(torch.int64).contiguous().numpy()

    def readable(self, t: Tensor) -> Tensor:
        """The tensor in the element type, with a contiguous last dimension; a copy only if it is neither."""
        t = t.detach().to(self.dtype)
        return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()

    def at(self, t: Tensor) -> tuple[int, tuple[int, int, int]]:
        """Address and strides in bytes."""
        return t.data_ptr(), tuple(s * self.size for s in t.stride()[:3])  # type: ignore[return-value]

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype)

    def workspace(self, bytes_per_thread: int) -> int:
        """Address of a buffer for all threads."""
        return scratch("workspace", self.threads * bytes_per_thread)


_scratch = threading.local()


def scratch(name: str, size: int) -> int:
    """Address, on a cache line, of a buffer of this Python thread that lives until the next call with this name.

    Kept between calls up to SCRATCH_KEPT bytes: pages fresh from the system cost more than the work on them.
    """
    buffers: dict[str, np.ndarray] = _scratch.__dict__
    buffer = buffers.get(name)
    if buffer is None or buffer.nbytes < size + 64 or buffer.nbytes > max(SCRATCH_KEPT, size + 64):
        buffer = buffers[name] = np.empty(size + 64, np.uint8)
    address = _address(buffer)
    return address + -address % 64


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


class _Panels:
    """The keys as int16 panels, and where the first key lies that is not finite, per batch and key head."""

    def __init__(self, call: _Call) -> None:
        batch, _, heads_kv, _, seqlen_k, dim, _ = call.shape
        chunks = -(-seqlen_k // kernels.BLOCK_N)
        n = batch * heads_kv * chunks
        self._steps = np.empty(n, np.float64)
        bad_keys = np.empty(n, np.int64)
        self.address = scratch("panels", n * kernels.PANELS * ((dim + 1) // 2) * simd.NR * 4)
        self.steps = _address(self._steps)
        run_stage(
            kernels.pack,
            call.threads,
            call.shape,
            *call.at(call.k),
            _address(call.lengths_k),
            self.address,
            self.steps,
            _address(bad_keys),
            call.size,
            call.like,
        )
        self.first_bad = bad_keys.reshape(batch * heads_kv, chunks).min(axis=1)


class _DenseKeys:
    """Keys and values as the dense stages read them: panels for q k^T, rows padded to whole register tiles."""

    def __init__(self, call: _Call) -> None:
        self.columns: int = kernels.panel_columns.py_func(call.size)
        self.columns_q, self.columns_v = (self.whole(n) for n in call.shape[5:])
        self._call = call

    def whole(self, n: int) -> int:
        return -(-n // self.columns) * self.columns

    def panels(self, rows: Tensor) -> Tensor:
        """(batch, heads_kv, panels, dim, columns) from (batch, heads_kv, seqlen_k, dim)."""
        batch, heads_kv, seqlen_k, dim = rows.shape
        padded = F.pad(rows, (0, 0, 0, self.whole(seqlen_k) - seqlen_k))
        return padded.view(batch, heads_kv, -1, self.columns, dim).transpose(-1, -2).contiguous()

    def rows(self, rows: Tensor) -> Tensor:
        return F.pad(rows, (0, self.whole(rows.shape[3]) - rows.shape[3])).contiguous()


def _addresses(base: Tensor, per_tile: int, n_tiles: int) -> np.ndarray:
    """Address of the first entry of each tile."""
    return base.data_ptr() + np.arange(n_tiles, dtype=np.int64) * (per_tile * base.element_size())


def _run_forward(
    call: _Call,
    panels: _Panels,
    items: np.ndarray,
    tile_keys: np.ndarray,
    tile_entries: np.ndarray,
    tile_capacity: int,
    outputs: Sequence[int] = (),
    blocks: tuple[int, int, int] = (0, 1, 1),
) -> None:
    """The forward stage over some tiles; ``outputs`` are the addresses of out, tau, shifts, sizes and tile states."""
    workspace = call.workspace(kernels.workspace_layout.py_func(call.shape, call.size)[-1])
    run_stage(
        kernels.forward,
        call.threads,
        workspace,
        call.shape,
        *call.at(call.q),
        *call.at(call.k),
        *call.at(call.v),
        panels.address,
        panels.steps,
        _address(panels.first_bad),
        _address(call.lengths_q),
        _address(call.lengths_k),
        _address(call.alphas),
        call.scale,
        call.is_causal,
        call.init,
        len(items),
        _address(items),
        bool(outputs),
        *(outputs or (0, 0, 0, 0, 0)),
        _address(tile_keys),
        _address(tile_entries),
        tile_capacity,
        *blocks,
        call.size,
        call.like,
    )


class _Support:
    """The entries of the support of all tiles that are not dense, those that forward did not save found again."""

    def __init__(self, call: _Call, saved: Sequence[Tensor]) -> None:
        saved_keys, saved_entries, _, sizes, states = saved
        tile_states = states.numpy().reshape(-1)
        padded = F.pad(sizes, (0, call.tiles_per_head * kernels.BLOCK_M - sizes.shape[2]))
        per_tile = padded.view(call.n_tiles, kernels.BLOCK_M).sum(-1).numpy()
        per_tile[tile_states == kernels.DENSE] = 0
        self.offsets = np.cumsum(per_tile) - per_tile
        self.total = int(per_tile.sum())
        self.largest_head = int(per_tile.reshape(-1, call.tiles_per_head).sum(1).max(initial=0))
        capacity = saved_keys.shape[-1]
        self.keys = _addresses(saved_keys, capacity, call.n_tiles)
        self.entries = _addresses(saved_entries, capacity, call.n_tiles)
        again = np.flatnonzero(tile_states == kernels.RESCAN)
        if len(again):
            counts = per_tile[again]
            starts = np.cumsum(counts) - counts
            self._found_keys = call.empty(int(counts.sum()), dtype=torch.int32)
            self._found_entries = call.empty(int(counts.sum()))
            self.keys[again] = self._found_keys.data_ptr() + starts * 4
            self.entries[again] = self._found_entries.data_ptr() + starts * call.size
            whole_tile = kernels.BLOCK_M * call.shape[4]
            _run_forward(call, _Panels(call), again, self.keys, self.entries, whole_tile)


class NumbaBackend:
    """alpha-entmax attention on a CPU: element sparsity forward and backward, dense tiles where support is dense.

    Extra memory beyond the results: per thread O(seqlen_k), SAVED_PER_ROW entries per query for backward, the keys
    once more as int16; in backward the entries of the support.

    Args:
        init: how the first lower bound of tau is found: "maxima" (exact tau of the maxima of groups of keys) or
            "histogram" (of the candidates, as in the paper). The results agree to rounding; the time differs.
    """

    name = "numba"
    features = frozenset({"alpha per head", "causal mask", "padded seqlens"})

    def __init__(self, init: Literal["maxima", "histogram"] = "maxima") -> None:
        self._init = init

    def unavailable_reason(self) -> str | None:
        return None

    def unsupported_reasons(self, request: AttentionRequest) -> tuple[str, ...]:
        return _device_reasons(request.q)

    def entmax_unsupported_reasons(self, request: EntmaxRequest) -> tuple[str, ...]:
        return _device_reasons(request.x)

    def saved_like(self, request: AttentionRequest) -> list[Tensor]:
        if not request.save_for_backward:
            return []
        q, dtype = request.q, request.tau_dtype
        rows = (request.batch, request.heads_q, request.seqlen_q)
        tiles = (request.batch, request.heads_q, -(-request.seqlen_q // kernels.BLOCK_M))
        entries = kernels.BLOCK_M * SAVED_PER_ROW
        return [
            q.new_empty((*tiles, entries), dtype=torch.int32),
            q.new_empty((*tiles, entries), dtype=dtype),
            q.new_empty(rows, dtype=dtype),
            q.new_empty(rows, dtype=torch.int32),
            q.new_empty(tiles, dtype=torch.int8),
        ]

    def forward(self, request: AttentionRequest) -> AttentionResult:
        result, _ = self._forward(request)
        return result

    def _forward(
        self, request: AttentionRequest, blocks: tuple[int, int, int] = (0, 1, 1)
    ) -> tuple[AttentionResult, Tensor]:
        """The result and the support size per row; ``blocks`` is a block map to fill: address, block_m, block_n."""
        call = _Call(request, self._init)
        batch, heads_q, _, seqlen_q, seqlen_k, _, dim_v = call.shape
        out = call.empty(batch, heads_q, seqlen_q, dim_v)
        tau, shifts = call.empty(batch, heads_q, seqlen_q), call.empty(batch, heads_q, seqlen_q)
        sizes = call.empty(batch, heads_q, seqlen_q, dtype=torch.int32)
        states = call.empty(batch, heads_q, call.tiles_per_head, dtype=torch.int8)
        saved = self.saved_like(request)
        if seqlen_k == 0 or not call.n_tiles:
            out.zero_(), tau.fill_(torch.inf), shifts.fill_(torch.inf), sizes.zero_(), states.zero_()
        else:
            panels = _Panels(call)
            capacity = saved[0].shape[-1] if saved else 0
            if saved:
                keys, entries = (_addresses(t, capacity, call.n_tiles) for t in saved[:2])
            else:
                keys = entries = np.zeros(call.n_tiles, np.int64)
            # Each head from its last tile back: under a causal mask the costly tiles come first.
            items = np.arange(call.n_tiles).reshape(-1, call.tiles_per_head)[:, ::-1].ravel()
            outputs = [t.data_ptr() for t in (out, tau, shifts, sizes, states)]
            _run_forward(call, panels, items, keys, entries, capacity, outputs, blocks)
            dense = np.flatnonzero(states.numpy() == kernels.DENSE)
            if len(dense):
                self._dense_forward(call, panels, dense, outputs[:4], blocks)
        if saved:
            saved[2:] = [shifts, sizes, states]
        return AttentionResult(out.to(request.q.dtype), tau, saved), sizes

    def _dense_forward(
        self,
        call: _Call,
        panels: _Panels,
        items: np.ndarray,
        outputs: Sequence[int],
        blocks: tuple[int, int, int],
    ) -> None:
        dense = _DenseKeys(call)
        k_panels, v_rows = dense.panels(call.k), dense.rows(call.v)
        layout = kernels.dense_layout.py_func(call.shape, 0, dense.columns_v, call.size)
        workspace = call.workspace(layout[-1])
        run_stage(
            kernels.dense_forward,
            call.threads,
            workspace,
            call.shape,
            *call.at(call.q),
            k_panels.data_ptr(),
            v_rows.data_ptr(),
            dense.columns_v,
            _address(panels.first_bad),
            _address(call.lengths_q),
            _address(call.lengths_k),
            _address(call.alphas),
            call.scale,
            call.is_causal,
            len(items),
            _address(items),
            *outputs,
            *blocks,
            call.size,
            call.like,
        )

    def backward(
        self, request: AttentionRequest, out: Tensor, tau: Tensor, saved: Sequence[Tensor], dout: Tensor
    ) -> AttentionGrads:
        call = _Call(request, self._init)
        batch, heads_q, heads_kv, seqlen_q, seqlen_k, dim, dim_v = call.shape
        dq = call.empty(batch, heads_q, seqlen_q, dim)
        dk = call.empty(batch, heads_kv, seqlen_k, dim)
        dv = call.empty(batch, heads_kv, seqlen_k, dim_v)
        dalpha = None
        if request.alpha_heads is not None:
            dalpha = torch.zeros((batch, heads_q, seqlen_q), dtype=torch.float64)
        if seqlen_k == 0 or not call.n_tiles:
            dq.zero_(), dk.zero_(), dv.zero_()
        else:
            self._sparse_backward(call, tau, saved, call.readable(dout), dq, dk, dv, dalpha)
            if bool((saved[4] == kernels.DENSE).any()):
                self._dense_backward(call, tau, saved, call.readable(dout), dq, dk, dv, dalpha)
            self._spread_bad_rows(request, tau, dk, dv)
        return AttentionGrads(
            dq.to(request.q.dtype),
            dk.to(request.k.dtype),
            dv.to(request.v.dtype),
            in_dtype_of(request.alpha_heads, None if dalpha is None else dalpha.sum((0, 2))),
        )

    def _sparse_backward(
        self,
        call: _Call,
        tau: Tensor,
        saved: Sequence[Tensor],
        dout: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dalpha: Tensor | None,
    ) -> None:
        batch, _, heads_kv, _, seqlen_k, _, _ = call.shape
        _, _, _, sizes, states = saved
        support = _Support(call, saved)
        p, ds = (scratch(name, support.total * call.size) for name in ("p", "ds"))
        workspace = call.workspace((seqlen_k + simd.NR) * call.size)
        run_stage(
            kernels.dq,
            call.threads,
            workspace,
            call.shape,
            *call.at(call.q),
            *call.at(call.k),
            *call.at(call.v),
            *call.at(dout),
            _address(call.alphas),
            call.scale,
            tau.data_ptr(),
            sizes.data_ptr(),
            states.data_ptr(),
            _address(support.keys),
            _address(support.entries),
            _address(support.offsets),
            p,
            ds,
            dq.data_ptr(),
            0 if dalpha is None else dalpha.data_ptr(),
            call.size,
            call.like,
        )
        # Every part reads all entries of its heads, so no more parts than keep the threads busy.
        parts = min(-(-2 * call.threads // (batch * heads_kv)), seqlen_k) if call.threads > 1 else 1
        per_thread = (seqlen_k + 2) * 8 + support.largest_head * (4 + 2 * call.size) + 64
        per_thread = -(-per_thread // 64) * 64
        workspace = call.workspace(per_thread)
        run_stage(
            kernels.dkv,
            call.threads,
            workspace,
            per_thread,
            call.shape,
            *call.at(call.q),
            *call.at(dout),
            sizes.data_ptr(),
            states.data_ptr(),
            _address(support.keys),
            _address(support.offsets),
            p,
            ds,
            parts,
            dk.data_ptr(),
            dv.data_ptr(),
            call.size,
            call.like,
        )

    def _dense_backward(
        self,
        call: _Call,
        tau: Tensor,
        saved: Sequence[Tensor],
        dout: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        dalpha: Tensor | None,
    ) -> None:
        batch, _, heads_kv, _, seqlen_k, dim, dim_v = call.shape
        _, _, shifts, _, states = saved
        dense = _DenseKeys(call)
        k_panels, v_panels = dense.panels(call.k), dense.panels(call.v)
        # A key that is not finite and that no row of a tile sees still meets a weight of 0 in the products.
        k_rows = dense.rows(call.k).nan_to_num()
        parts = min(-(-call.threads // (batch * heads_kv)), call.n_tiles)
        padded_k = kernels.dense_columns.py_func(seqlen_k, call.size)
        dk_sums = torch.zeros((parts, batch, heads_kv, padded_k, dense.columns_q), dtype=call.dtype)
        dv_sums = torch.zeros((parts, batch, heads_kv, padded_k, dense.columns_v), dtype=call.dtype)
        layout = kernels.dense_layout.py_func(call.shape, dense.columns_q, dense.columns_v, call.size)
        workspace = call.workspace(layout[-1])
        run_stage(
            kernels.dense_backward,
            call.threads,
            workspace,
            call.shape,
            *call.at(call.q),
            *call.at(dout),
            k_panels.data_ptr(),
            v_panels.data_ptr(),
            k_rows.data_ptr(),
            dense.columns_q,
            dense.columns_v,
            _address(call.lengths_q),
            _address(call.lengths_k),
            _address(call.alphas),
            call.scale,
            call.is_causal,
            parts,
            tau.data_ptr(),
            shifts.data_ptr(),
            states.data_ptr(),
            dq.data_ptr(),
            0 if dalpha is None else dalpha.data_ptr(),
            dk_sums.data_ptr(),
            dv_sums.data_ptr(),
            padded_k,
            call.size,
            call.like,
        )
        dk += dk_sums.sum(0)[:, :, :seqlen_k, :dim]
        dv += dv_sums.sum(0)[:, :, :seqlen_k, :dim_v]

    def _spread_bad_rows(self, request: AttentionRequest, tau: Tensor, dk: Tensor, dv: Tensor) -> None:
        """NaN in the gradients of all keys that a row without a tau sees."""
        bad = tau.isnan()
        if not bad.any():
            return
        group = request.heads_q // request.heads_kv
        seen = keys_seen(request)[:, None].expand_as(bad).masked_fill(~bad, 0).amax(-1)
        for b, h in seen.nonzero().tolist():
            for gradient in (dk, dv):
                gradient[b, h // group, : seen[b, h]] = torch.nan

    def support(self, request: AttentionRequest, block_m: int, block_n: int) -> SupportStats:
        # Values of width 0: the support is a matter of q and k alone.
        request = replace(request, v=request.k[..., :0], save_for_backward=False)
        blocks = (-(-request.seqlen_q // block_m), -(-request.seqlen_k // block_n))
        block_map = torch.zeros((request.batch, request.heads_q, *blocks), dtype=torch.int8)
        result, sizes = self._forward(request, (block_map.data_ptr(), block_m, block_n))
        return support_stats(request, result.tau, sizes, block_map, block_m, block_n)

    def entmax(self, request: EntmaxRequest) -> Tensor:
        x = request.x.detach()
        dtype, like, threads = _entmax_types(x)
        rows, n = x.shape
        z = x.to(dtype)
        z = z if n <= 1 or z.stride(1) == 1 else z.contiguous()
        p = torch.empty((rows, n), dtype=dtype)
        if p.numel():
            alphas = _row_alphas(request.alpha, request.alpha_rows, rows)
            run_stage(
                kernels.entmax_rows,
                threads,
                scratch("workspace", threads * (n * like.itemsize + 128)),
                rows,
                n,
                z.data_ptr(),
                z.stride(0) * like.itemsize,
                _address(alphas),
                p.data_ptr(),
                like.itemsize,
                like,
            )
        return p.to(x.dtype)

    def entmax_backward(
        self, p: Tensor, dp: Tensor, alpha: float, alpha_rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        dtype, like, threads = _entmax_types(p)
        rows, n = p.shape
        weights, upstream = (t.detach().to(dtype).contiguous() for t in (p, dp))
        dx = torch.empty((rows, n), dtype=dtype)
        dalpha = None if alpha_rows is None else torch.zeros(rows, dtype=torch.float64)
        if dx.numel():
            alphas = _row_alphas(alpha, alpha_rows, rows)
            run_stage(
                kernels.entmax_rows_backward,
                threads,
                scratch("workspace", threads * (n * like.itemsize + 192)),
                rows,
                n,
                weights.data_ptr(),
                upstream.data_ptr(),
                _address(alphas),
                dx.data_ptr(),
                0 if dalpha is None else dalpha.data_ptr(),
                like.itemsize,
                like,
            )
        return dx.to(p.dtype), in_dtype_of(alpha_rows, dalpha)


def _device_reasons(x: Tensor) -> tuple[str, ...]:
    return () if x.device.type == "cpu" else (f"got tensors on {x.device}; needs tensors on the CPU",)


def _entmax_types(x: Tensor) -> tuple[torch.dtype, Any, int]:
    threads = 1 if x.numel() < SMALL_WORK // 64 else torch.get_num_threads()
    if x.dtype == torch.float64:
        return torch.float64, np.float64(0), threads
    return torch.float32, np.float32(0), threads


def _row_alphas(alpha: float, alpha_rows: Tensor | None, rows: int) -> np.ndarray:
    if alpha_rows is None:
        return np.full(rows, alpha)
    return alpha_rows.detach().double().contiguous().numpy()


BACKEND = NumbaBackend()
