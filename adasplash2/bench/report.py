"""What the benchmark shows: a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from adasplash2.bench.measure import MODES, Mode, Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SOFTMAX", "Row", "picture", "table"]

SOFTMAX = "softmax"
_TITLES: dict[Mode, str] = {"fwd": "forward", "fwd_bwd": "forward + backward"}


@dataclass(frozen=True)
class Row:
    """Times of one contestant on one input.

    Attributes:
        kind: of the inputs.
        seqlen: queries and keys.
        elements: share of the visible weights that entmax leaves above zero.
        name: a backend, or ``SOFTMAX``.
        rounds: in which everyone was timed.
        ms: milliseconds, for each mode.
        speed: softmax's time divided by this one, round by round, for each mode.
    """

    kind: str
    seqlen: int
    elements: float
    name: str
    rounds: int
    ms: dict[Mode, Spread]
    speed: dict[Mode, Spread]


def table(rows: Sequence[Row]) -> Table:
    """All rows, those of one input together."""
    found = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    found.add_column("\ninputs", no_wrap=True)
    for heading in ("\nkeys", "\np > 0"):
        found.add_column(heading, justify="right", no_wrap=True)
    found.add_column("", no_wrap=True)
    for heading in ("fwd\nms", "\nspeed", "fwd+bwd\nms", "\nspeed"):
        found.add_column(heading, justify="right", no_wrap=True)
    before = None
    for row in rows:
        case = (row.kind, str(row.seqlen), f"{100 * row.elements:.3g}%")
        times = [cell for mode in MODES for cell in (_short(row.ms[mode].median), _speed(row, mode))]
        found.add_row(*(("", "", "") if case == before else case), row.name, *times)
        before = case
    return found


def _speed(row: Row, mode: Mode) -> str:
    return "" if row.name == SOFTMAX else "{} ({}-{})".format(*map(_short, row.speed[mode]))


def _short(value: float) -> str:
    """Two or three digits; an exponent only where a number is tiny."""
    if value < 0.1:
        return f"{value:.2g}"
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def picture(rows: Sequence[Row], title: str) -> Figure:
    """Speed over length, in units of softmax's: a line for each backend and kind of inputs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(12, 5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    ours = [row for row in rows if row.name != SOFTMAX]
    kinds, names = (list(dict.fromkeys(values)) for values in zip(*((row.kind, row.name) for row in ours), strict=True))
    seqlens = sorted({row.seqlen for row in ours})
    for axes, mode in zip(figure.subplots(1, 2), MODES, strict=True):
        for i, kind in enumerate(kinds):
            for name, style in zip(names, ("-", "--", ":", "-.") * len(names), strict=False):
                curve = sorted((row.seqlen, row.speed[mode]) for row in ours if (row.kind, row.name) == (kind, name))
                if not curve:
                    continue
                x = [seqlen for seqlen, _ in curve]
                look: dict[str, Any] = {"color": f"C{i}", "linestyle": style}
                axes.plot(x, [speed.median for _, speed in curve], marker="o", label=f"{kind}, {name}", **look)
                axes.fill_between(
                    x, [speed.q20 for _, speed in curve], [speed.q80 for _, speed in curve], color=f"C{i}", alpha=0.15
                )
        axes.axhline(1, color="0.3", linewidth=1, label="torch's softmax attention")
        axes.set(title=_TITLES[mode], xlabel="keys", ylabel="times as fast", xscale="log", yscale="log")
        axes.xaxis.set_major_locator(FixedLocator(seqlens))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which(StrMethodFormatter("{x:g}"))
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].legend()
    return figure
