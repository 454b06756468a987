"""Pictures of sparse attention, drawn with matplotlib, which ``pip install 'adasplash2[plot]'`` brings.

Every function draws into the Axes that it is given, or into those of a new figure, and returns them, so that titles,
limits and labels can be changed afterwards. Tensors of any device are taken, NumPy and CuPy arrays too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import adasplash2
from adasplash2.arrays import Array, library_of, to_torch
from adasplash2.contract import SupportStats
from adasplash2.registry import DEFAULT_BACKEND

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise ImportError(
        f"adasplash2.plot needs matplotlib ({error}): python -m pip install 'adasplash2[plot]'"
    ) from error

__all__ = ["alpha_over_training", "attention_weights", "block_map", "support_map", "support_sizes", "weight_map"]

_COLOR = "#c2410c"
_INVISIBLE = "0.9"

# More labels than that cannot be read.
_MAX_LABELS = 64
_SMALLEST_WEIGHT = 1e-3  # of the colour scale; what is smaller has the colour of this one
_BINS = 32
# Columns of the identity that are attended to at once: a head_dim_v that every backend serves well.
_COLUMNS = 64


@torch.no_grad()
def attention_weights(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor) -> Tensor:
    """All weights of any attention on a short text: what it gives for values that are the rows of the identity.

    Args:
        attend: q, k, v to out, linear in v: ``adasplash2.attention``, softmax attention, or any other.
        q: (batch, heads_q, seqlen_q, head_dim).
        k: (batch, heads_kv, seqlen_k, head_dim).

    Returns:
        (batch, heads_q, seqlen_q, seqlen_k) in q's dtype, a row for each query; dense, so for short texts alone.
    """
    identity = torch.eye(k.shape[2], dtype=k.dtype, device=k.device).expand(*k.shape[:2], -1, -1)
    return torch.cat([attend(q, k, columns) for columns in identity.split(_COLUMNS, dim=-1)], dim=-1)


def weight_map(
    weights: Array,
    *,
    is_causal: bool = False,
    tokens: Sequence[str] | None = None,
    query_tokens: Sequence[str] | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """The attention weights of one head: a row for each query, a column for each key.

    A weight of exactly zero stays white, and every other one has a colour, however small it is. What the causal mask
    hides is grey. The title says how many of the visible weights are zero.

    Args:
        weights: (seqlen_q, seqlen_k), floating.
        is_causal: whether the weights are those of a causal mask, bottom right as in ``adasplash2.attention``; False by
            default.
        tokens: the texts of the keys, seqlen_k of them; shown if they are 64 at most.
        query_tokens: the texts of the queries; by default the last seqlen_q of ``tokens``.
        colorbar: whether to draw the scale beside the map; True by default.
        ax: where to draw; a new figure by default.

    Returns:
        The Axes, with the shaded mask as their first image and the weights as their last.

    Raises:
        TypeError: weights that are no array.
        ValueError: weights that are no matrix, or empty, or NaN; another number of tokens.
    """
    matrix = _host("weights", weights)
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"weights.shape={tuple(matrix.shape)}: expected (seqlen_q, seqlen_k), neither of them 0")
    if matrix.isnan().any():
        raise ValueError(f"weights: {int(matrix.isnan().sum())} entries are NaN; expected numbers")
    seqlen_q, seqlen_k = matrix.shape
    key_labels, query_labels = _labels(tokens, query_tokens, seqlen_q, seqlen_k)

    ax = _axes(ax)
    visible = _visible(seqlen_q, seqlen_k, is_causal)
    frame: dict[str, Any] = {"aspect": "equal" if seqlen_q == seqlen_k else "auto", "interpolation": "nearest"}
    _shade(ax, ~visible, _INVISIBLE, **frame)
    image = ax.imshow(
        torch.where(matrix > 0, matrix, torch.nan).float().numpy(),
        cmap="viridis_r",
        norm=LogNorm(_SMALLEST_WEIGHT, 1, clip=True),
        **frame,
    )
    if colorbar:
        ax.figure.colorbar(image, ax=ax, shrink=0.8, label="weight").ax.tick_params(labelsize=7)
    for axis, labels, rotation in ((ax.xaxis, key_labels, 90), (ax.yaxis, query_labels, 0)):
        if labels is not None and len(labels) <= _MAX_LABELS:
            axis.set_ticks(range(len(labels)), labels, rotation=rotation, fontsize=7, family="monospace")
        else:
            axis.set_major_locator(MaxNLocator(integer=True))
    zeros = (matrix[visible] == 0).double().mean().item()
    ax.set(title=f"{zeros:.0%} of these weights are zero (white)", xlabel="key", ylabel="query")
    return ax


def support_map(
    q: Array,
    k: Array,
    *,
    batch: int = 0,
    head: int = 0,
    alpha: float | Array = 1.5,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    backend: str = DEFAULT_BACKEND,
    tokens: Sequence[str] | None = None,
    query_tokens: Sequence[str] | None = None,
    max_size: int = 256,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Which keys hold a weight for each query, in one head of one sequence.

    Up to ``max_size`` queries and keys this is ``weight_map``. Longer sequences are drawn as the ``block_map`` of
    ``adasplash2.support``, with blocks as large as the picture's size asks for: no array of seqlen_q times seqlen_k is
    made.

    Args:
        q: (batch, heads_q, seqlen_q, head_dim); this and the others as for ``adasplash2.attention``.
        k: (batch, heads_kv, seqlen_k, head_dim).
        batch: which sequence; the first by default.
        head: which query head; the first by default.
        alpha: 1.5 by default. 1, softmax, is drawn up to ``max_size`` alone: past it there is nothing to see.
        is_causal: False by default.
        scale: 1 / sqrt(head_dim) by default.
        seqlens_q: (batch,) valid queries, the only ones that are drawn; all by default.
        seqlens_k: (batch,) valid keys, the only ones that are drawn; all by default.
        backend: as for ``adasplash2.attention``.
        tokens: the texts of the (valid) keys; shown if they are 64 at most.
        query_tokens: the texts of the (valid) queries; by default the last of ``tokens``.
        max_size: rows and columns of the picture at most, at least 1; 256 by default.
        colorbar: whether to draw the scale of the weights beside the map; True by default.
        ax: where to draw; a new figure by default.

    Returns:
        The Axes.

    Raises:
        TypeError: as ``adasplash2.attention``.
        ValueError: as ``adasplash2.attention``; a batch or head that is not there; a sequence without queries or keys;
            another number of tokens; scores that are NaN.
    """
    # Makes every check of the arguments that attention makes.
    adasplash2.explain(q, k, k, alpha=alpha, is_causal=is_causal, scale=scale, seqlens_q=seqlens_q, seqlens_k=seqlens_k)
    _check_index("batch", batch, q.shape[0])
    _check_index("head", head, q.shape[1])
    _check_max_size(max_size)
    seqlen_q = q.shape[2] if seqlens_q is None else int(seqlens_q[batch])
    seqlen_k = k.shape[2] if seqlens_k is None else int(seqlens_k[batch])
    if not seqlen_q or not seqlen_k:
        raise ValueError(f"q and k hold {seqlen_q} queries and {seqlen_k} keys: expected at least one of each")
    _labels(tokens, query_tokens, seqlen_q, seqlen_k)
    if library_of(alpha) is not None:
        heads: Any = alpha
        alpha = float(heads[head] if heads.ndim else heads)
    kv_head = head // (q.shape[1] // k.shape[1])
    _, (q, k) = to_torch(q=q, k=k)
    # Half precision would round the smallest weights to zero.
    one_q, one_k = (
        tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        for tensor in (q[batch, head, :seqlen_q][None, None], k[batch, kv_head, :seqlen_k][None, None])
    )
    options: dict[str, Any] = {"alpha": alpha, "is_causal": is_causal, "scale": scale, "backend": backend}

    if max(seqlen_q, seqlen_k) <= max_size:
        weights = attention_weights(lambda *qkv: adasplash2.attention(*qkv, **options), one_q, one_k)[0, 0]
        if weights.isnan().any():
            raise ValueError(f"q or k of batch {batch}, head {head} give NaN in attention: expected finite scores")
        return weight_map(
            weights, is_causal=is_causal, tokens=tokens, query_tokens=query_tokens, colorbar=colorbar, ax=ax
        )
    block_m, block_n = -(-seqlen_q // max_size), -(-seqlen_k // max_size)
    stats = adasplash2.support(one_q, one_k, block_m=block_m, block_n=block_n, **options)
    if stats.tau.isnan().any():
        raise ValueError(f"q or k of batch {batch}, head {head} give NaN in attention: expected finite scores")
    return block_map(stats, is_causal=is_causal, seqlen_k=seqlen_k, max_size=max_size, ax=ax)


def block_map(
    stats: SupportStats,
    *,
    batch: int = 0,
    head: int = 0,
    is_causal: bool = False,
    seqlen_k: int | None = None,
    max_size: int = 512,
    ax: Axes | None = None,
) -> Axes:
    """The blocks of one head that hold support: what the kernels must read.

    Blocks of zeros alone stay white, and what the causal mask hides is grey. The title says how many of the visible
    blocks are white.

    Args:
        stats: of ``adasplash2.support``.
        batch: which sequence; the first by default.
        head: which query head; the first by default.
        is_causal: whether the mask was causal, which the statistics do not tell; False by default.
        seqlen_k: the number of keys, which the statistics tell up to the last block alone; by default seqlen_q if the
            map has the blocks for that many, else all that the map's blocks can hold.
        max_size: rows and columns of the picture at most, at least 1; 512 by default. Of a larger map, neighbouring
            blocks are drawn as one.
        ax: where to draw; a new figure by default.

    Returns:
        The Axes, in tokens, with the shaded mask as their first image and the blocks as their last.

    Raises:
        TypeError: stats that are none.
        ValueError: a batch or head that is not there; an empty map; a seqlen_k that the map does not have.
    """
    if not isinstance(stats, SupportStats):
        raise TypeError(f"stats is a {type(stats).__name__}: expected the SupportStats of adasplash2.support")
    blocks = _host("stats.block_map", stats.block_map)
    _check_index("batch", batch, blocks.shape[0])
    _check_index("head", head, blocks.shape[1])
    _check_max_size(max_size)
    blocks = blocks[batch, head]
    if not blocks.numel():
        raise ValueError(f"stats.block_map.shape={tuple(stats.block_map.shape)}: expected at least one block")
    seqlen_q, capacity = stats.size.shape[-1], blocks.shape[1] * stats.block_n
    least = capacity - stats.block_n + 1
    if seqlen_k is None:
        seqlen_k = seqlen_q if least <= seqlen_q <= capacity else capacity
    if not least <= seqlen_k <= capacity:
        raise ValueError(f"seqlen_k={seqlen_k}: expected {least} to {capacity}, as the blocks of the map say")

    factor_m, factor_n = (-(-size // max_size) for size in blocks.shape)
    block_m, block_n = factor_m * stats.block_m, factor_n * stats.block_n
    # [rows, columns]: a block of the picture holds support if one of the blocks in it does
    blocks = F.max_pool2d(blocks[None].float(), (factor_m, factor_n), ceil_mode=True)[0].bool()
    visible = _visible(seqlen_q, seqlen_k, is_causal, block_m, block_n)

    ax = _axes(ax)
    frame: dict[str, Any] = {
        "extent": (0.0, float(blocks.shape[1] * block_n), float(blocks.shape[0] * block_m), 0.0),
        "aspect": "equal" if seqlen_q == seqlen_k else "auto",
        "interpolation": "nearest",
    }
    _shade(ax, ~visible, _INVISIBLE, **frame)
    _shade(ax, blocks, _COLOR, **frame)
    ax.set_xlim(0, seqlen_k)
    ax.set_ylim(seqlen_q, 0)
    empty = 1 - blocks.sum().item() / visible.sum().item() if visible.any() else 0.0
    ax.set(
        title=f"{empty:.0%} of these {block_m} x {block_n} blocks hold zeros alone (white)",
        xlabel="key",
        ylabel="query",
    )
    return ax


def support_sizes(stats: SupportStats | Sequence[SupportStats], *, ax: Axes | None = None) -> Axes:
    """Histogram of the support sizes (keys with a weight above zero) of the queries, for each layer and head.

    A row for each head, layer by layer from the top; the colour is the share of the head's queries whose support has
    about that size, the dot the mean. Queries that see no key are left out.

    Args:
        stats: of ``adasplash2.support``, one for each layer, or one alone. Layers may differ in shape.
        ax: where to draw; a new figure by default.

    Returns:
        The Axes. Their mesh has the shares, NaN where there is no query; the sum of a row is 1.

    Raises:
        TypeError: stats that are none.
        ValueError: no layer, or no query that sees a key.
    """
    layers = [stats] if isinstance(stats, SupportStats) else list(stats)
    heads: list[Tensor] = []
    boundaries = [0]
    for layer in layers:
        if not isinstance(layer, SupportStats):
            raise TypeError(f"stats holds a {type(layer).__name__}: expected the SupportStats of adasplash2.support")
        # [heads, batch * seqlen_q]
        sizes = _host("stats.size", layer.size).transpose(0, 1).flatten(1)
        heads += [head[head > 0] for head in sizes]
        boundaries.append(len(heads))
    largest = max((int(head.max()) for head in heads if len(head)), default=0)
    if not largest:
        raise ValueError("stats: no query sees a key; expected at least one that does")

    # Bins between whole numbers, equally wide on a logarithmic axis where these are dense enough.
    edges = np.unique(np.geomspace(1, largest + 1, _BINS + 1).round()) - 0.5
    counts = np.stack([np.histogram(head.numpy(), edges)[0] for head in heads])
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.where(counts > 0, counts / np.maximum(totals, 1), np.nan)
    ax = _axes(ax)
    mesh = ax.pcolormesh(edges, np.arange(len(heads) + 1), shares, cmap="Blues", vmin=0)
    ax.figure.colorbar(mesh, ax=ax, shrink=0.8, label="share of the queries").ax.tick_params(labelsize=7)
    means = [head.double().mean().item() for head in heads]
    ax.plot(means, np.arange(len(heads)) + 0.5, "o", color=_COLOR, markersize=4)
    for boundary in boundaries[1:-1]:
        ax.axhline(boundary, color="0.5", linewidth=0.8)
    ax.set_yticks([(a + b) / 2 for a, b in itertools.pairwise(boundaries)], map(str, range(len(layers))))
    ax.set_ylim(len(heads), 0)
    ax.set(
        title="support sizes of the queries (dot: mean)",
        xlabel="keys with a weight above zero",
        ylabel="layer (a row for each head)",
        xscale="log",
    )
    return ax


def alpha_over_training(
    history: Sequence[Any] | Array, *, steps: Sequence[float] | None = None, ax: Axes | None = None
) -> Axes:
    """How the learned alpha of each head moved during training: a line for each head, a colour for each layer.

    Args:
        history: a measurement for each of the steps: an array of shape (layers, heads), or a sequence with the alpha of
            each layer, (heads,) or a number. Layers may differ in their number of heads.
        steps: when they were taken, 0, 1, 2, ... by default.
        ax: where to draw; a new figure by default.

    Returns:
        The Axes; their lines are in the order of the layers, and in each of the heads.

    Raises:
        ValueError: no measurement; measurements that differ in shape; another number of steps.
    """
    measurements = [[_host("history", layer).double() for layer in layers] for layers in history]
    shapes = [[tuple(layer.shape) for layer in layers] for layers in measurements]
    if not measurements or not shapes[0]:
        raise ValueError("history: expected at least one measurement, of at least one layer")
    for i, shape in enumerate(shapes):
        if shape != shapes[0] or any(len(of_layer) > 1 for of_layer in shape):
            raise ValueError(
                f"history[{i}] has layers of shapes {shape}: expected a number or (heads,) for each layer, as in "
                f"history[0], which has {shapes[0]}"
            )
    steps = range(len(measurements)) if steps is None else steps
    if len(steps) != len(measurements):
        raise ValueError(f"steps: {len(steps)} of them; expected {len(measurements)}, one for each measurement")

    ax = _axes(ax)
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(shapes[0])))
    for i, (layer, color) in enumerate(zip(zip(*measurements, strict=True), colors, strict=True)):
        # [measurements, heads]
        curves = torch.stack([alpha.reshape(-1) for alpha in layer]).numpy()
        for head, line in enumerate(ax.plot(steps, curves, color=color, linewidth=1.2)):
            if head == 0:
                line.set_label(f"layer {i}")
    ax.set_ylim(0.98, 2.02)
    ax.set(title="alpha of each head (1: softmax, 2: sparsemax)", xlabel="step", ylabel="alpha")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(ncols=2)
    ax.grid(alpha=0.3)
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    # Opens a window toolkit where there is one, so only for those who ask for a figure.
    from matplotlib import pyplot

    return pyplot.subplots(layout="constrained")[1]


def _host(name: str, value: object) -> Tensor:
    """A number, or an array of any library and device, as a tensor on the host."""
    if isinstance(value, (int, float)):
        return torch.tensor(value)
    if library_of(value) is None:
        raise TypeError(f"{name} is a {type(value).__name__}: expected a torch tensor, NumPy or CuPy array")
    _, (tensor,) = to_torch(**{name: value})
    host: Tensor = tensor.detach().cpu()
    return host


def _visible(seqlen_q: int, seqlen_k: int, is_causal: bool, block_m: int = 1, block_n: int = 1) -> Tensor:
    """[rows, columns]: the blocks with at least one pair of a query and a key that it sees."""
    last_query = (torch.arange(0, seqlen_q, block_m) + block_m).clamp(max=seqlen_q) - 1
    first_key = torch.arange(0, seqlen_k, block_n)
    offset = seqlen_k - seqlen_q if is_causal else seqlen_k
    return first_key <= last_query[:, None] + offset


def _shade(ax: Axes, where: Tensor, color: str, **frame: Any) -> None:
    cells = torch.where(where, 1.0, torch.nan).numpy()
    ax.imshow(cells, cmap=ListedColormap([color]), **frame)


def _labels(
    tokens: Sequence[str] | None, query_tokens: Sequence[str] | None, seqlen_q: int, seqlen_k: int
) -> tuple[Sequence[str] | None, Sequence[str] | None]:
    """Labels of the keys and of the queries, or None where there are none."""
    if query_tokens is None and tokens is not None and seqlen_q <= seqlen_k == len(tokens):
        query_tokens = tokens[seqlen_k - seqlen_q :]
    for name, labels, expected in (("tokens", tokens, seqlen_k), ("query_tokens", query_tokens, seqlen_q)):
        if labels is not None and len(labels) != expected:
            raise ValueError(f"{name}: {len(labels)} of them; expected {expected}")
    return tokens, query_tokens


def _check_index(name: str, value: object, count: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected an int")
    if not 0 <= value < count:
        raise ValueError(f"{name}={value}: expected 0 to {count - 1}" if count else f"{name}={value}: there is none")


def _check_max_size(value: int) -> None:
    if value < 1:
        raise ValueError(f"max_size={value}: expected at least 1")
