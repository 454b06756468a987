"""Hypothesis strategies: they draw the structure of a call and a seed; the arrays are built from the seed."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from adasplash2.contract import AttentionRequest, EntmaxRequest
from adasplash2.testing import INPUT_KINDS, make_inputs

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HEAD_DIMS = (64, 16, 1, 3, 8, 40, 72, 80, 96, 100, 128, 256)
LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "columns", "expanded")

# Blocks of 16, 48, 64, 128 and 256 and one more or less, primes, and chunks of 1024 keys.
_LENGTHS = (1, 0, 2, 7, 15, 16, 17, 31, 47, 48, 49, 63, 64, 65, 127, 128, 129, 255, 256, 257, 509)
_KEY_LENGTHS = (*_LENGTHS, 1023, 1024, 1025, 2051)

# Entries of all score matrices of one case together: what the dense truth costs, or Triton's interpreter.
MAX_PAIRS = 40_000 if os.environ.get("TRITON_INTERPRET") == "1" else 300_000


@dataclass(frozen=True)
class Case:
    """The structure of one attention call; ``build`` makes the arrays, the same each time."""

    seqlen_q: int
    seqlen_k: int
    head_dim: int = 16
    head_dim_v: int = 16
    batch: int = 1
    heads_kv: int = 1
    group: int = 1
    dtype: torch.dtype = torch.float32
    alpha: float | tuple[float, ...] = 1.5
    is_causal: bool = False
    seqlens_q: tuple[int, ...] | None = None
    seqlens_k: tuple[int, ...] | None = None
    kind: str = "iid"
    gain: float = 1.0
    shift: float = 0.0
    layout: str = "contiguous"
    seed: int = 0

    def build(self, device: torch.device) -> tuple[AttentionRequest, Tensor]:
        """The request and dout. What lies past the lengths and between the strides is NaN."""
        inputs = make_inputs(
            self.kind,
            batch=self.batch,
            heads_q=self.heads_kv * self.group,
            heads_kv=self.heads_kv,
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            dtype=self.dtype,
            device=device,
            seed=self.seed,
        )
        scale = self.gain / math.sqrt(self.head_dim)
        if self.shift:
            # Every score of a row falls by about the shift.
            size = math.sqrt(self.shift * math.sqrt(self.head_dim))
            inputs.q[..., -1], inputs.k[..., -1] = size, -size
        lengths_q, lengths_k = self.seqlens_q, self.seqlens_k
        for tensor, lengths in zip(inputs, (lengths_q, lengths_k, lengths_k, lengths_q), strict=True):
            for b, length in enumerate(lengths or ()):
                tensor[b, :, length:] = torch.nan
        q, k, v, dout = (with_layout(tensor, self.layout) for tensor in inputs)
        alpha_heads = None
        if isinstance(self.alpha, tuple):
            alpha_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
            alpha_heads = torch.tensor(self.alpha, dtype=alpha_dtype, device=device)
        request = AttentionRequest(
            q,
            k,
            v,
            scale,
            alpha=1.5 if isinstance(self.alpha, tuple) else self.alpha,
            alpha_heads=alpha_heads,
            is_causal=self.is_causal,
            seqlens_q=None if lengths_q is None else torch.tensor(lengths_q, device=device),
            seqlens_k=None if lengths_k is None else torch.tensor(lengths_k, dtype=torch.int32, device=device),
        )
        return request, dout


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout, with NaN in between ("expanded": the first of the batch for all)."""
    batch, heads, length, dim = tensor.shape
    if layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "columns":
        return tensor.mT.contiguous().mT
    if layout == "expanded":
        return tensor[:1].expand(batch, heads, length, dim)
    if layout == "offset":
        memory = tensor.new_full((tensor.numel() + 3,), torch.nan)
        view = memory[1:-2].view(tensor.shape)
    else:
        memory = tensor.new_full((batch, heads + 1, 2 * length + 1, dim + 3), torch.nan)
        view = memory[:, 1:, 1::2, 2:-1]
    return view.copy_(tensor)


def _lengths(limit: int, menu: tuple[int, ...]) -> st.SearchStrategy[int]:
    return st.one_of(st.sampled_from([n for n in menu if n <= limit]), st.integers(0, min(limit, 600)))


def _alphas() -> st.SearchStrategy[float]:
    return st.one_of(
        st.sampled_from((1.5, 2.0)),
        st.sampled_from((1.5, 2.0, 1.01, 1.1, 1.25, 4 / 3, 1.75, 1.95)),
        st.floats(1.02, 2.0).map(lambda alpha: round(alpha, 3)),
    )


@st.composite
def cases(draw: st.DrawFn, /, **fixed: Any) -> Case:
    """Attention calls; ``fixed`` fields of ``Case`` are not drawn."""

    def of(name: str, strategy: st.SearchStrategy) -> Any:
        return fixed[name] if name in fixed else draw(strategy, label=name)

    batch = of("batch", st.integers(1, 3))
    heads_kv = of("heads_kv", st.integers(1, 2))
    group = of("group", st.sampled_from((1, 1, 2, 3)))
    heads = batch * heads_kv * group
    seqlen_q = of("seqlen_q", _lengths(min(600, MAX_PAIRS // heads), _LENGTHS))
    seqlen_k = of("seqlen_k", _lengths(MAX_PAIRS // heads // max(seqlen_q, 1), _KEY_LENGTHS))
    head_dim = of("head_dim", st.sampled_from(HEAD_DIMS))
    dtype = of("dtype", st.sampled_from(DTYPES))
    one_alpha = _alphas()
    layout = of("layout", st.sampled_from(LAYOUTS))

    def seqlens(length: int) -> st.SearchStrategy[tuple[int, ...] | None]:
        if layout == "expanded":  # one memory for all sequences cannot be padded for each
            return st.none()
        one = st.one_of(st.sampled_from((0, length)), st.integers(0, length))
        return st.none() | st.tuples(*[one] * batch)

    return Case(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=of("head_dim_v", st.just(head_dim) | st.sampled_from(HEAD_DIMS)),
        batch=batch,
        heads_kv=heads_kv,
        group=group,
        dtype=dtype,
        alpha=of("alpha", one_alpha | st.tuples(*[one_alpha] * (heads_kv * group))),
        is_causal=of("is_causal", st.booleans()),
        seqlens_q=of("seqlens_q", seqlens(seqlen_q)),
        seqlens_k=of("seqlens_k", seqlens(seqlen_k)),
        kind=of("kind", st.sampled_from(INPUT_KINDS)),
        gain=of("gain", st.sampled_from((1.0, 1.0, 1e-3, 0.1, 10.0, 300.0, 1e4))),
        shift=of("shift", st.sampled_from((0.0, 0.0, 0.0, 2e3, 1e5))),
        layout=layout,
        seed=of("seed", st.integers(0, 2**31 - 1)),
    )


@dataclass(frozen=True)
class EntmaxCase:
    """The structure of one entmax call over rows."""

    rows: int
    n: int
    dtype: torch.dtype = torch.float32
    alpha: float | None = 1.5  # None: one for each row
    gain: float = 1.0
    shift: float = 0.0
    ties: bool = False
    masked: bool = False
    layout: str = "contiguous"
    seed: int = 0

    def build(self, device: torch.device) -> tuple[EntmaxRequest, Tensor]:
        """The request and dp."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.rows, self.n, generator=generator)
        dp = torch.randn(self.rows, self.n, generator=generator)
        if self.ties:
            x = x.round()
        x = x * self.gain + self.shift
        if self.masked:
            x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.3, -torch.inf)
        alpha_rows = None
        if self.alpha is None:
            alpha_rows = (2 - torch.rand(self.rows, generator=generator) * 0.95).to(device)
        x, dp = (with_layout(t.to(device, self.dtype)[None, None], self.layout)[0, 0] for t in (x, dp))
        return EntmaxRequest(x, 1.5 if self.alpha is None else self.alpha, alpha_rows), dp


@st.composite
def entmax_cases(draw: st.DrawFn) -> EntmaxCase:
    """Calls of entmax over rows."""
    rows = draw(_lengths(600, _LENGTHS), label="rows")
    return EntmaxCase(
        rows=rows,
        n=draw(_lengths(MAX_PAIRS // max(rows, 1), _KEY_LENGTHS), label="n"),
        dtype=draw(st.sampled_from(DTYPES), label="dtype"),
        alpha=draw(st.none() | _alphas(), label="alpha"),
        gain=draw(st.sampled_from((1.0, 1e-3, 3.5, 300.0)), label="gain"),
        shift=draw(st.sampled_from((0.0, -2e3, 3e4)), label="shift"),
        ties=draw(st.booleans(), label="ties"),
        masked=draw(st.booleans(), label="masked"),
        layout=draw(st.sampled_from(LAYOUTS), label="layout"),
        seed=draw(st.integers(0, 2**31 - 1), label="seed"),
    )
