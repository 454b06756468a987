"""Right, and the same bits, whoever else computes: threads of Python, forked and spawned processes, thread counts."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import Target, device_of
from strategies import Case
from torch.utils.data import DataLoader, Dataset

import adasplash2
from adasplash2 import registry
from adasplash2.testing import assert_close, attention_truth, run_attention

# Shapes that need workspaces of different sizes, one of them with a single head.
CASES = (
    Case(300, 500, head_dim=64, head_dim_v=64, is_causal=True),
    Case(70, 130, batch=2, group=2, head_dim=24, kind="narrow", alpha=(1.5, 1.25)),
    Case(257, 257, heads_kv=2, head_dim=40, dtype=torch.bfloat16, kind="wide"),
    Case(64, 1100, head_dim=16, dtype=torch.float64, alpha=2.0),
)
TIMEOUT = 180  # seconds, of which a new process may need most to compile


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def served(target):
    """A backend that serves by default; the reference is torch and no more, whose own threads do not survive a fork."""
    if not registry.find(target.name).devices:
        pytest.skip(f"{target.name} serves by name only")
    if target.device.type not in registry.find(target.name).devices:
        pytest.skip(f"{target.name} is interpreted on {target.device.type}, in one thread at a time")
    return target


@pytest.fixture
def on_cpu(served):
    if served.device.type != "cpu":
        pytest.skip("the context of a device does not survive a fork, and belongs to one process")
    return served


def compute(name: str, case: Case) -> dict[str, torch.Tensor]:
    request, dout = case.build(device_of(registry.find(name)))
    return run_attention(registry.resolve(request, name), request, dout)


def cases_of(served: Target) -> list[Case]:
    """The cases that the backend has no reason against."""
    return [case for case in CASES if not served.backend.unsupported_reasons(case.build(served.device)[0])]


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[quantity].view(torch.uint8), second[quantity].view(torch.uint8)) for quantity in first
    )


@pytest.mark.usefixtures("two_threads")
def test_threads(served):
    """Workspaces shared by thread number would mix the calls; some thread layers abort the process."""
    cases = cases_of(served)
    expected = [compute(served.name, case) for case in cases]
    together = threading.Barrier(4)

    def work(first: int) -> list[bool]:
        together.wait(TIMEOUT)
        order = [(first + i) % len(cases) for i in range(3 * len(cases))]
        return [same_bits(compute(served.name, cases[i]), expected[i]) for i in order]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(results) for results in pool.map(work, range(4)))


@pytest.mark.usefixtures("two_threads")
def test_gradients_from_several_threads(served):
    """torch runs backward of CPU tensors in the caller's thread, of a device in one of its own."""
    case = CASES[0]

    def gradient(_):
        request, dout = case.build(served.device)
        q = request.q.clone().requires_grad_()
        out = adasplash2.attention(q, request.k, request.v, is_causal=True, scale=request.scale, backend=served.name)
        out.backward(dout)
        return q.grad

    with ThreadPoolExecutor(3) as pool:
        first, *rest = pool.map(gradient, range(6))
    assert all(first.equal(other) for other in rest)


@pytest.mark.parametrize("case", CASES, ids=["one head", "alpha per head", "bfloat16", "many keys"])
def test_number_of_threads(served, case):
    """Right at every number of threads that torch may be set to, also between two calls."""
    before = torch.get_num_threads()
    request, dout = case.build(served.device)
    backend = served.serving(request)
    truth = attention_truth(request, dout)
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            first, second = (run_attention(backend, request, dout) for _ in range(2))
            assert torch.get_num_threads() == threads
            assert same_bits(first, second), f"{threads} threads"
            for quantity, result in first.items():
                assert_close(result, truth, quantity, f"{served.name}, {threads} threads")
    finally:
        torch.set_num_threads(before)


def send_results(name: str, cases: tuple[Case, ...], threads: int, connection) -> None:
    torch.set_num_threads(threads)
    connection.send([{key: value.numpy(force=True) for key, value in compute(name, case).items()} for case in cases])


# NumPy, which carries the results between processes, has no bfloat16.
EXACT = tuple(case for case in CASES if case.dtype != torch.bfloat16)

# In a forked child torch's own operations wait for threads that are gone (seen: torch.zeros) once they have 2 ** 15
# elements to share out. So no tensor has as many here, and no tile is dense; the backend's stages are shared out.
FORKED = (
    Case(110, 300, head_dim=64, head_dim_v=64, kind="wide"),
    Case(110, 300, head_dim=64, head_dim_v=40, kind="wide", alpha=(1.75,)),
    Case(80, 500, head_dim=60, dtype=torch.float64, kind="wide", alpha=2.0),
)


def results_of_process(method: str, name: str, cases: tuple[Case, ...]) -> list[dict[str, torch.Tensor]]:
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_results, args=(name, cases, torch.get_num_threads(), sender))
    process.start()
    sender.close()
    try:
        assert receiver.poll(TIMEOUT), f"the {method}ed process neither answered nor ended in {TIMEOUT} s"
        try:
            received = receiver.recv()
        except EOFError:
            process.join(TIMEOUT)
            raise AssertionError(f"the {method}ed process ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    return [{quantity: torch.from_numpy(array) for quantity, array in results.items()} for results in received]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.usefixtures("two_threads")
def test_after_fork(on_cpu):
    """The child has the parent's memory, but none of its threads: a pool that the parent has used is dead in it."""
    expected = [compute(on_cpu.name, case) for case in FORKED]
    for _ in range(2):
        received = results_of_process("fork", on_cpu.name, FORKED)
        assert all(map(same_bits, received, expected))
    assert all(same_bits(compute(on_cpu.name, case), before) for case, before in zip(FORKED, expected, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_spawned_process(on_cpu):
    received = results_of_process("spawn", on_cpu.name, EXACT)
    assert all(map(same_bits, received, [compute(on_cpu.name, case) for case in EXACT]))


class Outputs(Dataset):
    def __init__(self, name: str) -> None:
        self.name = name

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return compute(self.name, CASES[0])["out"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.usefixtures("two_threads")
def test_data_loader_workers(on_cpu):
    expected = compute(on_cpu.name, CASES[0])["out"]
    loader = DataLoader(
        Outputs(on_cpu.name), batch_size=None, num_workers=2, timeout=TIMEOUT, multiprocessing_context="fork"
    )
    # A worker runs on one thread, where sums may be taken in another order.
    one_thread = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = compute(on_cpu.name, CASES[0])["out"]
    torch.set_num_threads(one_thread)
    outputs = list(loader)
    assert len(outputs) == 4
    assert all(out.equal(alone) for out in outputs)
    assert compute(on_cpu.name, CASES[0])["out"].equal(expected)
