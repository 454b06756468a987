"""What the front and the backends agree on: the requests, the results, the backend protocol, the errors.

A request is validated once, in the front. Each backend answers it with a list of reasons against it (empty means
yes); the choice of ``backend="auto"``, the error for a backend asked for by name and ``explain`` all come from those
lists.

Equations (AdaSplash-2, arXiv 2604.15180; one convention in the whole project), for one query row::

    z_j = (alpha - 1) * scale * q . k_j
    p_j = max(z_j - tau, 0) ** (1 / (alpha - 1)),    sum_j p_j = 1  (fixes tau)
    out = sum_j p_j v_j
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "AttentionGrads",
    "AttentionRequest",
    "AttentionResult",
    "Backend",
    "EntmaxRequest",
    "Explanation",
    "NoBackendError",
    "SupportStats",
    "UnsupportedError",
]


class UnsupportedError(ValueError):
    """A backend asked for by name cannot serve the call; the message gives every reason."""


class NoBackendError(UnsupportedError):
    """No backend can serve the call; the message lists every backend with every reason."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionRequest:
    """One call of attention, already validated for shapes, dtypes and devices.

    A field whose metadata names a ``feature`` is optional for a backend: when the field differs from its default,
    only backends that list the feature in ``Backend.features`` are asked. A new field (packed sequences, windows,
    ...) is therefore added here alone, and a backend that does not know it answers with a reason by itself.

    Attributes:
        q: (batch, heads_q, seqlen_q, head_dim), float16, bfloat16, float32 or float64, any strides.
        k: (batch, heads_kv, seqlen_k, head_dim), q's dtype and device; heads_q is a multiple of heads_kv.
        v: (batch, heads_kv, seqlen_k, head_dim_v), q's dtype and device.
        scale: factor of the scores q . k.
        alpha: in (1, 2]; ignored where ``alpha_heads`` is given.
        alpha_heads: (heads_q,) floating tensor with entries in (1, 2], on q's device, or None.
        is_causal: query i sees key j only if j - i <= seqlen_k - seqlen_q (bottom right; with ``seqlens``, their
            values of the sequence in place of the padded lengths).
        seqlens_q: (batch,) int32 or int64, valid queries of each sequence, on q's device, or None. Rows past it
            give zeros, and take no gradient.
        seqlens_k: (batch,) int32 or int64, valid keys of each sequence, on q's device, or None. The entries of
            ``alpha_heads`` and of both seqlens are checked on the CPU alone: on an accelerator a backend must not read
            or write out of bounds whatever they are.
        save_for_backward: whether ``AttentionResult.saved`` must serve a later ``Backend.backward``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    alpha: float = 1.5
    alpha_heads: Tensor | None = field(default=None, metadata={"feature": "alpha per head"})
    is_causal: bool = field(default=False, metadata={"feature": "causal mask"})
    seqlens_q: Tensor | None = field(default=None, metadata={"feature": "padded seqlens"})
    seqlens_k: Tensor | None = field(default=None, metadata={"feature": "padded seqlens"})
    save_for_backward: bool = False

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads_q(self) -> int:
        return self.q.shape[1]

    @property
    def heads_kv(self) -> int:
        return self.k.shape[1]

    @property
    def seqlen_q(self) -> int:
        return self.q.shape[2]

    @property
    def seqlen_k(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        return self.q.shape[3]

    @property
    def head_dim_v(self) -> int:
        return self.v.shape[3]

    @property
    def tau_dtype(self) -> torch.dtype:
        """float64 for float64 inputs, float32 for all others."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def features(self) -> tuple[str, ...]:
        """The optional features that this call uses, without repeats."""
        used = [feature for name, default, feature in _OPTIONAL if getattr(self, name) is not default]
        return tuple(dict.fromkeys(used)) if used else ()


# Read once: fields() costs more than all the rest of a dispatch.
_OPTIONAL = [(f.name, f.default, f.metadata["feature"]) for f in fields(AttentionRequest) if "feature" in f.metadata]


@dataclass(frozen=True, slots=True, eq=False)
class EntmaxRequest:
    """One call of entmax over the rows of a matrix.

    Attributes:
        x: (rows, n), float16, bfloat16, float32 or float64, any strides. Scores before the factor (alpha - 1).
        alpha: in (1, 2]; ignored where ``alpha_rows`` is given.
        alpha_rows: (rows,) floating tensor with entries in (1, 2], on x's device, or None.
    """

    x: Tensor
    alpha: float = 1.5
    alpha_rows: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.x.device


class AttentionResult(NamedTuple):
    """out (q's dtype, contiguous), tau (``tau_dtype``), and what backward needs.

    A row that sees no key, or lies past its ``seqlens_q``, has zeros in out and +inf in tau (with which every p_j
    of the equations is 0).
    """

    out: Tensor  # (batch, heads_q, seqlen_q, head_dim_v)
    tau: Tensor  # (batch, heads_q, seqlen_q), in units of z
    saved: list[Tensor]


class AttentionGrads(NamedTuple):
    """Gradients in the dtypes of their inputs, contiguous; dalpha_heads is None unless ``alpha_heads`` was given."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dalpha_heads: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class SupportStats:
    """Where the attention weights are not zero; never an array of seqlen_q times seqlen_k.

    Attributes:
        tau: (batch, heads_q, seqlen_q), float32 (float64 for float64 inputs), in units of z; +inf for a row that sees
            no key.
        size: (batch, heads_q, seqlen_q) int32, keys with p > 0 in each row.
        block_map: (batch, heads_q, ceil(seqlen_q / block_m), ceil(seqlen_k / block_n)) bool, blocks that hold support.
        block_m: queries per block.
        block_n: keys per block.
        element_density: share of the visible (query, key) pairs with p > 0.
        block_density: share of the blocks with at least one visible pair that hold support.
    """

    tau: Tensor
    size: Tensor
    block_map: Tensor
    block_m: int
    block_n: int
    element_density: float
    block_density: float


@runtime_checkable
class Backend(Protocol):
    """What a backend module exposes as ``BACKEND``. All tensors of a call live on the device of ``request.q``."""

    name: str
    features: frozenset[str]

    def unavailable_reason(self) -> str | None:
        """Why this machine cannot run the backend (one sentence), or None. Imports the heavy library; never raises."""

    def unsupported_reasons(self, request: AttentionRequest) -> tuple[str, ...]:
        """Reasons against this call, each as "got X; needs Y". Cheap, pure, reads no tensor data, never raises."""

    def entmax_unsupported_reasons(self, request: EntmaxRequest) -> tuple[str, ...]:
        """The same for a call of entmax."""

    def saved_like(self, request: AttentionRequest) -> list[Tensor]:
        """Empty tensors with the shapes and dtypes of ``AttentionResult.saved``, from shapes, dtypes and flags."""

    def forward(self, request: AttentionRequest) -> AttentionResult: ...

    def backward(
        self, request: AttentionRequest, out: Tensor, tau: Tensor, saved: Sequence[Tensor], dout: Tensor
    ) -> AttentionGrads:
        """Gradients of sum(out * dout).

        out, tau and ``saved`` are forward's; dout has out's shape and dtype, any strides.
        """

    def support(self, request: AttentionRequest, block_m: int, block_n: int) -> SupportStats: ...

    def entmax(self, request: EntmaxRequest) -> Tensor:
        """p with x's shape and dtype, contiguous."""

    def entmax_backward(
        self, p: Tensor, dp: Tensor, alpha: float, alpha_rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(dx, dalpha_rows) from the output p alone; dalpha_rows is None unless ``alpha_rows`` is given."""


class Explanation(NamedTuple):
    """What ``adasplash2.explain`` returns: who would serve the call, and why each other one would not."""

    chosen: str | None
    reasons: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        head = f"served by {self.chosen}" if self.chosen else "served by no backend"
        lines = [
            f"  {name}: {'; '.join(reasons) if reasons else 'can serve this call'}"
            for name, reasons in self.reasons.items()
        ]
        return "\n".join([head, *lines])
