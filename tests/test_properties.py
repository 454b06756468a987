"""What entmax attention satisfies whatever the inputs, for each backend."""

from __future__ import annotations

from dataclasses import replace

import entmax as entmax_package
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import Case, cases, entmax_cases

from adasplash2.contract import AttentionRequest, EntmaxRequest
from adasplash2.testing import assert_close, assert_pair_close, attention_truth, entmax_truth, run_attention

# Every key and row counts, each property with its own structure on top.
plain = cases(seqlens_q=None, seqlens_k=None, is_causal=False, shift=0.0)


def results(target, request: AttentionRequest, dout=None):
    return run_attention(target.serving(request), request, dout)


@given(case=cases())
def test_constant_values_come_back(target, case):
    """The weights of a row sum to 1."""
    request, _ = case.build(target.device)
    constant = replace(request, v=torch.full_like(request.v, 0.75))
    out = results(target, constant)["out"]
    truth = attention_truth(constant)
    expected = torch.where(truth.values["tau"].isinf(), 0, 0.75)[..., None].expand_as(out)
    assert_close(out, replace(truth, values={"out": expected}, rms_limits={}), "out", target.name)


@given(case=plain)
def test_a_vector_added_to_all_keys_moves_tau_alone(target, case):
    request, dout = case.build(target.device)
    # Small dyadic numbers: the sums and products below are exact, also in half precision.
    q, k = ((t * 4).round().clamp(-16, 16) / 8 for t in (request.q, request.k))
    step = torch.arange(case.head_dim, device=target.device).remainder(3).sub(1).to(k.dtype)
    request, moved = replace(request, q=q, k=k), replace(request, q=q, k=k + step)
    truth, moved_truth = attention_truth(request, dout), attention_truth(moved, dout)
    first, second = results(target, request, dout), results(target, moved, dout)
    for quantity in ("out", "dk", "dv"):
        assert_pair_close(first[quantity], second[quantity], truth, quantity, target.name, moved_truth)
    alpha = request.alpha if request.alpha_heads is None else request.alpha_heads.double()[:, None]
    tau = first["tau"].double() + (alpha - 1) * request.scale * (q.double() @ step.double())
    assert_pair_close(tau, second["tau"], truth, "tau", target.name, moved_truth)


@given(case=plain, seed=st.integers(0, 1000))
def test_the_order_of_keys_does_not_matter(target, case, seed):
    request, dout = case.build(target.device)
    order = torch.randperm(case.seqlen_k, generator=torch.Generator().manual_seed(seed)).to(target.device)
    shuffled = replace(request, k=request.k[:, :, order], v=request.v[:, :, order])
    truth = attention_truth(request, dout)
    first, second = results(target, request, dout), results(target, shuffled, dout)
    for quantity in ("out", "tau", "dq"):
        assert_pair_close(first[quantity], second[quantity], truth, quantity, target.name)
    for quantity in ("dk", "dv"):
        assert_pair_close(first[quantity][:, :, order], second[quantity], reordered(truth, quantity, order), quantity)


def reordered(truth, quantity, order):
    return replace(truth, bounds={quantity: truth.bounds[quantity][:, :, order]})


@given(case=cases(is_causal=True, seqlens_q=None, seqlens_k=None), where=st.floats(0, 1))
def test_a_causal_row_sees_a_prefix(target, case, where):
    assume(case.seqlen_q)
    request, _ = case.build(target.device)
    row = int(where * (case.seqlen_q - 1))
    prefix = max(0, case.seqlen_k - case.seqlen_q + row + 1)
    alone = replace(
        request,
        q=request.q[:, :, row : row + 1],
        k=request.k[:, :, :prefix],
        v=request.v[:, :, :prefix],
        is_causal=False,
    )
    truth = attention_truth(alone)
    whole, part = results(target, request), results(target, alone)
    for quantity in ("out", "tau"):
        assert_pair_close(whole[quantity][:, :, row : row + 1], part[quantity], truth, quantity, target.name)


@given(case=cases(group=3))
def test_grouped_queries_see_repeated_keys(target, case):
    request, dout = case.build(target.device)
    repeated = replace(request, k=request.k.repeat_interleave(3, 1), v=request.v.repeat_interleave(3, 1))
    truth = attention_truth(request, dout)
    grouped, separate = results(target, request, dout), results(target, repeated, dout)
    for quantity in ("out", "tau", "dq"):
        assert_pair_close(grouped[quantity], separate[quantity], truth, quantity, target.name)


@given(case=cases(batch=3))
def test_sequences_of_a_batch_do_not_see_each_other(target, case):
    request, dout = case.build(target.device)
    truth = attention_truth(request, dout)
    together = results(target, request, dout)
    for b in range(3):
        one = slice(b, b + 1)
        alone = replace(
            request,
            q=request.q[one],
            k=request.k[one],
            v=request.v[one],
            seqlens_q=None if request.seqlens_q is None else request.seqlens_q[one],
            seqlens_k=None if request.seqlens_k is None else request.seqlens_k[one],
        )
        truth_b = replace(truth, bounds={name: bound[one] for name, bound in truth.bounds.items()})
        separate = results(target, alone, dout[one])
        for quantity in ("out", "tau", "dq", "dk", "dv"):
            assert_pair_close(together[quantity][one], separate[quantity], truth_b, quantity, f"{target.name} {b}")


@given(case=cases(batch=2, layout="sliced"), data=st.data())
def test_lengths_cut_the_padding_off(target, case, data):
    lengths_q = data.draw(st.tuples(*[st.integers(0, case.seqlen_q)] * 2))
    lengths_k = data.draw(st.tuples(*[st.integers(0, case.seqlen_k)] * 2))
    request, dout = replace(case, seqlens_q=lengths_q, seqlens_k=lengths_k).build(target.device)
    padded = results(target, request, dout)
    for b, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        one, rows, keys = slice(b, b + 1), slice(length_q), slice(length_k)
        cut = replace(
            request,
            q=request.q[one, :, rows],
            k=request.k[one, :, keys],
            v=request.v[one, :, keys],
            seqlens_q=None,
            seqlens_k=None,
        )
        truth = attention_truth(cut, dout[one, :, rows])
        separate = results(target, cut, dout[one, :, rows])
        for quantity, length in (("out", rows), ("tau", rows), ("dq", rows), ("dk", keys), ("dv", keys)):
            whole = padded[quantity][one]
            assert_pair_close(whole[:, :, length], separate[quantity], truth, quantity, f"{target.name} {b}")
            rest = whole[:, :, length.stop :]
            assert (rest == (torch.inf if quantity == "tau" else 0)).all(), f"{quantity} past the length"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_alpha_2_is_sparsemax(target, dtype):
    """With the identity for values, out is the matrix of weights."""
    request, _ = Case(70, 90, head_dim=24, dtype=dtype, alpha=2.0).build(target.device)
    identity = torch.eye(90, dtype=dtype, device=target.device)[None, None]
    request = replace(request, v=identity)
    s = (request.q.double() @ request.k.double().mT) * request.scale
    p = entmax_package.sparsemax(s, dim=-1)
    truth = attention_truth(request)
    assert_close(results(target, request)["out"], replace(truth, values={"out": p}, rms_limits={}), "out", target.name)


@given(case=entmax_cases())
def test_entmax_gives_distributions(target, case):
    assume(case.n)
    request, _ = case.build(target.device)
    p = target.serving(request).entmax(request)
    bounds = entmax_truth(request).bounds["p"]
    number = ~p.isnan()
    assert (p[number] >= 0).all()
    error = (p.double().sum(-1) - 1).abs()
    assert (error.isnan() | (error <= bounds.nan_to_num().sum(-1))).all()


@given(case=entmax_cases())
def test_entmax_keeps_the_order_of_scores(target, case):
    request, _ = case.build(target.device)
    p = target.serving(request).entmax(request)
    bounds = entmax_truth(request).bounds["p"]
    order = request.x.sort(dim=-1, stable=True).indices
    p, bounds = (t.double().gather(-1, order) for t in (p, bounds))
    falls = p[:, :-1] - p[:, 1:]
    assert not (falls > bounds[:, :-1] + bounds[:, 1:]).any()


def test_entmax_is_sparser_for_larger_alpha(target):
    x = torch.randn(30, 200, generator=torch.Generator().manual_seed(0)).to(target.device)
    sizes = []
    for alpha in (1.05, 1.25, 1.5, 1.75, 2.0):
        request = EntmaxRequest(x, alpha)
        sizes.append(int((target.serving(request).entmax(request) > 0).sum()))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 2 * sizes[-1]
