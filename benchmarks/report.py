"""Turns results into tables, between the markers of README.md and of pages in docs/, and into the plots that they show.

python benchmarks/report.py                      the newest complete results of each machine
python benchmarks/report.py RESULTS.json --stdout
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

__all__ = ["ROOT", "Results", "fill", "main", "markdown", "markdown_table", "plots", "summary"]

Row = dict[str, Any]

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
PAGES = ("README.md", "docs/performance.md", "docs/gpu.md")
PLOTS = "docs/plots"

# The first of these that was timed at a case stands for the package there.
OURS = ("triton", "cupy", "numba")
KINDS = {
    "narrow": "near-uniform, std 0.03",
    "iid": "iid, std 1",
    "real": "real, trained model",
    "topics": "topics",
    "wide": "iid, std 3.5",
    "drifting": "drifting clusters",
}
PEERS = {
    "cudnn": "cuDNN",
    "flex": "flex_attention",
    "adasplash-v1": "adasplash 0.2.2, v1",
    "adasplash": "adasplash 0.2.2",
    "triton": "adasplash2 triton",
    "cupy": "adasplash2 cupy",
}
# Inputs, head_dim, keys, heads: share of make_inputs("topics"), or gain of others, to the goal for forward + backward
# on an H200, in units of FlashAttention-2's time.
GOALS = {
    ("topics", 64, 8192, 16): {0.5: 0.45, 0.25: 0.40, 0.1: 0.33},
    ("topics", 64, 32768, 16): {0.25: 0.23, 0.1: 0.21},
    ("topics", 128, 8192, 16): {0.5: 0.55, 0.25: 0.42, 0.1: 0.33},
    ("topics", 128, 16384, 16): {0.5: 0.45, 0.25: 0.37, 0.1: 0.28},
    ("topics", 64, 131072, 4): {0.25: 0.18},
    ("iid", 64, 8192, 16): {1: 0.8, 3.5: 0.6},
    ("iid", 64, 32768, 16): {1: 0.5, 3.5: 0.35},
}
# Okabe and Ito's colours, apart for colour-blind eyes too.
COLOURS = dict(zip(KINDS, ("#000000", "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"), strict=True))
MODES = {"fwd": "forward", "fwd_bwd": "forward + backward"}
DATE = r"-\d{4}-\d{2}-\d{2}"
INK = "#333333"
DASHED = (0, (4, 3))
TITLE: dict[str, Any] = {"x": 0.01, "ha": "left", "fontsize": 12, "fontweight": "bold", "color": INK}


# Of the 80% and the 20% quantile of a ratio on a GPU, from where on it is left out.
DISTURBED = 1.5

# Stage: how the name of its kernel ends, and how many products of its blocks it cannot do without: those of Triton in
# bfloat16 at alpha = 1.5, as the others' are not told.
STAGES = {
    "scan": ("_fwd_scan", 1),
    "refine": ("_fwd_refine", 0),
    "output": ("_fwd_output", 2),
    "dq": ("_bwd_dq", 4),
    "dkv": ("_bwd_dkv", 4),
    "dq by entries": ("_bwd_dq_entries", 0),
    "dkv by entries": ("_bwd_dkv_entries", 0),
}


@dataclass(frozen=True)
class Results:
    """One results file."""

    path: Path
    stamp: dict[str, Any]
    cases: list[Row]
    rows: dict[tuple[str, str, str], Row]  # (case, provider, mode), those timed, and on a GPU without disturbance
    peaks: dict[tuple[str, str, str], int]  # bytes, of all that were timed
    initialisations: list[Row]
    first_calls: dict[str, dict[str, float]]

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file that run.py wrote."""
        content = json.loads(path.read_text())
        is_gpu = content["stamp"]["device"] != "cpu"
        timed = [row for row in content["rows"] if row["status"] == "timed"]
        return cls(
            path,
            content["stamp"],
            content["cases"],
            {(row["case"], row["provider"], row["mode"]): row for row in timed if not (is_gpu and _is_disturbed(row))},
            {
                (row["case"], row["provider"], row["mode"]): row["peak_bytes"]
                for row in timed
                if row["peak_bytes"] is not None
            },
            content.get("initialisations", []),
            content.get("first_calls", {}),
        )

    def attention(self, **wanted: object) -> list[Row]:
        """The attention cases with these fields, and the usual ones where none is named."""
        usual = {"dtype": "f32", "head_dim": 64, "heads": 8, "batch": 1, "alpha": 1.5, "gain": 1.0, "share": 0.25}
        wanted = {"op": "attention", "is_causal": True} | usual | wanted
        return [case for case in self.cases if all(case[name] == value for name, value in wanted.items())]

    def ours(self, case: Row, mode: str) -> Row | None:
        """The package's row at a case."""
        return next((row for name in OURS if (row := self.rows.get((case["name"], name, mode)))), None)

    def baseline(self, case: Row, mode: str) -> Row | None:
        """The row that the package's ratio is against."""
        ours = self.ours(case, mode)
        return self.rows.get((case["name"], ours["against"], mode)) if ours and "against" in ours else None


def _is_disturbed(row: Row) -> bool:
    """Whether the rounds disagree so much that their median says little."""
    _, low, high = row.get("speedup", (1, 1, 1))
    return bool(high > DISTURBED * low)


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]], align: str = "---:") -> str:
    """A table in Markdown; ``align`` is the rule under every column but the first."""
    made = [header, ["---"] + [align] * (len(header) - 1), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in made)


def _digits(value: float) -> str:
    """Three digits, but never an exponent for a large number."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _share(value: float) -> str:
    return f"{100 * value:.2g}%" if value < 0.1 else f"{100 * value:.0f}%"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value < 10 else _digits(value)


def _times(row: Row | None) -> str:
    return _ratio(row["speedup"][0]) if row and "speedup" in row else ""


def _times_with_spread(row: Row | None) -> str:
    return "{} ({} to {})".format(*map(_ratio, row["speedup"])) if row and "speedup" in row else ""


def _ms(row: Row | None) -> str:
    return _digits(row["ms"][0]) if row else ""


def _mb(row: Row | None) -> str:
    return f"{row['peak_bytes'] / 1e6:.0f}" if row and row["peak_bytes"] is not None else ""


def _speed_by_length(results: Results) -> str:
    """Kinds of inputs by lengths, forward / forward + backward."""
    cases = results.attention()
    lengths = sorted({case["seqlen"] for case in cases})
    found = {(case["kind"], case["seqlen"]): case for case in cases}

    def cell(kind: str, seqlen: int) -> str:
        case = found.get((kind, seqlen))
        if case is None or results.ours(case, "fwd") is None:
            return ""
        speed = " / ".join(_times(results.ours(case, mode)) for mode in MODES)
        return f"{speed} ({_share(case['support']['elements'])})"

    lines = ([label, *(cell(kind, seqlen) for seqlen in lengths)] for kind, label in KINDS.items())
    return markdown_table(["inputs", *map(str, lengths)], (line for line in lines if any(line[1:])))


def _case_table(results: Results, cases: Iterable[Row]) -> str:
    columns = ("torch ms", "ms", "times", "torch MB", "MB")
    header = ["case", "keys a row", "elements", "blocks"]
    header += [f"{label}: {column}" for label in MODES.values() for column in columns]
    lines = []
    for case in cases:
        support = case["support"]
        line = [_describe(case), f"{support['size']:.3g}", _share(support["elements"]), _share(support["blocks"])]
        for mode in MODES:
            theirs, ours = results.baseline(case, mode), results.ours(case, mode)
            line += [_ms(theirs), _ms(ours), _times_with_spread(ours), _mb(theirs), _mb(ours)]
        if any(line[4:]):
            lines.append(line)
    return markdown_table(header, lines)


def _describe(case: Row) -> str:
    words = [KINDS[case["kind"]], f"{case['seqlen']} keys"]
    words += [f"scores x {case['gain']:g}"] * (case["gain"] != 1)
    words += [f"share {case['share']:g}"] * (case["share"] != 0.25)
    words += [f"head_dim {case['head_dim']}"] * (case["head_dim"] != 64)
    words += ["no mask"] * (not case["is_causal"])
    words += [f"alpha {case['alpha']:g}"] * (case["alpha"] != 1.5)
    usual_heads, usual_dtype = (8, "f32") if case.get("device", "cpu") == "cpu" else (16, "bf16")
    words += [f"{case['heads']} heads"] * (case["heads"] != usual_heads)
    words += [f"batch {case['batch']}"] * (case["batch"] != 1)
    words += [case["dtype"]] * (case["dtype"] != usual_dtype)
    return ", ".join(words)


def _provider_table(results: Results, case: Row) -> str:
    """Everyone at one case."""
    header = ["", *(f"{label}: {column}" for label in MODES.values() for column in ("ms", "times", "MB"))]
    providers = dict.fromkeys(provider for name, provider, _ in results.rows if name == case["name"])
    lines = []
    for provider in providers:
        own = [results.rows.get((case["name"], provider, mode)) for mode in MODES]
        label = next(row["label"] for row in own if row)
        lines.append([label, *(cell for row in own for cell in (_ms(row), _times(row), _mb(row)))])
    return markdown_table(header, lines)


def _histogram_table(results: Results) -> str:
    """The two initialisations of the Numba backend against each other."""
    lines = []
    for case in results.cases:
        own = [results.rows.get((case["name"], name, mode)) for mode in MODES for name in ("numba", "numba-histogram")]
        if all(own):
            lines.append([_describe(case), *map(_ms, own)])
    header = ["case", *(f"{label}: {init}, ms" for label in MODES.values() for init in ("maxima", "histogram"))]
    return markdown_table(header, lines) if lines else ""


def _initialisation_table(rows: list[Row], cell: Callable[[Row], str]) -> str:
    inputs = dict.fromkeys(row["inputs"] for row in rows)
    labels = dict.fromkeys(row["initialisation"] for row in rows)
    found = {(row["initialisation"], row["inputs"]): row for row in rows}
    lines = ([label, *(cell(found[label, name]) for name in inputs)] for label in labels)
    return markdown_table(["initialisation", *inputs], lines)


def _details(title: str, body: str) -> str:
    # markdown="1": the documentation's Markdown leaves what is in HTML alone unless told.
    return f'<details markdown="1"><summary>{title}</summary>\n\n{body}\n\n</details>'


def _device(stamp: Mapping[str, Any]) -> str:
    return f"{stamp['info']['cpu']}, {stamp['threads']} threads" if stamp["device"] == "cpu" else str(stamp["device"])


def _machine(stamp: Mapping[str, Any]) -> str:
    device, info = _device(stamp), stamp["info"]
    if stamp["device"] == "cpu":
        device += f" ({info['cpu features']})"
    compiler = "numba" if stamp["device"] == "cpu" else "triton"
    versions = ", ".join(f"{name} {info[name]}" for name in ("torch", compiler, "python"))
    changes = " with changes" if stamp["uncommitted_changes"] else ""
    return f"{device}; {versions}; {stamp['date'][:10]}, commit {(stamp['commit'] or 'unknown')[:9]}{changes}"


def _share_of_time(row: Row | None) -> str:
    """Time in units of the baseline's, with its spread."""
    if row is None or "speedup" not in row:
        return ""
    median, low, high = (1 / value for value in (row["speedup"][0], row["speedup"][2], row["speedup"][1]))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _peers(results: Results) -> dict[str, str]:
    """Name and label of everyone who was timed on a GPU beside FlashAttention-2."""
    timed = {provider for _, provider, _ in results.rows}
    return {name: label for name, label in PEERS.items() if name in timed}


def _gpu_table(results: Results) -> str:
    """Every case in units of FlashAttention-2's time."""
    peers = _peers(results)
    header = ["case", "blocks"]
    header += [f"{mode}: {name}" for mode in MODES.values() for name in ("fa2 ms", *peers.values())]
    lines = []
    for case in results.cases:
        if case["op"] != "attention":
            continue
        line = [_describe(case), _share(case["support"]["blocks"])]
        for mode in MODES:
            line.append(_ms(results.rows.get((case["name"], "fa2", mode))))
            line += [_share_of_time(results.rows.get((case["name"], peer, mode))) for peer in peers]
        lines.append(line)
    return markdown_table(header, lines)


def _gpu_summary(results: Results) -> str:
    """The usual inputs at each shape where the package was timed, forward / forward + backward, without the spread."""
    peers = _peers(results)

    def cell(case: Row, peer: str) -> str:
        rows = (results.rows.get((case["name"], peer, mode)) for mode in MODES)
        return " / ".join(_ratio(1 / row["speedup"][0]) if row and "speedup" in row else "-" for row in rows)

    lines = [
        [_describe(case), _share(case["support"]["blocks"]), *(cell(case, peer) for peer in peers)]
        for case in results.cases
        if _is_plain_topics(case) and case["share"] == 0.25 and all(results.ours(case, mode) for mode in MODES)
    ]
    return markdown_table(["inputs", "blocks", *peers.values()], lines) if lines else ""


def _memory_table(results: Results) -> str:
    """Peak memory of everyone at each shape, forward / forward + backward, in MB."""
    timed = {provider for _, provider, _ in results.peaks}
    labels = {name: label for name, label in {"fa2": "FlashAttention-2", **PEERS}.items() if name in timed}

    def cell(case: Row, name: str) -> str:
        peaks = (results.peaks.get((case["name"], name, mode)) for mode in MODES)
        return " / ".join("-" if peak is None else f"{peak / 1e6:.0f}" for peak in peaks)

    lines = (
        [f"{case['head_dim']}, {case['seqlen']}, {case['heads']}", *(cell(case, name) for name in labels)]
        for case in results.cases
        if _is_plain_topics(case) and case["share"] == 0.25
    )
    return markdown_table(["head_dim, keys, heads", *labels.values()], lines)


def _is_plain_topics(case: Row) -> bool:
    plain = {"kind": "topics", "batch": 1, "alpha": 1.5, "is_causal": True, "dtype": "bf16"}
    return all(case[setting] == value for setting, value in plain.items())


def _goals_table(results: Results) -> str:
    """What forward + backward was meant to take, and what it took, at each shape that was timed."""
    timed = [name for name in ("triton", "cupy") if any(provider == name for _, provider, _ in results.rows)]
    lines = []
    for (kind, head_dim, seqlen, heads), goals in GOALS.items():
        cases = {
            case["share"] if kind == "topics" else case["gain"]: case
            for case in results.cases
            if (case["kind"], case["alpha"], case["is_causal"], case["dtype"]) == (kind, 1.5, True, "bf16")
            and (case["op"], case["head_dim"], case["seqlen"], case["heads"]) == ("attention", head_dim, seqlen, heads)
        }
        cases = {setting: case for setting, case in cases.items() if setting in goals}
        measured = {
            name: [results.rows.get((case["name"], name, "fwd_bwd"), {}) for case in cases.values()] for name in timed
        }
        if any("speedup" in row for rows in measured.values() for row in rows):
            texts = {
                name: " / ".join(_ratio(1 / row["speedup"][0]) if "speedup" in row else "-" for row in rows)
                for name, rows in measured.items()
            }
            lines.append(
                [
                    f"{kind}, {head_dim}, {seqlen}, {heads}",
                    " / ".join(_share(case["support"]["blocks"]) for case in cases.values()),
                    " / ".join(_ratio(goals[setting]) for setting in cases),
                    *(texts[name] for name in timed),
                ]
            )
    return markdown_table(["inputs, head_dim, keys, heads", "blocks", "goal", *timed], lines) if len(lines) > 1 else ""


def _gpu_sections(results: Results, images: Mapping[str, str]) -> Iterator[str]:
    yield (
        f"Measured on {_machine(results.stamp)}. Batch 1, causal and bfloat16 unless said. Times are those of a call "
        "through the public API with a cold L2 cache, host time included, in units of FlashAttention-2's in the same "
        "run: less is better. `blocks` is the share of the visible 128 x 64 blocks that hold a weight. Medians of "
        "interleaved rounds, 20% to 80% in brackets; where nothing stands, the correctness gate refused the result, "
        f"nothing was timed, or the host was so busy that the two differ by more than a factor of {DISTURBED}."
    )
    yield _gpu_table(results)
    yield from (f"![{name}]({image})" for name, image in images.items())
    yield "Peak memory of a call on topics above what was held before, forward / forward + backward, in MB:"
    yield _memory_table(results)


def _sections(results: Results, images: Mapping[str, str]) -> Iterator[str]:
    if results.stamp["device"] != "cpu":
        yield from _gpu_sections(results, images)
        return
    plain = results.attention()
    others = [case for case in results.cases if case["op"] == "attention" and case not in plain]
    yield (
        f"Measured on {_machine(results.stamp)}. Batch 1, 8 heads. Medians of interleaved rounds, after a correctness "
        "gate that every provider must pass."
    )
    yield (
        "Times as fast as torch's softmax attention in the same run, forward / forward + backward, by sequence length "
        "(causal, float32, head_dim 64). In brackets the share of the visible weights that are not zero."
    )
    yield _speed_by_length(results)
    yield from (f"![{name}]({image})" for name, image in images.items())
    yield _details("Every case, with times, spread (20% to 80%) and peak memory", _case_table(results, plain + others))
    for case in results.cases:
        providers = {provider for name, provider, _ in results.rows if name == case["name"]}
        if case["op"] == "entmax":
            shape = (case["seqlen"], case["seqlen"])
            yield f"`entmax(x)` on a {shape} matrix, alpha {case['alpha']:g}, {case['dtype']}:"
            yield _provider_table(results, case)
        elif providers & {"entmax15", "entmax_bisect"}:
            yield f"Everyone at one case ({_describe(case)}):"
            yield _provider_table(results, case)
    if table := _histogram_table(results):
        yield "The first bound of tau in the Numba backend, from the maxima of groups of keys or from a histogram:"
        yield table
    if results.initialisations:
        goal = "0.0001"
        yield (
            f"Passes over the scores until every row is within {goal} of tau, after the pass that forms the scores "
            "(256 rows of 4096 keys, 1024 for the real ones; alpha 1.5):"
        )
        yield _initialisation_table(results.initialisations, lambda row: f"{row['passes'][goal]:.2f}")
        yield _details(
            "Gap to tau of the worst row after each initialisation, and after 1, 2, 3 steps",
            _initialisation_table(results.initialisations, lambda row: ", ".join(f"{gap:.0e}" for gap in row["gaps"])),
        )
    if results.first_calls:
        yield "Seconds in a fresh process, forward + backward, with the compile cache empty (cold) or filled (warm):"
        yield markdown_table(
            ["", "import", "first call", "second call"],
            ([state, *map(_digits, seconds.values())] for state, seconds in results.first_calls.items()),
        )


def markdown(results: Results, images: Mapping[str, str]) -> str:
    """The report on one machine.

    Args:
        results: of that machine.
        images: alternative text to address, shown below the first table.
    """
    return "\n\n".join(_sections(results, images))


def summary(results: Results, images: Mapping[str, str]) -> str:
    """The report on one machine in one table and one plot; arguments as for ``markdown``."""
    table = _speed_by_length(results) if results.stamp["device"] == "cpu" else _gpu_summary(results)
    image = next((f"![{name}]({image})" for name, image in images.items()), "")
    return f"{table}\n\n{image}".strip()


def _about(results: Results) -> str:
    """How the tables of a summary are read."""
    if results.stamp["device"] == "cpu":
        return (
            "how many times as fast as torch's softmax attention in the same run, forward / forward + backward, by "
            "sequence length (causal, float32, head_dim 64, 8 heads). In brackets the share of the visible weights "
            "that are not zero."
        )
    return (
        "time in units of FlashAttention-2's in the same run, forward / forward + backward: less is better (causal, "
        "bfloat16, head_dim 64 and 16 heads unless said). `blocks` is the share of the visible 128 x 64 blocks that "
        "hold a weight. Every table is one run."
    )


def _joined(found: Sequence[Results], texts: Iterable[str], title: Callable[[Results], str]) -> str:
    """The reports on all machines, with a title where the device changes."""
    parts = []
    device = ""
    for results, text in zip(found, texts, strict=True):
        if text and _device(results.stamp) != device:
            device = _device(results.stamp)
            parts.append(title(results))
        parts.append(text)
    return "\n\n".join(filter(None, parts))


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#999999")


def _legend(figure: Figure) -> None:
    """One legend for all axes, at the right."""
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(list(entries.values()), list(entries), loc="outside right center", frameon=False, labelcolor=INK)


def _speed_plot(results: Results) -> Figure:
    """Speed against torch's softmax over length, a line for each kind of inputs."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    cases = results.attention()
    lengths = sorted({case["seqlen"] for case in cases})
    for axes, (mode, label) in zip(figure.subplots(1, 2), MODES.items(), strict=True):
        _style(axes, label)
        for kind, name in KINDS.items():
            points = sorted(
                (case["seqlen"], *row["speedup"])
                for case in cases
                if case["kind"] == kind and (row := results.ours(case, mode)) and "speedup" in row
            )
            if points:
                x, median, low, high = zip(*points, strict=True)
                axes.fill_between(x, low, high, color=COLOURS[kind], alpha=0.12, linewidth=0)
                axes.plot(x, median, color=COLOURS[kind], marker="o", markersize=4, linewidth=1.8, label=name)
        axes.axhline(1, color=INK, linewidth=1.2, linestyle=DASHED, label="torch softmax")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(lengths))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0f}"))
        axes.set_ylim(0, None)
        axes.set_xlabel("keys", color=INK)
    _legend(figure)
    figure.suptitle("Times as fast as torch's softmax attention (causal, head_dim 64, float32)", **TITLE)
    return figure


def _sparsity_plot(results: Results, seqlen: int = 2048) -> Figure:
    """Time over the share of weights that are not zero, at one length."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    cases = [case for case in results.cases if case in results.attention(seqlen=seqlen, gain=case["gain"])]
    for axes, (mode, label) in zip(figure.subplots(1, 2), MODES.items(), strict=True):
        _style(axes, label)
        points = [
            (100 * case["support"]["elements"], ours["ms"][0], theirs["ms"][0], case["kind"])
            for case in cases
            if (ours := results.ours(case, mode)) and (theirs := results.baseline(case, mode))
        ]
        if not points:
            continue
        # The same draws at ever other gains.
        swept = sorted((share, ms) for share, ms, _, kind in points if kind in ("narrow", "iid", "wide"))
        axes.plot(*zip(*swept, strict=True), color="#cccccc", linewidth=1.2, zorder=1)
        for kind, name in KINDS.items():
            own = [(share, ms) for share, ms, _, its_kind in points if its_kind == kind]
            if own:
                name = "iid, other gains" if kind == "iid" else name
                axes.scatter(*zip(*own, strict=True), color=COLOURS[kind], s=36, zorder=2, label=name)
        softmax = statistics.median(theirs for _, _, theirs, _ in points)
        axes.axhline(softmax, color=INK, linewidth=1.2, linestyle=DASHED, label="torch softmax")
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}%"))
        axes.set_ylim(0, None)
        axes.set_xlabel("weights that are not zero", color=INK)
        axes.set_ylabel("ms", color=INK)
    _legend(figure)
    figure.suptitle(f"Time over sparsity ({seqlen} keys, causal, head_dim 64, float32)", **TITLE)
    return figure


def _blocks_plot(results: Results) -> Figure:
    """Time on a GPU in units of FlashAttention-2's over the share of blocks that hold a weight, topics alone."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    cases = [case for case in results.cases if _is_plain_topics(case)]
    shapes = sorted({(case["head_dim"], case["seqlen"]) for case in cases})
    if len(shapes) < 2:  # the table says it all
        return figure
    for axes, (mode, label) in zip(figure.subplots(1, 2), MODES.items(), strict=True):
        _style(axes, label)
        for colour, (head_dim, seqlen) in zip(COLOURS.values(), shapes, strict=False):
            points = sorted(
                (100 * case["support"]["blocks"], 1 / row["speedup"][0])
                for case in cases
                if (case["head_dim"], case["seqlen"]) == (head_dim, seqlen)
                and (row := results.ours(case, mode))
                and "speedup" in row
            )
            if points:
                name = f"head_dim {head_dim}, {seqlen} keys"
                axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.8, label=name)
        rows = (results.rows.get((case["name"], "cudnn", mode)) for case in cases)
        if cudnn := [1 / row["speedup"][0] for row in rows if row]:
            axes.axhline(
                statistics.median(cudnn), color="#999999", linewidth=1.2, linestyle=DASHED, label="cuDNN softmax"
            )
        axes.axhline(1, color=INK, linewidth=1.2, linestyle=DASHED, label="FlashAttention-2")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:g}%"))
        axes.set_ylim(0, None)
        axes.set_xlabel("blocks that hold a weight", color=INK)
    _legend(figure)
    figure.suptitle("Time in units of FlashAttention-2's (topics, causal, bfloat16)", **TITLE)
    return figure


def plots(results: Results, folder: Path | None = None) -> dict[str, Path]:
    """Draw the plots of a machine; only those that the results have data for.

    Args:
        results: of that machine.
        folder: where the images go; beside the results by default.

    Returns:
        What each shows, and where it is.
    """
    made = {}
    shown = {"Speed over length": _speed_plot, "Time over sparsity": _sparsity_plot}
    if results.stamp["device"] != "cpu":
        shown = {"Time over blocks": _blocks_plot}
    # Without the date, so that new results take the place of old ones.
    stem = re.sub(DATE, "", results.path.stem)
    with matplotlib.rc_context({"font.size": 10, "font.family": "DejaVu Sans"}):
        for title, draw in shown.items():
            figure = draw(results)
            if any(axes.lines for axes in figure.axes):
                made[title] = (folder or results.path.parent) / f"{stem}-{title.split()[-1]}.png"
                figure.savefig(made[title], dpi=110, facecolor="white")
    return made


def newest_complete(folder: Path) -> list[Path]:
    """The last results file of each machine, without those of partial runs and files of another kind."""
    return _newest(folder, "", "rows")


def _newest(folder: Path, suffix: str, key: str) -> list[Path]:
    """Of the files MACHINE-DATE with such a suffix that have the key, the last one of each machine and suffix."""
    newest: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.glob("*.json")):
        if (found := re.fullmatch(rf"(.+){DATE}({suffix})", path.stem)) and key in json.loads(path.read_text()):
            newest[found[1], found[2]] = path
    return list(newest.values())


def training(folder: Path) -> str:
    """What training.py found on each machine; nothing without its results."""
    return "\n\n".join(part for path in _newest(folder, "-training", "states") for part in _training_sections(path))


def _training_sections(path: Path) -> Iterator[str]:
    results = json.loads(path.read_text())
    setting, states = results["setting"], results["states"]
    yield f"### Training on {_device(results['stamp'])}"
    yield (
        f"A Llama-style model of transformers ({setting['layers']} layers, {setting['heads']} heads of "
        f"{setting['head_dim']} channels, {setting['parameters'] / 1e6:.3g} million parameters), "
        f"{setting['seqlen']} tokens x {setting['batch']}, bfloat16 autocast: forward, backward and optimiser step, "
        f"measured on {_machine(results['stamp'])}. Speed is in units of sdpa's in the same rounds: more is better."
    )
    lines = []
    for state in states:
        weights = f"after {state['steps']} steps with entmax" if state["steps"] else "random"
        for row in state["rows"]:
            if row["status"] == "timed":
                low, high = (f"{1e-3 * row['tokens_per_second'][i]:.1f}" for i in (1, 2))
                speed = f"{1e-3 * row['tokens_per_second'][0]:.1f} ({low} to {high})"
                lines.append([weights, row["label"], speed, _times_with_spread(row), _mb(row)])
    yield markdown_table(["weights", "attention", "thousand tokens / s", "speed", "MB"], lines)
    for state in states:
        if state["support"]:
            layers = (
                f"{layer['size']:.3g} ({_share(layer['elements'])}, {_share(layer['blocks'])})"
                for layer in state["support"]
            )
            when = f"after {state['steps']} steps" if state["steps"] else "at random weights"
            yield f"Keys a row in each layer {when} (of the weights, of the blocks): {', '.join(layers)}."
    operators = {
        operator
        for state in states
        for row in state["rows"]
        if row["provider"].startswith("sdpa")
        for operator in row.get("operators", ())
        if operator.startswith("aten::_") and not operator.endswith("_backward")
    }
    if operators:
        yield f"torch's softmax attention was {' and '.join(f'`{operator}`' for operator in sorted(operators))}."


def kernels(folder: Path) -> str:
    """What kernels.py found on each machine; nothing without its results."""
    return "\n\n".join(part for path in _newest(folder, "-kernels", "decoding") for part in _kernel_sections(path))


def _kernel_sections(path: Path) -> Iterator[str]:
    results = json.loads(path.read_text())
    yield f"### Kernels on {_device(results['stamp'])}"
    yield (
        f"Measured on {_machine(results['stamp'])}, by torch's profiler: the device's time alone. A kernel that begins "
        "while another runs is counted from the other's end. In brackets the TFLOP/s of the products that a kernel "
        "cannot do without: scan one over the visible pairs; over live blocks "
        "(128 x 64) output two, dq and dkv four. refine takes one for each of its passes, which are not counted. "
        "Where a backend takes tiles by their entries, refine has their output too, and only the scan's rate is given. "
        "The last column is forward + backward in units of FlashAttention-2's time in the same run: less is better."
    )
    lines = []
    for case in results["cases"]:
        pairs = case["heads"] * case["batch"] * case["seqlen"] * (case["seqlen"] + 1) / 2
        for row in case["rows"]:
            if "total" not in row:
                continue
            inputs = case["kind"] + (f" x {case['gain']:g}" if case["gain"] != 1 else "")
            about = f"{inputs}, {case['head_dim']}, {case['seqlen']}, {_share(case['support']['blocks'])}"
            own = [_kernel_time(row["kernels"], stage, pairs, case) for stage in STAGES]
            lines.append([about, row["label"], *own, _digits(row["total"]), _of_fa2(row, case)])
    yield markdown_table(
        ["inputs, head_dim, keys, live blocks", "", *(f"{stage}, us" for stage in STAGES), "all, us", "of FA2"], lines
    )
    lines = []
    for case in results["decoding"]:
        batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim = case["shape"]
        for row in case["rows"]:
            if "total" in row:
                shape = f"{batch}, {heads_q}:{heads_kv}, {seqlen_q} x {seqlen_k}, {head_dim}"
                lines.append([shape, row["label"], _digits(row["total"]), _of_fa2(row, case)])
    if lines:
        yield "Decoding, independent scores, no mask, forward alone:"
        yield markdown_table(["batch, heads q:kv, queries x keys, head_dim", "", "us", "of FA2"], lines)


def _of_fa2(row: Row, case: Row) -> str:
    """Time of all kernels in units of FlashAttention-2's at the same case, if that was timed."""
    totals = [other["total"] for other in case["rows"] if other["provider"] == "fa2" and "total" in other]
    return _ratio(row["total"] / totals[0]) if totals else ""


def _kernel_time(times: Mapping[str, float], stage: str, pairs: float, case: Row) -> str:
    ending, products = STAGES[stage]
    found = [time for name, time in times.items() if name.endswith(ending)]
    if not found:
        return ""
    by_entries = any(name.endswith("_entries") for name in times)
    products = 0 if by_entries and stage != "scan" else products
    share = 1 if stage == "scan" else case["support"]["blocks"]
    rate = 2e-6 * case["head_dim"] * pairs * share * products / found[0]
    return _digits(found[0]) + (f" ({rate:.0f})" if products else "")


def host(folder: Path) -> str:
    """What first_call.py and overhead.py found on each machine; nothing without their results."""
    return "\n\n".join([*_first_call_sections(folder), *_overhead_sections(folder)])


def _section(title: str, text: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table with its title; nothing without lines."""
    if lines:
        yield from (f"### {title}", text, markdown_table(header, lines))


def _first_call_sections(folder: Path) -> Iterator[str]:
    lines = []
    for path in _newest(folder, "-first-call(?:-[a-z]+)?", "first_calls"):
        results = json.loads(path.read_text())
        cold, warm = (results["first_calls"][state] for state in ("cold", "warm"))
        seconds = (cold["first"], warm["first"], warm["second"])
        lines.append([_device(results["stamp"]), results["backend"], results["dtype"], *map(_digits, seconds)])
    text = (
        "Seconds of forward and backward at 4 heads and 1024 keys in a fresh process that already has torch and the "
        "device ready, with the compile cache empty or filled."
    )
    header = ["device", "backend", "dtype", "empty cache", "filled cache", "second call"]
    yield from _section("First call", text, header, lines)


def _overhead_sections(folder: Path) -> Iterator[str]:
    lines = []
    for path in _newest(folder, "-overhead(?:-[a-z]+)?", "microseconds"):
        results = json.loads(path.read_text())
        for mode, spreads in results["microseconds"].items():
            low, high = (_digits(spreads["overhead"][quantile]) for quantile in ("q20", "q80"))
            front, alone, overhead = (_digits(spreads[name]["median"]) for name in ("front", "backend", "overhead"))
            about = [_device(results["stamp"]), results["backend"], mode]
            lines.append([*about, front, alone, f"{overhead} ({low} to {high})"])
    text = (
        "Microseconds of the host in one call on inputs so small that nothing else counts, the device idle before it: "
        "through the public API, of the backend's functions alone, and the difference."
    )
    yield from _section("Host time", text, ["device", "backend", "", "call", "backend alone", "difference"], lines)


def fill(page: Path, parts: Mapping[str, str]) -> None:
    """Replace what stands between the markers ``NAME:begin`` and ``NAME:end`` of a page; unnamed parts stay.

    Raises:
        ValueError: if the page has no markers, or one without its partner.
    """
    pieces = re.split(r"(<!-- [a-z]+:(?:begin|end) -->)", page.read_text())
    if len(pieces) == 1:
        raise ValueError(f"{page}: expected markers, one line {BEGIN} and after it one line {END}")
    for i in range(1, len(pieces), 4):
        name = pieces[i].removeprefix("<!-- ").partition(":")[0]
        if pieces[i : i + 4 : 2] != [f"<!-- {name}:begin -->", f"<!-- {name}:end -->"]:
            raise ValueError(f"{page}: {pieces[i]}: expected <!-- {name}:begin --> and after it <!-- {name}:end -->")
        if name in parts:
            pieces[i + 1] = f"\n{parts[name]}\n"
    page.write_text("".join(pieces))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="the newest of each machine by default")
    parser.add_argument(
        "--readme",
        type=Path,
        default=ROOT / "README.md",
        help="README.md of this repository by default; the pages in docs/ beside it are filled too",
    )
    parser.add_argument("--stdout", action="store_true", help="print the tables and leave the pages alone")
    options = parser.parse_args(argv)
    paths = options.results or newest_complete(ROOT / "benchmarks" / "results")
    if not paths:
        parser.error("no results in benchmarks/results/: run benchmarks/run.py first")
    found = [Results.load(path) for path in paths]
    if options.stdout:
        print("\n\n".join(markdown(results, {}) for results in found))
        return
    root = options.readme.parent
    (root / PLOTS).mkdir(parents=True, exist_ok=True)
    drawn = [plots(results, root / PLOTS) for results in found]
    for page in (root / name for name in PAGES):
        if page.exists():
            images = [
                {title: Path(os.path.relpath(image, page.parent)).as_posix() for title, image in own.items()}
                for own in drawn
            ]
            fill(
                page,
                {
                    "benchmarks": _joined(found, map(markdown, found, images), lambda own: f"### {_device(own.stamp)}"),
                    "summary": _joined(
                        found, map(summary, found, images), lambda own: f"**{_device(own.stamp)}**: {_about(own)}"
                    ),
                    "goals": "\n\n".join(filter(None, map(_goals_table, found))),
                    "training": training(ROOT / "benchmarks" / "results"),
                    "kernels": kernels(ROOT / "benchmarks" / "results"),
                    "host": host(ROOT / "benchmarks" / "results"),
                },
            )
            print(f"written: {page}")


if __name__ == "__main__":
    main()
