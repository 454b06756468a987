"""What the demo shows at its end: two tables and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from adasplash2 import plot
from adasplash2.contract import SupportStats
from adasplash2.demo.model import Transformer, capture_qkv
from adasplash2.demo.train import Learner

__all__ = ["Results", "attention_weights", "draw", "loss_table", "support_table"]

_COLORS = ("#c2410c", "#1d4ed8")


@dataclass(frozen=True)
class Results:
    """Everything that the tables and the picture are made of.

    Attributes:
        learners: entmax and softmax.
        alpha: of the entmax attention.
        bytes_per_token: of the held-out text.
        held_out: loss of each learner on text that it did not see, nats per token.
        support: of each layer of the entmax model after training, on one held-out sequence.
        labels: the first tokens of that sequence.
        weights: of each learner on these tokens: (layers, heads, len(labels), len(labels)) float32.
    """

    learners: Sequence[Learner]
    alpha: float
    bytes_per_token: float
    held_out: Sequence[float]
    support: Sequence[SupportStats]
    labels: Sequence[str]
    weights: Sequence[Tensor]

    @property
    def keys_per_head(self) -> Tensor:
        """Mean number of keys with a weight above zero: (layers, heads) float32."""
        return torch.stack([stats.size.float().mean(dim=(0, 2)) for stats in self.support])

    @property
    def visible_keys(self) -> float:
        """Mean number of keys that a query may see, which softmax weights all."""
        return (self.support[0].size.shape[-1] + 1) / 2


def attention_weights(model: Transformer, tokens: Tensor) -> Tensor:
    """All attention weights on a short text.

    Args:
        model: with any attention.
        tokens: (n,) int64.

    Returns:
        (layers, heads, n, n) float32, a row for each query.
    """
    return torch.stack([plot.attention_weights(model.attend, q, k)[0] for q, k, _ in capture_qkv(model, tokens[None])])


def loss_table(results: Results) -> Table:
    """Loss and time of each learner."""
    table = Table(title="Same start, same batches", title_justify="left")
    table.add_column()
    table.add_column("held-out loss\n(nats/token)", justify="right")
    table.add_column("(bits/byte)", justify="right", vertical="bottom")
    table.add_column("tokens/s", justify="right", vertical="bottom")
    table.add_column("training\n(s)", justify="right")
    table.add_column("of it in\nattention (s)", justify="right")
    for learner, loss in zip(results.learners, results.held_out, strict=True):
        share = learner.attention.seconds / learner.seconds
        table.add_row(
            learner.name,
            f"{loss:.3f}",
            f"{loss / math.log(2) / results.bytes_per_token:.3f}",
            f"{learner.tokens_per_second:,.0f}",
            f"{learner.seconds:.1f}",
            f"{learner.attention.seconds:.1f} ({share:.0%})",
        )
    return table


def support_table(results: Results) -> Table:
    """Mean support size per layer and head."""
    keys = results.keys_per_head
    table = Table(
        title=f"Keys with a weight above zero, per query (softmax: all {results.visible_keys:.1f} that it sees)",
        title_justify="left",
    )
    table.add_column()
    for head in range(keys.shape[1]):
        table.add_column(f"head {head}", justify="right")
    table.add_column("zeros", justify="right")
    table.add_column(f"empty {results.support[0].block_m} x {results.support[0].block_n} blocks", justify="right")
    for layer, (row, stats) in enumerate(zip(keys.tolist(), results.support, strict=True)):
        table.add_row(
            f"layer {layer}",
            *(f"{size:.1f}" for size in row),
            f"{1 - stats.element_density:.1%}",
            f"{1 - stats.block_density:.1%}",
        )
    return table


def draw(results: Results, path: Path) -> None:
    """Writes the picture: losses, times, support sizes; attention maps of real text and a block map."""
    figure = Figure(figsize=(17, 11.5), layout="constrained")
    (losses, time, support), (entmax_map, softmax_map, blocks) = figure.subplots(2, 3)
    figure.suptitle(
        "Two small transformers on the source of Python's standard library, which differ in their attention alone: "
        f"α-entmax with α = {results.alpha:g}, and softmax"
    )
    _draw_losses(losses, results)
    _draw_time(time, results)
    plot.support_sizes(results.support, ax=support)
    support.axvline(results.visible_keys, color=_COLORS[1])
    support.set_title(
        f"{support.get_title()}\nline: the {results.visible_keys:.1f} keys that softmax weights on average"
    )

    layer, head = _median_head(results.keys_per_head)
    entmax, softmax = results.weights
    overlap = torch.minimum(softmax, entmax[layer, head]).sum(dim=(-1, -2))
    alike = divmod(int(overlap.argmax()), overlap.shape[1])
    entmax_title = f"entmax: layer {layer}, head {head}"
    softmax_title = f"softmax: its head most alike (layer {alike[0]}, head {alike[1]})"
    for axes, title, weights in (
        (entmax_map, entmax_title, entmax[layer, head]),
        (softmax_map, softmax_title, softmax[alike]),
    ):
        plot.weight_map(weights, is_causal=True, tokens=results.labels, ax=axes)
        axes.set_title(f"{title}\n{axes.get_title()}")
    plot.block_map(results.support[layer], head=head, is_causal=True, ax=blocks)
    blocks.set_title(f"entmax: this head's blocks, whole sequence\n{blocks.get_title()}")
    figure.savefig(path, dpi=100)


def _median_head(keys: Tensor) -> tuple[int, int]:
    """The layer and head whose support size is the median of all: neither the best nor the worst case is shown."""
    return divmod(int((keys - keys.median()).abs().argmin()), keys.shape[1])


def _draw_losses(axes: Axes, results: Results) -> None:
    for learner, color, held_out in zip(results.learners, _COLORS, results.held_out, strict=True):
        losses = torch.tensor(learner.losses)
        mean = F.avg_pool1d(losses[None], 9, stride=1, padding=4, count_include_pad=False)[0]
        steps = range(1, len(losses) + 1)
        axes.plot(steps, losses.numpy(), color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, mean.numpy(), color=color, label=f"{learner.name} ({held_out:.3f} on held-out text)")
    axes.set(title="training loss, and its mean over 9 steps", xlabel="step", ylabel="nats per token")
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_time(axes: Axes, results: Results) -> None:
    names = [learner.name for learner in results.learners]
    attention = [learner.attention.seconds for learner in results.learners]
    rest = [learner.seconds - learner.attention.seconds for learner in results.learners]
    axes.barh(names, attention, color=_COLORS, label=[f"attention: {seconds:.1f} s" for seconds in attention])
    axes.barh(names, rest, left=attention, color="0.8", label="all the rest")
    axes.set(title="time of all training steps", xlabel="seconds")
    axes.invert_yaxis()
    axes.margins(y=0.4)
    axes.legend()
    axes.grid(alpha=0.3, axis="x")
