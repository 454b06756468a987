"""Times every kernel of forward and backward on a CUDA device, each provider's, and of decoding.

    python benchmarks/kernels.py --json results/MACHINE-DATE-kernels.json
    python benchmarks/kernels.py --case 'topics-8192-*' --provider triton --provider fa2

Times are those of torch's profiler: of the device alone, the host's work and the gaps between kernels left out.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from cases import Case, find
from providers import Provider, Ready, providers
from rich.console import Console
from stamp import stamp
from torch.profiler import ProfilerActivity, profile

import adasplash2
from adasplash2.bench.measure import make_call

__all__ = ["DECODING", "counted", "decoding", "kernel_name", "main", "profiled"]

CASES = (
    *(
        f"topics-{seqlen}-d{head_dim}-causal-b1h16-bf16-cuda"
        for head_dim, seqlen in ((64, 8192), (64, 32768), (128, 8192), (128, 16384))
    ),
    *(f"iid-{gain}{seqlen}-d64-causal-b1h16-bf16-cuda" for gain in ("", "gain3.5-") for seqlen in (8192, 32768)),
)
PROVIDERS = ("triton", "cupy", "fa2", "cudnn")
WARM_UP, ROUNDS = 3, 8

# batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim; independent scores, no mask, forward alone.
DECODING = (
    (8, 16, 16, 1, 65536, 64),
    (8, 16, 16, 16, 65536, 64),
    (8, 16, 4, 1, 65536, 128),
    (1, 16, 4, 1, 65536, 128),
)

Row = dict[str, Any]


def kernel_name(signature: str) -> str:
    """Of a kernel as the profiler spells it: without return type, namespaces, template arguments and parameters."""
    name = signature.removeprefix("void ").partition("(")[0].partition("<")[0]
    return name.rpartition("::")[2].strip()


def counted(kernels: Iterable[tuple[str, float, float]]) -> dict[str, float]:
    """The time of each kernel from (name, begin, end), counted from when all that began before it have ended."""
    total: dict[str, float] = collections.defaultdict(float)
    ended = -math.inf
    for name, begin, end in sorted(kernels, key=lambda kernel: kernel[1:]):
        total[name] += max(end - max(begin, ended), 0)
        ended = max(ended, end)
    return dict(total)


def profiled(call: Callable[[], object]) -> dict[str, float]:
    """Microseconds of each kernel in one call, in the order in which they first run, as ``counted``."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(ROUNDS):
            call()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    kernels = [
        (kernel_name(event.name), event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == cuda
    ]
    return {name: time / ROUNDS for name, time in counted(kernels).items()}


def _rows(calls: Iterable[tuple[str, str, Callable[[], Callable[[], object]]]]) -> list[Row]:
    rows = []
    for name, label, prepare in calls:
        row: Row = {"provider": name, "label": label}
        try:
            kernels = profiled(prepare())
            row |= {"kernels": kernels, "total": sum(kernels.values())}
        except Exception as error:  # the others are still to be timed
            row["reason"] = f"{type(error).__name__}: {error}"[:300]
        rows.append(row)
    return rows


def forward_and_backward(case: Case, chosen: Sequence[Provider]) -> Row:
    """All providers on one case."""
    arguments, dout = case.inputs(torch.device("cuda"))

    def prepare(provider: Provider) -> Callable[[], object]:
        ready = provider.setup(case, arguments)
        if not isinstance(ready, Ready):
            raise RuntimeError(ready)
        return make_call(ready.forward, arguments, dout, "fwd_bwd")

    calls = [(one.name, one.label, lambda one=one: prepare(one)) for one in chosen if one.op == case.op]
    return case.describe() | {"support": case.support(arguments), "rows": _rows(calls)}


def decoding(shape: tuple[int, ...], chosen: Sequence[Provider]) -> Row:
    """Our backends and FlashAttention-2 on a few queries over many keys."""
    batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim = shape
    options: Row = {"device": "cuda", "dtype": torch.bfloat16, "generator": torch.Generator("cuda").manual_seed(0)}
    q = torch.randn(batch, heads_q, seqlen_q, head_dim, **options)
    k, v = (torch.randn(batch, heads_kv, seqlen_k, head_dim, **options) for _ in range(2))

    def prepare(name: str) -> Callable[[], object]:
        if name in adasplash2.available_backends():
            return torch.no_grad()(lambda: adasplash2.attention(q, k, v, backend=name))
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def softmax() -> object:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=heads_kv < heads_q)

        return torch.no_grad()(softmax)

    served = [one for one in chosen if one.op == "attention" and one.name in ("triton", "cupy", "fa2")]
    calls = [(one.name, one.label, lambda one=one: prepare(one.name)) for one in served]
    return {"shape": list(shape), "rows": _rows(calls)}


def _show(title: str, rows: Sequence[Row], console: Console) -> None:
    console.print(f"\n[bold]{title}[/]", highlight=False)
    for row in rows:
        times = row.get("reason") or ", ".join(f"{name} {time:.1f}" for name, time in row["kernels"].items())
        console.print(f"  {row['provider']:8} {row.get('total', float('nan')):9.1f} us: {times}", highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if a provider failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", action="append", default=[], metavar="GLOB", help="of topics and independent scores by default"
    )
    parser.add_argument("--provider", action="append", default=[], metavar="GLOB", help=", ".join(PROVIDERS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(argv)
    patterns = options.provider or PROVIDERS
    chosen = [one for one in providers() if any(fnmatch(one.name, pattern) for pattern in patterns)]
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device: torch sees none")
    console = Console()
    results: Row = {"stamp": stamp(torch.device("cuda")), "cases": [], "decoding": []}
    try:
        for case in find(options.case or list(CASES), device="cuda"):
            results["cases"].append(forward_and_backward(case, chosen))
            _show(case.name, results["cases"][-1]["rows"], console)
        for shape in () if options.case else DECODING:
            results["decoding"].append(decoding(shape, chosen))
            _show("decoding {} x {} ({}) heads, {} x {}, {}".format(*shape), results["decoding"][-1]["rows"], console)
    except KeyboardInterrupt:
        console.print("interrupted: keeping what was measured")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(any("reason" in row for part in results["cases"] + results["decoding"] for row in part["rows"]))


if __name__ == "__main__":
    sys.exit(main())
