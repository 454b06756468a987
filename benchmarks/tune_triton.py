"""Times every kernel of the Triton backend over tile sizes, warps, stages and registers: what config.py is filled from.

    python benchmarks/tune_triton.py --head-dim 64 --seqlen 8192 --json tuned.json

Each kernel is timed alone on the arguments that a real call gave it. Candidates are compiled first, in processes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from adasplash2.backends.triton_gpu import backend, kernels
from adasplash2.backends.triton_gpu.config import Config, Launch
from adasplash2.contract import AttentionRequest
from adasplash2.testing import make_inputs

__all__ = ["main"]

# Kernel: the compile-time arguments that config.py may choose, besides the launch.
KERNELS: dict[str, dict[str, tuple[int, ...]]] = {
    "entmax_attn_fwd_scan": {"BLOCKS": (2,), "BOUND_EVERY": (4, 8, 16)},
    "entmax_attn_fwd_refine": {},
    "entmax_attn_fwd_output": {"TILE_PROGRAMS": (1, 2)},
    "entmax_attn_bwd_dq": {},
    "entmax_attn_bwd_dkv": {"PARTS": (1, 2, 4)},
}
LAUNCHES = [
    Launch(warps, stages, registers)
    for warps, stages, registers in itertools.product((4, 8), (2, 3, 4), (None, 128, 168))
    if not (warps == 4 and registers == 128)
]

Candidate = tuple[str, Launch, dict[str, int]]


def candidates(name: str) -> Iterator[Candidate]:
    options = KERNELS[name]
    for values in itertools.product(*options.values()):
        for launch in LAUNCHES:
            yield name, launch, dict(zip(options, values, strict=True))


def record(request: AttentionRequest, dout: torch.Tensor, config: Config) -> dict[str, tuple[int, dict[str, Any]]]:
    """Programs and arguments of each kernel in one call, with copies of what a kernel writes in place."""
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    launch, configure = backend._launch, backend._configure

    def launch_and_keep(kernel: Any, programs: int, options: Launch, **arguments: Any) -> None:
        copies = {key: arguments[key].clone() for key in ("LIST", "TAU", "COUNTS") if key in arguments}
        found[kernel.fn.__name__] = programs, arguments | {"copies": copies}
        launch(kernel, programs, options, **arguments)

    backend._configure = lambda request: config
    backend._launch = launch_and_keep  # type: ignore[assignment]
    try:
        result = backend.BACKEND.forward(request)
        backend.BACKEND.backward(request, result.out, result.tau, result.saved, dout)
    finally:
        backend._launch, backend._configure = launch, configure
    return found


def compile_one(job: tuple[Candidate, dict[str, Any]]) -> str:
    """Compile a candidate into the cache on disk; the reason if it cannot be."""
    (name, launch, options), arguments = job
    kernel = getattr(kernels, name)
    arguments = arguments | options
    try:
        kernel.warmup(*(arguments[argument] for argument in kernel.arg_names), grid=(1,), **launch.options)
    except Exception as error:  # a candidate that does not fit is no candidate
        return str(error).splitlines()[0][:100] if str(error) else type(error).__name__
    return ""


def time_one(candidate: Candidate, programs: int, arguments: dict[str, Any], rounds: int) -> float:
    """Median milliseconds of a kernel alone."""
    name, launch, options = candidate
    programs = programs // arguments.get("TILE_PROGRAMS", 1) * options.get("TILE_PROGRAMS", 1)
    arguments = arguments | options
    copies = arguments.pop("copies")
    kernel = getattr(kernels, name)
    times = []
    for _ in range(rounds):
        # What the kernels before this one had left.
        for key, copy in copies.items():
            arguments[key].copy_(copy)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        backend._launch(kernel, programs, launch, **arguments)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[1:])


def main(argv: Sequence[str] | None = None) -> None:
    """Tune and print the best of each kernel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.25, help="of make_inputs('topics')")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--blocks", nargs="+", default=["128x64"], help="block_m x block_n")
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--best", type=int, default=4, help="candidates printed for each kernel")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    shape = {"heads_q": args.heads, "seqlen_q": args.seqlen, "head_dim": args.head_dim}
    q, k, v, dout = make_inputs("topics", **shape, dtype=dtype, device="cuda", share=args.share)
    request = AttentionRequest(q, k, v, args.head_dim**-0.5, is_causal=True, save_for_backward=True)
    plain = backend._configure(request)
    rows = []
    for blocks in args.blocks:
        block_m, block_n = map(int, blocks.split("x"))
        recorded = record(
            request, dout, dataclasses.replace(plain, block_m=block_m, block_n=block_n, output_programs=2)
        )
        jobs = []
        for name in args.kernel:
            _, arguments = recorded[name]
            plain_arguments = {
                key: value.dtype if isinstance(value, torch.Tensor) else value
                for key, value in arguments.items()
                if key != "copies"
            }
            jobs += [(candidate, plain_arguments) for candidate in candidates(name)]
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=context) as pool:
            faults = list(pool.map(compile_one, jobs, chunksize=2))
        for (candidate, _), fault in zip(jobs, faults, strict=True):
            name, launch, options = candidate
            row = {"kernel": name, "blocks": blocks, "launch": tuple(launch), "options": options}
            if not fault:
                try:
                    row["ms"] = time_one(candidate, *recorded[name], args.rounds)
                except Exception as error:  # out of shared memory or registers
                    fault = str(error).splitlines()[0][:100]
            rows.append(row | ({"fault": fault} if fault else {}))
        for name in args.kernel:
            timed = sorted(
                (row for row in rows if row["kernel"] == name and row["blocks"] == blocks and "ms" in row),
                key=lambda row: row["ms"],
            )
            for row in timed[: args.best]:
                print(
                    f"{name} {blocks} d{args.head_dim}: {row['ms']:.4f} ms  {row['launch']} {row['options']}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(
            json.dumps({"device": torch.cuda.get_device_name(), "args": vars(args) | {"json": None}, "rows": rows})
        )


if __name__ == "__main__":
    main()
