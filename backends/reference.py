"""Dense float64 attention and entmax: the truth that the other backends are tested against, never chosen by "auto".

Whatever the input dtype, everything is computed in float64 and rounded once at the end. Scores are taken relative to
the largest score of their row, so that their magnitude does not matter::

    x_j = s_j - max s  <= 0,   s_j = scale * q . k_j
    u_j = max(1 + (alpha - 1) * (x_j - lam), 0),   p_j = u_j ** r,   r = 1 / (alpha - 1)
    tau = max z - 1 + (alpha - 1) * lam

``lam`` takes the place of tau: it stays between 0 and log(n) for every alpha, is the logsumexp of x in the limit
alpha -> 1, and 1 + (alpha - 1) * ... goes through log1p, so no digit is lost as alpha approaches 1.

Independent of the other backends in how it finds lam: by sorting at alpha = 1.5 and alpha = 2 (Peters et al. 2019,
arXiv 1905.05702; Martins and Astudillo 2016, arXiv 1602.02068), by bisection elsewhere. p is never normalised: its sum
says how good lam is.

Gradients in closed form, with w_j = p_j ** (2 - alpha) on the support and dp_j = dout . v_j::

    delta = sum w dp / sum w        ds_j = w_j (dp_j - delta)

For alpha (Correia et al. 2019, arXiv 1909.00015, Proposition 1), rewritten with y_j = -log u_j and
phi_j = exp(y_j) - 1 - y_j, because the original form cancels like (alpha - 1) ** -2::

    dp_j / dalpha = p_j (Phi (1 + y_j) - phi_j (1 + Y)) / ((alpha - 1) ** 2 sum w),    Y = sum p y,  Phi = sum p phi

Non-finite input: a NaN or inf in a query gives NaN in its row, in a key in every row that sees the key, in a value in
every row whose support holds it. In ``entmax`` a score of -inf is a key that is not there (p = 0); a row with NaN or
+inf, or of -inf alone, gives NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adasplash2.contract import AttentionGrads, AttentionRequest, AttentionResult, EntmaxRequest, SupportStats

__all__ = ["BACKEND", "Dense", "ReferenceBackend", "Slice", "any_in_blocks", "find_lam", "relative_scores", "weights"]

# Bytes of one dense array of scores. Queries are taken in slices that keep to it; a call holds about ten such arrays.
_SLICE_BYTES = 1 << 27

# Newton steps end after 5 to 15 rounds, bisection alone would after 60.
_MAX_ROUNDS = 100


def _sorted_lam(x: Tensor, alpha: float) -> Tensor:
    """lam by sorting, for alpha 1.5 or 2."""
    z = ((alpha - 1) * x).clamp(min=-1)  # tau >= -1, so nothing below can be in the support
    ordered = z.sort(dim=-1, descending=True).values
    count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    mean = ordered.cumsum(-1) / count
    if alpha == 2:
        tau = mean - 1 / count
    else:
        spread = ordered.square().cumsum(-1) - count * mean.square()
        tau = mean - ((1 - spread) / count).clamp(min=0).sqrt()
    size = (tau <= ordered).sum(-1, keepdim=True)
    # The cumulative sums have found the support; tau itself is better from sums about the mean.
    support = z >= ordered.gather(-1, size - 1)
    count = support.sum(-1, keepdim=True).to(x.dtype)
    mean = (z * support).sum(-1, keepdim=True) / count
    if alpha == 2:
        tau = mean - 1 / count
    else:
        spread = ((z - mean).square() * support).sum(-1, keepdim=True)
        tau = mean - ((1 - spread) / count).clamp(min=0).sqrt()
    return (tau + 1) / (alpha - 1)


def _bisected_lam(x: Tensor, alpha: float | Tensor) -> Tensor:
    """lam by bisection, for any alpha, sped up by Newton steps on log(sum p) wherever they stay inside the bracket.

    The bracket is max z - 1 <= tau <= max z - n ** (1 - alpha): the largest of the p is at most 1 and at least 1 / n.
    """
    keys = torch.isfinite(x).sum(-1, keepdim=True).to(x.dtype)
    low = torch.zeros_like(keys)
    high = -torch.expm1((1 - alpha) * torch.log(keys)) / (alpha - 1)
    lam = (low + high) / 2
    noise = 32 * torch.finfo(x.dtype).eps  # rounding of sum p, at most eps times the entropy of p and some
    for _ in range(_MAX_ROUNDS):
        p, w, _ = weights(x, lam, alpha)
        total = p.sum(-1, keepdim=True)
        low = torch.where(total >= 1, lam, low)
        high = torch.where(total <= 1, lam, high)
        step = total.log() * total / w.sum(-1, keepdim=True)
        done = step.abs() <= noise * lam.clamp(min=1)
        inside = (lam + step >= low) & (lam + step <= high)
        lam = torch.where(inside | done, lam + step, (low + high) / 2)
        if bool(done.all()):
            break
    return lam


def weights(x: Tensor, lam: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p, w = p ** (2 - alpha) and log u at any lam; off the support 0, 0 and -inf."""
    u_minus_1 = ((alpha - 1) * (x - lam)).clamp(min=-1)
    log_u = torch.log1p(u_minus_1)
    p = torch.exp(log_u / (alpha - 1))
    return p, (p / (1 + u_minus_1)).masked_fill(p == 0, 0), log_u


def find_lam(x: Tensor, alpha: float | Tensor) -> Tensor:
    """lam (..., 1) for relative scores x (..., n), -inf where there is no key, with maximum 0 in each row."""
    if not isinstance(alpha, Tensor) and alpha in (1.5, 2):
        return _sorted_lam(x, alpha)
    return _bisected_lam(x, alpha)


def relative_scores(s: Tensor) -> tuple[Tensor, Tensor]:
    """Scores relative to the row maximum, and the maximum; a row of -inf alone becomes a row of zeros (maximum 0)."""
    top = s.amax(-1, keepdim=True)
    empty = top == -torch.inf
    top = torch.where(empty, 0, top)
    return torch.where(empty, 0, s - top), top


def _score_grads(w: Tensor, dp: Tensor) -> Tensor:
    """ds from w and dp, both 0 off the support."""
    delta = (w * dp).sum(-1, keepdim=True) / _positive(w.sum(-1, keepdim=True))
    return (w * (dp - delta)).masked_fill(w == 0, 0)  # a NaN in delta stays on the support


def _alpha_grads(p: Tensor, w: Tensor, y: Tensor, dp: Tensor, alpha: float | Tensor) -> Tensor:
    """dalpha per row (..., 1) from p, w, y = -log u and dp, all 0 off the support."""
    phi = torch.expm1(y) - y
    jacobian = p * ((p * phi).sum(-1, keepdim=True) * (1 + y) - phi * (1 + (p * y).sum(-1, keepdim=True)))
    return (jacobian * dp).sum(-1, keepdim=True) / (_positive(w.sum(-1, keepdim=True)) * (alpha - 1) ** 2)


def _positive(w_sum: Tensor) -> Tensor:
    """The sum of w, at least 1 where there is a support; an empty row has none."""
    return w_sum.masked_fill(w_sum == 0, 1)


@dataclass(frozen=True, slots=True)
class Slice:
    """The dense state of some queries, all heads; finite throughout, with the marks that say where NaN belongs."""

    rows: slice
    q: Tensor  # [batch, heads_q, m, head_dim]
    x: Tensor  # [batch, heads_q, m, seqlen_k], -inf where a key is not visible
    top: Tensor  # [batch, heads_q, m, 1], the largest score
    visible: Tensor  # [batch, 1, m, seqlen_k]
    empty: Tensor  # [batch, 1, m, 1], rows that see no key
    poisoned: Tensor  # [batch, heads_q, m, 1], rows with a NaN or an inf among their scores


class Dense:
    """A request in one dtype: keys and values repeated for each query head, non-finite entries set to 0 and marked."""

    def __init__(self, request: AttentionRequest, dtype: torch.dtype = torch.float64) -> None:
        self.request = request
        self.group = request.heads_q // request.heads_kv if request.heads_kv else 1
        self.q, self.q_bad = _finite(request.q.to(dtype))
        self.k, self.k_bad = _finite(request.k.to(dtype).repeat_interleave(self.group, dim=1))
        self.v, self.v_bad = _finite(request.v.to(dtype).repeat_interleave(self.group, dim=1))
        self.alpha: float | Tensor = request.alpha
        if request.alpha_heads is not None:
            self.alpha = request.alpha_heads.detach().to(dtype)[:, None, None]
        device = self.q.device
        self.lengths_q = _lengths(request.seqlens_q, request.seqlen_q, request.batch, device)
        self.lengths_k = _lengths(request.seqlens_k, request.seqlen_k, request.batch, device)

    def slices(self, multiple: int = 1) -> Iterator[Slice]:
        """The queries in order, in slices of a multiple of ``multiple`` rows (the last may be shorter)."""
        request = self.request
        if 0 in (request.batch, request.heads_q, request.seqlen_q, request.seqlen_k):
            return
        bytes_per_row = 8 * request.batch * request.heads_q * request.seqlen_k
        step = max(1, _SLICE_BYTES // bytes_per_row // multiple) * multiple
        for start in range(0, request.seqlen_q, step):
            rows = slice(start, min(start + step, request.seqlen_q))
            i = torch.arange(rows.start, rows.stop, device=self.q.device)[:, None]
            j = torch.arange(request.seqlen_k, device=self.q.device)
            visible = (i < self.lengths_q) & (j < self.lengths_k)
            if request.is_causal:
                visible = visible & (j - i <= self.lengths_k - self.lengths_q)
            q = self.q[:, :, rows]
            s = q @ self.k.mT * request.scale
            bad = self.q_bad[:, :, rows].any(-1, keepdim=True) | self.k_bad.any(-1)[:, :, None] | ~torch.isfinite(s)
            poisoned = (bad & visible).any(-1, keepdim=True)
            s = torch.where(poisoned, 0, s).masked_fill(~visible, -torch.inf)
            x, top = relative_scores(s)
            yield Slice(rows, q, x, top, visible, ~visible.any(-1, keepdim=True), poisoned)

    def weights(self, part: Slice, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p, w and y = -log u of a slice: 0 off the support and in empty rows, NaN at the keys of a poisoned row."""
        p, w, log_u = weights(part.x, lam, self.alpha)
        nan = part.poisoned & part.visible
        off = (p == 0) | part.empty
        p, w, y = (t.masked_fill(off, 0).masked_fill(nan, torch.nan) for t in (p, w, -log_u))
        return p, w, y

    def per_kv_head(self, t: Tensor) -> Tensor:
        """Sums over the query heads that share a key head: (batch, heads_q, n, d) to (batch, heads_kv, n, d)."""
        batch, _, n, d = t.shape
        return t.reshape(batch, self.request.heads_kv, self.group, n, d).sum(2)


def _finite(t: Tensor) -> tuple[Tensor, Tensor]:
    bad = ~torch.isfinite(t)
    return t.masked_fill(bad, 0), bad


def _lengths(seqlens: Tensor | None, full: int, batch: int, device: torch.device) -> Tensor:
    """[batch, 1, 1, 1] lengths, to compare with positions."""
    if seqlens is None:
        return torch.full((batch, 1, 1, 1), full, device=device)
    return seqlens.long().view(-1, 1, 1, 1)


class ReferenceBackend:
    """Serves every call on CPU or CUDA tensors, in O(seqlen_q * seqlen_k) time, some slices of queries at a time.

    Args:
        dtype: of everything in between, float64 by default. In a lower one this is plain dense evaluation, the
            yardstick of ``adasplash2.testing``; p and ds are then rounded to the inputs' dtype before they are
            multiplied with the inputs, as matrix units take them.
    """

    name = "reference"
    features = frozenset({"alpha per head", "causal mask", "padded seqlens"})

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype

    def unavailable_reason(self) -> str | None:
        return None

    def unsupported_reasons(self, request: AttentionRequest) -> tuple[str, ...]:
        return _device_reasons(request.q)

    def entmax_unsupported_reasons(self, request: EntmaxRequest) -> tuple[str, ...]:
        return _device_reasons(request.x)

    def saved_like(self, request: AttentionRequest) -> list[Tensor]:
        if not request.save_for_backward:
            return []
        return [request.q.new_empty(request.q.shape[:-1], dtype=self.dtype)]

    def forward(self, request: AttentionRequest) -> AttentionResult:
        dense = Dense(request, self.dtype)
        rows = (request.batch, request.heads_q, request.seqlen_q)
        out = dense.q.new_zeros(*rows, request.head_dim_v)
        tau = dense.q.new_full(rows, torch.inf)
        lams = dense.q.new_zeros(rows)
        for part in dense.slices():
            lam = find_lam(part.x, dense.alpha)
            p, _, _ = dense.weights(part, lam)
            bad_values = (p != 0).to(self.dtype) @ dense.v_bad.to(self.dtype) > 0
            out[:, :, part.rows] = (self._operand(p, request) @ dense.v).masked_fill(bad_values, torch.nan)
            part_tau = (dense.alpha - 1) * (part.top + lam) - 1
            part_tau = part_tau.masked_fill(part.poisoned, torch.nan).masked_fill(part.empty, torch.inf)
            tau[:, :, part.rows] = part_tau[..., 0]
            lams[:, :, part.rows] = lam[..., 0]
        saved = [lams] if request.save_for_backward else []
        return AttentionResult(out.to(request.q.dtype), tau.to(request.tau_dtype), saved)

    def backward(
        self, request: AttentionRequest, out: Tensor, tau: Tensor, saved: Sequence[Tensor], dout: Tensor
    ) -> AttentionGrads:
        dense = Dense(request, self.dtype)
        (lams,) = saved
        dq, dk, dv = torch.zeros_like(dense.q), torch.zeros_like(dense.k), torch.zeros_like(dense.v)
        dalpha = dense.q.new_zeros(request.heads_q)
        v = dense.v.masked_fill(dense.v_bad, torch.nan)
        for part in dense.slices():
            p, w, y = dense.weights(part, lams[:, :, part.rows, None])
            part_dout = dout[:, :, part.rows].to(self.dtype).masked_fill(part.empty, 0)
            dp = (part_dout @ v.mT).masked_fill(p == 0, 0)
            ds = _score_grads(w, dp)
            if request.alpha_heads is not None:
                dalpha += _alpha_grads(p, w, y, dp, dense.alpha).sum((0, 2, 3))
            p, ds = self._operand(p, request), self._operand(ds, request)
            dq[:, :, part.rows] = request.scale * (ds @ dense.k)
            dk += request.scale * (ds.mT @ part.q)
            dv += p.mT @ part_dout
        dtype = request.q.dtype
        return AttentionGrads(
            dq.to(dtype),
            dense.per_kv_head(dk).to(dtype),
            dense.per_kv_head(dv).to(dtype),
            None if request.alpha_heads is None else dalpha.to(request.alpha_heads.dtype),
        )

    def support(self, request: AttentionRequest, block_m: int, block_n: int) -> SupportStats:
        dense = Dense(request, self.dtype)
        blocks_m, blocks_n = -(-request.seqlen_q // block_m), -(-request.seqlen_k // block_n)
        rows = (request.batch, request.heads_q)
        tau = self.forward(request).tau
        size = torch.zeros(*rows, request.seqlen_q, dtype=torch.int32, device=dense.q.device)
        block_map = torch.zeros(*rows, blocks_m, blocks_n, dtype=torch.bool, device=dense.q.device)
        pairs, visible_blocks = 0, 0
        for part in dense.slices(multiple=block_m):
            _, _, log_u = weights(part.x, find_lam(part.x, dense.alpha), dense.alpha)
            support = torch.isfinite(log_u) & part.visible & ~part.poisoned  # p > 0, also where float64 underflows
            size[:, :, part.rows] = support.sum(-1, dtype=torch.int32)
            first = part.rows.start // block_m
            blocks = any_in_blocks(support, block_m, block_n)
            block_map[:, :, first : first + blocks.shape[2]] = blocks
            pairs += int(part.visible.sum()) * request.heads_q
            visible_blocks += int(any_in_blocks(part.visible, block_m, block_n).sum()) * request.heads_q
        return SupportStats(
            tau,
            size,
            block_map,
            block_m,
            block_n,
            element_density=int(size.sum()) / pairs if pairs else 0.0,
            block_density=int(block_map.sum()) / visible_blocks if visible_blocks else 0.0,
        )

    def entmax(self, request: EntmaxRequest) -> Tensor:
        s = request.x.to(self.dtype)
        if s.numel() == 0:
            return torch.empty_like(request.x, memory_format=torch.contiguous_format)
        bad = (s.isnan() | (s == torch.inf)).any(-1, keepdim=True) | (s == -torch.inf).all(-1, keepdim=True)
        alpha = request.alpha if request.alpha_rows is None else request.alpha_rows.to(self.dtype)[:, None]
        x, _ = relative_scores(s.masked_fill(bad, 0))
        p, _, _ = weights(x, find_lam(x, alpha), alpha)
        return p.masked_fill(bad, torch.nan).to(request.x.dtype)

    def entmax_backward(
        self, p: Tensor, dp: Tensor, alpha: float, alpha_rows: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        used_alpha = alpha if alpha_rows is None else alpha_rows.to(self.dtype)[:, None]
        p_in, p = p, p.to(self.dtype)
        off = p == 0
        y = ((1 - used_alpha) * p.log()).masked_fill(off, 0)
        w = (p * torch.exp(y)).masked_fill(off, 0)
        dp = dp.to(self.dtype).masked_fill(off, 0)
        dx = _score_grads(w, dp).to(p_in.dtype)
        if alpha_rows is None:
            return dx, None
        return dx, _alpha_grads(p, w, y, dp, used_alpha)[:, 0].to(alpha_rows.dtype)

    def _operand(self, t: Tensor, request: AttentionRequest) -> Tensor:
        """p or ds as a factor of a product: rounded to the inputs' dtype unless everything is exact."""
        return t if self.dtype == torch.float64 else t.to(request.q.dtype).to(self.dtype)


def any_in_blocks(mask: Tensor, block_m: int, block_n: int) -> Tensor:
    """Whether any entry of each (block_m, block_n) block of the last two dimensions is True."""
    rows, columns = mask.shape[-2:]
    padded = torch.nn.functional.pad(mask, (0, -columns % block_n, 0, -rows % block_m))
    blocks = (padded.shape[-2] // block_m, block_m, padded.shape[-1] // block_n, block_n)
    return padded.reshape(*padded.shape[:-2], *blocks).any(-1).any(-2)


def _device_reasons(t: Tensor) -> tuple[str, ...]:
    if t.device.type in ("cpu", "cuda"):
        return ()
    return (f"got a tensor on {t.device}; needs cpu or cuda",)


BACKEND = ReferenceBackend()
