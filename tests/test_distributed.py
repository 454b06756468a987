"""Two processes (gloo, CPU): DDP, FSDP2 and DTensor give what one process gives.

One pair of processes runs all cases; a case that fails ends it, so that no process waits for the other's messages.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import subprocess
import sys
import traceback
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import adasplash2

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")

PROCESSES = 2
SECONDS = 120


class Block(nn.Module):
    """Grouped-query attention with an alpha per head."""

    def __init__(self, heads_q=4, heads_kv=2, head_dim=4):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v = (nn.Linear(8, heads * head_dim) for heads in (heads_q, heads_kv, heads_kv))
        self.out = nn.Linear(heads_q * head_dim, 8)
        self.alpha = nn.Parameter(torch.linspace(-1, 1, heads_q))

    def forward(self, x):
        # Reads the head_dim alone, so that a process may hold a part of the heads.
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        alpha = 1.01 + 0.99 * torch.sigmoid(self.alpha)
        out = adasplash2.attention(q, k, v, alpha=alpha, is_causal=True, backend="reference")
        return self.out(out.transpose(1, 2).flatten(-2))


def block_and_inputs():
    torch.manual_seed(0)
    return Block(), torch.randn(4, 6, 8), torch.randn(4, 6, 8)


def gradients(block, x, target):
    loss = (block(x) - target).square().mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in block.named_parameters()}


def expect_gradients_of_one_process(wrap, is_batch_split=True):
    block, x, target = block_and_inputs()
    expected = gradients(block, x, target)
    block, x, target = block_and_inputs()
    if is_batch_split:
        x, target = (tensor.chunk(PROCESSES)[dist.get_rank()] for tensor in (x, target))
    got = gradients(wrap(block), x, target)
    assert len(got) == len(expected)
    for name, grad in got.items():
        torch.testing.assert_close(whole(grad), expected[name.removeprefix("module.")])


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def case_ddp():
    expect_gradients_of_one_process(nn.parallel.DistributedDataParallel)


def case_fsdp2():
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (PROCESSES,))
    expect_gradients_of_one_process(lambda block: fully_shard(block, mesh=mesh))


def tensor_parallel(block):
    mesh = init_device_mesh("cpu", (PROCESSES,))
    columns = ColwiseParallel(use_local_output=False)
    plan = {"q": columns, "k": columns, "v": columns, "out": RowwiseParallel()}
    block = parallelize_module(block, mesh, plan)
    block.alpha = nn.Parameter(distribute_tensor(block.alpha.detach(), mesh, [Shard(0)]))
    return block


def case_tensor_parallel():
    expect_gradients_of_one_process(tensor_parallel, is_batch_split=False)


def inputs(batch=4, heads_q=4, heads_kv=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, heads_q, 5, 4), (batch, heads_kv, 7, 4), (batch, heads_kv, 7, 3))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def expect_attention_of_one_process(placements, mesh_shape=(PROCESSES,), alpha=None, seqlens=None, call=None, **shape):
    """The results and all gradients; ``placements`` are those of q, k, v, or of all three."""
    if call is None:
        call = adasplash2.attention
    mesh = init_device_mesh("cpu", mesh_shape)
    if not isinstance(placements[0], (list, tuple)):
        placements = [placements] * 3
    plain = inputs(**shape)
    shared = [distribute_tensor(p.detach(), mesh, at).requires_grad_() for p, at in zip(plain, placements, strict=True)]
    options: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for name, value in {"alpha": alpha, "seqlens_k": seqlens}.items():
        if value is not None:
            options[0][name] = value.clone().requires_grad_(value.is_floating_point())
            options[1][name] = distribute_tensor(value, mesh).requires_grad_(value.is_floating_point())
    results = []
    for arguments, more in zip((plain, shared), options, strict=True):
        out, tau = call(*arguments, **more, is_causal=True, backend="reference", return_tau=True)
        out.square().sum().backward()
        tensors = [*arguments, *more.values()]
        results.append([out, tau, *(tensor.grad for tensor in tensors if tensor.requires_grad)])
    assert all(isinstance(result, DTensor) for result in results[1])
    for expected, got in zip(*results, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(whole(got), expected)
    return results[1]


ALPHAS = torch.tensor([1.5, 1.2, 1.8, 2.0])


def case_heads():
    out, *others = expect_attention_of_one_process([Shard(1)], alpha=ALPHAS)
    for tensor in (out, *others[:4]):
        assert tensor.placements == (Shard(1),)
    assert out.to_local().shape == (4, 2, 5, 3)


def case_batch():
    lengths = torch.tensor([7, 0, 3, 5])
    out, *_ = expect_attention_of_one_process([Shard(0)], alpha=ALPHAS, seqlens=lengths)
    assert out.placements == (Shard(0),)


def case_a_batch_that_does_not_divide():
    expect_attention_of_one_process([Shard(0)], batch=3, alpha=torch.tensor(1.3), seqlens=torch.tensor([7, 2, 5]))


def case_one_head_of_keys_for_all():
    expect_attention_of_one_process([Shard(1)], heads_kv=1, alpha=ALPHAS)


def case_batch_and_heads():
    expect_attention_of_one_process([Shard(0), Shard(1)], (1, PROCESSES), alpha=ALPHAS)
    expect_attention_of_one_process([Shard(0), Shard(1)], (PROCESSES, 1), alpha=ALPHAS)


def case_keys_that_lie_otherwise_are_moved():
    expect_attention_of_one_process(([Shard(1)], [Shard(0)], [Replicate()]), alpha=ALPHAS)
    out, *_ = expect_attention_of_one_process(([Replicate()], [Shard(1)], [Shard(1)]))
    assert out.placements == (Shard(1),)
    out, *_ = expect_attention_of_one_process([Replicate()], alpha=ALPHAS)
    assert out.placements == (Replicate(),)


def case_partial_sums_are_added():
    mesh = init_device_mesh("cpu", (PROCESSES,))
    q, k, v = (tensor.detach() for tensor in inputs())
    part = DTensor.from_local(q / PROCESSES, mesh, [Partial()])
    k_whole, v_whole = (distribute_tensor(tensor, mesh) for tensor in (k, v))
    got = adasplash2.attention(part, k_whole, v_whole, backend="reference")
    torch.testing.assert_close(whole(got), adasplash2.attention(q, k, v, backend="reference"))


def case_softmax():
    mesh = init_device_mesh("cpu", (PROCESSES,))
    plain = [tensor.detach() for tensor in inputs()]
    shared = [distribute_tensor(tensor, mesh, [Shard(1)]) for tensor in plain]
    got = adasplash2.attention(*shared, alpha=1)
    torch.testing.assert_close(whole(got), adasplash2.attention(*plain, alpha=1))


def case_compiled():
    compiled = torch.compile(adasplash2.attention, fullgraph=True, backend="aot_eager")
    expect_attention_of_one_process([Shard(1)], alpha=ALPHAS, call=compiled)


def case_entmax():
    mesh = init_device_mesh("cpu", (PROCESSES,))
    plain = [tensor.requires_grad_() for tensor in (inputs(batch=3)[0].detach(), 1.2 + torch.rand(4, 1, 1) / 2)]
    for placement in (Shard(0), Shard(1), Replicate()):
        shared = [
            distribute_tensor(t.detach(), mesh, [at]).requires_grad_()
            for t, at in zip(plain, (placement, Replicate()), strict=True)
        ]
        results = []
        for x, alpha in (plain, shared):
            p = adasplash2.entmax(x, alpha, -2, backend="reference")
            results.append([p, *torch.autograd.grad(p.square().sum(), (x, alpha))])
        for expected, got in zip(*results, strict=True):
            torch.testing.assert_close(whole(got), expected)
        assert results[1][0].placements == (placement,)


def case_what_is_refused():
    mesh = init_device_mesh("cpu", (PROCESSES,))
    q, k, v = (tensor.detach() for tensor in inputs())
    replicated = [distribute_tensor(tensor, mesh) for tensor in (q, k, v)]
    for dim in (2, 3):
        split = [distribute_tensor(tensor, mesh, [Shard(dim)]) for tensor in (q, k, v)]
        with pytest.raises(ValueError, match=r"q\.placements=.*expected Shard\(0\) \(the batch\), Shard\(1\) \(the h"):
            adasplash2.attention(*split)
    with pytest.raises(TypeError, match="k is a plain tensor: expected a DTensor"):
        adasplash2.attention(replicated[0], k, v)
    with pytest.raises(TypeError, match="alpha is a plain tensor: expected a DTensor"):
        adasplash2.attention(*replicated, alpha=ALPHAS)
    with pytest.raises(TypeError, match="k is a DTensor: expected a plain tensor"):
        adasplash2.attention(q, *replicated[1:])
    with pytest.raises(TypeError, match="q is a DTensor: expected a plain tensor"):
        adasplash2.support(*replicated[:2])
    three = [distribute_tensor(tensor, mesh, [Shard(1)]) for tensor in inputs(heads_q=3, heads_kv=3)]
    with pytest.raises(ValueError, match="heads_q=3, heads_kv=3: expected numbers that 2 processes can share evenly"):
        adasplash2.attention(*three)
    with pytest.raises(ValueError, match=r"x\.placements=.*expected Shard\(0\)"):
        adasplash2.entmax(distribute_tensor(q, mesh, [Shard(3)]))


CASES = {name.removeprefix("case_"): case for name, case in globals().items() if name.startswith("case_")}


def work(rank, folder, results):
    """All cases in one of the processes; puts (rank, case, what went wrong or None)."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=SECONDS / 2),
    )
    for name, case in CASES.items():
        try:
            case()
        except Exception:
            results.put((rank, name, traceback.format_exc()))
            break
        results.put((rank, name, None))
    results.put((rank, None, None))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """By case, what each process reports."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    folder = tmp_path_factory.mktemp("gloo")
    processes = [context.Process(target=work, args=(rank, folder, results)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    found: dict[str, dict[int, Any]] = {name: {} for name in CASES}
    running = set(range(PROCESSES))
    try:
        while running:
            rank, name, error = results.get(timeout=SECONDS)
            if name is None or error is not None:
                running.discard(rank)
            if name is not None:
                found[name][rank] = error
            if error is not None:
                break
    finally:
        for process in processes:
            process.join(5 if not running else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_processes(outcomes, case):
    errors = outcomes[case]
    for rank, error in errors.items():
        assert error is None, f"process {rank}:\n{error}"
    assert set(errors) == set(range(PROCESSES)), "a case before this one failed"


def test_an_import_loads_no_dtensor():
    code = "import sys, torch, adasplash2; print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
