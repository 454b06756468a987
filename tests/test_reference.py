"""The float64 reference against the package entmax, closed forms, central differences and the facts about tau."""

from __future__ import annotations

import math
from typing import Any

import entmax as entmax_package
import pytest
import torch
from strategies import Case

import adasplash2
from adasplash2.backends.reference import BACKEND, ReferenceBackend
from adasplash2.contract import AttentionRequest, EntmaxRequest
from adasplash2.testing import assert_attention, assert_close, entmax_backward_truth, entmax_truth, run_attention

CPU = torch.device("cpu")
ALPHAS = (1.001, 1.05, 1.25, 1.5, 1.75, 1.99, 2.0)


def scores(kind: str) -> torch.Tensor:
    x = torch.randn(40, 130, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {"iid": x, "wide": 10 * x, "narrow": 1e-3 * x, "ties": x.round(), "low": x - 1e6, "one": x[:, :1]}[kind]


def bisected(x: torch.Tensor, alpha: float) -> torch.Tensor:
    return entmax_package.entmax_bisect(x, alpha, dim=-1, n_iter=200, ensure_sum_one=False)


@pytest.mark.parametrize("kind", ["iid", "wide", "narrow", "ties", "low", "one"])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_entmax_against_the_package(alpha, kind):
    request = EntmaxRequest(scores(kind), alpha)
    truth = entmax_truth(request)
    assert_close(bisected(request.x, alpha), truth, "p", "bisection")
    if alpha == 1.5:
        assert_close(entmax_package.entmax15(request.x, dim=-1), truth, "p", "entmax15")
    if alpha == 2.0:
        assert_close(entmax_package.sparsemax(request.x, dim=-1), truth, "p", "sparsemax")


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("kind", ["iid", "wide", "narrow", "ties", "low"])
def test_sorting_and_bisection_agree(alpha, kind):
    x = scores(kind)
    each_row = torch.full((len(x),), alpha, dtype=x.dtype)
    assert_close(BACKEND.entmax(EntmaxRequest(x, alpha_rows=each_row)), entmax_truth(EntmaxRequest(x, alpha)), "p")


@pytest.mark.parametrize("alpha", ALPHAS)
def test_p_sums_to_one_without_normalisation(alpha):
    p = BACKEND.entmax(EntmaxRequest(scores("iid"), alpha))
    assert ((p.sum(-1) - 1).abs() <= 64 * torch.finfo(p.dtype).eps).all()


def test_softmax_is_the_limit():
    alpha = 1 + 1e-7
    x = scores("iid")
    p = BACKEND.entmax(EntmaxRequest(x, alpha))
    log_p = torch.log_softmax(x, -1)
    # log p = log(1 - (alpha - 1) * -log_p) / (alpha - 1), up to normalisation: off by half the square, twice at most.
    assert ((p - log_p.exp()).abs() <= (alpha - 1) * log_p.square().amax() * log_p.exp()).all()


@pytest.mark.parametrize("alpha", [1.05, 1.3, 1.5, 1.8])
def test_entmax_gradients_against_the_package(alpha):
    x = scores("iid").requires_grad_()
    alpha_rows = torch.full((len(x),), alpha, dtype=x.dtype, requires_grad=True)
    dp = scores("ties")
    p = entmax_package.entmax_bisect(x, alpha_rows[:, None], dim=-1, n_iter=200, ensure_sum_one=False)
    p.backward(dp)
    truth = entmax_backward_truth(p.detach(), dp, alpha, alpha_rows.detach())
    for leaf, quantity in ((x, "dx"), (alpha_rows, "dalpha")):
        assert leaf.grad is not None
        assert_close(leaf.grad, truth, quantity)


@pytest.mark.parametrize("alpha", [1.0001, 1.01, 1.1, 1.3, 1.5, 1.7, 1.95])
def test_alpha_gradient_against_central_differences(alpha):
    """Correia et al. 2019, also where the published form would cancel like (alpha - 1) ** -2."""
    x = scores("iid")[:, :20]
    step = 1e-5 * (alpha - 1)
    above, below = (BACKEND.entmax(EntmaxRequest(x, alpha + h)) for h in (step, -step))
    same = ((above > 0) == (below > 0)).all(-1)  # no key enters or leaves the support between the two
    assert same.double().mean() > 0.9
    p = BACKEND.entmax(EntmaxRequest(x, alpha))
    dp = scores("ties")[:, :20]
    alpha_rows = torch.full((len(x),), alpha, dtype=x.dtype)
    _, dalpha = BACKEND.entmax_backward(p, dp, 1.5, alpha_rows)
    assert dalpha is not None
    differences = ((above - below) * dp).sum(-1) / (2 * step)
    # p is known to 1e-15 or so, hence the differences to 1e-15 / step; what they miss is of order step ** 2.
    assert torch.allclose(differences[same], dalpha[same], rtol=1e-5, atol=1e-14 / step)


def smooth_case(alpha: float | tuple[float, ...], **fields: Any) -> Case:
    """A call without a key near the edge of its support, where the gradient has a kink."""
    return Case(3, 5, head_dim=2, head_dim_v=2, heads_kv=2, group=2, dtype=torch.float64, alpha=alpha, **fields)


@pytest.mark.parametrize(
    "fields",
    [{}, {"is_causal": True}, {"is_causal": True, "seqlens_q": (2,), "seqlens_k": (4,)}, {"gain": 3.0}],
    ids=["plain", "causal", "padded", "wide"],
)
@pytest.mark.parametrize("alpha", [1.05, 1.3, 1.5, 1.8, 2.0, (1.2, 1.0005, 1.5, 1.77)])
def test_gradcheck(alpha, fields):
    request, _ = smooth_case(alpha, **fields).build(CPU)
    leaves = [t.nan_to_num(0).requires_grad_() for t in (request.q, request.k, request.v)]
    if request.alpha_heads is not None:
        leaves.append(request.alpha_heads.clone().requires_grad_())

    def attention(q, k, v, alpha=alpha):
        return adasplash2.attention(
            q,
            k,
            v,
            alpha=alpha,
            scale=request.scale,
            is_causal=request.is_causal,
            seqlens_q=request.seqlens_q,
            seqlens_k=request.seqlens_k,
            backend="reference",
        )

    assert torch.autograd.gradcheck(attention, leaves)


@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0])
def test_entmax_gradcheck(alpha):
    x = scores("iid")[:6, :9].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: adasplash2.entmax(x, alpha, backend="reference"), x)


def test_entmax_gradcheck_in_alpha():
    x = scores("iid")[:6, :9].requires_grad_()
    alpha = torch.linspace(1.05, 1.9, 6, dtype=torch.float64)[:, None].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, alpha: adasplash2.entmax(x, alpha, backend="reference"), (x, alpha))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_bracket_of_tau(alpha):
    """max z - 1 <= tau <= max z - n ** (1 - alpha); one key reaches the left end, n equal keys the right one."""
    n = 50
    v = torch.zeros(1, 1, n, 1, dtype=torch.float64)
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)

    def tau_and_top(s: torch.Tensor) -> tuple[float, float]:
        k = s.view(1, 1, -1, 1)
        tau = BACKEND.forward(AttentionRequest(q, k, v[:, :, : len(s)], 1.0, alpha=alpha)).tau
        return tau.item(), (alpha - 1) * s.max().item()

    room = 16 * torch.finfo(torch.float64).eps
    for row in scores("iid")[:, :n]:
        tau, top = tau_and_top(row)
        assert top - 1 - room <= tau <= top - n ** (1 - alpha) + room
    tau, top = tau_and_top(torch.zeros(1, dtype=torch.float64) + 0.3)
    assert math.isclose(tau, top - 1, abs_tol=room)
    tau, top = tau_and_top(torch.zeros(n, dtype=torch.float64) + 0.3)
    assert math.isclose(tau, top - n ** (1 - alpha), abs_tol=room)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_tau_of_a_subset_is_a_lower_bound(alpha):
    request, _ = Case(20, 64, dtype=torch.float64, alpha=alpha).build(CPU)
    tau = BACKEND.forward(request).tau
    room = 16 * torch.finfo(torch.float64).eps
    for keys in (slice(0, 1), slice(10, 40), slice(0, 64, 3)):
        part = AttentionRequest(request.q, request.k[:, :, keys], request.v[:, :, keys], request.scale, alpha=alpha)
        assert (BACKEND.forward(part).tau <= tau + room).all()


def test_slices_of_queries_change_nothing(monkeypatch):
    request, dout = Case(37, 50, batch=2, group=2, dtype=torch.float64, is_causal=True, alpha=(1.5, 1.2)).build(CPU)
    whole = run_attention(BACKEND, request, dout)
    whole_map = BACKEND.support(request, 4, 8)
    monkeypatch.setattr("adasplash2.backends.reference._SLICE_BYTES", 8 * 2 * 2 * 50 * 5)
    assert_attention(ReferenceBackend(), request, dout)
    for quantity, value in run_attention(BACKEND, request, dout).items():
        torch.testing.assert_close(value, whole[quantity])
    sliced_map = BACKEND.support(request, 4, 8)
    assert sliced_map.block_map.equal(whole_map.block_map)
    assert sliced_map.block_density == whole_map.block_density


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_on_cuda(dtype):
    case = Case(100, 130, batch=2, group=2, dtype=dtype, is_causal=True, alpha=(1.5, 1.2), seqlens_k=(100, 130))
    request, dout = case.build(torch.device("cuda"))
    on_cpu, dout_on_cpu = case.build(CPU)
    expected = run_attention(BACKEND, on_cpu, dout_on_cpu)
    for quantity, value in run_attention(BACKEND, request, dout).items():
        torch.testing.assert_close(value.cpu(), expected[quantity])
