"""Time and memory of calls that are compared with each other.

Times of a shared machine drift by tens of percent within minutes. So all calls are warmed first, then timed in rounds,
one call of each per round; a ratio is taken inside a round, where both calls saw the same machine, and only the ratios
are then reduced to a median and its spread.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

__all__ = ["RSS_ERROR", "Spread", "interleaved", "peak_memory", "ratio", "spread", "time_once"]

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)

# More than the last-level cache of any GPU so far (H200: 50 MB).
_FLUSH_BYTES = 1 << 28

# Linux counts resident pages in batches for each core and thread; this much may be missing from the sum. Seen: 0.3 MB.
RSS_ERROR = 1 << 22


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


def time_once(call: Call, device: torch.device) -> float:
    """Milliseconds of one call: wall clock on a CPU, events around the call on a GPU, there with a cold L2 cache."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


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
    rounds = 0
    with _no_garbage_collection():
        while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < deadline):
            for key in order:
                times[key].append(time_once(calls[key], device))
            order.reverse()
            rounds += 1
    return times


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that one call of a warm function allocates at its peak above what was held before, or None if unknown.

    On a GPU from torch's allocator. On a CPU from the peak of the resident set, which Linux lets a process reset: it
    counts every allocator, but not what a library keeps allocated between calls, and may be off by ``RSS_ERROR``.
    Elsewhere unknown.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or sys.platform != "linux":
        return None
    # Freed memory that glibc holds back would be taken again without a trace.
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as clear_refs:
            clear_refs.write("5")
    except OSError:
        return None
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


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
