"""What a user waits for: import, the first call with and without the compile cache, a second call.

    python benchmarks/first_call.py [DEVICE]

Each in a fresh process. The cold one gets an empty cache folder, which the warm one then finds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from rich.console import Console

__all__ = ["first_calls", "main", "show"]

CACHE_VARIABLES = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "CUPY_CACHE_DIR")

CHILD = """
import json, sys, time
import torch
marks = [time.perf_counter()]
import adasplash2
marks.append(time.perf_counter())
q, k, v = (torch.randn(1, 4, 1024, 64, device=sys.argv[1], requires_grad=True) for _ in range(3))
for _ in range(2):
    adasplash2.attention(q, k, v, is_causal=True).sum().backward()
    v.grad.sum().item()
    marks.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip(marks, marks[1:])]))
"""


def first_calls(device: str) -> dict[str, dict[str, float]]:
    """Seconds of ``import adasplash2`` (torch is imported already), and of two calls with backward at 1024 keys.

    Args:
        device: a type of device, whose usual backend serves the calls.

    Returns:
        ``cold`` and ``warm`` (the state of the compile cache), each with ``import``, ``first`` and ``second``.

    Raises:
        subprocess.CalledProcessError: if no backend serves the device.
    """
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | dict.fromkeys(CACHE_VARIABLES, cache)
        for state in ("cold", "warm"):
            done = subprocess.run(
                [sys.executable, "-P", "-c", CHILD, device],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            found[state] = dict(zip(("import", "first", "second"), json.loads(done.stdout), strict=True))
    return found


def show(found: dict[str, dict[str, float]], console: Console) -> None:
    """Print the times."""
    for state, seconds in found.items():
        console.print(f"{state} cache: " + ", ".join(f"{name} {value:.3g} s" for name, value in seconds.items()))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", default="cpu", help="cpu by default")
    show(first_calls(parser.parse_args(argv).device), Console())


if __name__ == "__main__":
    main()
