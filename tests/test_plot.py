"""adasplash2.plot: the pictures hold what the attention does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

import adasplash2
from adasplash2 import plot
from adasplash2.contract import AttentionRequest, SupportStats
from adasplash2.testing import attention_truth, make_inputs

matplotlib.use("Agg")


@pytest.fixture
def ax() -> Iterator[Any]:
    """Axes without pyplot, untyped because matplotlib's types are vague; what was drawn must be possible to render."""
    figure = Figure()
    yield figure.subplots()
    figure.canvas.draw()


def picture(axes: Any, index: int = -1) -> Tensor:
    """The data of an image, 0 where nothing is drawn."""
    return torch.from_numpy(np.ma.filled(axes.images[index].get_array().astype(float), 0)).nan_to_num()


def labels(axes: Any) -> tuple[list[str], list[str]]:
    return [text.get_text() for text in axes.get_xticklabels()], [text.get_text() for text in axes.get_yticklabels()]


def test_weight_map(ax: Any) -> None:
    weights = torch.tensor([[1.0, 0.0, 0.0], [1e-9, 1.0, 0.0], [0.0, 0.25, 0.75]])
    assert plot.weight_map(weights, is_causal=True, tokens=["a", "b", "c"], ax=ax) is ax
    assert picture(ax).float().equal(weights)
    assert picture(ax, 0).equal(torch.ones(3, 3).triu(1).double())
    assert ax.get_title() == "17% of these weights are zero (white)"
    assert labels(ax) == (["a", "b", "c"],) * 2
    # A weight has a colour, however small it is, and a zero has none.
    colors: Any = ax.images[-1].cmap(ax.images[-1].norm(ax.images[-1].get_array()))
    assert ((colors[..., 3] > 0) == (weights > 0).numpy()).all()
    assert len(ax.figure.axes) == 2
    assert ax.figure.axes[1].get_ylabel() == "weight"


def test_labels_are_left_out_where_they_cannot_be_read(ax: Any) -> None:
    plot.weight_map(torch.full((2, 80), 1 / 80), tokens=["key"] * 80, query_tokens=["a", "b"], colorbar=False, ax=ax)
    columns, rows = labels(ax)
    assert rows == ["a", "b"]
    assert "key" not in columns
    assert len(ax.figure.axes) == 1


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_support_map_of_one_head(dtype: torch.dtype, library: str, ax: Any) -> None:
    """Grouped heads, an alpha for each, padding, more keys than queries: against entmax of the scores."""
    made = make_inputs("wide", batch=2, heads_q=4, heads_kv=2, seqlen_q=70, seqlen_k=90, head_dim=16, dtype=dtype)
    alpha = torch.tensor([1.1, 1.3, 2.0, 1.5])
    lengths = torch.tensor([9, 60]), torch.tensor([8, 85])
    given: list[Any] = [made.q, made.k, alpha, *lengths]
    if library == "numpy":
        given = [tensor.numpy() for tensor in given]
    q, k, alpha_heads, seqlens_q, seqlens_k = given
    tokens = [str(i) for i in range(85)]
    plot.support_map(
        q, k, batch=1, head=2, alpha=alpha_heads, is_causal=True, scale=0.3, seqlens_q=seqlens_q, seqlens_k=seqlens_k,
        tokens=tokens, ax=ax,
    )  # fmt: skip
    # Weights are what attention gives to the identity.
    identity = torch.eye(85, dtype=dtype)[None, None]
    truth = attention_truth(
        AttentionRequest(made.q[1:, 2:3, :60], made.k[1:, 1:, :85], identity, 0.3, alpha=2.0, is_causal=True)
    )
    assert ((picture(ax) - truth.values["out"][0, 0]).abs() <= truth.bounds["out"][0, 0]).all()
    visible = torch.ones(60, 85, dtype=torch.bool).tril(25)
    assert (picture(ax) > 0).sum() > 60
    assert picture(ax, 0).equal((~visible).double())
    assert labels(ax)[1] == tokens[25:]


def test_support_map_of_softmax_has_no_zeros(ax: Any) -> None:
    made = make_inputs("iid", seqlen_q=20, head_dim=8)
    plot.support_map(made.q.requires_grad_(), made.k, alpha=1.0, ax=ax)
    expected = torch.softmax(made.q[0, 0] @ made.k[0, 0].T / 8**0.5, -1)
    torch.testing.assert_close(picture(ax).float(), expected)
    assert ax.get_title().startswith("0% ")


def test_support_map_of_a_long_sequence_is_one_of_blocks(ax: Any) -> None:
    made = make_inputs("topics", heads_q=2, seqlen_q=301, seqlen_k=320, head_dim=16)
    plot.support_map(made.q, made.k, head=1, is_causal=True, max_size=64, ax=ax)
    stats = adasplash2.support(made.q, made.k, is_causal=True, block_m=5, block_n=5)
    assert picture(ax).equal(stats.block_map[0, 1].double())
    assert picture(ax).shape == (61, 64)
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 320), (301, 0))


def test_block_map(ax: Any) -> None:
    made = make_inputs("drifting", batch=2, heads_q=2, seqlen_q=100, head_dim=16)
    stats = adasplash2.support(made.q, made.k, is_causal=True, block_m=16, block_n=8)
    plot.block_map(stats, batch=1, head=1, is_causal=True, ax=ax)
    blocks = stats.block_map[1, 1]
    assert picture(ax).equal(blocks.double())
    first_key, last_query = 8 * torch.arange(13), (16 * torch.arange(7) + 15).clamp(max=99)
    visible = first_key <= last_query[:, None]
    assert picture(ax, 0).equal((~visible).double())
    assert not (blocks & ~visible).any()
    empty = 1 - int(blocks.sum()) / int(visible.sum())
    assert 0.1 < empty < 0.9
    assert ax.get_title() == f"{empty:.0%} of these 16 x 8 blocks hold zeros alone (white)"
    # In tokens: the last blocks reach past the end.
    assert ax.images[-1].get_extent() == [0, 104, 112, 0]
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 100), (100, 0))


def stats_of(size: Tensor, block_map: Tensor | None = None, block: int = 1) -> SupportStats:
    block_map = torch.ones(1, 1, 1, 1, dtype=torch.bool) if block_map is None else block_map
    return SupportStats(torch.zeros(size.shape), size.int(), block_map, block, block, 0.5, 0.5)


def test_a_large_block_map_is_drawn_coarser(ax: Any) -> None:
    blocks = torch.zeros(1, 1, 7, 10, dtype=torch.bool)
    blocks[0, 0, 6, 9] = blocks[0, 0, 0, 3] = True
    plot.block_map(stats_of(torch.ones(1, 1, 28), blocks, block=4), seqlen_k=39, max_size=4, ax=ax)
    expected = torch.zeros(4, 4)
    expected[3, 3] = expected[0, 1] = 1
    assert picture(ax).equal(expected.double())
    assert ax.get_title() == "88% of these 8 x 12 blocks hold zeros alone (white)"
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 39), (28, 0))


def test_support_sizes(ax: Any) -> None:
    """Two layers with 2 heads and 1: the third head sees nothing in half of its rows."""
    sizes = torch.tensor([[[1, 1, 2, 40], [3, 3, 3, 3]], [[1, 2, 2, 40], [3, 3, 3, 3]]])
    plot.support_sizes([stats_of(sizes), stats_of(torch.tensor([[[0, 5, 0, 7]]]))], ax=ax)
    (mesh,) = (found for found in ax.collections if found.get_array() is not None)
    shares = np.ma.filled(mesh.get_array(), 0).astype(float)
    shares = np.nan_to_num(shares)
    edges = mesh.get_coordinates()[0, :, 0]
    assert shares.shape == (3, len(edges) - 1)

    def share(head: int, size: int) -> float:
        return float(shares[head, np.searchsorted(edges, size) - 1])

    assert [share(0, size) for size in (1, 2, 40)] == pytest.approx([3 / 8, 3 / 8, 2 / 8])
    assert share(1, 3) == 1
    assert [share(2, size) for size in (5, 7)] == [0.5, 0.5]
    assert shares.sum(axis=1) == pytest.approx([1, 1, 1])
    means = ax.lines[0].get_xdata()
    assert list(means) == pytest.approx([(3 + 6 + 80) / 8, 3, 6])
    assert [line.get_ydata()[0] for line in ax.lines[1:]] == [2]
    assert labels(ax)[1] == ["0", "1"]
    assert ax.get_ylim() == (3, 0)


def test_support_sizes_of_one_layer(ax: Any) -> None:
    made = make_inputs("iid", heads_q=3, seqlen_q=64, head_dim=8)
    stats = adasplash2.support(made.q, made.k, is_causal=True)
    plot.support_sizes(stats, ax=ax)
    assert list(ax.lines[0].get_xdata()) == pytest.approx(stats.size.double().mean((0, 2)).tolist())


def test_alpha_over_training(ax: Any) -> None:
    history = 1 + torch.rand(5, 2, 3)
    plot.alpha_over_training(history, steps=range(0, 50, 10), ax=ax)
    assert len(ax.lines) == 6
    for line, (layer, head) in zip(ax.lines, ((layer, head) for layer in range(2) for head in range(3)), strict=True):
        assert list(line.get_xdata()) == [0, 10, 20, 30, 40]
        assert list(line.get_ydata()) == history[:, layer, head].double().tolist()
        assert tuple(line.get_color()) == tuple(ax.lines[3 * layer].get_color())
    assert tuple(ax.lines[0].get_color()) != tuple(ax.lines[3].get_color())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["layer 0", "layer 1"]
    low, high = ax.get_ylim()
    assert low < 1
    assert high > 2


def test_alpha_over_training_of_layers_that_differ(ax: Any) -> None:
    first, second = torch.tensor([1.5, 1.6], requires_grad=True), np.array([1.1])
    plot.alpha_over_training([(first, second, 1.3), (2 - first / 3, second + 0.1, 1.4)], ax=ax)
    assert [list(line.get_ydata()) for line in ax.lines] == [
        pytest.approx(curve) for curve in ([1.5, 1.5], [1.6, 2 - 1.6 / 3], [1.1, 1.2], [1.3, 1.4])
    ]


def test_without_axes_there_is_a_new_figure() -> None:
    from matplotlib import pyplot

    try:
        first: Any = plot.weight_map(torch.eye(2))
        second: Any = plot.alpha_over_training([[1.5]])
        assert first.figure is not second.figure
        assert pyplot.get_fignums() == [first.figure.number, second.figure.number]
    finally:
        pyplot.close("all")


# Of any type, for they are put in wrong places.
Q: Any = torch.ones(1, 2, 4, 8)
ONE: Any = 1.0
STATS = stats_of(torch.ones(1, 1, 4), torch.ones(1, 1, 2, 2, dtype=torch.bool), block=2)
NAN = Q.clone().index_fill_(2, torch.tensor([1]), torch.nan)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plot.weight_map([[1.0]]), TypeError, "weights is a list: expected a torch tensor"),
        (lambda: plot.weight_map(Q), ValueError, r"weights.shape=\(1, 2, 4, 8\): expected \(seqlen_q, seqlen_k\)"),
        (lambda: plot.weight_map(torch.ones(0, 3)), ValueError, "neither of them 0"),
        (lambda: plot.weight_map(torch.full((2, 2), torch.nan)), ValueError, "4 entries are NaN"),
        (lambda: plot.weight_map(torch.eye(2), tokens=["a"]), ValueError, "tokens: 1 of them; expected 2"),
        (lambda: plot.weight_map(torch.eye(2), query_tokens="abc"), ValueError, "query_tokens: 3 of them; expected 2"),
        (lambda: plot.support_map(Q, Q[..., :4]), ValueError, "k.shape"),
        (lambda: plot.support_map(Q, Q, alpha=3.0), ValueError, "alpha=3.0"),
        (lambda: plot.support_map(Q, Q, head=2), ValueError, "head=2: expected 0 to 1"),
        (lambda: plot.support_map(Q, Q, batch=-1), ValueError, "batch=-1: expected 0 to 0"),
        (lambda: plot.support_map(Q, Q, head=ONE), TypeError, "head=1.0: expected an int"),
        (lambda: plot.support_map(Q, Q, max_size=0), ValueError, "max_size=0: expected at least 1"),
        (lambda: plot.support_map(Q, Q, max_size=2, tokens=["a"]), ValueError, "tokens: 1 of them; expected 4"),
        (lambda: plot.support_map(Q, Q, alpha=1, max_size=2), ValueError, "softmax has no tau"),
        (lambda: plot.support_map(Q, Q[:, :, :0]), ValueError, "4 queries and 0 keys"),
        (lambda: plot.support_map(NAN, Q), ValueError, "batch 0, head 0 give NaN"),
        (lambda: plot.support_map(NAN, Q, max_size=2), ValueError, "batch 0, head 0 give NaN"),
        (lambda: plot.block_map(Q), TypeError, "stats is a Tensor"),
        (lambda: plot.block_map(STATS, head=1), ValueError, "head=1: expected 0 to 0"),
        (lambda: plot.block_map(STATS, seqlen_k=2), ValueError, "seqlen_k=2: expected 3 to 4"),
        (lambda: plot.support_sizes([Q]), TypeError, "stats holds a Tensor"),
        (lambda: plot.support_sizes([]), ValueError, "no query sees a key"),
        (lambda: plot.support_sizes(stats_of(torch.zeros(1, 1, 3))), ValueError, "no query sees a key"),
        (lambda: plot.alpha_over_training([]), ValueError, "at least one measurement"),
        (lambda: plot.alpha_over_training([[1.5], [1.5, 1.6]]), ValueError, r"history\[1\] has layers of shapes"),
        (lambda: plot.alpha_over_training(torch.ones(2, 2, 2, 2)), ValueError, r"history\[0\] has layers of shapes"),
        (lambda: plot.alpha_over_training([["a"]]), TypeError, "history is a str"),
        (lambda: plot.alpha_over_training([[1.5]], steps=[1, 2]), ValueError, "steps: 2 of them; expected 1"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], message: str) -> None:
    from matplotlib import pyplot

    with pytest.raises(error, match=message):
        call()
    assert pyplot.get_fignums() == [], "an error leaves no empty figure behind"


def test_matplotlib_is_loaded_for_pictures_alone() -> None:
    program = (
        "import sys, adasplash2, adasplash2.bench\n"
        "assert 'matplotlib' not in sys.modules\n"
        "sys.modules['matplotlib'] = None\n"
        "import adasplash2.plot"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: adasplash2.plot needs matplotlib (")
    assert last.endswith("python -m pip install 'adasplash2[plot]'")
