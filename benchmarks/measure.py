"""Peak memory of a call; times are measured by ``adasplash2.bench.measure``."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

from adasplash2.bench.measure import Call

__all__ = ["RSS_ERROR", "peak_memory"]

# Linux counts resident pages in batches for each core and thread; this much may be missing from the sum. Seen: 0.3 MB.
RSS_ERROR = 1 << 22


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
