"""Runs a stage on several threads at once.

Own Python threads, because Numba's threading layers abort on concurrent calls (workqueue) or kill a forked child
(OpenMP). The stages release the GIL and take their work from a shared counter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

__all__ = ["run_stage"]


@cache
def _pool(pid: int) -> ThreadPoolExecutor:
    """One pool for the process; keyed by its id since threads do not survive a fork."""
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="adasplash2")


def run_stage(stage: Callable[..., None], threads: int, *args: object) -> None:
    """Calls stage(counter, *args) on this and threads - 1 other threads and waits for all.

    ``counter`` is the address of two zeroed int64: the next work item, and the next thread number.
    """
    counter = np.zeros(2, np.int64)
    address = counter.ctypes.data
    others = [_pool(os.getpid()).submit(stage, address, *args) for _ in range(threads - 1)]
    try:
        stage(address, *args)
    finally:
        for other in others:
            if not other.cancel():
                other.result()
