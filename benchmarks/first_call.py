"""What a user waits for: import, the first call with and without the compile cache, a second call.

    python benchmarks/first_call.py [DEVICE] [--backend NAME] [--dtype NAME] [--json FILE]

Each in a fresh process. The cold one gets an empty cache folder, which the warm one then finds. torch and what it needs
to use the device are there before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from stamp import stamp

__all__ = ["first_calls", "main", "show"]

CACHE_VARIABLES = ("NUMBA_CACHE_DIR", "TRITON_CACHE_DIR", "CUPY_CACHE_DIR")

CHILD = """
import json, sys, time
import torch
device, backend, dtype = sys.argv[1:]
options = {"device": device, "dtype": getattr(torch, dtype), "requires_grad": True}
q, k, v = (torch.randn(1, 4, 1024, 64, **options) for _ in range(3))
v.sum().item()
marks = [time.perf_counter()]
import adasplash2
marks.append(time.perf_counter())
for _ in range(2):
    adasplash2.attention(q, k, v, is_causal=True, backend=backend).sum().backward()
    v.grad.sum().item()
    marks.append(time.perf_counter())
print(json.dumps([b - a for a, b in zip(marks, marks[1:])]))
"""


def first_calls(device: str, backend: str = "auto", dtype: str = "float32") -> dict[str, dict[str, float]]:
    """Seconds of ``import adasplash2`` (torch is imported already), and of two calls with backward at 1024 keys.

    Args:
        device: a type of device.
        backend: that serves the calls; the device's usual one by default.
        dtype: of the inputs, as torch spells it.

    Returns:
        ``cold`` and ``warm`` (the state of the compile cache), each with ``import``, ``first`` and ``second``.

    Raises:
        subprocess.CalledProcessError: if the backend, or none, serves the device.
    """
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | dict.fromkeys(CACHE_VARIABLES, cache)
        for state in ("cold", "warm"):
            done = subprocess.run(
                [sys.executable, "-P", "-c", CHILD, device, backend, dtype],
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
    parser.add_argument("--backend", default="auto", help="by default the first that serves the device")
    parser.add_argument("--dtype", default="float32", help="of the inputs (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    found = first_calls(options.device, options.backend, options.dtype)
    show(found, Console())
    if options.json:
        setting = {"backend": options.backend, "dtype": options.dtype, "first_calls": found}
        result = {"stamp": stamp(torch.device(options.device))} | setting
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
