"""Times attention and entmax against what a user would have instead, and writes what it found to benchmarks/results/.

    python benchmarks/run.py --quick                                    a minute, the short cases
    python benchmarks/run.py                                            everything
    python benchmarks/run.py --case 'iid-*-f32' --provider numba --provider sdpa-f32 --mode fwd

Every provider first passes a correctness gate; one that does not gets no time. Then all are warmed and timed in rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import first_call
import initialisation
import torch
from cases import Case, find
from gate import Gate, make_gate
from measure import peak_memory
from providers import Provider, Ready, baseline, providers
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from stamp import machine_slug, stamp
from torch import Tensor

from adasplash2.bench.measure import MODES, Call, Mode, interleaved, make_call, ratio, spread

__all__ = ["Row", "main", "time_case"]

RESULTS = Path(__file__).parent / "results"

# What a row may say of its provider, besides "timed" and "skipped" (it does not serve the case).
UNHEALTHY = ("refused", "failed")

BUSY = 0.3  # load per core at the start

Row = dict[str, Any]
Say = Callable[[str], None]


def time_case(
    case: Case,
    competitors: Sequence[Provider],
    modes: Sequence[Mode],
    device: torch.device,
    seconds: float,
    min_rounds: int,
    say: Say = lambda doing: None,
) -> list[Row]:
    """Gate, warm and time all competitors at one case.

    Args:
        case: what to run.
        competitors: those of another operator are left out.
        modes: some of ``MODES``.
        device: where.
        seconds: spent in timed rounds, unless ``min_rounds`` take longer.
        min_rounds: rounds at least.
        say: told what is being done.

    Returns:
        One row per competitor and mode; ``ms`` only where the gate was passed, else a ``reason``.
    """
    arguments, dout = case.inputs(device)
    gates: dict[torch.dtype, Gate] = {}
    rows: dict[tuple[str, Mode], Row] = {}
    calls: dict[tuple[str, Mode], Call] = {}
    for provider in competitors:
        if provider.op != case.op:
            continue
        say(f"checking {provider.name}")
        dtype = provider.dtype or case.dtype
        own_arguments, own_dout = tuple(argument.to(dtype) for argument in arguments), dout.to(dtype)
        if dtype not in gates:
            gates[dtype] = make_gate(case, own_arguments, own_dout)
        ready, status, reason = _admit(provider, case, own_arguments, gates[dtype])
        for mode in modes:
            row = rows[provider.name, mode] = {
                "case": case.name,
                "provider": provider.name,
                "label": provider.label,
                "mode": mode,
                "status": status,
                "reason": reason,
            }
            if ready is None:
                continue
            if mode == "fwd_bwd" and ready.no_backward:
                row |= {"status": "skipped", "reason": ready.no_backward}
            else:
                calls[provider.name, mode] = make_call(ready.forward, own_arguments, own_dout, mode)
    say("warming")
    for call in calls.values():
        call()
    say("timing")
    times = interleaved(calls, device, seconds, min_rounds)
    for (name, mode), call in calls.items():
        say(f"memory of {name}")
        row = rows[name, mode]
        row |= {
            "rounds": len(times[name, mode]),
            "ms": spread(times[name, mode]),
            "peak_bytes": peak_memory(call, device),
        }
        if against := times.get((baseline(case), mode)):
            row |= {"against": baseline(case), "speedup": ratio(against, times[name, mode])}
    return list(rows.values())


def _admit(
    provider: Provider, case: Case, arguments: tuple[Tensor, ...], gate: Gate
) -> tuple[Ready | None, str, str | None]:
    """The provider if it may be timed, its status, and why it may not."""
    ready = provider.setup(case, arguments)
    if isinstance(ready, str):
        return None, "skipped", ready
    try:
        gate.check(ready.forward, provider.function, backward=ready.no_backward is None)
    except AssertionError as error:
        return None, "refused", str(error)
    except Exception as error:  # whatever it is, the others are still to be timed, and the exit status tells
        return None, "failed", f"{type(error).__name__}: {error}"
    return ready, "timed", None


def _cells(row: Row) -> tuple[str, str, str]:
    if row["status"] != "timed":
        return row["status"], "", ""
    speedup = "{:.3g} ({:.3g}-{:.3g})".format(*row["speedup"]) if "speedup" in row else ""
    peak = row["peak_bytes"]
    return f"{row['ms'][0]:.4g}", speedup, "" if peak is None else f"{peak / 1e6:.0f}"


def _show(case: Case, support: dict[str, float], rows: list[Row], modes: Sequence[str], console: Console) -> None:
    density = f"support {support['size']:.4g} keys a row, {support['elements']:.2%}"
    if "blocks" in support:
        density += f" of the elements, {support['blocks']:.0%} of the blocks"
    console.print(f"\n[bold]{case.name}[/]: {density}; speed in units of {baseline(case)}'s", highlight=False)
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for mode in modes:
        for heading in (f"{mode} ms", "speed (20-80%)", "MB"):
            table.add_column(heading, justify="right", no_wrap=True)
    by_provider: dict[str, list[Row]] = {}
    for row in rows:
        by_provider.setdefault(row["provider"], []).append(row)
    for name, own_rows in by_provider.items():
        if any(row["status"] != "skipped" for row in own_rows):
            table.add_row(name, *(cell for row in own_rows for cell in _cells(row)))
    console.print(table)
    for row in rows:
        if row["status"] in UNHEALTHY:
            message = f"[red]{row['provider']} {row['mode']} {row['status']}[/]: {escape(row['reason'])}"
            console.print(message, highlight=False)


def _parser(names: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[], metavar="GLOB", help="names of cases; all by default")
    parser.add_argument(
        "--provider", action="append", default=[], metavar="GLOB", help=f"all by default: {', '.join(names)}"
    )
    parser.add_argument("--mode", action="append", choices=MODES, help="both by default")
    parser.add_argument("--threads", type=int, help="as many as torch takes by default")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu by default")
    parser.add_argument("--seconds", type=float, help="timed per case: 2.5 by default, 0.5 with --quick")
    parser.add_argument("--quick", action="store_true", help="the short cases, few rounds")
    parser.add_argument("--json", type=Path, metavar="PATH", help="MACHINE-DATE.json in results/ by default")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        1 if the gate refused a provider or one failed, else 0.
    """
    everyone = providers()
    names = list(dict.fromkeys(provider.name for provider in everyone))
    parser = _parser(names)
    options = parser.parse_args(argv)
    for pattern in options.provider:
        if not any(fnmatch(name, pattern) for name in names):
            parser.error(f"provider={pattern!r}: matches none of {', '.join(names)}")
    try:
        cases = find(options.case, options.quick, options.device.type)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)

    chosen = [
        provider
        for provider in everyone
        if not options.provider or any(fnmatch(provider.name, pattern) for pattern in options.provider)
    ]
    unfiltered = not (options.case or options.provider or options.mode)

    results: dict[str, Any] = {"stamp": stamp(options.device), "cases": [], "rows": []}
    console = Console()
    load = results["stamp"]["load_average"]
    if load is not None and load > BUSY * results["stamp"]["cores"]:
        console.print(f"[yellow]this machine is busy (load {load:.1f}): trust the ratios, not the times[/]")
    complete = False
    try:
        with _progress(console) as progress:
            _time_cases(cases, chosen, options, results, progress)
            if unfiltered:
                _extras(options.device, results, progress)
        complete = unfiltered and not options.quick
    except KeyboardInterrupt:
        console.print("interrupted: keeping what was measured")
    finally:
        name = f"{machine_slug(results['stamp'])}-{results['stamp']['date'][:10]}"
        path = options.json or RESULTS / (f"{name}.json" if complete else f"{name}-partial.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        console.print(f"written: {path}", soft_wrap=True)
    return int(any(row["status"] in UNHEALTHY for row in results["rows"]))


def _time_cases(
    cases: Sequence[Case],
    chosen: Sequence[Provider],
    options: argparse.Namespace,
    results: dict[str, Any],
    progress: Progress,
) -> None:
    modes = [mode for mode in MODES if not options.mode or mode in options.mode]
    seconds, min_rounds = (0.5, 3) if options.quick else (2.5, 5)
    if options.seconds is not None:
        seconds = options.seconds
    task = progress.add_task("", total=len(cases))
    for case in cases:

        def say(doing: str, name: str = case.name) -> None:
            progress.update(task, description=f"{name}: {doing}")

        say("measuring the support")
        support = case.support(case.inputs(options.device)[0])
        rows = time_case(case, chosen, modes, options.device, seconds, min_rounds, say)
        results["cases"].append(case.describe() | {"support": support})
        results["rows"] += rows
        _show(case, support, rows, modes, progress.console)
        progress.advance(task)


def _extras(device: torch.device, results: dict[str, Any], progress: Progress) -> None:
    """What a run of all cases adds to them."""
    task = progress.add_task("initialisations", total=2)
    results["initialisations"] = initialisation.compare()
    initialisation.show(results["initialisations"], progress.console)
    progress.update(task, advance=1, description="first calls")
    results["first_calls"] = first_call.first_calls(device.type)
    first_call.show(results["first_calls"], progress.console)
    progress.advance(task)


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
    )


if __name__ == "__main__":
    sys.exit(main())
