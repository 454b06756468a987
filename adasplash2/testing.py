"""How closely a backend must agree with the reference, and inputs to try it on: for the tests and the benchmark gate.

Truth is ``adasplash2.backends.reference`` on the inputs as they are, already rounded to the tested dtype. What may
differ from it is derived here, and stated nowhere else.

**Scores.** A product q . k computed in the accumulation dtype (float32; float64 for float64 inputs), its factor
(alpha - 1) * scale and the subtraction of tau leave in z an error of at most

    eps_z = SCORE_ROUNDINGS * eps(acc) * ((alpha - 1) * |scale| * sum_c |q_c k_c| + 1)

where the 1 stands for u, which lies in [0, 1]. A row is as good as its worst key that can reach the support. tau is
1-Lipschitz in the scores, so |dtau| <= eps_z, and every u_j moves by at most the *margin* m = 2 eps_z.

**p and w.** p = u ** r and w = u ** (r - 1) are increasing in u: they move by no more than they do between u - m and
u + m. This holds at every alpha, also where w has a kink (alpha = 1.5), an infinite slope (1.5 < alpha < 2) or a jump
(alpha = 2) at the edge of the support; a key within the margin of tau widens the bounds of what it touches by what
its entering or leaving can do there. Call the two moves dp~ and dw~.

**Results**, with R = ROUNDINGS[quantity] * eps(dtype) for the rounding of p and ds as factors of products, of the
accumulated sum and of the result, and with g_j = dout . v_j (the gradient of p_j):

    out   dp~ |v| + R p |v|                            dv  dp~^T |dout| + R p^T |dout|
    ds    dw~ |g - delta| + w+ (dg + ddelta) + R w |g - delta|, with
          dg = R' |dout| |v|  (R' with eps(acc)),
          ddelta = (sum dw~ |g - delta| + sum w+ dg) / sum w + R |dout| |out1|
    dq    |scale| ds |k|                               dk  |scale| ds^T |q|

and dalpha from the terms of the reference's formula (A = p phi, B = p (1 + y)), each moved as p and w are; it does
not allow for the cancellation of order (alpha - 1) ** -2 in the form of Correia et al. 2019. As dalpha sums over the
keys of all rows, whose errors are independent and whose bounds are of eight standard deviations, the squares of these
are added.

The other bounds add absolute values where errors in truth cancel, so they catch what is wrong at a single entry, but
not a loss of accuracy everywhere. For float16 and bfloat16, where the rounding of p and ds dominates, each (batch,
head) with at least ``YARDSTICK_ROUNDINGS`` entries and weights must also keep its root mean square error below
``YARDSTICK`` times that of plain dense evaluation (the reference in float32 with p and ds rounded to the dtype), plus
that of the part of the bound which comes from the scores.

Entries whose bound exceeds ``RESOLVED`` times their natural scale (the same sums without cancellation) are
*unresolved*: comparing them says little. ``Truth.unresolved`` counts them, so that tests can cap their share at
``MAX_UNRESOLVED``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from adasplash2.backends.reference import (
    BACKEND,
    Dense,
    ReferenceBackend,
    Slice,
    any_in_blocks,
    find_lam,
    relative_scores,
    weights,
)
from adasplash2.contract import AttentionRequest, Backend, EntmaxRequest, SupportStats

__all__ = [
    "INPUT_KINDS",
    "Inputs",
    "Truth",
    "assert_attention",
    "assert_close",
    "assert_pair_close",
    "assert_support",
    "attention_truth",
    "entmax_backward_truth",
    "entmax_truth",
    "make_inputs",
    "run_attention",
]

# A sum of head_dim products has an error of eps / 2 per rounding of its partial sums, about eps * sum |q_c k_c| for
# random signs in any order; the factor covers eight standard deviations and the steps behind it (scale, tau, the sum
# of n powers that fixes tau).
SCORE_ROUNDINGS = 8

# Per quantity, in units of eps(dtype) = twice the largest rounding error. out and dv: the factor p, the accumulated sum
# over keys and the result round once each (3 / 2). dq and dk: ds and delta besides. tau and dalpha are results in the
# accumulation dtype. Doubled, for sums whose error grows with their length.
ROUNDINGS = {"out": 3, "out1": 0.5, "tau": 1, "dq": 5, "dk": 5, "dv": 3, "dalpha": 8, "p": 3, "dx": 8}


# Half-precision root mean square error, in units of that of plain dense evaluation: the factor allows another order of
# rounding (delta from a rounded out1, scores rounded with p), not another algorithm.
YARDSTICK = 2.0
# Fewer entries or weights per (batch, head) leave the ratio of two error norms to chance: each is rounded once, and of
# a row with four weights, however many channels it has, the error is the sum of four.
YARDSTICK_ROUNDINGS = 256

RESOLVED = 0.1
MAX_UNRESOLVED = 0.1


@dataclass
class Truth:
    """What the reference says about one call, and how far from it a backend may be.

    Attributes:
        dtype: of the inputs.
        values: quantity to its true value, float64.
        bounds: quantity to the largest error allowed at each entry, 0 where the value must be exact.
        rms_limits: quantity to the largest root mean square error allowed in each (batch, head), half precision only;
            inf where too little is rounded.
        unresolved: quantity to the share of its entries whose bound says little; "support" to the share of keys within
            the margin of tau.
    """

    dtype: torch.dtype
    values: dict[str, Tensor] = field(default_factory=dict)
    bounds: dict[str, Tensor] = field(default_factory=dict)
    rms_limits: dict[str, Tensor] = field(default_factory=dict)
    unresolved: dict[str, float] = field(default_factory=dict)

    def add(self, quantity: str, value: Tensor, scores: Tensor, rounding: Tensor, natural: Tensor) -> None:
        """Enter a quantity with the two parts of its bound and its natural scale."""
        bound = scores + rounding
        bound = torch.where(bound > 0, bound + _smallest(self.dtype), 0)
        self.values[quantity] = value
        self.bounds[quantity] = bound
        self.unresolved[quantity] = float(
            (bound > RESOLVED * natural + _smallest(self.dtype)).double().mean().nan_to_num()
        )


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _smallest(dtype: torch.dtype) -> float:
    """What underflow may lose: a subnormal of the inputs' dtype, or what the accumulation flushes to zero."""
    return max(torch.finfo(dtype).tiny * torch.finfo(dtype).eps, torch.finfo(_accumulation(dtype)).tiny)


def _rounding(quantity: str, dtype: torch.dtype) -> float:
    return ROUNDINGS[quantity] * torch.finfo(dtype).eps


class _Moves(NamedTuple):
    """p and w of some rows, how far they move within the margin, and the keys that may or must be in the support."""

    p: Tensor
    w: Tensor
    p_move: Tensor
    w_move: Tensor
    w_high: Tensor
    w_low: Tensor
    b: Tensor  # B = p (1 + y) and A = p phi of the gradient of alpha, as in the reference
    a: Tensor
    b_move: Tensor
    a_move: Tensor
    possible: Tensor
    certain: Tensor
    eps_z: Tensor
    margin: Tensor


def _moves(
    x: Tensor, lam: Tensor, alpha: float | Tensor, magnitude: Tensor, keep: Tensor, dtype: torch.dtype
) -> _Moves:
    """x: (..., n) scores relative to the row maximum; magnitude: |scale| sum |q_c k_c|; keep: the real keys."""
    acc = _accumulation(dtype)
    eps_z = SCORE_ROUNDINGS * torch.finfo(acc).eps * ((alpha - 1) * magnitude + 1)
    eps_top = eps_z.gather(-1, x.argmax(-1, keepdim=True))
    in_reach = keep & ((alpha - 1) * x + 1 + 2 * (eps_z + eps_top) >= 0)
    eps_z = eps_z.masked_fill(~in_reach, 0).amax(-1, keepdim=True)
    shift = 2 * eps_z / (alpha - 1)
    (p, w, b, a, _), (p_high, w_high, b_high, a_high, possible), (p_low, w_low, b_low, a_low, _) = (
        [t.masked_fill(~keep, 0) for t in _terms(*weights(x, at, alpha))] for at in (lam, lam - shift, lam + shift)
    )
    lost = _smallest(dtype) * possible
    return _Moves(
        p,
        w,
        p_move=p_high - p + lost,  # the larger of the two moves, since u ** r is convex
        w_move=torch.maximum(w_high - w, w - w_low) + lost,
        w_high=w_high,
        w_low=w_low,
        b=b,
        a=a,
        b_move=torch.maximum(b_high - b, b - b_low) + lost,
        a_move=2 * torch.maximum((a_high - a).abs(), (a - a_low).abs()) + lost,  # A has one peak, maybe in between
        possible=possible,
        certain=p_low > torch.finfo(acc).tiny,  # what underflows may be counted or not
        eps_z=eps_z,
        margin=2 * eps_z,
    )


def _terms(p: Tensor, w: Tensor, log_u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """p, w, B, A, and whether the key is in the support."""
    y = (-log_u).masked_fill(p == 0, 0)
    return p, w, p * (1 + y), p * (torch.expm1(y) - y), torch.isfinite(log_u)


def _terms_of_p(p: Tensor, alpha: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``_terms`` from p itself."""
    log_p = p.log()
    return _terms(p, torch.where(p > 0, torch.exp((2 - alpha) * log_p), 0), (alpha - 1) * log_p)


def _attention_moves(dense: Dense, part: Slice, lams: Tensor) -> _Moves:
    magnitude = abs(dense.request.scale) * (part.q.abs() @ dense.k.abs().mT)
    keep = part.visible & ~part.poisoned
    return _moves(part.x, lams[:, :, part.rows, None], dense.alpha, magnitude, keep, dense.request.q.dtype)


def _ratio(numerator: Tensor, denominator: Tensor, at_most: Tensor) -> Tensor:
    """numerator / denominator, but no more than at_most; 0 / 0 is 0."""
    return torch.where(numerator > 0, numerator / denominator, 0).minimum(at_most)


def _alpha_bound(m: _Moves, g: Tensor, g_error: Tensor, alpha: float | Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What each key may add to the error of its row's dalpha, and its natural scale there.

    The Jacobian of the reference is (A_sum B - A B_sum) / ((alpha - 1) ** 2 sum w).
    """
    a_sum, b_sum, a_move_sum, b_move_sum, w_sum, w_move_sum, w_low_sum = (
        t.sum(-1, keepdim=True) for t in (m.a, m.b, m.a_move, m.b_move, m.w, m.w_move, m.w_low)
    )
    smallest = torch.finfo(g.dtype).tiny ** 0.5
    scale = (alpha - 1) ** 2 * w_sum.clamp(min=smallest)
    scale_low = (alpha - 1) ** 2 * w_low_sum.clamp(min=smallest)
    jacobian = (a_sum * m.b - m.a * b_sum).abs() / scale
    terms = (a_sum * m.b + m.a * b_sum) / scale
    moved = (
        a_move_sum * (m.b + m.b_move)
        + a_sum * m.b_move
        + m.a_move * (b_sum + b_move_sum)
        + m.a * b_move_sum
        + jacobian * (alpha - 1) ** 2 * w_move_sum
    ) / scale_low
    return g.abs() * (moved + eps * terms) + g_error * (jacobian + moved), g.abs() * terms


def attention_truth(request: AttentionRequest, dout: Tensor | None = None) -> Truth:
    """Truth for out and tau, and, if ``dout`` is given, for dq, dk, dv (and dalpha with ``alpha_heads``).

    Args:
        request: the call as the backend gets it.
        dout: (batch, heads_q, seqlen_q, head_dim_v), the gradient of out.
    """
    dtype = request.q.dtype
    acc = _accumulation(dtype)
    exact = replace(request, q=request.q.double(), k=request.k.double(), v=request.v.double(), save_for_backward=True)
    if request.alpha_heads is not None:
        exact = replace(exact, alpha_heads=request.alpha_heads.detach().double())
    result = BACKEND.forward(exact)
    values = {"out": result.out, "tau": result.tau}
    if dout is not None:
        grads = BACKEND.backward(exact, result.out, result.tau, result.saved, dout.double())
        values |= {"dq": grads.dq, "dk": grads.dk, "dv": grads.dv}
        if grads.dalpha_heads is not None:
            values["dalpha"] = grads.dalpha_heads
    dense = Dense(request)
    # Key gradients gather over query heads, one key head each, before they are summed.
    per_query_head = {"dk": dense.k, "dv": dense.v}
    scores, rounding, natural = (
        {quantity: torch.zeros_like(per_query_head.get(quantity, value)) for quantity, value in values.items()}
        for _ in range(3)
    )
    truth = Truth(dtype)
    v_abs = dense.v.abs()
    n_weights = torch.zeros((request.batch, request.heads_q, 1, 1), dtype=torch.int64, device=request.q.device)
    in_margin = in_reach = 0
    for part in dense.slices():
        m = _attention_moves(dense, part, result.saved[0])
        rows = part.rows
        in_margin += int((m.possible & ~m.certain).sum())
        in_reach += int(m.possible.sum())
        n_weights += (m.p > 0).sum((2, 3), keepdim=True)
        scores["out"][:, :, rows] = m.p_move @ v_abs
        rounding["out"][:, :, rows] = _rounding("out", dtype) * (m.p @ v_abs)
        natural["out"][:, :, rows] = m.p @ v_abs
        scores["tau"][:, :, rows] = m.eps_z[..., 0]
        tau = result.tau[:, :, rows].nan_to_num(0, 0, 0).abs()
        rounding["tau"][:, :, rows] = _rounding("tau", acc) * tau
        natural["tau"][:, :, rows] = tau + 1
        if dout is None:
            continue

        dout_part = dout[:, :, rows].double().masked_fill(part.empty, 0)
        dout_abs = dout_part.abs()
        scores["dv"] += m.p_move.mT @ dout_abs
        rounding["dv"] += _rounding("dv", dtype) * (m.p.mT @ dout_abs)
        natural["dv"] += m.p.mT @ dout_abs

        g = dout_part @ dense.v.mT
        g_error = _rounding("dq", acc) * (dout_abs @ v_abs.mT)
        w_sum = m.w.sum(-1, keepdim=True)
        out1 = torch.where(w_sum > 0, m.w @ dense.v / w_sum, 0)
        delta = (dout_part * out1).sum(-1, keepdim=True)
        delta_rounding = _rounding("out1", dtype) * (dout_abs * out1.abs()).sum(-1, keepdim=True)
        distance = (g - delta).abs()
        range_of_g = torch.where(m.possible, distance, 0).amax(-1, keepdim=True)
        delta_move = _ratio(
            (m.w_move * distance + m.w_high * g_error).sum(-1, keepdim=True), m.w_low.sum(-1, keepdim=True), range_of_g
        )
        ds = {
            "scores": m.w_move * distance + m.w_high * (g_error + delta_move) + _smallest(dtype) * m.possible,
            "rounding": m.w_high * delta_rounding + _rounding("dq", dtype) * m.w * distance,
            "natural": m.w * (g.abs() + delta.abs()),
        }
        for total, part_ds in zip((scores, rounding, natural), ds.values(), strict=True):
            total["dq"][:, :, rows] = abs(request.scale) * (part_ds @ dense.k.abs())
            total["dk"] += abs(request.scale) * (part_ds.mT @ part.q.abs())
        if "dalpha" in values:
            key_bound, key_natural = _alpha_bound(m, g, g_error, dense.alpha, _rounding("dalpha", acc))
            scores["dalpha"] += key_bound.square().sum((0, 2, 3))
            natural["dalpha"] += key_natural.sum((0, 2, 3))

    if "dalpha" in values:
        scores["dalpha"] = scores["dalpha"].sqrt()
    for total in (scores, rounding, natural):
        total |= {quantity: dense.per_kv_head(total[quantity]) for quantity in per_query_head if quantity in total}
    truth.unresolved["support"] = in_margin / max(in_reach, 1)
    for quantity, value in values.items():
        truth.add(quantity, value, scores[quantity], rounding[quantity], natural[quantity])
    if dtype in (torch.float16, torch.bfloat16):
        of_kv_head = dense.per_kv_head(n_weights)
        of_quantity = {q: of_kv_head if q in per_query_head else n_weights for q in values}
        _add_rms_limits(truth, request, dout, scores, of_quantity)
    return truth


def _add_rms_limits(
    truth: Truth,
    request: AttentionRequest,
    dout: Tensor | None,
    scores: dict[str, Tensor],
    n_weights: dict[str, Tensor],
) -> None:
    plain = ReferenceBackend(torch.float32)
    request = replace(request, save_for_backward=True)
    result = plain.forward(request)
    actual = {"out": result.out}
    if dout is not None:
        grads = plain.backward(request, result.out, result.tau, result.saved, dout)
        actual |= {"dq": grads.dq, "dk": grads.dk, "dv": grads.dv}
    for quantity, value in actual.items():
        error = value.double() - truth.values[quantity]
        limit = YARDSTICK * _rms(error) + _rms(scores[quantity])
        rounded = n_weights[quantity][:, :, 0, 0].clamp(max=value[0, 0].numel())
        truth.rms_limits[quantity] = torch.where(rounded >= YARDSTICK_ROUNDINGS, limit, torch.inf)


def _rms(error: Tensor) -> Tensor:
    """(batch, heads), entries that are not numbers left out; 0 where there are none."""
    return (error.nan_to_num(0, 0, 0).square().sum((-2, -1)) / max(error[0, 0].numel(), 1)).sqrt()


def entmax_truth(request: EntmaxRequest) -> Truth:
    """Truth for p of ``Backend.entmax``."""
    x = request.x.double()
    alpha_rows = None if request.alpha_rows is None else request.alpha_rows.detach().double()
    p = BACKEND.entmax(replace(request, x=x, alpha_rows=alpha_rows))
    truth = Truth(request.x.dtype)
    if not x.numel():
        truth.add("p", p, p, p, p)
        return truth
    alpha = request.alpha if alpha_rows is None else alpha_rows[:, None]
    relative, _ = relative_scores(x.masked_fill(p.isnan(), 0))
    magnitude = x.abs().nan_to_num(0, 0, 0)
    m = _moves(relative, find_lam(relative, alpha), alpha, magnitude, torch.isfinite(relative), truth.dtype)
    truth.add("p", p, m.p_move, _rounding("p", truth.dtype) * m.p, m.p)
    return truth


def entmax_backward_truth(p: Tensor, dp: Tensor, alpha: float, alpha_rows: Tensor | None = None) -> Truth:
    """Truth for dx (and dalpha with ``alpha_rows``) of ``Backend.entmax_backward``, which is a function of p alone."""
    acc = _accumulation(p.dtype)
    rows = None if alpha_rows is None else alpha_rows.detach().double()
    dx, dalpha = BACKEND.entmax_backward(p.double(), dp.double(), alpha, rows)
    used_alpha = alpha if rows is None else rows[:, None]
    p64, g = p.double(), dp.double()
    tiny = torch.finfo(acc).tiny
    # What is smaller than a normal number of the accumulation may be read as 0 or as the smallest one.
    subnormal = (p64 > 0) & (p64 < tiny)
    (p64, w, b, a, support), (_, w_low, b_low, a_low, _), (_, w_high, b_high, a_high, _) = (
        _terms_of_p(at, used_alpha) for at in (p64, p64.masked_fill(subnormal, 0), p64.masked_fill(subnormal, tiny))
    )
    w_move = torch.maximum(w_high - w, w - w_low)
    w_sum = w.sum(-1, keepdim=True)
    at_most = torch.full_like(w_sum, torch.inf)
    delta = _ratio((w * g.abs()).sum(-1, keepdim=True), w_sum, at_most)
    distance = g.abs() + delta
    delta_move = _ratio((w_move * distance).sum(-1, keepdim=True), w_low.sum(-1, keepdim=True), at_most)
    natural = w * distance
    truth = Truth(p.dtype)
    power = natural * (1 - p64.log()).masked_fill(~support, 0)  # a power is as good as its logarithm
    scores = _rounding("dx", acc) * power + w_move * distance + w_high * delta_move
    truth.add("dx", dx, scores, _rounding("dx", p.dtype) * dx.abs(), natural)
    if dalpha is not None:
        still = torch.zeros_like(w)
        a_move, b_move = torch.maximum(a_high - a, a - a_low), torch.maximum(b_high - b, b - b_low)
        m = _Moves(p64, w, still, w_move, w_high, w_low, b, a, b_move, a_move, support, support, still, still)
        bound, scale = _alpha_bound(m, g, still, used_alpha, _rounding("dalpha", acc))
        # The reference takes the sum of p for 1. Formulas that do not differ by how far rounding has taken it from 1.
        off_one = (p64.sum(-1, keepdim=True) - 1).abs() + _rounding("dalpha", acc)
        excess = off_one / (used_alpha - 1) ** 2
        excess = excess * (g.abs() * (p64 + _ratio(w, w_sum, torch.ones_like(w)))).sum(-1, keepdim=True)
        truth.add("dalpha", dalpha, bound.sum(-1), 2 * excess[:, 0], scale.sum(-1))
    return truth


def run_attention(backend: Backend, request: AttentionRequest, dout: Tensor | None = None) -> dict[str, Tensor]:
    """All results of a backend for one call, under the names that ``Truth`` has for them.

    Raises:
        AssertionError: if what forward saved is not what ``saved_like`` announces.
    """
    request = replace(request, save_for_backward=dout is not None)
    result = backend.forward(request)
    saved_like = backend.saved_like(request)
    for kind in (lambda t: tuple(t.shape), lambda t: t.dtype, lambda t: t.device):
        saved, announced = [kind(t) for t in result.saved], [kind(t) for t in saved_like]
        assert saved == announced, f"{backend.name}: forward saved {saved}, saved_like announces {announced}"
    results = {"out": result.out, "tau": result.tau}
    if dout is not None:
        grads = backend.backward(request, result.out, result.tau, result.saved, dout)
        results |= {"dq": grads.dq, "dk": grads.dk, "dv": grads.dv}
        if grads.dalpha_heads is not None:
            results["dalpha"] = grads.dalpha_heads
    return results


def assert_attention(backend: Backend, request: AttentionRequest, dout: Tensor | None = None) -> None:
    """Assert that a backend's results for one call are right: out and tau, and with ``dout`` the gradients.

    Raises:
        AssertionError: as ``assert_close``, on the first quantity that is wrong.
    """
    truth = attention_truth(request, dout)
    results = run_attention(backend, request, dout)
    assert results.keys() == truth.values.keys(), f"{backend.name} returned {[*results]}, expected {[*truth.values]}"
    for quantity, actual in results.items():
        assert_close(actual, truth, quantity, backend.name)


def assert_close(actual: Tensor, truth: Truth, quantity: str, label: str = "") -> None:
    """Assert that a result of a backend is as close to the truth as its dtype allows.

    Args:
        actual: the result.
        truth: of the same call.
        quantity: one of ``truth.values``.
        label: said first in the message of a failure.

    Raises:
        AssertionError: on another shape, dtype or device, or other places of NaN and inf; on an entry out of its bound
            (the message gives the worst index, both values, the bound and the share of failing entries); on a root
            mean square error above its limit.
    """
    value, bound = truth.values[quantity], truth.bounds[quantity]
    name = f"{label} {quantity}".strip()
    _assert_same_frame(actual, value, name)
    if quantity == "dalpha":  # has the dtype of alpha, which is free, and is rounded to it
        bound = bound + torch.finfo(actual.dtype).eps / 2 * value.abs()
    else:
        expected = _accumulation(truth.dtype) if quantity == "tau" else truth.dtype
        assert actual.dtype == expected, f"{name}: dtype {actual.dtype}, expected {expected}"
    # Beyond the range of the dtype, inf is what rounding gives.
    overflow = actual.isinf() & (value * actual.sign() + bound >= torch.finfo(actual.dtype).max)
    actual = torch.where(overflow, value, actual.double())
    _assert_within(actual, value, bound, name)
    if quantity in truth.rms_limits:
        rms, limit = _rms(actual - value), truth.rms_limits[quantity]
        index = _worst(rms - limit)
        assert rms[index] <= limit[index], (
            f"{name}: root mean square error {rms[index]:.3g} in (batch, head) {index}, limit {limit[index]:.3g}"
        )


def assert_pair_close(
    a: Tensor, b: Tensor, truth_a: Truth, quantity: str, label: str = "", truth_b: Truth | None = None
) -> None:
    """Assert that two results differ by no more than the sum of what each may differ from its truth.

    For two backends on one call, or for one backend on two calls that must agree.
    """
    name = f"{label} {quantity}".strip()
    bound = truth_a.bounds[quantity] + (truth_b or truth_a).bounds[quantity]
    _assert_same_frame(a, b, name)
    _assert_within(a.double(), b.double(), bound, name)


def assert_support(stats: SupportStats, request: AttentionRequest, label: str = "") -> None:
    """Assert that support statistics are right, up to keys within the margin of tau.

    Raises:
        AssertionError: if a key is counted that is out by more than the margin, or not counted that is in by more; if a
            block is marked or not against such keys; if the densities contradict the size and the block map.
    """
    truth = attention_truth(request)
    assert_close(stats.tau, truth, "tau", label)
    exact = replace(request, q=request.q.double(), k=request.k.double(), v=request.v.double(), save_for_backward=True)
    lams = BACKEND.forward(exact).saved[0]
    dense = Dense(request)
    block_m, block_n = stats.block_m, stats.block_n
    blocks = (-(-request.seqlen_q // block_m), -(-request.seqlen_k // block_n))
    heads = (request.batch, request.heads_q)
    assert stats.size.shape == stats.tau.shape, f"{label} size: shape {tuple(stats.size.shape)}"
    assert stats.size.dtype == torch.int32, f"{label} size: dtype {stats.size.dtype}"
    assert stats.block_map.shape == (*heads, *blocks), f"{label} block_map: shape {tuple(stats.block_map.shape)}"
    assert stats.block_map.dtype == torch.bool, f"{label} block_map: dtype {stats.block_map.dtype}"
    pairs = visible_blocks = 0
    for part in dense.slices(multiple=block_m):
        m = _attention_moves(dense, part, lams)
        low, high = m.certain.sum(-1), m.possible.sum(-1)
        size = stats.size[:, :, part.rows]
        wrong = (size < low) | (size > high)
        assert not wrong.any(), _count_message(f"{label} size", wrong, size, low, high)
        first = part.rows.start // block_m
        low, high = any_in_blocks(m.certain, block_m, block_n), any_in_blocks(m.possible, block_m, block_n)
        block_map = stats.block_map[:, :, first : first + low.shape[2]]
        wrong = (low & ~block_map) | (block_map & ~high)
        assert not wrong.any(), _count_message(f"{label} block_map", wrong, block_map, low, high)
        pairs += int(part.visible.sum()) * request.heads_q
        visible_blocks += int(any_in_blocks(part.visible, block_m, block_n).sum()) * request.heads_q
    for density, count, total in (
        ("element_density", int(stats.size.sum()), pairs),
        ("block_density", int(stats.block_map.sum()), visible_blocks),
    ):
        expected = count / total if total else 0.0
        error = abs(getattr(stats, density) - expected)
        assert error <= torch.finfo(torch.float32).eps, f"{label} {density}: {getattr(stats, density)}, not {expected}"


def _count_message(name: str, wrong: Tensor, actual: Tensor, low: Tensor, high: Tensor) -> str:
    index = tuple(int(i) for i in wrong.nonzero()[0])
    expected = f"{low[index].item()} to {high[index].item()}"
    share = wrong.double().mean()
    return f"{name}: got {actual[index].item()} at {index} of this slice, expected {expected}; {share:.2%} fail"


def _assert_same_frame(actual: Tensor, expected: Tensor, name: str) -> None:
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.device == expected.device, f"{name}: on {actual.device}, expected {expected.device}"


def _assert_within(actual: Tensor, expected: Tensor, bound: Tensor, name: str) -> None:
    for kind, test in (("NaN", torch.isnan), ("inf", torch.isinf)):
        wrong = test(actual) != test(expected)
        assert not wrong.any(), (
            f"{name}: {int(test(actual).sum())} entries are {kind}, expected {int(test(expected).sum())}; they differ "
            f"first at {tuple(wrong.nonzero()[0].tolist())}"
        )
    error = torch.where(actual == expected, 0, (actual - expected).abs()).nan_to_num(0)
    failing = error > bound
    if failing.any():
        index = _worst(error / bound)
        raise AssertionError(
            f"{name}: got {actual[index].item():.9g} at {index}, expected {expected[index].item():.9g}; off by "
            f"{error[index].item():.3g}, bound {bound[index].item():.3g}; {failing.double().mean():.2%} of the "
            f"{failing.numel()} entries fail"
        )


def _worst(badness: Tensor) -> tuple[int, ...]:
    flat = int(badness.nan_to_num(-torch.inf, torch.inf).argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), badness.shape))


class Inputs(NamedTuple):
    """Arguments of one attention call, and a gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


TOPICS = 32  # at most head_dim
TOPIC_SEGMENT = 128  # tokens that share a topic


def _iid(q: Tensor, k: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return q, k


def _narrow(q: Tensor, k: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return 0.03 * q, k


def _wide(q: Tensor, k: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return 3.5 * q, k


def _topics(q: Tensor, k: Tensor, generator: torch.Generator, share: float = 0.25) -> tuple[Tensor, Tensor]:
    head_dim = q.shape[-1]
    topics = min(TOPICS, head_dim)
    directions = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator)).Q[:topics]
    tokens = max(q.shape[2], k.shape[2], 1)
    segments = -(-tokens // TOPIC_SEGMENT)
    topic = torch.randint(topics, (segments,), generator=generator)
    wanted = torch.rand(segments, topics, generator=generator) < share
    wanted[torch.arange(segments), topic] = True
    segment = torch.arange(tokens) // TOPIC_SEGMENT
    # Both sequences end at the same token, as the causal mask aligns them.
    of_query, of_key = (segment[tokens - t.shape[2] :] for t in (q, k))
    return 8 * wanted[of_query].float() @ directions + 0.5 * q, head_dim**0.5 * directions[topic[of_key]] + 0.5 * k


def _drifting(q: Tensor, k: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = max(q.shape[2], k.shape[2])
    centre = torch.randn(*k.shape[:2], tokens, k.shape[-1], generator=generator).cumsum(2)
    centre = centre / torch.arange(1, tokens + 1).sqrt()[:, None]
    group = q.shape[1] // max(k.shape[1], 1)
    of_query = centre[:, :, tokens - q.shape[2] :].repeat_interleave(group, dim=1)
    return 3 * of_query + 0.5 * q, centre[:, :, tokens - k.shape[2] :] + 0.5 * k


def _ties(q: Tensor, k: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return q.round(), k.round()


def _equal(q: Tensor, k: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return q, k[:, :, :1].expand_as(k)


_KINDS: dict[str, Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]] = {
    "iid": _iid,
    "narrow": _narrow,
    "wide": _wide,
    "topics": _topics,
    "drifting": _drifting,
    "ties": _ties,
    "equal": _equal,
}
INPUT_KINDS = tuple(_KINDS)


def make_inputs(
    kind: str,
    *,
    batch: int = 1,
    heads_q: int = 1,
    heads_kv: int | None = None,
    seqlen_q: int,
    seqlen_k: int | None = None,
    head_dim: int,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    **options: float,
) -> Inputs:
    """Inputs of one kind, the same on every device for the same seed. Scores are meant with scale = head_dim ** -0.5.

    Args:
        kind: "iid" (scores of standard deviation 1), "narrow" (0.03: near-uniform weights), "wide" (3.5), "topics"
            (each segment of 128 tokens has one of 32 orthonormal directions; its queries want a random subset of them,
            their own included: block-sparse, as trained models are), "drifting" (both follow a random walk), "ties"
            (small integers: many equal scores) or "equal" (all keys of a head are one).
        batch, heads_q, seqlen_q, head_dim: shape of q.
        heads_kv, seqlen_k: the same as q's unless given.
        head_dim_v: head_dim unless given.
        dtype: what float32 draws are rounded to.
        device: where the tensors go.
        seed: of the draws.
        options: "topics" takes ``share``, the probability that a segment wants a topic, which sets the density; 0.25 by
            default. At 8192 keys and head_dim 64, shares of 0.5, 0.25 and 0.1 give 0.33, 0.25 and 0.15 of the causal
            128 x 64 blocks.

    Returns:
        Inputs: q, k, v and dout, contiguous.

    Raises:
        ValueError: on an unknown kind.
    """
    if kind not in _KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(map(repr, INPUT_KINDS))}")
    heads_kv = heads_q if heads_kv is None else heads_kv
    seqlen_k = seqlen_q if seqlen_k is None else seqlen_k
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (
        torch.randn(shape, generator=generator)
        for shape in (
            (batch, heads_q, seqlen_q, head_dim),
            (batch, heads_kv, seqlen_k, head_dim),
            (batch, heads_kv, seqlen_k, head_dim_v),
            (batch, heads_q, seqlen_q, head_dim_v),
        )
    )
    q, k = _KINDS[kind](q, k, generator, **options)
    return Inputs(*(t.to(device, dtype).contiguous() for t in (q, k, v, dout)))
