"""Times of calls that are compared with each other.

Times of a shared machine drift by tens of percent within minutes. So all calls are warmed first, then timed in rounds,
one call of each per round; a ratio is taken inside a round, where both calls saw the same machine, and only the ratios
are then reduced to a median and its spread.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

__all__ = ["MODES", "Call", "Forward", "Mode", "Spread", "interleaved", "make_call", "ratio", "spread"]

Call = Callable[[], object]
Forward = Callable[..., Tensor]
Mode = Literal["fwd", "fwd_bwd"]
Key = TypeVar("Key", bound=Hashable)

MODES: tuple[Mode, ...] = ("fwd", "fwd_bwd")

# More than the last-level cache of any GPU so far (H200: 50 MB).
_FLUSH_BYTES = 1 << 28


class Spread(NamedTuple):
    """Median with the 20% and 80% quantiles."""

    median: float
    q20: float
    q80: float


def spread(values: Sequence[float]) -> Spread:
    """Median, 20% and 80% quantile of the values."""
    median, q20, q80 = np.quantile(values, (0.5, 0.2, 0.8)).tolist()
    return Spread(median, q20, q80)


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the ratios taken round by round."""
    return spread([a / b for a, b in zip(numerator, denominator, strict=True)])


def make_call(forward: Forward, arguments: tuple[Tensor, ...], dout: Tensor, mode: Mode) -> Call:
    """What is timed: the forward pass without gradients, or forward and the gradients of all arguments."""
    if mode == "fwd":
        return torch.no_grad()(lambda: forward(*arguments))
    leaves = tuple(argument.detach().requires_grad_() for argument in arguments)
    return lambda: torch.autograd.grad(forward(*leaves), leaves, dout)


def _begin(call: Call, device: torch.device) -> Callable[[], float]:
    """Make the call, on a GPU with a cold L2 cache; the function that comes back waits for its milliseconds.

    Wall clock on a CPU, events around the call on a GPU. There the host does not wait between the calls, as it does not
    in training: what it does meanwhile counts only where it is slower than the device.
    """
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        milliseconds = 1e3 * (time.perf_counter() - start)
        return lambda: milliseconds
    torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()

    def elapsed() -> float:
        end.synchronize()
        between: float = begin.elapsed_time(end)
        return between

    return elapsed


def interleaved(
    calls: Mapping[Key, Call], device: torch.device, seconds: float, min_rounds: int = 5, max_rounds: int = 50
) -> dict[Key, list[float]]:
    """Milliseconds of each call in each round; the calls must be warm.

    Args:
        calls: what to time; every second round takes them in reverse, so that no call always follows the same one.
        device: where they run.
        seconds: no new round begins after this time, unless fewer than ``min_rounds`` are done.
        min_rounds: rounds at least.
        max_rounds: rounds at most.
    """
    times: dict[Key, list[float]] = {key: [] for key in calls}
    order = list(calls)
    deadline = time.perf_counter() + seconds
    begun: dict[Key, Callable[[], float]] = {}
    rounds = 0
    with _no_garbage_collection():
        while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < deadline):
            before, begun = begun, {key: _begin(calls[key], device) for key in order}
            # While the device works on this round, the one before is read: the next one finds it busy.
            _read(before, times)
            order.reverse()
            rounds += 1
        _read(begun, times)
    return times


def _read(begun: Mapping[Key, Callable[[], float]], times: Mapping[Key, list[float]]) -> None:
    for key, elapsed in begun.items():
        times[key].append(elapsed())


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
