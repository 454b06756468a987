"""What is timed: shapes, alpha, mask and inputs, each case with the support that its inputs turn out to have."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import adasplash2
from adasplash2.bench import cases as shared
from adasplash2.testing import Inputs

__all__ = ["CASES", "Case", "captured", "find"]

CAPTURED = Path(__file__).parent / "data" / "demo_qkv.npz"

DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}


@dataclass(frozen=True)
class Case(shared.Case):
    """One comparison: every provider gets the same tensors.

    Attributes:
        kind: as for every benchmark, or "real": captured from the trained model of the demo.
        seqlen: queries and keys; for entmax the rows and the columns of the matrix.
        op: "attention", or "entmax" of a matrix.
        dense_peers: whether the providers that need O(seqlen ** 2) memory, or long to compile, are timed here.
        compare_inits: whether the Numba backend's other initialisation of tau is timed too.
        quick: whether a quick run takes this case.
        device: type of the device that the case is meant for.
    """

    op: Literal["attention", "entmax"] = "attention"
    dense_peers: bool = False
    compare_inits: bool = False
    quick: bool = False
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Unique, readable, and what ``--case`` is matched with."""
        parts = [self.kind]
        if self.share != 0.25:
            parts.append(f"share{self.share:g}")
        if self.gain != 1:
            parts.append(f"gain{self.gain:g}")
        parts.append(str(self.seqlen))
        if self.op == "attention":
            parts += [f"d{self.head_dim}", "causal" if self.is_causal else "full"]
            if (self.batch, self.heads) != (1, 8):
                parts.append(f"b{self.batch}h{self.heads}")
        else:
            parts.insert(0, "entmax")
        if self.alpha != 1.5:
            parts.append(f"alpha{self.alpha:g}")
        parts.append(DTYPE_NAMES[self.dtype])
        return "-".join(parts if self.device == "cpu" else [*parts, self.device])

    def inputs(self, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
        """The arguments, (q, k, v) or (x,), and a gradient of the output."""
        if self.op == "entmax":
            generator = torch.Generator().manual_seed(0)
            x, dp = (torch.randn(self.seqlen, self.seqlen, generator=generator) for _ in range(2))
            return ((self.gain * x).to(device, self.dtype),), dp.to(device, self.dtype)
        if self.kind == "real":
            made = captured(batch=self.batch, heads_q=self.heads, seqlen_q=self.seqlen, head_dim=self.head_dim)
            *arguments, dout = (tensor.to(device, self.dtype) for tensor in made)
            return tuple(arguments), dout
        return super().inputs(device)

    def support(self, arguments: tuple[Tensor, ...], **options: Any) -> dict[str, float]:
        """As of every case; of entmax without blocks."""
        if self.op == "entmax":
            size = (adasplash2.entmax(arguments[0], self.alpha) > 0).sum(-1).double().mean().item()
            return {"size": size, "elements": size / self.seqlen}
        return super().support(arguments, **options)

    def describe(self) -> dict[str, Any]:
        """For the results file."""
        return {"name": self.name} | asdict(self) | {"dtype": DTYPE_NAMES[self.dtype]}


@functools.cache
def _load_captured() -> dict[str, Tensor]:
    with np.load(CAPTURED) as stored:
        return {name: torch.from_numpy(stored[name]).float() for name in ("q", "k", "v")}


def captured(*, batch: int, heads_q: int, seqlen_q: int, head_dim: int) -> Inputs:
    """q, k, v of the demo's trained entmax model, and a random dout.

    The stored heads and tokens are repeated where more are asked for. A repeated key has a twin with the same score, so
    past the stored length the support grows with the length.

    Raises:
        ValueError: if the model has another head_dim.
    """
    stored = _load_captured()
    stored_heads, stored_seqlen, stored_head_dim = stored["q"].shape
    if head_dim != stored_head_dim:
        raise ValueError(f"head_dim={head_dim}: expected {stored_head_dim}, the head_dim of {CAPTURED.name}")
    tiles = (batch, -(-heads_q // stored_heads), -(-seqlen_q // stored_seqlen), 1)
    q, k, v = (stored[name].tile(tiles)[:, :heads_q, :seqlen_q].contiguous() for name in ("q", "k", "v"))
    return Inputs(q, k, v, torch.randn(q.shape, generator=torch.Generator().manual_seed(0)))


BF16 = torch.bfloat16
# The kinds of inputs that softmax attention is compared on, from dense to sparse.
KINDS = ("narrow", "iid", "real", "topics", "wide", "drifting")

_GPU: dict[str, Any] = {"heads": 16, "dtype": BF16, "device": "cuda"}

CASES: tuple[Case, ...] = (
    *(Case(kind, 512, quick=kind in ("iid", "real")) for kind in KINDS),
    *(Case(kind, 1024, quick=kind == "wide", dense_peers=kind == "iid") for kind in KINDS),
    *(Case(kind, 2048, compare_inits=True) for kind in KINDS),
    *(Case(kind, 4096) for kind in KINDS),
    *(Case(kind, 8192) for kind in ("iid", "topics", "drifting")),
    Case("narrow", 2048, is_causal=False),
    *(Case(kind, 4096, is_causal=False) for kind in ("iid", "wide", "drifting")),
    # The same draws, ever sharper: time over sparsity.
    *(Case("iid", 2048, gain=gain) for gain in (0.1, 0.3, 0.5, 2, 8)),
    *(Case("topics", 4096, share=share) for share in (0.05, 0.6)),
    *(Case(kind, seqlen, head_dim=128) for seqlen in (512, 2048) for kind in ("iid", "wide", "drifting")),
    Case("iid", 4096, head_dim=128),
    *(Case(kind, 2048, head_dim=96) for kind in ("iid", "wide", "drifting")),
    *(Case(kind, 512, dtype=BF16, quick=kind == "iid") for kind in ("iid", "real")),
    *(Case(kind, 2048, dtype=BF16) for kind in ("iid", "real", "wide", "drifting")),
    *(Case("iid", 2048, alpha=alpha) for alpha in (1.25, 2.0)),
    Case("iid", 4096, heads=1),
    Case("iid", 512, op="entmax", quick=True),
    Case("iid", 4096, op="entmax"),
    Case("iid", 4096, op="entmax", alpha=2.0),
    *(
        Case("topics", seqlen, head_dim=head_dim, share=share, quick=seqlen == 8192, **_GPU)
        for head_dim, seqlen, shares in (
            (64, 8192, (0.5, 0.25, 0.1)),
            (64, 32768, (0.25, 0.1)),
            (128, 8192, (0.5, 0.25, 0.1)),
            (128, 16384, (0.5, 0.25, 0.1)),
        )
        for share in shares
    ),
    Case("topics", 131072, share=0.25, **(_GPU | {"heads": 4})),
    *(Case(kind, 8192, **_GPU) for kind in ("iid", "wide", "narrow")),
    # Entries everywhere, and few of them.
    Case("iid", 32768, **_GPU),
    *(Case("iid", seqlen, gain=3.5, **_GPU) for seqlen in (8192, 32768)),
    *(Case("topics", 8192, alpha=alpha, **_GPU) for alpha in (1.3, 2.0)),
    Case("topics", 8192, is_causal=False, **_GPU),
    Case("topics", 8192, **(_GPU | {"dtype": torch.float16})),
    # As many queries in shorter sequences.
    *(
        Case(kind, seqlen, head_dim=head_dim, batch=16_384 // seqlen, **_GPU)
        for kind, seqlen, head_dim in (
            ("topics", 4096, 64),
            ("topics", 4096, 128),
            ("iid", 4096, 64),
            ("topics", 2048, 64),
            ("iid", 2048, 64),
        )
    ),
    Case("iid", 4096, op="entmax", device="cuda"),
)


def find(patterns: list[str], quick: bool = False, device: str = "cpu") -> list[Case]:
    """The cases for a type of device whose names match a shell pattern, all without patterns; quick: fewer of them.

    Raises:
        ValueError: if a pattern matches nothing.
    """
    pool = [case for case in CASES if case.device == device and (case.quick or not quick)]
    for pattern in patterns:
        if not any(fnmatch(case.name, pattern) for case in pool):
            raise ValueError(f"case={pattern!r}: matches none of {', '.join(case.name for case in pool)}")
    return [case for case in pool if not patterns or any(fnmatch(case.name, pattern) for pattern in patterns)]
