"""What a backend reads and writes: nothing past the ends, nothing of the inputs, the same bits each time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from strategies import DTYPES, LAYOUTS, Case, cases, with_layout

from adasplash2.contract import EntmaxRequest
from adasplash2.testing import assert_attention, assert_close, entmax_truth, run_attention

PADDED = Case(
    50, 70, batch=3, group=2, head_dim=24, head_dim_v=40, is_causal=True, seqlens_q=(50, 0, 33), seqlens_k=(64, 70, 0)
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(target, dtype, layout):
    """All but "contiguous" and "expanded" have NaN in between; past the lengths there is NaN in each."""
    case = replace(PADDED, dtype=dtype, layout=layout, alpha=(1.5, 1.3))
    if layout == "expanded":
        case = replace(case, seqlens_q=None, seqlens_k=None)
    request, dout = case.build(target.device)
    assert_attention(target.serving(request), request, dout)


@pytest.mark.parametrize("layouts", [("expanded", "contiguous"), ("contiguous", "expanded"), ("columns", "sliced")])
def test_each_tensor_has_its_own_layout(target, layouts):
    request, dout = Case(40, 60, batch=2, heads_kv=2, head_dim=24).build(target.device)
    request = replace(
        request,
        q=with_layout(request.q, layouts[0]),
        k=with_layout(request.k, layouts[1]),
        v=with_layout(request.v, layouts[0]),
    )
    assert_attention(target.serving(request), request, with_layout(dout, layouts[1]))


def test_one_number_for_all_of_dout(target):
    """out.sum().backward() gives a dout without strides."""
    request, dout = Case(40, 60, head_dim=24).build(target.device)
    assert_attention(target.serving(request), request, dout.new_ones(()).expand_as(dout))


@given(case=cases())
def test_inputs_are_not_written_to(target, case):
    request, dout = case.build(target.device)
    inputs = [request.q, request.k, request.v, dout]
    inputs += [t for t in (request.alpha_heads, request.seqlens_q, request.seqlens_k) if t is not None]
    before = [t.clone() for t in inputs]
    results = run_attention(target.serving(request), request, dout)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor.nan_to_num(-1.0), copy.nan_to_num(-1.0))
    memory = {tensor.untyped_storage().data_ptr() for tensor in inputs if tensor.numel()}
    for quantity, result in results.items():
        assert result.is_contiguous(), quantity
        assert not result.numel() or result.untyped_storage().data_ptr() not in memory, (
            f"{quantity} shares an input's memory"
        )


@given(case=cases())
def test_saved_tensors_are_not_written_to(target, case):
    """backward(retain_graph=True) runs it twice."""
    request, dout = case.build(target.device)
    backend = target.serving(request)
    request = replace(request, save_for_backward=True)
    result = backend.forward(request)
    first, second = (list(backend.backward(request, result.out, result.tau, result.saved, dout)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a is b or same_bits(a, b)


@given(case=cases())
def test_two_runs_give_the_same_bits(target, case):
    request, dout = case.build(target.device)
    backend = target.serving(request)
    first, second = (run_attention(backend, request, dout) for _ in range(2))
    for quantity, result in first.items():
        assert same_bits(result, second[quantity]), quantity


def same_bits(a, b) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_gradients_are_not_needed_to_go_forward(target):
    request, dout = Case(100, 130, head_dim=64, is_causal=True).build(target.device)
    backend = target.serving(request)
    with_saved, without = run_attention(backend, request, dout), run_attention(backend, request)
    assert not backend.saved_like(request)
    assert same_bits(with_saved["out"], without["out"])
    assert same_bits(with_saved["tau"], without["tau"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_entmax_layouts(target, layout):
    x = torch.randn(1, 1, 37, 53, generator=torch.Generator().manual_seed(0)).to(target.device)
    request = EntmaxRequest(with_layout(x, layout)[0, 0])
    before = request.x.clone()
    backend = target.serving(request)
    p = backend.entmax(request)
    assert_close(p, entmax_truth(request), "p", target.name)
    assert same_bits(request.x.contiguous(), before.contiguous())
    kept = p.clone()
    backend.entmax_backward(p, before, 1.5, None)
    assert same_bits(p, kept)


def test_poisoned_allocations():
    """The fixture that makes memory which is never written show itself."""
    assert torch.empty(3).isnan().all()
    assert torch.zeros(3).new_empty(2).isnan().all()
    assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
