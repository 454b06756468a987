"""How close to tau each initialisation starts, and the passes over the scores that it then takes to get there.

    python benchmarks/initialisation.py

Every initialisation is a lower bound of tau, because tau of a subset of the keys, or of lowered scores, is no more than
tau of all; Newton's method on the norm rises from it and never passes tau. A step is one pass over the scores. The pass
that forms the scores and their maxima is the same for all and not counted.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cases import captured
from rich.console import Console
from rich.table import Table
from torch import Tensor

import adasplash2
from adasplash2.testing import make_inputs

__all__ = ["ACCURACIES", "compare", "main", "show"]

ALPHA = 1.5
QUERIES, KEYS, TILE = 256, 4096, 64
NEWTON_STEPS = 3
ACCURACIES = (1e-2, 1e-4, 1e-6)
MAX_STEPS = 30


def scaled_scores(kind: str, gain: float = 1.0) -> Tensor:
    """z of some consecutive queries, float64 [queries, keys], -inf where the mask hides a key.

    Args:
        kind: of ``make_inputs``, 256 queries that see 4096 keys; or "real", the last 64 queries of each head of the
            demo's trained model, causal.
        gain: factor of the scores.
    """
    if kind == "real":
        q, k, _, _ = captured(batch=1, heads_q=QUERIES // TILE, seqlen_q=1024, head_dim=64)
        q = q[:, :, -TILE:]
        hidden = torch.ones(TILE, k.shape[2], dtype=torch.bool).triu(k.shape[2] - TILE + 1)
    else:
        q, k, _, _ = make_inputs(kind, seqlen_q=QUERIES, seqlen_k=KEYS, head_dim=64)
        hidden = torch.zeros(QUERIES, KEYS, dtype=torch.bool)
    z = (ALPHA - 1) * gain * q.shape[-1] ** -0.5 * q.double() @ k.double().mT
    return z.masked_fill(hidden, -torch.inf).flatten(0, 2)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "iid, std 1": functools.partial(scaled_scores, "iid"),
    "iid, std 3.5": functools.partial(scaled_scores, "wide"),
    "topics": functools.partial(scaled_scores, "topics"),
    "topics, near-equal keys": functools.partial(scaled_scores, "topics", 0.25),
    "drifting clusters": functools.partial(scaled_scores, "drifting"),
    "real": functools.partial(scaled_scores, "real"),
}


def exact_tau(z: Tensor) -> Tensor:
    """tau of each row (rows, 1), from the largest weight p of the dense reference: tau = max z - p ** (alpha - 1)."""
    p = adasplash2.entmax(z / (ALPHA - 1), ALPHA, backend="reference")
    return z.amax(-1, keepdim=True) - p.amax(-1, keepdim=True) ** (ALPHA - 1)


def newton_step(z: Tensor, tau: Tensor) -> Tensor:
    """One step on the norm: tau + (f - f ** (1 - 1 / r)) / g with f = sum u ** r, g = sum u ** (r - 1)."""
    r = 1 / (ALPHA - 1)
    u = (z - tau).clamp(min=0)
    f, g = (u**r).sum(-1, keepdim=True), (u ** (r - 1)).sum(-1, keepdim=True)
    return tau + (f - f ** (1 - 1 / r)) / g


def largest_minus_one(z: Tensor) -> Tensor:
    """A key alone in the support has u = 1."""
    return z.amax(-1, keepdim=True) - 1


def histogram(z: Tensor, bins: int) -> Tensor:
    """tau of the scores counted at the lower edges of equal bins on [max - 1, max]."""
    low = largest_minus_one(z)
    lowered = low + ((z - low) * bins).floor().clamp(max=bins - 1) / bins
    return torch.maximum(low, exact_tau(lowered))


def group_maxima(z: Tensor, group: int) -> Tensor:
    """The largest score of every ``group`` consecutive keys."""
    return z.unflatten(-1, (-1, group)).amax(-1)


def steps_to(z: Tensor, tau: Tensor, true_tau: Tensor, accuracy: float) -> int:
    """Newton steps until no row is further than ``accuracy`` below its tau."""
    for steps in range(MAX_STEPS):
        if (true_tau - tau).max() <= accuracy:
            return steps
        tau = newton_step(z, tau)
    raise RuntimeError(f"no convergence to {accuracy} in {MAX_STEPS} steps")


def solving_steps(z: Tensor) -> int:
    """Newton steps from max - 1 to the best of ``ACCURACIES``."""
    return steps_to(z, largest_minus_one(z), exact_tau(z), min(ACCURACIES))


@dataclass(frozen=True)
class Initialisation:
    """A lower bound of tau from the scores, or from the largest score of every ``group`` consecutive keys.

    Attributes:
        label: for people.
        bound: from such scores.
        reads: how often it goes over them.
        group: keys that count as one.
    """

    label: str
    bound: Callable[[Tensor], Tensor]
    reads: Callable[[Tensor], int]
    group: int = 1

    def tau(self, z: Tensor) -> Tensor:
        """The bound, (rows, 1)."""
        return self.bound(group_maxima(z, self.group))

    def passes(self, z: Tensor) -> float:
        """What it costs, in passes over all scores."""
        return self.reads(group_maxima(z, self.group)) / self.group


INITIALISATIONS = (
    Initialisation("max - 1", largest_minus_one, lambda z: 0),
    Initialisation("histogram of all scores, 8 bins", functools.partial(histogram, bins=8), lambda z: 1),
    Initialisation("histogram of all scores, 16 bins", functools.partial(histogram, bins=16), lambda z: 1),
    Initialisation("histogram of 64-key maxima, 16 bins", functools.partial(histogram, bins=16), lambda z: 1, 64),
    Initialisation("exact tau of 64-key maxima", exact_tau, solving_steps, 64),
    Initialisation("exact tau of 16-key maxima", exact_tau, solving_steps, 16),
)


def tiles_kept(z: Tensor, tau: Tensor) -> float:
    """Share of the tiles of 64 queries and 64 keys with a visible key that hold a score above tau."""
    tiles = [(z > bound).unflatten(0, (-1, TILE)).unflatten(-1, (-1, TILE)) for bound in (tau, -torch.inf)]
    kept, visible = (tile.any(-1).any(1).sum().item() for tile in tiles)
    return kept / visible


def compare() -> list[dict[str, Any]]:
    """One row per inputs and initialisation.

    Returns:
        ``gaps``: distance to tau of the worst row, after the initialisation and after each Newton step. ``passes``: for
        each of ``ACCURACIES``, passes over the scores until no gap is larger. ``tiles_kept`` by the initialisation and
        ``tiles_needed`` by the support.
    """
    rows = []
    for inputs, make in INPUTS.items():
        z = make()
        true_tau = exact_tau(z)
        for initialisation in INITIALISATIONS:
            start = tau = initialisation.tau(z)
            gaps = [(true_tau - tau).max().item()]
            for _ in range(NEWTON_STEPS):
                tau = newton_step(z, tau)
                gaps.append((true_tau - tau).abs().max().item())
            cost = initialisation.passes(z)
            rows.append(
                {
                    "inputs": inputs,
                    "initialisation": initialisation.label,
                    "gaps": gaps,
                    "passes": {str(goal): cost + steps_to(z, start, true_tau, goal) for goal in ACCURACIES},
                    "tiles_kept": tiles_kept(z, start),
                    "tiles_needed": tiles_kept(z, true_tau),
                }
            )
    return rows


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a table for each kind of inputs."""
    console.print(
        "\nworst gap to tau at first, after 1 step, after 2; passes over the scores to accuracies; tiles kept"
    )
    for inputs in INPUTS:
        own = [row for row in rows if row["inputs"] == inputs]
        table = Table(box=None, padding=(0, 1, 0, 0))
        table.add_column("", no_wrap=True)
        for heading in ("gap", "+1", "+2", *(f"{goal:.0e}" for goal in ACCURACIES), "tiles"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in own:
            gaps = (f"{gap:.0e}" for gap in row["gaps"][:3])
            passes = (f"{cost:.2f}" for cost in row["passes"].values())
            table.add_row(row["initialisation"], *gaps, *passes, f"{row['tiles_kept']:.0%}")
        console.print(f"\n[bold]{inputs}[/]: {own[0]['tiles_needed']:.0%} of the tiles hold support", highlight=False)
        console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the comparison."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    show(compare(), Console())


if __name__ == "__main__":
    main()
