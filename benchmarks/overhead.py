"""What the front costs: checks, choice of a backend and autograd, over calling the backend's functions directly.

    python benchmarks/overhead.py [DEVICE] [--backend NAME] [--rounds N] [--json FILE]

On inputs so small that the host's work is all there is. Host time of one call, the device idle before it. Each round
makes both calls, every second one in reverse, and the difference is taken inside the round.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from stamp import stamp

import adasplash2
from adasplash2 import registry
from adasplash2.bench.measure import Spread, spread
from adasplash2.contract import AttentionRequest

__all__ = ["main", "measure", "show"]

SHAPE = (1, 1, 4, 16)
SCALE = 0.25
WARM_UP = 100

Calls = dict[str, Callable[[], object]]


def calls(device: torch.device, backend: str) -> dict[str, Calls]:
    """By mode, the call through the front and the same work without it."""
    served = registry.find(backend).backend
    if isinstance(served, str):
        raise SystemExit(f"backend {backend} cannot run here: {served}")
    generator = torch.Generator().manual_seed(0)
    q, k, v = plain = [torch.randn(SHAPE, generator=generator).to(device) for _ in range(3)]
    leaves = [tensor.clone().requires_grad_() for tensor in plain]
    dout = torch.ones_like(v)
    request = AttentionRequest(q, k, v, SCALE)
    saving = AttentionRequest(q, k, v, SCALE, save_for_backward=True)

    def front(arguments: Sequence[torch.Tensor]) -> Any:
        return adasplash2.attention(*arguments, scale=SCALE, backend=backend)

    def both() -> object:
        out, tau, saved = served.forward(saving)
        return served.backward(saving, out, tau, saved, dout)

    return {
        "forward": {"front": lambda: front(plain), "backend": lambda: served.forward(request)},
        "forward, grad": {"front": lambda: front(leaves), "backend": lambda: served.forward(saving)},
        "forward + backward": {
            "front": lambda: torch.autograd.grad(front(leaves), leaves, dout),
            "backend": both,
        },
    }


def measure(device: torch.device, backend: str, rounds: int) -> dict[str, dict[str, Spread]]:
    """Microseconds by mode: of the call through the front, of the backend alone, and of their difference."""
    found = {}
    for mode, pair in calls(device, backend).items():
        for call in pair.values():
            for _ in range(WARM_UP):
                call()
        times: dict[str, list[float]] = {name: [] for name in pair}
        order = list(pair)
        for _ in range(rounds):
            for name in order:
                times[name].append(_host_microseconds(pair[name], device))
            order.reverse()
        times["overhead"] = [front - alone for front, alone in zip(times["front"], times["backend"], strict=True)]
        found[mode] = {name: spread(values) for name, values in times.items()}
    return found


def _host_microseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter_ns()
    call()
    return 1e-3 * (time.perf_counter_ns() - start)


def show(found: dict[str, dict[str, Spread]], console: Console) -> None:
    """Print the table, in microseconds."""
    table = Table("mode", "front", "backend alone", "overhead", "20% to 80%")
    for mode, spreads in found.items():
        overhead = spreads["overhead"]
        medians = (f"{spreads[name].median:.1f} us" for name in ("front", "backend", "overhead"))
        table.add_row(mode, *medians, f"{overhead.q20:.1f} to {overhead.q80:.1f} us")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was measured if a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", default="cpu", type=torch.device, help="cpu by default")
    parser.add_argument("--backend", help="by default the first that serves the device")
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    backend = options.backend
    if backend is None:
        x = torch.ones(SHAPE, device=options.device)
        backend = adasplash2.explain(x, x, x).chosen
    if backend is None:
        parser.error(f"device={options.device}: no backend serves it here")
    found = measure(options.device, backend, options.rounds)
    show(found, Console())
    if options.json:
        rows = {mode: {name: value._asdict() for name, value in spreads.items()} for mode, spreads in found.items()}
        result = {"stamp": stamp(options.device), "backend": backend, "rounds": options.rounds, "microseconds": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
