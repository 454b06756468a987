"""The torch operators: registration and compiling with every backend, autograd and tracing with the reference."""

from __future__ import annotations

import weakref
from dataclasses import fields

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import adasplash2
from adasplash2.contract import AttentionRequest, EntmaxRequest

OPS = torch.ops.adasplash2


def tensors(*shapes, dtype=torch.float32, requires_grad=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad and dtype.is_floating_point)
        for shape in shapes
    ]


def qkv(batch=2, heads_q=4, heads_kv=2, seqlen_q=5, seqlen_k=7, head_dim=8, head_dim_v=3, **options):
    shapes = (
        (batch, heads_q, seqlen_q, head_dim),
        (batch, heads_kv, seqlen_k, head_dim),
        (batch, heads_kv, seqlen_k, head_dim_v),
    )
    return tensors(*shapes, **options)


def attention_arguments(target, requires_grad, dtype=torch.float32, **options):
    q, k, v = (tensor.detach().to(target.device) for tensor in qkv(heads_q=2, heads_kv=1, dtype=dtype))
    options = {name: value.to(target.device) if name in ON_DEVICE else value for name, value in options.items()}
    for tensor in (q, k, v, options.get("alpha_heads")):
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    request = AttentionRequest(q, k, v, 0.5, save_for_backward=requires_grad, **options)
    target.serving(request)
    return *(getattr(request, field.name) for field in fields(request)), target.name


ON_DEVICE = ("alpha_heads", "seqlens_q", "seqlens_k")
OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True, "alpha": 2.0},
    "seqlens": {"seqlens_q": torch.tensor([0, 5]), "seqlens_k": torch.tensor([7, 2], dtype=torch.int32)},
    "alpha per head": {"alpha_heads": torch.tensor([1.5, 1.2])},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class TestRegistration:
    def test_the_schema_has_every_field_of_the_request(self):
        for operator, request, ends in (
            (OPS.attention, AttentionRequest, ["backend"]),
            (OPS.entmax, EntmaxRequest, ["backend"]),
        ):
            arguments = operator.default._schema.arguments
            assert [argument.name for argument in arguments] == [field.name for field in fields(request)] + ends

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("requires_grad", [True, False])
    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_attention(self, target, options, requires_grad, dtype):
        arguments = attention_arguments(target, requires_grad, dtype, **options)
        # With grad a backend may leave room in ``saved`` that it never writes, and the check under AOTAutograd compares
        # every entry; TestCompile.test_every_backend compares what matters.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(OPS.attention.default, arguments, test_utils=checks if requires_grad else "ALL")

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_attention_backward(self, target, options):
        *inputs, backend = attention_arguments(target, False, **options)
        inputs[-1] = True
        out, tau, saved = OPS.attention.default(*inputs, backend)
        dout = torch.ones_like(out)
        torch.library.opcheck(OPS.attention_backward.default, (dout, out, tau, saved, *inputs, backend))

    @pytest.mark.parametrize("requires_grad", [True, False])
    @pytest.mark.parametrize("alpha_rows", [None, torch.tensor([1.5, 1.1, 2.0])], ids=["float", "rows"])
    def test_entmax(self, target, alpha_rows, requires_grad):
        x = tensors((3, 6))[0].detach().to(target.device).requires_grad_(requires_grad)
        if alpha_rows is not None:
            alpha_rows = alpha_rows.clone().to(target.device).requires_grad_(requires_grad)
        torch.library.opcheck(OPS.entmax.default, (x, 1.5, alpha_rows, target.name))
        p = OPS.entmax.default(x, 1.5, alpha_rows, target.name).detach()
        alpha_rows = None if alpha_rows is None else alpha_rows.detach()
        torch.library.opcheck(OPS.entmax_backward.default, (p, torch.ones_like(p), 1.5, alpha_rows, target.name))


class TestAutograd:
    def test_tau_is_detached(self):
        out, tau = adasplash2.attention(*qkv(), backend="reference", return_tau=True)
        assert out.requires_grad
        assert not tau.requires_grad
        assert tau.shape == (2, 4, 5)

    @pytest.mark.parametrize(
        ("dtype", "tau_dtype"),
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
        ],
    )
    def test_dtypes(self, dtype, tau_dtype):
        inputs = qkv(dtype=dtype)
        out, tau = adasplash2.attention(*inputs, backend="reference", return_tau=True)
        out.sum().backward()
        assert (out.dtype, tau.dtype) == (dtype, tau_dtype)
        assert {tensor.grad.dtype for tensor in inputs} == {dtype}

    def test_a_result_that_nothing_uses_gives_no_gradient(self):
        q, k, v = qkv()
        adasplash2.attention(q, k, v, backend="reference")
        (q * 1).sum().backward()
        assert k.grad is None

    def test_no_gradient_in_no_gradient_out(self):
        class Stop(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, dx):
                return None

        q, k, v = qkv()
        Stop.apply(adasplash2.attention(q, k, v, backend="reference")).sum().backward()
        assert q.grad is k.grad is v.grad is None

    def test_the_operator_saves_what_it_needs_whatever_it_is_told(self):
        through_front, through_operator = qkv(), qkv()
        adasplash2.attention(*through_front, scale=0.5, backend="reference").sum().backward()
        arguments = (0.5, 1.5, None, False, None, None, False, "reference")
        OPS.attention.default(*through_operator, *arguments)[0].sum().backward()
        for one, other in zip(through_front, through_operator, strict=True):
            assert torch.equal(one.grad, other.grad)

    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_one_input_alone_may_require_grad(self, which):
        everything = qkv()
        adasplash2.attention(*everything, backend="reference").sum().backward()
        alone = [tensor.detach().requires_grad_(i == which) for i, tensor in enumerate(everything)]
        adasplash2.attention(*alone, backend="reference").sum().backward()
        for i, (tensor, expected) in enumerate(zip(alone, everything, strict=True)):
            assert tensor.grad is None if i != which else torch.equal(tensor.grad, expected.grad)

    def test_one_alpha_for_all_heads_collects_the_gradients_of_all(self):
        inputs = qkv(requires_grad=False)
        heads = torch.full((4,), 1.5, requires_grad=True)
        one = torch.tensor(1.5, requires_grad=True)
        for alpha in (heads, one):
            adasplash2.attention(*inputs, alpha=alpha, backend="reference").square().sum().backward()
        assert heads.grad is not None
        assert heads.grad.all()
        torch.testing.assert_close(one.grad, heads.grad.sum())

    @pytest.mark.parametrize("call", ["attention", "entmax"])
    def test_second_derivatives_are_refused(self, call):
        q, k, v = qkv()
        if call == "attention":
            out = adasplash2.attention(q, k, v, backend="reference")
        else:
            out = adasplash2.entmax(q, backend="reference")
        (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        (expected,) = torch.autograd.grad(
            (
                adasplash2.attention(q, k, v, backend="reference")
                if call == "attention"
                else adasplash2.entmax(q, backend="reference")
            )
            .square()
            .sum(),
            q,
        )
        assert torch.equal(dq, expected)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            dq.sum().backward()

    def test_forward_mode_is_refused_and_never_lost(self):
        q, k, v = qkv(requires_grad=False)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
            with pytest.raises(NotImplementedError, match="forward mode AD"):
                adasplash2.attention(dual, k, v, backend="reference")
            with pytest.raises(NotImplementedError, match="forward mode AD"):
                adasplash2.entmax(dual, backend="reference")

    def test_an_input_changed_before_backward_is_noticed(self):
        q, k, v = qkv()
        out = adasplash2.attention(q, k, v, backend="reference")
        with torch.no_grad():
            k.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_inputs_are_saved_as_they_are(self):
        q, k, v = (tensor.detach().mT.contiguous().mT.requires_grad_() for tensor in qkv())
        saved = []

        def keep(tensor):
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = adasplash2.attention(q, k, v, backend="reference")
        pointers = [tensor.data_ptr() for tensor in saved]
        assert {tensor.data_ptr() for tensor in (q, k, v, out)} < set(pointers)
        rows = [tensor for tensor in saved if tensor.shape == q.shape[:3]]
        assert len(saved) == 4 + len(rows)  # tau, and what the reference leaves per row

    def test_out_may_not_change_before_backward(self):
        out = adasplash2.attention(*qkv(), backend="reference")
        with torch.no_grad():
            out.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()

    def test_the_graph_keeps_nothing_once_its_result_is_gone(self):
        q, k, v = qkv()
        copy = k * 1
        alive = weakref.ref(copy)
        out = adasplash2.attention(q, copy, v, backend="reference")
        del copy
        assert alive() is not None
        del out
        assert alive() is None

    def test_checkpoint(self):
        plain, again = qkv(), qkv()

        def attend(q, k, v):
            return adasplash2.attention(q, k, v, is_causal=True, backend="reference")

        attend(*plain).sum().backward()
        checkpoint(attend, *again, use_reentrant=False).sum().backward()
        for expected, got in zip(plain, again, strict=True):
            assert torch.equal(expected.grad, got.grad)

    def test_a_step_of_autocast_runs_as_torch_attention_does(self):
        q, k, v = qkv(heads_q=2)
        k = k.to(torch.bfloat16)
        with torch.autocast("cpu"):
            out = adasplash2.attention(q, k, v, backend="reference")
            softmax = adasplash2.attention(q, k, v, alpha=1)
            torch_out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert out.dtype == softmax.dtype == torch_out.dtype == torch.bfloat16
        out.sum().backward()
        assert q.grad.dtype == torch.float32
        rounded = [tensor.detach().to(torch.bfloat16) for tensor in (q, k, v)]
        assert torch.equal(out, adasplash2.attention(*rounded, backend="reference"))
        with torch.autocast("cpu"):
            assert adasplash2.attention(*qkv(dtype=torch.float64), backend="reference").dtype == torch.float64
            assert adasplash2.entmax(q, backend="reference").dtype == torch.float32


def causal(q, k, v):
    return adasplash2.attention(q, k, v, is_causal=True, backend="reference")


def with_tau(q, k, v):
    out, tau = adasplash2.attention(q, k, v, alpha=1.3, scale=0.3, backend="reference", return_tau=True)
    return out * 2 + tau[..., None]


def per_head(q, k, v):
    alpha = 1.01 + 0.99 * torch.sigmoid(q.mean((0, 2, 3)))
    return adasplash2.attention(q, k, v, alpha=alpha, backend="reference")


def shared_alpha(q, k, v):
    return adasplash2.attention(q, k, v, alpha=1.01 + 0.99 * torch.sigmoid(q.mean()), backend="reference")


def padded(q, k, v):
    lengths = torch.arange(1, q.shape[0] + 1)
    return adasplash2.attention(q, k, v, seqlens_q=lengths, seqlens_k=lengths, is_causal=True, backend="reference")


def softmax(q, k, v):
    return adasplash2.attention(q, k, v, alpha=1, is_causal=True)


def padded_softmax(q, k, v):
    return adasplash2.attention(q, k, v, alpha=1.0, seqlens_k=torch.arange(q.shape[0]))


def entmax_of_scores(q, k, v):
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    return adasplash2.entmax(q @ k.mT, 1.5, -2, backend="reference")


def entmax_with_alpha(q, k, v):
    return adasplash2.entmax(q, 1.01 + 0.99 * torch.sigmoid(v.mean()), backend="reference")


CALLS = [causal, with_tau, per_head, shared_alpha, padded, softmax, padded_softmax, entmax_of_scores, entmax_with_alpha]


class TestCompile:
    @pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
    def test_one_graph_with_dynamic_shapes_forward_and_backward(self, call):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
        frames = []
        for seqlen_q, seqlen_k in ((5, 7), (6, 11)):
            eager, traced = (qkv(seqlen_q=seqlen_q, seqlen_k=seqlen_k) for _ in range(2))
            expected = call(*eager)
            got = compiled(*traced)
            torch.testing.assert_close(got, expected)
            expected.square().sum().backward()
            got.square().sum().backward()
            for one, other in zip(eager, traced, strict=True):
                torch.testing.assert_close(other.grad, one.grad)
            frames.append(counter.frame_count)
        assert frames[1:] == frames[:-1]

    def test_every_backend(self, target):
        def call(q, k, v):
            return adasplash2.attention(q, k, v, alpha=1.7, is_causal=True, backend=target.name)

        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
        for seqlen_q in (5, 70):
            inputs = qkv(batch=1, heads_q=2, heads_kv=1, seqlen_q=seqlen_q, seqlen_k=99)
            eager, traced = ([t.detach().to(target.device).requires_grad_() for t in inputs] for _ in range(2))
            expected, got = call(*eager), compiled(*traced)
            assert torch.equal(got, expected)
            expected.sum().backward()
            got.sum().backward()
            for one, other in zip(eager, traced, strict=True):
                assert torch.equal(other.grad, one.grad)

    def test_autocast_is_asked_nothing_that_torch_2_11_cannot_trace(self, monkeypatch):
        untraceable = torch._dynamo.disable(torch.amp.is_autocast_available)
        monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
        inputs = qkv(requires_grad=False)
        compiled = torch.compile(causal, fullgraph=True, backend="eager")
        assert torch.equal(compiled(*inputs), causal(*inputs))

    def test_compiled_without_grad(self):
        compiled = torch.compile(causal, fullgraph=True, backend="aot_eager")
        inputs = qkv(requires_grad=False)
        torch.testing.assert_close(compiled(*inputs), causal(*inputs))

    @pytest.mark.slow
    def test_inductor(self, tmp_path, monkeypatch):
        # What other versions of the operators left in the user's cache would be taken for this one's.
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        # It would compile a program for each instruction set of this machine, to see whether it runs.
        monkeypatch.setattr(inductor_config.cpp, "vec_isa_ok", True)
        compiled = torch.compile(lambda q, k, v: causal(q * 2, k, v).sin(), fullgraph=True, dynamic=True)
        eager, traced = qkv(), qkv()
        expected = causal(eager[0] * 2, *eager[1:]).sin()
        got = compiled(*traced)
        torch.testing.assert_close(got, expected)
        expected.sum().backward()
        got.sum().backward()
        for one, other in zip(eager, traced, strict=True):
            torch.testing.assert_close(other.grad, one.grad)

    def test_export(self):
        class Attend(torch.nn.Module):
            def forward(self, q, k, v):
                return causal(q, k, v)

        inputs = tuple(qkv(requires_grad=False))
        program = torch.export.export(Attend(), inputs)
        assert OPS.attention.default in [node.target for node in program.graph.nodes]
        torch.testing.assert_close(program.module()(*inputs), causal(*inputs))

    def test_fake_tensors_run_no_kernel(self):
        with FakeTensorMode() as mode:
            q, k, v = (mode.from_tensor(tensor) for tensor in qkv())
            out, tau = adasplash2.attention(q, k, v, backend="reference", return_tau=True)
            (dq,) = torch.autograd.grad(out.sum(), q)
            assert out.shape == (2, 4, 5, 3)
            assert tau.shape == (2, 4, 5)
            assert dq.shape == q.shape

    def test_bad_values_are_found_in_a_compiled_call(self):
        def call(q, k, v, lengths):
            return adasplash2.attention(q, k, v, seqlens_k=lengths, backend="reference")

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        q, k, v = qkv(requires_grad=False)
        compiled(q, k, v, torch.tensor([7, 0]))
        with pytest.raises(ValueError, match="seqlens_k has entries from 0 to 8"):
            compiled(q, k, v, torch.tensor([8, 0]))
