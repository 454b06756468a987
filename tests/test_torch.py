"""attention and entmax in torch's hands: compile, export, torch.func, autocast, checkpoints, dispatch."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import adasplash2
from adasplash2 import autograd
from adasplash2.backends.reference import ReferenceBackend

OPS = torch.ops.adasplash2
attention = partial(adasplash2.attention, backend="reference")
entmax = partial(adasplash2.entmax, backend="reference")


def inputs(*leading, seed=0, heads_q=4, heads_kv=2, seqlen_q=5, seqlen_k=7, requires_grad=False):
    """q, k, v of batch 2, behind leading dimensions."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, heads_q, seqlen_q, 8), (2, heads_kv, seqlen_k, 8), (2, heads_kv, seqlen_k, 3)
    return [torch.randn(*leading, *shape, generator=generator).requires_grad_(requires_grad) for shape in shapes]


def loss(q, k, v, **options):
    return attention(q, k, v, **options).square().sum()


def gradients(function, *arguments):
    """By plain autograd, of a scalar."""
    leaves = [tensor.detach().requires_grad_() for tensor in arguments]
    return torch.autograd.grad(function(*leaves), leaves)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class TestFunc:
    """torch.func."""

    def test_grad_is_that_of_autograd(self):
        arguments = inputs()
        expected = gradients(loss, *arguments)
        for got in (
            torch.func.grad(loss, argnums=(0, 1, 2))(*arguments),
            torch.func.grad_and_value(loss, argnums=(0, 1, 2))(*arguments)[0],
            torch.func.vjp(loss, *arguments)[1](torch.tensor(1.0)),
        ):
            for one, other in zip(got, expected, strict=True):
                assert torch.equal(one, other)

    def test_grad_of_alpha_through_a_module(self):
        class Attend(nn.Module):
            def __init__(self):
                super().__init__()
                self.alpha = nn.Parameter(torch.tensor([1.2, 1.5, 1.7, 1.9]))

            def forward(self, q, k, v):
                return loss(q, k, v, alpha=self.alpha)

        module, arguments = Attend(), tuple(inputs())
        call = partial(torch.func.functional_call, module)
        got = torch.func.grad(call)(dict(module.named_parameters()), arguments)
        module(*arguments).backward()
        assert torch.equal(got["alpha"], module.alpha.grad)

    def test_jacrev(self):
        q, k, v = inputs(seqlen_q=2)
        jacobian = torch.func.jacrev(lambda q: attention(q, k, v)[0, 1, 1])(q)
        for i in range(3):
            (row,) = gradients(lambda q, i=i: attention(q, k, v)[0, 1, 1, i], q)
            torch.testing.assert_close(jacobian[i], row)

    @pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 0), (None, 2, -1)], ids=str)
    @pytest.mark.parametrize("name", ["plain", "alpha per head", "mapped alpha", "mapped lengths", "both mapped"])
    def test_vmap_is_a_loop(self, name, in_dims):
        mapped_alpha, mapped_lengths = (
            torch.tensor([[1.5, 1.2, 1.8, 2.0]] * 3) - 0.1 * torch.rand(3, 1),
            torch.tensor([[7, 3], [0, 1], [2, 2]]),
        )
        choices: dict[str, dict[str, Any]] = {
            "plain": {},
            "alpha per head": {"alpha": (mapped_alpha[0], None), "seqlens_q": (torch.tensor([5, 2]), None)},
            "mapped alpha": {"alpha": (mapped_alpha, 0), "seqlens_k": (torch.tensor([7, 2]), None)},
            "mapped lengths": {"seqlens_k": (mapped_lengths, 0)},
            "both mapped": {"alpha": (mapped_alpha, 0), "seqlens_k": (mapped_lengths, 0)},
        }
        extras = choices[name]
        many = [
            tensor[0] if dim is None else tensor.movedim(0, dim) for tensor, dim in zip(inputs(3), in_dims, strict=True)
        ]
        many += [tensor for tensor, _ in extras.values()]
        dims = (*in_dims, *(dim for _, dim in extras.values()))

        def call(q, k, v, *more):
            return attention(q, k, v, is_causal=True, return_tau=True, **dict(zip(extras, more, strict=True)))

        def differentiated(*arguments):
            return call(*arguments)[0].square().sum()

        argnums = (0, 1, 2, 3) if "alpha" in extras else (0, 1, 2)
        grad = torch.func.grad(differentiated, argnums)
        got = (*torch.vmap(call, dims)(*many), *torch.vmap(grad, dims)(*many))
        for i in range(3):
            one = [tensor if dim is None else tensor.select(dim, i) for tensor, dim in zip(many, dims, strict=True)]
            for some, expected in zip(got, (*call(*one), *grad(*one)), strict=True):
                torch.testing.assert_close(some[i], expected)

    def test_grad_of_vmap_and_nested_vmap(self):
        arguments = inputs(2, 3)

        def call(q, k, v):
            return torch.vmap(torch.vmap(attention))(q, k, v)

        def flat(q, k, v):
            return attention(*(tensor.flatten(0, 2) for tensor in (q, k, v))).view(2, 3, 2, 4, 5, 3)

        torch.testing.assert_close(call(*arguments), flat(*arguments))
        expected = gradients(lambda *some: flat(*some).square().sum(), *arguments)
        for got in (
            torch.func.grad(lambda *some: call(*some).square().sum(), (0, 1, 2))(*arguments),
            gradients(lambda *some: call(*some).square().sum(), *arguments),
            torch.vmap(torch.vmap(torch.func.grad(loss, (0, 1, 2))))(*arguments),
        ):
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other)

    def test_one_call_of_the_backend_serves_all(self, monkeypatch):
        calls = []
        forward = ReferenceBackend.forward

        def counted(backend, request):
            calls.append(request.q.shape)
            return forward(backend, request)

        monkeypatch.setattr(ReferenceBackend, "forward", counted)
        torch.vmap(attention)(*inputs(3))
        torch.vmap(partial(attention, alpha=torch.full((4,), 1.3)))(*inputs(3))
        assert calls == [(6, 4, 5, 8), (2, 12, 5, 8)]

    @pytest.mark.parametrize("alpha_dim", [None, 0, "float"])
    def test_vmap_of_entmax(self, alpha_dim):
        x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
        alpha: Any = 1.7 if alpha_dim == "float" else torch.tensor([[1.2], [1.5], [1.9]])[:, None].expand(3, 4, 1)
        if alpha_dim is None:
            alpha = alpha[0]
        dims = (0, alpha_dim if alpha_dim == 0 else None)

        def call(x, alpha):
            return entmax(x, alpha, -1).square().sum()

        argnums = (0,) if alpha_dim == "float" else (0, 1)
        got = torch.vmap(torch.func.grad_and_value(call, argnums), dims)(x, alpha)
        for i in range(3):
            grads, value = torch.func.grad_and_value(call, argnums)(x[i], alpha[i] if alpha_dim == 0 else alpha)
            torch.testing.assert_close(got[1][i], value)
            for some, expected in zip(got[0], grads, strict=True):
                torch.testing.assert_close(some[i], expected)

    @pytest.mark.parametrize("call", [loss, lambda q, k, v: entmax(q).square().sum()], ids=["attention", "entmax"])
    def test_forward_mode_is_refused(self, call):
        q, k, v = inputs()
        of_q = lambda q: call(q, k, v)  # noqa: E731
        for transformed in (
            lambda: torch.func.jvp(of_q, (q,), (q,)),
            lambda: torch.func.jacfwd(of_q)(q),
            lambda: torch.func.hessian(of_q)(q),
            lambda: torch.func.jvp(torch.func.grad(of_q), (q,), (q,)),
        ):
            with pytest.raises(NotImplementedError, match="adasplash2 has no forward mode AD"):
                transformed()

    @pytest.mark.parametrize("call", [loss, lambda q, k, v: entmax(q).square().sum()], ids=["attention", "entmax"])
    def test_second_derivatives_are_refused(self, call):
        arguments = inputs()
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            torch.func.grad(lambda *some: torch.func.grad(call)(*some).sum())(*arguments)

    def test_mapping_that_autograd_does_by_itself_is_refused(self):
        q, k, v = inputs(requires_grad=True)
        out = attention(q, k, v)
        with pytest.raises(NotImplementedError, match=r"is_grads_batched=True.*expected torch\.func\.vmap"):
            torch.autograd.grad(out, q, torch.ones(3, *out.shape), is_grads_batched=True)


class TestCompile:
    @pytest.mark.parametrize("is_marked", [True, False], ids=["mark_dynamic", "dynamic=True"])
    @pytest.mark.parametrize("requires_grad", [True, False])
    def test_one_graph_for_all_lengths_and_batches(self, is_marked, requires_grad, fresh_compiler):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(attention, fullgraph=True, dynamic=None if is_marked else True, backend=counter)
        frames = 0
        # In the first call no two sizes are equal: torch takes those that are for one and the same.
        for i, (batch, seqlen_q, seqlen_k) in enumerate(((6, 5, 7), (3, 9, 70), (5, 64, 65), (2, 130, 3))):
            generator = torch.Generator().manual_seed(i)
            shapes = (batch, 4, seqlen_q, 8), (batch, 2, seqlen_k, 8), (batch, 2, seqlen_k, 3)
            some = [torch.randn(shape, generator=generator).requires_grad_(requires_grad) for shape in shapes]
            if is_marked:
                for tensor in some:
                    torch._dynamo.mark_dynamic(tensor, 0)
                    torch._dynamo.mark_dynamic(tensor, 2)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                got = compiled(*some, is_causal=True)
            assert torch.equal(got, attention(*some, is_causal=True))
            if requires_grad:
                got.sum().backward()
            # dynamic=True traces a first time to find which floats depend on sizes.
            frames = frames if i else counter.frame_count
            assert counter.frame_count == frames <= (1 if is_marked else 2)

    def test_autocast(self, fresh_compiler):
        def call(q, k, v):
            with torch.autocast("cpu", torch.bfloat16):
                return attention(q @ q.mT @ q, k, v)

        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            q, k, v = inputs(requires_grad=True)
            out = function(q, k, v)
            out.sum().backward()
            assert out.dtype == torch.bfloat16
            assert {tensor.grad.dtype for tensor in (q, k, v)} == {torch.float32}

    @pytest.mark.parametrize(
        "transform",
        [lambda f: torch.func.grad(lambda *a: f(*a).square().sum()), torch.vmap],
        ids=["grad", "vmap"],
    )
    def test_with_torch_func(self, transform, fresh_compiler):
        function = transform(attention)
        arguments = inputs(3) if transform is torch.vmap else inputs()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([1.2, 1.5, 1.7, 1.9]))

    def forward(self, q, k, v):
        return attention(q, k, v, alpha=self.alpha, is_causal=True)


class TestExport:
    @pytest.mark.parametrize("strict", [True, False])
    def test_saved_loaded_and_run_at_other_lengths(self, strict, fresh_compiler):
        batch, m, n = (torch.export.Dim(name, min=1, max=4096) for name in ("batch", "seqlen_q", "seqlen_k"))
        keys = {0: batch, 2: n}
        module = Attend()
        program = torch.export.export(
            module, tuple(inputs()), dynamic_shapes=({0: batch, 2: m}, keys, keys), strict=strict
        )
        assert OPS.attention.default in [node.target for node in program.graph.nodes]
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for seqlen_q, seqlen_k in ((5, 7), (1, 33), (64, 2)):
            some = inputs(seqlen_q=seqlen_q, seqlen_k=seqlen_k)
            assert torch.equal(loaded(*some), module(*some))

    def test_a_loaded_program_trains(self):
        module = Attend()
        loaded = torch.export.export(module, tuple(inputs())).module()
        for one in (module, loaded):
            one(*inputs()).square().sum().backward()
        (alpha,) = loaded.parameters()
        assert torch.equal(alpha.grad, module.alpha.grad)


class Counted(TorchDispatchMode):
    """Counts the operators of adasplash2 that reach it."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "adasplash2":
            self.seen.append(function)
        return function(*args, **(kwargs or {}))


class TestCheckpoint:
    """Also: torch.utils.checkpoint recomputes what it should, and no more."""

    @pytest.mark.parametrize("alpha", [1.5, "per head"])
    @pytest.mark.parametrize("mode", ["reentrant", "not reentrant", "selective"])
    def test_gradients_and_recomputation(self, mode, alpha, monkeypatch):
        forwards = []
        forward = ReferenceBackend.forward

        def counted(backend, request):
            forwards.append(1)
            return forward(backend, request)

        monkeypatch.setattr(ReferenceBackend, "forward", counted)

        def policy(ctx, operator, *args, **kwargs):
            is_attention = operator == OPS.attention.default
            return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE

        choices: dict[str, dict[str, Any]] = {
            "reentrant": {"use_reentrant": True},
            "not reentrant": {"use_reentrant": False},
            "selective": {
                "use_reentrant": False,
                "context_fn": partial(create_selective_checkpoint_contexts, policy),
            },
        }
        options = choices[mode]
        plain, again = (inputs(requires_grad=True) for _ in range(2))
        if alpha == "per head":
            for some in (plain, again):
                some.append(torch.tensor([1.2, 1.5, 1.7, 1.9], requires_grad=True))

        def call(q, k, v, alpha=1.5):
            return attention(q * 2, k, v, alpha=alpha, is_causal=True).sin()

        call(*plain).sum().backward()
        forwards.clear()
        checkpoint(call, *again, **options).sum().backward()
        assert len(forwards) == (1 if mode == "selective" else 2)
        for expected, got in zip(plain, again, strict=True):
            assert torch.equal(got.grad, expected.grad)


class TestDispatch:
    """The short way to the kernel is taken only where the long one would lead there unseen."""

    @pytest.mark.parametrize("call", [lambda q, k, v: attention(q, k, v), lambda q, k, v: entmax(q)])
    def test_a_mode_sees_forward_and_backward(self, call):
        q, k, v = inputs(requires_grad=True)
        with Counted() as counted:
            call(q, k, v).sum().backward()
        assert [function._schema.name.rpartition("_")[2] for function in counted.seen][1:] == ["backward"]
        assert len(counted.seen) == 2

    def test_the_profiler_sees_the_operators(self):
        q, k, v = inputs(requires_grad=True)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            attention(q, k, v).sum().backward()
        names = {event.key for event in profiled.key_averages()}
        assert {"adasplash2::attention", "adasplash2::attention_backward"} <= names

    def test_a_subclass_sees_the_operator(self):
        seen = []

        class Logged(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                seen.append(function)
                return super().__torch_function__(function, types, args, kwargs)

        q, k, v = inputs()
        out = attention(q.as_subclass(Logged), k, v)
        assert OPS.attention.default in seen
        assert torch.equal(out.as_subclass(torch.Tensor), attention(q, k, v))

    def test_a_lazy_negation_is_carried_out(self):
        q, k, v = inputs()
        negated = torch.complex(torch.zeros_like(q), q).conj().imag
        assert negated.is_neg()
        for backend in ("reference", "auto"):
            got = adasplash2.attention(negated, k, v, backend=backend)
            assert torch.equal(got, adasplash2.attention(-q, k, v, backend=backend))

    def test_a_trace_holds_the_operator(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sizes become constants, and that jit is deprecated
            traced = torch.jit.trace(lambda q, k, v: attention(q, k, v), tuple(inputs()))
        other = inputs(seed=1)
        assert "adasplash2::attention" in str(traced.graph)
        torch.testing.assert_close(traced(*other), attention(*other))

    def test_plain_tensors_go_straight_to_the_backend(self, monkeypatch):
        def never(*args):
            raise AssertionError("the operator was called")

        monkeypatch.setattr(autograd, "_attention_op", never)
        monkeypatch.setattr(autograd, "_attention_backward_op", never)
        q, k, v = inputs(requires_grad=True)
        for tensor in (q, nn.Parameter(q.detach())):
            attention(tensor, k, v).sum().backward()
        with torch.inference_mode(), torch.autocast("cpu"):
            attention(*inputs())

    def test_auto_imports_no_backend_for_another_device(self):
        code = """
import sys, torch, adasplash2
x = torch.ones(1, 1, 1, 1)
adasplash2.attention(x, x, x)
print(sorted(name for name in sys.modules if name.startswith("adasplash2.backends.")))
"""
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
        assert "numba_cpu" in done.stdout
        assert "triton_gpu" not in done.stdout
        assert "cupy_cuda" not in done.stdout
