"""Which backends the tests run on, Hypothesis profiles, and uninitialised memory that shows itself.

``--backend NAME`` (again for more) restricts the tests to these backends; ``--require-backend NAME`` turns "this
machine cannot run it" from a skip into a failure. Hypothesis takes ``--hypothesis-profile`` dev (the default), few, ci
or nightly.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, currently_in_test_context, reject, settings

from adasplash2 import registry
from adasplash2.contract import AttentionRequest, Backend, EntmaxRequest, UnsupportedError

_common = settings(deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("dev", _common, max_examples=10)
settings.register_profile("few", _common, max_examples=3, derandomize=True)
settings.register_profile("ci", _common, max_examples=20, derandomize=True)
settings.register_profile("nightly", _common, max_examples=1000)
settings.load_profile("dev")


class Target(NamedTuple):
    """A backend under test, and the device that it is tried on."""

    name: str
    backend: Backend
    device: torch.device

    def serving(self, request: AttentionRequest | EntmaxRequest) -> Backend:
        """The backend for a call; where it has a reason against it, the test is skipped, or the example passed over."""
        try:
            return registry.resolve(request, self.name)
        except UnsupportedError as reasons:
            if currently_in_test_context():
                reject()
            pytest.skip(str(reasons))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("adasplash2")
    group.addoption("--backend", action="append", metavar="NAME", help="test this backend only; may be repeated")
    group.addoption(
        "--require-backend", action="append", metavar="NAME", default=[], help="fail if this backend cannot run here"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "slow: more than some seconds; leave out with -m 'not slow'")
    for name in (config.getoption("--backend") or []) + config.getoption("--require-backend"):
        if name not in registry.names():
            raise pytest.UsageError(f"unknown backend {name!r}: expected one of {', '.join(registry.names())}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--backend") or registry.names()
        metafunc.parametrize("target", chosen, indirect=True, scope="session")


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> Target:
    candidate = registry.find(request.param)
    if isinstance(candidate.backend, str):
        if request.param in request.config.getoption("--require-backend"):
            pytest.fail(f"backend {request.param} is required, but: {candidate.backend}")
        pytest.skip(candidate.backend)
    return Target(request.param, candidate.backend, device_of(candidate))


def device_of(candidate: registry.Candidate) -> torch.device:
    """Where a backend is tried: with TRITON_INTERPRET=1, Triton's interpreter runs on the CPU."""
    if not torch.cuda.is_available() or isinstance(candidate.backend, str):
        return torch.device("cpu")
    return torch.device(candidate.devices[0] if candidate.devices else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needing_gpu and not torch.cuda.is_available():
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def children_hear_ctrl_c() -> Iterator[None]:
    """A shell's background job ignores Ctrl-C, and hands that on to the processes that tests start and stop with it."""
    previous = signal.getsignal(signal.SIGINT)
    if previous == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="session", autouse=True)
def poisoned_allocations() -> Iterator[None]:
    """torch.empty and its kin give NaN (integers: their largest value), so that what is never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def context_survives(request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel that fails takes the CUDA context with it, later and for all tests: the one that ran it is named."""
    yield
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        request.session.shouldstop = f"{request.node.nodeid} lost the CUDA context: {error}"
        raise


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
            from triton_interpreter import quicken

            quicken(patch)
        yield patch
