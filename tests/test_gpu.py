"""Streams and graphs of a CUDA device, on each backend that serves one."""

from __future__ import annotations

import pytest
import torch

import adasplash2
from adasplash2.contract import AttentionRequest
from adasplash2.testing import make_inputs, run_attention

pytestmark = pytest.mark.gpu


def made(target, kind, seqlen):
    if target.device.type != "cuda":
        pytest.skip(f"{target.name} serves no CUDA device")
    return make_inputs(kind, heads_q=2, seqlen_q=seqlen, head_dim=64, dtype=torch.bfloat16, device="cuda")


def test_forward_and_backward_in_a_cuda_graph(target):
    """Nothing waits for the device, and a replay computes on what the inputs then hold."""
    inputs = made(target, "topics", 300)
    q, k, v = (t.clone().requires_grad_() for t in inputs[:3])

    def step():
        out = adasplash2.attention(q, k, v, is_causal=True, backend=target.name)
        return out, *torch.autograd.grad(out, (q, k, v), inputs.dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        q.mul_(0.5)
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        assert torch.equal(one, other)


def test_another_stream(target):
    """The kernels run on the stream that torch is set to, after what was asked of it before."""
    inputs = made(target, "iid", 500)
    expected = adasplash2.attention(*inputs[:3], is_causal=True, backend=target.name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        q = inputs.q + 0
        out = adasplash2.attention(q, inputs.k, inputs.v, is_causal=True, backend=target.name)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("kind", "seqlen_q", "seqlen_k"),
    [("topics", 300, 300), ("topics", 4096, 4096), ("iid", 3000, 3000), ("narrow", 2000, 2000), ("iid", 2, 5000)],
)
def test_kernels_that_begin_early_change_no_bit(target, monkeypatch, kind, seqlen_q, seqlen_k):
    """Where a device can do that, CuPy's begin while those before still run, and wait for what they need themselves."""
    if target.name != "cupy":
        pytest.skip("only one backend's launcher can do either")
    from adasplash2.backends.cupy_cuda import CupyBackend
    from adasplash2.backends.cupy_cuda.launcher import CupyLauncher

    # Kernels that fill what is allocated would lie between ours.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    sizes = {"heads_q": 8, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "head_dim": 64}
    q, k, v, dout = make_inputs(kind, dtype=torch.bfloat16, device="cuda", **sizes)
    request = AttentionRequest(q, k, v, scale=0.125, is_causal=True)
    # Few queries over many keys have kernels of their own where no gradient is asked for.
    asked = dout if seqlen_q == seqlen_k else None
    expected = run_attention(CupyBackend(launcher=CupyLauncher(overlaps=False)), request, asked)
    for _ in range(20):
        found = run_attention(target.backend, request, asked)
        for quantity, values in expected.items():
            assert torch.equal(found[quantity], values), quantity


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (64, torch.float16), (128, torch.bfloat16)])
def test_who_copies_changes_no_bit(target, head_dim, dtype):
    """CuPy's whole tiles come by the bulk copy engine where a device has one."""
    if target.name != "cupy":
        pytest.skip("only one backend has kernels of both kinds")
    from adasplash2.backends.cupy_cuda import CupyBackend
    from adasplash2.backends.cupy_cuda.launcher import CupyLauncher

    class WithoutMaps(CupyLauncher):
        def tensor_map(self, *tensor):
            return None

    sizes = {"batch": 2, "heads_q": 4, "heads_kv": 2, "seqlen_q": 1500, "seqlen_k": 2100, "head_dim": head_dim}
    q, k, v, dout = make_inputs("topics", dtype=dtype, device="cuda", **sizes)
    lengths = [torch.tensor(n, device="cuda") for n in ((1500, 1001), (2100, 1333))]
    request = AttentionRequest(q, k, v, scale=0.1, is_causal=True, seqlens_q=lengths[0], seqlens_k=lengths[1])
    expected = run_attention(CupyBackend(launcher=WithoutMaps()), request, dout)
    found = run_attention(target.backend, request, dout)
    for quantity, values in expected.items():
        assert torch.equal(found[quantity], values), quantity


def test_a_device_that_is_not_the_current_one(target):
    """What is asked of another device runs there, with the same bits."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    inputs = made(target, "topics", 300)

    def results(device):
        q, k, v, dout = (t.detach().to(device) for t in inputs)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = adasplash2.attention(*leaves, is_causal=True, backend=target.name)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    assert torch.cuda.current_device() == 0
    for first, second in zip(results("cuda:0"), results("cuda:1"), strict=True):
        assert second.device.index == 1
        assert torch.equal(first, second.to("cuda:0"))
