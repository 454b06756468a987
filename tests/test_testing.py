"""The comparison itself: what is right passes, each kind of fault is caught, and tolerances have one place."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from strategies import DTYPES, Case

from adasplash2.backends import reference
from adasplash2.backends.reference import BACKEND, ReferenceBackend
from adasplash2.contract import AttentionRequest
from adasplash2.testing import (
    INPUT_KINDS,
    assert_attention,
    assert_close,
    assert_pair_close,
    assert_support,
    attention_truth,
    make_inputs,
    run_attention,
)

CPU = torch.device("cpu")
PLAIN = ReferenceBackend(torch.float32)


def case(dtype: torch.dtype = torch.float32, **fields: Any) -> Case:
    return Case(**{"seqlen_q": 130, "seqlen_k": 200, "head_dim": 64, "head_dim_v": 64, "dtype": dtype, **fields})


def with_results(changes):
    """Plain evaluation whose results are changed before they are compared."""

    class Changed(ReferenceBackend):
        def forward(self, request):
            return changes(super().forward(request))

        def backward(self, request, out, tau, saved, dout):
            return changes(super().backward(request, out, tau, saved, dout))

    return Changed(torch.float32)


def on_field(name, change):
    return with_results(
        lambda results: (
            results._replace(**{name: change(getattr(results, name))}) if hasattr(results, name) else results
        )
    )


@pytest.mark.parametrize("kind", INPUT_KINDS)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64], ids=str)
def test_plain_evaluation_passes(dtype, kind):
    assert_attention(PLAIN, *case(dtype, kind=kind, is_causal=True, alpha=(1.5, 2.0), group=2).build(CPU))


@pytest.mark.parametrize(
    ("quantity", "backend"),
    [
        ("tau", on_field("tau", lambda tau: tau + 1e-5)),
        ("out", on_field("out", lambda out: out * (1 + 1e-4))),
        ("dq", on_field("dq", lambda dq: dq * (1 + 1e-3))),
        ("dk", on_field("dk", lambda dk: dk * (1 + 1e-3))),
        ("dv", on_field("dv", lambda dv: dv * (1 + 1e-3))),
        ("dalpha", on_field("dalpha_heads", lambda dalpha: dalpha * (1 + 1e-2))),
        ("out", on_field("out", lambda out: out.index_fill(2, torch.tensor(77), 0))),
        ("dk", on_field("dk", lambda dk: dk.roll(1, 2))),
        (
            "out: 1 entries are NaN",
            on_field(
                "out", lambda out: out.index_put((*torch.zeros(4, 1, dtype=torch.int64),), torch.tensor(torch.nan))
            ),
        ),
        (
            "tau: 1 entries are inf",
            on_field(
                "tau", lambda tau: tau.index_put((*torch.zeros(3, 1, dtype=torch.int64),), torch.tensor(torch.inf))
            ),
        ),
        ("out: shape", on_field("out", lambda out: out[:, :, 1:])),
        ("out: dtype", on_field("out", lambda out: out.double())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_results_are_caught(quantity, backend):
    with pytest.raises(AssertionError, match=f"^reference {quantity}"):
        assert_attention(backend, *case(alpha=(1.5,), is_causal=True).build(CPU))


def test_a_forgotten_key_is_caught():
    request, dout = case().build(CPU)
    one_less = replace(request, seqlens_k=torch.tensor([199]))
    truth = attention_truth(request, dout)
    for quantity, value in run_attention(PLAIN, one_less, dout).items():
        with pytest.raises(AssertionError, match=quantity):
            assert_close(value, truth, quantity)


def test_queries_scaled_before_the_product_are_caught():
    """Rounding q * scale to bfloat16 costs accuracy that scaling the scores does not."""
    request, _ = case(torch.bfloat16, head_dim=80).build(CPU)
    scaled = replace(request, q=request.q * request.scale, scale=1.0)
    with pytest.raises(AssertionError, match="tau"):
        assert_close(PLAIN.forward(scaled).tau, attention_truth(request), "tau")


def test_wrong_delta_is_caught(monkeypatch):
    """delta = dout . out holds for softmax; for entmax it is dout . out1."""
    request, dout = case(torch.bfloat16).build(CPU)
    truth = attention_truth(request, dout)

    def score_grads(w, dp):
        p = w.square()  # at alpha = 1.5
        return w * (dp - (p * dp).sum(-1, keepdim=True))

    monkeypatch.setattr(reference, "_score_grads", score_grads)
    with pytest.raises(AssertionError, match="dq"):
        assert_close(run_attention(PLAIN, request, dout)["dq"], truth, "dq")


@pytest.mark.parametrize("quantity", ["out", "dq", "dk", "dv"])
def test_lost_accuracy_in_half_precision_is_caught(quantity):
    """Errors of 1% everywhere stay within the bound of each entry; their root mean square does not."""
    request, dout = case(torch.bfloat16, head_dim=128, head_dim_v=128).build(CPU)
    truth = attention_truth(request, dout)
    value = run_attention(PLAIN, request, dout)[quantity]
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    assert_close(value, truth, quantity)
    with pytest.raises(AssertionError, match="root mean square"):
        assert_close(
            (value * (1 + 0.01 * noise)).to(value.dtype),
            replace(truth, bounds={quantity: torch.tensor(torch.inf)}),
            quantity,
        )


def test_pairs_are_held_to_both_bounds():
    request, dout = case().build(CPU)
    truth = attention_truth(request, dout)
    out = PLAIN.forward(request).out
    assert_pair_close(out, BACKEND.forward(request).out, truth, "out")
    with pytest.raises(AssertionError, match="bound"):
        assert_pair_close(out, out * 1.001, truth, "out")


@pytest.mark.parametrize(
    "change",
    [
        lambda stats: {"size": stats.size + 1},
        lambda stats: {"size": stats.size.long()},
        lambda stats: {"block_map": ~stats.block_map},
        lambda stats: {"block_map": stats.block_map[..., 1:]},
        lambda stats: {"tau": stats.tau + 1e-4},
        lambda stats: {"element_density": stats.element_density * 1.01},
        lambda stats: {"block_density": stats.block_density * 1.01},
    ],
    ids=["size", "size dtype", "block_map", "block_map shape", "tau", "element_density", "block_density"],
)
def test_wrong_support_is_caught(change):
    request, _ = case(kind="wide").build(CPU)
    stats = BACKEND.support(request, 16, 16)
    assert_support(stats, request)
    with pytest.raises(AssertionError):
        assert_support(replace(stats, **change(stats)), request)


def test_saved_must_be_announced():
    class Unannounced(ReferenceBackend):
        def saved_like(self, request):
            return []

    with pytest.raises(AssertionError, match="saved_like announces"):
        run_attention(Unannounced(), *case().build(CPU))


def test_failures_name_the_worst_entry():
    request, _ = case().build(CPU)
    out = BACKEND.forward(request).out
    out[0, 0, 5, 7] += 1
    with pytest.raises(
        AssertionError, match=r"mine out: got .* at \(0, 0, 5, 7\), expected .* bound .*; 0.01% of the 8320"
    ):
        assert_close(out, attention_truth(request), "out", "mine")


@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_inputs_depend_on_their_seed_alone(kind):
    shape: dict[str, Any] = {
        "batch": 2,
        "heads_q": 4,
        "heads_kv": 2,
        "seqlen_q": 150,
        "seqlen_k": 170,
        "head_dim": 40,
        "head_dim_v": 8,
    }
    first, again, other = (make_inputs(kind, **shape, dtype=torch.bfloat16, seed=seed) for seed in (3, 3, 4))
    assert [tuple(t.shape) for t in first] == [(2, 4, 150, 40), (2, 2, 170, 40), (2, 2, 170, 8), (2, 4, 150, 8)]
    for a, b, c in zip(first, again, other, strict=True):
        assert a.equal(b)
        assert not a.equal(c)
        assert a.isfinite().all()
        assert a.is_contiguous()


def test_unknown_kind():
    with pytest.raises(ValueError, match="kind='flat': expected one of 'iid'"):
        make_inputs("flat", seqlen_q=1, head_dim=1)


def test_share_of_topics_sets_the_density():
    def density(share):
        q, k, v, _ = make_inputs("topics", seqlen_q=1024, head_dim=64, share=share)
        return BACKEND.support(AttentionRequest(q, k, v, 0.125, is_causal=True), 64, 64).block_density

    few, some, many = density(0.05), density(0.25), density(0.5)
    assert 0.05 < few < some < many < 0.9


def test_tolerances_have_one_place():
    """Backends are compared within the bounds of adasplash2.testing; no test has a tolerance of its own for them."""
    own = re.compile(r"\b[ar]tol\s*=(?!\s*0\b(?!\.))")
    exempt = {"test_reference.py", Path(__file__).name}  # the reference itself has nothing above it but mathematics
    found = [
        path.name
        for path in Path(__file__).parent.glob("*.py")
        if path.name not in exempt and own.search(path.read_text())
    ]
    assert not found
