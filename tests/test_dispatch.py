"""Which backend serves a call: the order, every kind of reason, no fallback for a name, and the texts."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import types
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch

import adasplash2
from adasplash2 import registry
from adasplash2.contract import (
    AttentionGrads,
    AttentionRequest,
    AttentionResult,
    Backend,
    EntmaxRequest,
    NoBackendError,
    SupportStats,
    UnsupportedError,
)
from adasplash2.registry import Candidate

FEATURES = frozenset(f.metadata["feature"] for f in fields(AttentionRequest) if "feature" in f.metadata)


@dataclass
class FakeBackend:
    """Zeros of the right shapes, and a record of what was asked."""

    name: str = "fake"
    features: frozenset[str] = FEATURES
    unavailable: str | None = None
    reasons: tuple[str, ...] = ()
    entmax_reasons: tuple[str, ...] = ()
    asked: list[str] = field(default_factory=list)
    requests: list[AttentionRequest] = field(default_factory=list)

    def unavailable_reason(self):
        self.asked.append("unavailable_reason")
        return self.unavailable

    def unsupported_reasons(self, request):
        self.asked.append("unsupported_reasons")
        return self.reasons

    def entmax_unsupported_reasons(self, request):
        self.asked.append("entmax_unsupported_reasons")
        return self.entmax_reasons

    def saved_like(self, request):
        return []

    def forward(self, request):
        self.asked.append("forward")
        self.requests.append(request)
        rows = (request.batch, request.heads_q, request.seqlen_q)
        return AttentionResult(request.q.new_zeros(*rows, request.head_dim_v), request.q.new_zeros(rows), [])

    def backward(self, request, out, tau, saved, dout):
        self.asked.append("backward")
        self.requests.append(request)
        return AttentionGrads(
            torch.zeros_like(request.q), torch.zeros_like(request.k), torch.zeros_like(request.v), None
        )

    def support(self, request, block_m, block_n):
        self.asked.append("support")
        self.requests.append(request)
        nothing = torch.zeros(0)
        return SupportStats(nothing, nothing, nothing, block_m, block_n, 0.0, 0.0)

    def entmax(self, request):
        self.asked.append("entmax")
        return torch.zeros_like(request.x)

    def entmax_backward(self, p, dp, alpha, alpha_rows):
        self.asked.append("entmax_backward")
        return torch.zeros_like(p), None


def request_with(**options):
    q = torch.zeros(1, 2, 3, 4)
    return AttentionRequest(q, q, q, 1.0, **options)


def candidate(name, devices=("cpu",), **options):
    return Candidate(name, FakeBackend(name, **options), devices)


@pytest.fixture
def fakes(monkeypatch):
    """A registry of its own: what a test registers is gone afterwards."""
    monkeypatch.setattr(registry, "_entries", {})
    monkeypatch.setattr(registry, "_found", {})

    def add(name, devices=("cpu",), **options):
        backend = FakeBackend(name, **options)
        registry.register(name, backend, devices)
        return backend

    return add


class TestSelect:
    def test_auto_takes_the_first_without_a_reason(self):
        candidates = [candidate("a", reasons=("got x; needs y",)), candidate("b"), candidate("c")]
        for order in itertools.permutations(candidates):
            first = next(found for found in order if found.name != "a")
            assert registry.select(request_with(), "auto", order) is first.backend

    def test_nothing_behind_the_chosen_one_is_looked_at(self):
        def lazily():
            yield candidate("a", reasons=("got x; needs y",))
            yield candidate("b")
            pytest.fail("a third candidate was asked for")

        assert registry.select(request_with(), "auto", lazily()).name == "b"

    def test_a_name_is_served_by_that_backend_alone(self):
        first, second = candidate("a"), candidate("b")
        assert registry.select(request_with(), "b", [first, second]) is second.backend
        assert first.backend.asked == []

    @pytest.mark.parametrize(
        ("refusing", "reason"),
        [
            (Candidate("a", "no driver", ("cpu",)), "no driver"),
            (candidate("a", features=frozenset()), "got causal mask; needs a backend that serves it"),
            (
                candidate("a", reasons=("got head_dim 7; needs 8", "got v; needs w")),
                "got head_dim 7; needs 8; got v; needs w",
            ),
        ],
        ids=["unavailable", "feature", "unsupported"],
    )
    def test_a_name_never_falls_back(self, refusing, reason):
        other = candidate("b")
        with pytest.raises(UnsupportedError) as error:
            registry.select(request_with(is_causal=True), "a", [refusing, other])
        assert not isinstance(error.value, NoBackendError)
        assert str(error.value) == (
            "backend='a' cannot serve this call (q (1, 2, 3, 4), k (1, 2, 3, 4), v (1, 2, 3, 4), torch.float32, cpu, "
            f"causal mask): {reason}"
        )
        assert other.backend.asked == []

    def test_the_error_of_auto_lists_every_backend_with_every_reason(self):
        candidates = [
            Candidate("a", "no driver", ("cpu",)),
            candidate("b", ("cuda", "xpu")),
            candidate("c", ()),
            candidate("d", features=frozenset(), reasons=("got one; needs two", "got three; needs four")),
        ]
        with pytest.raises(NoBackendError) as error:
            registry.select(request_with(is_causal=True), "auto", candidates)
        assert str(error.value).splitlines()[1:] == [
            "  a: no driver",
            "  b: got backend='auto' on cpu; needs tensors on cuda or xpu",
            "  c: got backend='auto' on cpu; needs backend='c'",
            "  d: got causal mask; needs a backend that serves it; got one; needs two; got three; needs four",
        ]

    def test_by_name_a_backend_is_asked_on_any_device(self):
        far = candidate("a", ("cuda",))
        assert registry.select(request_with(), "a", [far]) is far.backend

    def test_an_unknown_name(self):
        with pytest.raises(ValueError, match=r"backend='c': expected one of 'auto', 'a', 'b'$"):
            registry.select(request_with(), "c", [candidate("a"), candidate("b")])

    @pytest.mark.parametrize("feature", sorted(FEATURES))
    def test_a_feature_that_a_backend_does_not_list_is_refused_without_its_help(self, feature):
        options: dict[str, dict[str, Any]] = {
            "alpha per head": {"alpha_heads": torch.full((2,), 1.5)},
            "causal mask": {"is_causal": True},
            "padded seqlens": {"seqlens_k": torch.tensor([3]), "seqlens_q": torch.tensor([3])},
        }
        request = request_with(**options[feature])
        with pytest.raises(UnsupportedError, match=rf": got {feature}; needs a backend that serves it$"):
            registry.select(request, "a", [candidate("a", features=FEATURES - {feature})])
        assert registry.select(request, "a", [candidate("a", features=frozenset({feature}))]).name == "a"

    def test_entmax_asks_its_own_question(self):
        request = EntmaxRequest(torch.zeros(2, 3))
        refusing = candidate("a", entmax_reasons=("got rows; needs none",))
        serving = candidate("b", reasons=("got attention; needs entmax",), features=frozenset())
        assert registry.select(request, "auto", [refusing, serving]) is serving.backend
        with pytest.raises(UnsupportedError, match=r"\(x \(2, 3\), torch.float32, cpu\): got rows; needs none$"):
            registry.select(request, "a", [refusing])

    @pytest.mark.parametrize("name", ["auto", "a", "b", "c"])
    def test_explain_and_select_agree(self, name):
        candidates = [
            candidate("a", reasons=("got x; needs y",)),
            Candidate("b", "no driver", ("cpu",)),
            candidate("c"),
            candidate("d", ()),
        ]
        explanation = registry.explain(request_with(), name, candidates)
        assert list(explanation.reasons) == ["a", "b", "c", "d"]
        assert explanation.reasons["a"] == ("got x; needs y",)
        assert explanation.reasons["b"] == ("no driver",)
        assert explanation.reasons["d"] == (("got backend='auto' on cpu; needs backend='d'",) if name == "auto" else ())
        if explanation.chosen is None:
            with pytest.raises(UnsupportedError):
                registry.select(request_with(), name, candidates)
        else:
            assert registry.select(request_with(), name, candidates).name == explanation.chosen == "c"


class TestRegistry:
    def test_the_shipped_order(self):
        assert registry.names() == ("triton", "cupy", "numba", "reference")

    def test_the_reference_serves_by_name_only(self):
        assert registry.find("reference").devices == ()
        assert isinstance(registry.find("reference").backend, Backend)

    def test_a_module_that_is_not_there(self, fakes):
        registry.register("ghost", "adasplash2.backends.ghost")
        assert registry.available_backends() == {
            "ghost": "the ghost backend is not part of this installation (no module adasplash2.backends.ghost)"
        }
        registry.register("ghost", "no_such_package.ghost")
        assert registry.find("ghost").backend == (
            "the ghost backend is not part of this installation (no module no_such_package)"
        )

    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("import no_such_library", "broken_backend cannot be imported: No module named 'no_such_library'"),
            (
                "raise ImportError('libfoo.so.1 is missing')",
                "broken_backend cannot be imported: libfoo.so.1 is missing",
            ),
            ("BACKEND = 3", "the module broken_backend exposes no BACKEND"),
        ],
    )
    def test_what_fails_inside_a_module_keeps_its_text(self, fakes, tmp_path, monkeypatch, source, reason):
        (tmp_path / "broken_backend.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "broken_backend", raising=False)
        registry.register("broken", "broken_backend")
        assert registry.available_backends() == {"broken": reason}

    def test_an_error_that_is_no_import_error_is_not_hidden(self, fakes, tmp_path, monkeypatch):
        (tmp_path / "buggy_backend.py").write_text("1 / 0")
        monkeypatch.syspath_prepend(tmp_path)
        registry.register("buggy", "buggy_backend")
        with pytest.raises(ZeroDivisionError):
            registry.find("buggy")

    def test_a_module_is_imported_when_it_is_asked_for_and_asked_once(self, fakes, monkeypatch):
        backend = FakeBackend("late")
        registry.register("late", "late_backend", ("cpu",))
        monkeypatch.setitem(sys.modules, "late_backend", types.SimpleNamespace(BACKEND=backend))
        assert backend.asked == []
        for _ in range(3):
            assert registry.resolve(request_with(), "auto") is backend
        assert backend.asked.count("unavailable_reason") == 1

    def test_auto_imports_nothing_that_it_does_not_need(self, fakes):
        first = fakes("first")
        registry.register("second", "a_module_that_must_not_be_imported", ("cpu",))
        assert registry.resolve(request_with(), "auto") is first
        assert "second" not in registry._found

    def test_auto_asks_the_one_that_was_measured_to_be_faster_first(self, fakes, monkeypatch):
        fakes("first")
        second = fakes("second")
        measured = types.SimpleNamespace(leads=lambda request: request.seqlen_q > 3)
        monkeypatch.setitem(sys.modules, "measurements", measured)
        registry._entries["second"] = registry._Entry(second, ("cpu",), "measurements")
        long, short = (torch.zeros(1, 1, n, 1) for n in (4, 3))
        for q, expected in ((long, "second"), (short, "first")):
            request = AttentionRequest(q, q, q, scale=1.0)
            assert registry.resolve(request, "auto").name == expected
            assert registry.resolve(request, "first").name == "first"
            explanation = adasplash2.explain(q, q, q, backend="auto")
            assert explanation.chosen == next(iter(explanation.reasons)) == expected
        registry._entries["gone"] = registry._Entry("a_missing_backend", ("cpu",), "a_missing_backend.measurements")
        assert registry.resolve(AttentionRequest(long, long, long, scale=1.0), "auto").name == "second"
        second.reasons = ("got long; needs short",)
        assert registry.resolve(AttentionRequest(long, long, long, scale=1.0), "auto").name == "first"

    def test_registering_again_replaces_in_place(self, fakes):
        fakes("a", unavailable="no driver")
        fakes("b")
        assert registry.available_backends() == {"a": "no driver", "b": None}
        again = fakes("a")
        assert registry.available_backends() == {"a": None, "b": None}
        assert registry.resolve(request_with(), "auto") is again

    def test_bad_registrations(self, fakes):
        with pytest.raises(ValueError, match="name='auto': expected another name"):
            registry.register("auto", FakeBackend("auto"))
        with pytest.raises(ValueError, match="name='b': expected 'a', the backend's own name"):
            registry.register("b", FakeBackend("a"))
        with pytest.raises(TypeError, match=r"source=3: expected a module path or an object"):
            registry.register("c", 3)  # type: ignore[arg-type]
        assert registry.names() == ()

    def test_unknown_names_are_told_the_known_ones(self, fakes):
        fakes("a")
        q = torch.zeros(1, 1, 1, 1)
        for call in (adasplash2.attention, adasplash2.explain):
            with pytest.raises(ValueError, match=r"backend='A': expected one of 'auto', 'a'$"):
                call(q, q, q, backend="A")


class TestCalls:
    def test_the_chosen_backend_runs_forward_and_backward(self, fakes):
        refusing, serving = fakes("refusing", reasons=("got x; needs y",)), fakes("serving")
        q, k, v = (torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3))
        adasplash2.attention(q, k, v, backend="auto").sum().backward()
        assert [step for step in serving.asked if step in ("forward", "backward")] == ["forward", "backward"]
        assert not {"forward", "backward"} & set(refusing.asked)

    def test_backward_meets_the_backend_of_forward(self, fakes):
        early = fakes("early", unavailable="not yet")
        late = fakes("late")
        q = torch.randn(1, 1, 3, 4, requires_grad=True)
        out = adasplash2.attention(q, q, q, backend="auto")
        early = fakes("early")
        assert adasplash2.explain(q, q, q, backend="auto").chosen == "early"
        out.sum().backward()
        assert "backward" in late.asked
        assert "backward" not in early.asked

    @pytest.mark.parametrize(
        ("requires_grad", "grad_mode", "saves"), [(True, True, True), (True, False, False), (False, True, False)]
    )
    def test_saves_for_backward_only_where_there_can_be_one(self, fakes, requires_grad, grad_mode, saves):
        backend = fakes("fake")
        q = torch.randn(1, 1, 3, 4)
        v = q.clone().requires_grad_(requires_grad)
        with torch.set_grad_enabled(grad_mode):
            adasplash2.attention(q, q, v, backend="auto")
        assert backend.requests[-1].save_for_backward is saves

    def test_a_learned_alpha_alone_saves_for_backward(self, fakes):
        backend = fakes("fake")
        q = torch.randn(1, 2, 3, 4)
        adasplash2.attention(q, q, q, alpha=torch.full((2,), 1.5, requires_grad=True), backend="auto")
        assert backend.requests[-1].save_for_backward is True

    def test_the_request_says_what_the_call_said(self, fakes):
        backend = fakes("fake")
        q, k, v = torch.randn(2, 4, 3, 9), torch.randn(2, 2, 5, 9), torch.randn(2, 2, 5, 7)
        lengths = torch.tensor([3, 1])
        adasplash2.attention(
            q, k, v, alpha=2, is_causal=True, scale=0.25, seqlens_q=lengths, seqlens_k=lengths, backend="auto"
        )
        request = backend.requests[-1]
        assert (request.scale, request.alpha, request.alpha_heads, request.is_causal) == (0.25, 2.0, None, True)
        assert request.features() == ("causal mask", "padded seqlens")
        for sent, got in ((q, request.q), (k, request.k), (v, request.v), (lengths, request.seqlens_k)):
            assert got.data_ptr() == sent.data_ptr()
        adasplash2.attention(q, k, v, backend="auto")
        assert backend.requests[-1].scale == 1 / 3
        assert backend.requests[-1].alpha == 1.5
        assert backend.requests[-1].features() == ()

    def test_one_alpha_for_all_heads_is_repeated(self, fakes):
        backend = fakes("fake")
        q = torch.randn(1, 3, 2, 4)
        adasplash2.attention(q, q, q, alpha=torch.tensor(1.25), backend="auto")
        assert backend.requests[-1].alpha_heads.tolist() == [1.25] * 3

    def test_softmax_asks_no_backend(self, fakes):
        backend = fakes("fake")
        q = torch.randn(1, 1, 3, 4)
        adasplash2.attention(q, q, q, alpha=1.0, backend="fake")
        adasplash2.entmax(q, alpha=1.0, backend="fake")
        explanation = adasplash2.explain(q, q, q, alpha=1, backend="auto")
        assert backend.asked == []
        assert explanation.chosen == "scaled_dot_product_attention"
        assert explanation.reasons == {"fake": ("got alpha=1.0; needs alpha in (1, 2]",)}

    def test_explain_runs_nothing(self, fakes):
        backend = fakes("fake")
        q = torch.randn(1, 1, 3, 4)
        explanation = adasplash2.explain(q, q, q, backend="auto")
        assert str(explanation) == "served by fake\n  fake: can serve this call"
        assert backend.requests == []

    def test_support_and_entmax_go_to_the_chosen_backend(self, fakes):
        fakes("refusing", reasons=("got x; needs y",), entmax_reasons=("got x; needs y",))
        backend = fakes("serving")
        q, k = torch.randn(1, 2, 3, 4, requires_grad=True), torch.randn(1, 2, 5, 4)
        stats = adasplash2.support(q, k, is_causal=True, block_m=2, block_n=3, backend="auto")
        assert (stats.block_m, stats.block_n) == (2, 3)
        assert backend.requests[-1].is_causal
        assert backend.requests[-1].save_for_backward is False
        adasplash2.entmax(q, backend="auto").sum().backward()
        assert backend.asked[-3:] == ["entmax", "entmax_unsupported_reasons", "entmax_backward"]


CHILD = """
import torch, adasplash2
q = torch.zeros(1, 1, 1, 1)
print(adasplash2.explain(q, q, q).chosen, adasplash2.explain(q, q, q, backend="auto").chosen)
"""


@pytest.mark.parametrize("value", [None, "reference"])
def test_the_environment_changes_the_default_and_nothing_else(value):
    environment = {name: text for name, text in os.environ.items() if name != "ADASPLASH2_BACKEND"}
    if value is not None:
        environment["ADASPLASH2_BACKEND"] = value
    child = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True)
    default, automatic = child.stdout.split()
    assert automatic != "reference"
    assert default == (value or automatic)
