"""``python -m adasplash2 bench``: how fast entmax attention is on this machine, against torch's softmax attention."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from adasplash2 import options, registry
from adasplash2.testing import INPUT_KINDS

if TYPE_CHECKING:
    from rich.console import Console

    from adasplash2.bench.cases import Case
    from adasplash2.bench.measure import Forward
    from adasplash2.bench.report import Row

__all__ = ["add_arguments", "run"]

# From dense to sparse: nearly equal scores, independent ones, segments of text with a topic each, a random walk.
_KINDS = ("narrow", "iid", "topics", "drifting")
_SEQLENS = {"cpu": (512, 1024, 2048, 4096), "cuda": (2048, 8192, 32768)}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_CHECKED_SEQLEN = 256
_MIN_ROUNDS = 3
_BUSY = 0.3  # load per core at the start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's options to a parser."""
    parser.add_argument(
        "--kind", nargs="+", choices=INPUT_KINDS, default=_KINDS, help=f"inputs (default: {' '.join(_KINDS)})"
    )
    lengths = "; ".join(f"{device}: {' '.join(map(str, own))}" for device, own in _SEQLENS.items())
    parser.add_argument(
        "--seqlen", nargs="+", type=options.integer(1), metavar="N", help=f"queries and keys (default: {lengths})"
    )
    parser.add_argument("--heads", type=options.integer(1), default=8, help="query heads (default: %(default)s)")
    parser.add_argument("--head-dim", type=options.integer(1), default=64, help="of q, k, v (default: %(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, help="float32 on a CPU, bfloat16 on a GPU by default")
    parser.add_argument("--alpha", type=options.alpha, default=1.5, help="in (1, 2] (default: %(default)s)")
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True, help="mask (default: causal)")
    parser.add_argument("--device", type=_device, help="cuda where there is a GPU, else cpu, by default")
    parser.add_argument(
        "--backend",
        nargs="+",
        choices=registry.names(),
        help="all that 'auto' considers on the device by default",
    )
    parser.add_argument(
        "--seconds",
        type=options.seconds,
        default=30.0,
        help="timed in all, after compiling and checking, if three rounds of each input take no longer "
        "(default: %(default)s)",
    )
    parser.add_argument("--json", type=options.output(".json"), metavar="OUT.json", help="write the numbers")
    parser.add_argument("--plot", type=options.output(".png"), metavar="OUT.png", help="draw speed over length")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark with parsed options.

    Returns:
        0; 1 where no backend can be timed, or a result was wrong; 2 where an optional dependency is missing; 130 where
        Ctrl-C left nothing to show.
    """
    missing = [name for name in ("rich", *(["matplotlib"] if args.plot else [])) if find_spec(name) is None]
    if missing:
        print(f"bench needs {' and '.join(missing)}: python -m pip install 'adasplash2[bench]'", file=sys.stderr)
        return 2

    from rich.console import Console

    from adasplash2.bench import report
    from adasplash2.bench.machine import machine

    console = Console(highlight=False)
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = machine(device)
    load = record["load_average"]
    if load is not None and load > _BUSY * record["cores"]:
        console.print(f"[yellow]this machine is busy (load {load:.1f}): trust the speeds, not the times[/]")
    base = _base_case(args, device)
    rows: list[Row] = []
    faults: list[str] = []
    complete = False
    try:
        names = _admit(base, args, device, console, faults)
        if not names:
            console.print(f"no backend can be timed on {device}")
            return 1
        for found in _measure(base, names, args, device, console, faults):
            rows += found
        complete = True
    except KeyboardInterrupt:
        console.print("interrupted" if rows else "interrupted before the first result: nothing to show")
    if not rows:
        return 1 if complete else 130
    title = _title(base, record)
    console.print(
        report.table(rows),
        f"{title}. p > 0: share of the visible weights. Medians of interleaved rounds; speed: torch's softmax "
        "attention is 1, ratios are taken round by round (20% to 80% of them).",
    )
    if args.json:
        settings = dataclasses.asdict(base) | {
            "dtype": str(base.dtype),
            "kind": args.kind,
            "seqlen": _seqlens(args, device),
        }
        written = {
            "machine": record,
            "settings": settings,
            "complete": complete,
            "faults": faults,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        console.print(f"numbers: {args.json.resolve()}", soft_wrap=True)
    if args.plot:
        report.picture(rows, title).savefig(args.plot, dpi=100)
        console.print(f"picture: {args.plot.resolve()}", soft_wrap=True)
    return 1 if faults else 0


def _base_case(args: argparse.Namespace, device: torch.device) -> Case:
    """What all inputs have in common; of the first kind, and small."""
    from adasplash2.bench.cases import Case

    seqlens = _seqlens(args, device)
    return Case(
        args.kind[0],
        min(_CHECKED_SEQLEN, *seqlens),
        head_dim=args.head_dim,
        heads=args.heads,
        alpha=args.alpha,
        is_causal=args.causal,
        dtype=_DTYPES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")],
    )


def _seqlens(args: argparse.Namespace, device: torch.device) -> Sequence[int]:
    return args.seqlen or _SEQLENS["cpu" if device.type == "cpu" else "cuda"]


def _title(case: Case, record: Mapping[str, Any]) -> str:
    mask = "causal" if case.is_causal else "no mask"
    cpu = f"{record['info']['cpu']}, {record['threads']} threads"
    return (
        f"{cpu if record['device'] == 'cpu' else record['device']}; torch {torch.__version__}; alpha {case.alpha:g}, "
        f"{mask}, {str(case.dtype).removeprefix('torch.')}, {case.heads} heads, head_dim {case.head_dim}"
    )


def _admit(
    base: Case, args: argparse.Namespace, device: torch.device, console: Console, faults: list[str]
) -> list[str]:
    """The backends that serve such calls, and whose results on small inputs of each kind are right."""
    from adasplash2.bench.providers import check, entmax_attention

    considered = args.backend or [name for name in registry.names() if device.type in registry.find(name).devices]
    admitted = []
    for name in considered:
        arguments, _ = base.inputs(device)
        forward = entmax_attention(name, base, arguments)
        if isinstance(forward, str):
            console.print(f"{name} is not timed: {forward}", markup=False)
            continue
        try:
            with console.status(f"{name}: compiling, and comparing with the reference"):
                for kind in args.kind:
                    check(forward, dataclasses.replace(base, kind=kind, heads=2), device)
        except Exception as error:  # whatever it is, the others are still to be timed, and the exit status tells
            _tell(f"{name} is not timed, its results are wrong: {type(error).__name__}: {error}", console, faults)
            continue
        admitted.append(name)
    return admitted


def _tell(fault: str, console: Console, faults: list[str]) -> None:
    console.print(fault, style="red", markup=False)
    faults.append(fault)


def _measure(
    base: Case,
    names: Sequence[str],
    args: argparse.Namespace,
    device: torch.device,
    console: Console,
    faults: list[str],
) -> Iterator[list[Row]]:
    """The rows of each input, the short ones first."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    cases = [
        dataclasses.replace(base, kind=kind, seqlen=seqlen) for seqlen in _seqlens(args, device) for kind in args.kind
    ]
    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    deadline = time.perf_counter() + args.seconds
    with progress:
        task = progress.add_task("", total=len(cases))
        for i, case in enumerate(cases):
            label = f"{case.kind}, {case.seqlen} keys"
            progress.update(task, description=label)
            seconds = (deadline - time.perf_counter()) / (len(cases) - i)
            try:
                yield _time(case, names, device, seconds)
            except Exception as error:  # out of memory, say: what was measured is still shown
                _tell(f"{label}: {type(error).__name__}: {error}", console, faults)
            progress.advance(task)
            if not console.is_terminal:
                console.print(f"{i + 1}/{len(cases)} {label}")


def _time(case: Case, names: Sequence[str], device: torch.device, seconds: float) -> list[Row]:
    """Times everyone on one input, in rounds; ``seconds`` include what comes before them."""
    from adasplash2.bench.measure import MODES, interleaved, make_call, ratio, spread
    from adasplash2.bench.providers import entmax_attention, softmax_attention
    from adasplash2.bench.report import SOFTMAX, Row

    begin = time.perf_counter()
    arguments, dout = case.inputs(device)
    forwards: dict[str, Forward | str] = {SOFTMAX: softmax_attention(case)}
    forwards |= {name: entmax_attention(name, case, arguments) for name in names}
    elements = case.support(arguments, backend=names[0])["elements"]
    calls = {
        (name, mode): make_call(forward, arguments, dout, mode)
        for name, forward in forwards.items()
        if not isinstance(forward, str)
        for mode in MODES
    }
    for call in calls.values():
        call()
    times = interleaved(calls, device, begin + seconds - time.perf_counter(), _MIN_ROUNDS)
    rounds = len(next(iter(times.values())))
    return [
        Row(
            case.kind,
            case.seqlen,
            elements,
            name,
            rounds,
            ms={mode: spread(times[name, mode]) for mode in MODES},
            speed={mode: ratio(times[SOFTMAX, mode], times[name, mode]) for mode in MODES},
        )
        for name in dict.fromkeys(name for name, _ in calls)
    ]


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {str(error).splitlines()[0]}") from error
    return device
