"""Trains on short sequences, tests on 16 times longer ones: softmax against entmax on multi-query associative recall.

python examples/long_context_recall.py                                        three seeds, on a CPU
python examples/long_context_recall.py --preset gpu                           larger, on a GPU
python examples/long_context_recall.py --results a.json b.json                puts results together, trains nothing

The task (MQAR, Arora et al. 2023, arXiv 2312.04927): a sequence begins with pairs of a key and a value; later the keys
come again, one by one among other tokens, and at each the model must tell the key's value. The pairs grow with the
length, so that at 16 times the length each query has 16 times as many keys to choose from.

The positions are those of Vasylenko et al. 2025 (arXiv 2506.16640): half of the heads know none, the others prefer
recent tokens (ALiBi, Press et al. 2021, arXiv 2108.12409). Both mean the same at every length.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib
import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import adasplash2
from adasplash2.options import output

# A model trained with softmax whose scores are multiplied, in tests alone, by log(seqlen) / log(training seqlen).
SHARPENED = ", scores × log n"


class Kind(NamedTuple):
    """A kind of attention, and how it is trained and drawn.

    Attributes:
        alpha: a number, 1 for softmax; None for one per head, learned.
        slope: of the head that prefers recent keys the most. Softmax learns the task better at 2 than at 1, entmax
            better at 1 than at 2.
        colour: of Okabe and Ito's, which are apart for colour-blind eyes too.
    """

    alpha: float | None
    slope: float
    colour: str


MODELS = {
    "softmax": Kind(1.0, 2.0, "#0072B2"),
    "softmax, slope as entmax": Kind(1.0, 1.0, "#56B4E9"),
    "entmax, α = 1.5": Kind(1.5, 1.0, "#D55E00"),
    "entmax, α learned": Kind(None, 1.0, "#009E73"),
}
FACTORS = (1, 2, 4, 8, 16)
TOKENS_PER_PAIR = 8  # of the sequence: 2 for the pair, 1 for its query, 5 that mean nothing
MEASURES = {
    "accuracy": "queries answered right, %",
    "weight": "weight on the right key, %",
    "support": "keys with a weight",
}


@dataclass(frozen=True)
class Setting:
    """Sizes of the task, the model, the training and the test."""

    seqlen: int = 64
    steps: int = 1200
    seeds: int = 3
    batch: int = 32
    layers: int = 2
    heads: int = 4
    head_dim: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    queries: int = 2048  # at each length

    @property
    def keys(self) -> int:
        """Keys that there are, and values: as many as the longest sequence has pairs."""
        return FACTORS[-1] * self.seqlen // TOKENS_PER_PAIR


PRESETS = {
    "cpu": Setting(),
    "gpu": Setting(seqlen=128, steps=1500, batch=64, heads=8),
}


class Recall(NamedTuple):
    """Sequences of the task; pairs = seqlen / TOKENS_PER_PAIR.

    Attributes:
        tokens: (batch, seqlen) int64; the pairs come first: key i at 2i, its value at 2i + 1.
        asked_at: (batch, pairs) int64, where key i comes again.
        values: (batch, pairs) int64, the right answers.
    """

    tokens: Tensor
    asked_at: Tensor
    values: Tensor

    def to(self, device: torch.device) -> Recall:
        return Recall(*(tensor.to(device) for tensor in self))


def make_recall(batch: int, seqlen: int, keys: int, generator: torch.Generator) -> Recall:
    """Random sequences. Keys are tokens below ``keys``, all others are values, those that mean nothing too."""
    pairs = seqlen // TOKENS_PER_PAIR
    drawn = torch.rand(batch, keys, generator=generator).topk(pairs).indices
    tokens = torch.randint(keys, 2 * keys, (batch, seqlen), generator=generator)
    values = tokens[:, 1 : 2 * pairs : 2]
    # As in the paper, early places are likelier, by a power law.
    places = torch.arange(1, (seqlen - 2 * pairs) // 2 + 1) ** -0.99
    asked_at = 2 * (pairs + torch.multinomial(places.expand(batch, -1), pairs, generator=generator))
    tokens[:, : 2 * pairs : 2] = drawn
    return Recall(tokens.scatter(1, asked_at, drawn), asked_at, values)


class Attention(nn.Module):
    """Causal attention of which half of the heads prefer recent keys."""

    def __init__(self, heads: int, head_dim: int, kind: Kind) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.scale = head_dim**-0.5
        self.project_qkv = nn.Linear(width, 3 * width, bias=False)
        self.project_out = nn.Linear(width, width, bias=False)
        recent = kind.slope * 0.5 ** torch.arange(heads // 2)
        self.register_buffer("slopes", torch.cat([recent, torch.zeros(heads - heads // 2)]))
        self.fixed_alpha = kind.alpha
        self.raw_alpha = nn.Parameter(torch.zeros(heads)) if kind.alpha is None else None

    @property
    def alpha(self) -> float | Tensor:
        """A number, or (heads,) in (1, 2), 1.5 at first."""
        return 1 + self.raw_alpha.sigmoid() if self.fixed_alpha is None else self.fixed_alpha

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(batch, seqlen, width) to q, k (batch, heads, seqlen, head_dim + 1) and v (batch, heads, seqlen, head_dim).

        The last channel adds slope * j to the score of key j. ALiBi adds slope * (j - i), which differs by the same
        number for all keys of query i, and so gives the same weights, softmax or entmax.
        """
        q, k, v = self.project_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        batch, heads, seqlen, _ = q.shape
        slope = (self.slopes / self.scale)[:, None, None].expand(batch, heads, seqlen, 1)
        position = torch.arange(seqlen, dtype=k.dtype, device=k.device)[:, None].expand(batch, heads, seqlen, 1)
        return torch.cat([q, slope], dim=-1), torch.cat([k, position], dim=-1), v

    def forward(self, x: Tensor, sharpness: float) -> Tensor:
        q, k, v = self.qkv(x)
        out = adasplash2.attention(q, k, v, alpha=self.alpha, is_causal=True, scale=sharpness * self.scale)
        return self.project_out(out.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor, rows: Tensor, sharpness: float) -> Tensor:
        """The weights of some queries, rows (batch, n): (batch, heads, n, seqlen)."""
        q, k, _ = self.qkv(x)
        q = q.gather(2, rows[:, None, :, None].expand(-1, self.heads, -1, q.shape[-1]))
        future = torch.arange(k.shape[2], device=k.device) > rows[:, None, :, None]
        scores = (sharpness * self.scale * q @ k.transpose(2, 3)).masked_fill(future, -math.inf)
        alpha = self.alpha
        return adasplash2.entmax(scores, alpha[:, None, None] if isinstance(alpha, Tensor) else alpha)


class Block(nn.Module):
    def __init__(self, heads: int, head_dim: int, kind: Kind) -> None:
        super().__init__()
        width = heads * head_dim
        self.norm = nn.RMSNorm(width)
        self.attention = Attention(heads, head_dim, kind)
        self.mlp = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, sharpness: float) -> Tensor:
        x = x + self.attention(self.norm(x), sharpness)
        return x + self.mlp(x)


class Model(nn.Module):
    """A transformer that answers at given positions. ``sharpness`` is a factor of all scores."""

    def __init__(self, setting: Setting, kind: Kind) -> None:
        super().__init__()
        width = setting.heads * setting.head_dim
        self.embed = nn.Embedding(2 * setting.keys, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(Block(setting.heads, setting.head_dim, kind) for _ in range(setting.layers))
        self.answer = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 2 * setting.keys, bias=False))

    def forward(self, recall: Recall, sharpness: float = 1.0) -> Tensor:
        """Scores of all tokens as answers: (batch, pairs, vocabulary)."""
        x = self.embed(recall.tokens)
        for block in self.blocks:
            x = block(x, sharpness)
        return self.answer(x.gather(1, recall.asked_at[..., None].expand(-1, -1, x.shape[-1])))

    def weights(self, recall: Recall, sharpness: float = 1.0) -> Iterator[Tensor]:
        """Each layer's attention weights at the queries: (batch, heads, pairs, seqlen)."""
        x = self.embed(recall.tokens)
        for block in cast(Iterable[Block], self.blocks):
            yield block.attention.weights(block.norm(x), recall.asked_at, sharpness)
            x = block(x, sharpness)


def train(model: Model, setting: Setting, seed: int, device: torch.device) -> Iterator[tuple[float, float]]:
    """One step at a time; gives its loss, nats per query, and its accuracy. Equal seeds mean equal sequences."""
    optimizer = torch.optim.AdamW(
        model.parameters(), setting.learning_rate, betas=(0.9, 0.98), weight_decay=setting.weight_decay
    )
    warmup = max(1, setting.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / setting.steps))
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(setting.steps):
        recall = make_recall(setting.batch, setting.seqlen, setting.keys, generator).to(device)
        scores = model(recall)
        loss = F.cross_entropy(scores.flatten(0, 1), recall.values.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item(), _accuracy(scores, recall)


def _accuracy(scores: Tensor, recall: Recall) -> float:
    return (scores.argmax(dim=-1) == recall.values).float().mean().item()


@torch.no_grad()
def evaluate(model: Model, setting: Setting, device: torch.device, sharpened: bool = False) -> list[dict[str, Any]]:
    """Accuracy at each length, on the same sequences for every model; for each layer and head its mean weight on the
    right value and its support size.

    Args:
        model: trained.
        setting: what it was trained with.
        device: of the model.
        sharpened: whether to multiply all scores by log(seqlen) / log(training seqlen).
    """
    found = []
    for factor in FACTORS:
        seqlen = factor * setting.seqlen
        pairs = seqlen // TOKENS_PER_PAIR
        sharpness = math.log(seqlen) / math.log(setting.seqlen) if sharpened else 1.0
        generator = torch.Generator().manual_seed(-factor)
        recall = make_recall(max(1, setting.queries // pairs), seqlen, setting.keys, generator).to(device)
        weight, support = [], []
        for p in model.weights(recall, sharpness):
            # The right key's own token is at 2i, but what the query looks for is its value, at 2i + 1.
            right = p[..., 1 : 2 * pairs : 2].diagonal(dim1=2, dim2=3)
            weight.append(right.mean(dim=(0, 2)).tolist())
            support.append(p.count_nonzero(dim=-1).float().mean(dim=(0, 2)).tolist())
        accuracy = _accuracy(model(recall, sharpness), recall)
        found.append({"seqlen": seqlen, "accuracy": accuracy, "weight": weight, "support": support})
    return found


def run_one(
    name: str, seed: int, setting: Setting, device: torch.device, progress: Progress, task: Any
) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Model(setting, MODELS[name]).to(device)
    began = time.perf_counter()
    losses = []
    for loss, accuracy in train(model, setting, seed, device):
        losses.append(loss)
        state = f"{name}, seed {seed}: loss {loss:.2f}, {accuracy:.0%} right"
        progress.update(task, advance=1, state=state)
    alphas = [module.alpha for module in model.modules() if isinstance(module, Attention)]
    row = {
        "model": name,
        "seed": seed,
        "seconds": time.perf_counter() - began,
        "alpha": [alpha.tolist() if isinstance(alpha, Tensor) else alpha for alpha in alphas],
        # Twenty points show the course as well as all do.
        "loss": [statistics.fmean(part) for part in _parts(losses, 20)],
        "lengths": evaluate(model, setting, device),
    }
    if MODELS[name].alpha == 1:
        row["lengths_sharpened"] = evaluate(model, setting, device, sharpened=True)
    return row


def _parts(numbers: Sequence[float], count: int) -> Iterator[Sequence[float]]:
    size = max(1, len(numbers) // count)
    return (numbers[i : i + size] for i in range(0, len(numbers), size))


def summarise(results: dict[str, Any]) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Measure, model, length: a number per seed. Weights are in percent, as accuracies are.

    Weight and support are those of each run's recall head: of all, the one with the largest weight on the right key at
    the training length.
    """
    found: dict[str, dict[str, dict[int, list[float]]]] = {measure: {} for measure in MEASURES}
    for run in results["runs"]:
        for key, suffix in (("lengths", ""), ("lengths_sharpened", SHARPENED)):
            for at in run.get(key, []):
                first = run[key][0]["weight"]
                layer, head = max(_heads(first), key=lambda where: first[where[0]][where[1]])
                numbers = {
                    "accuracy": 100 * at["accuracy"],
                    "weight": 100 * at["weight"][layer][head],
                    "support": at["support"][layer][head],
                }
                for measure, number in numbers.items():
                    by_length = found[measure].setdefault(run["model"] + suffix, {})
                    by_length.setdefault(at["seqlen"], []).append(number)
    return found


def _heads(layers: Sequence[Sequence[float]]) -> Iterator[tuple[int, int]]:
    return ((layer, head) for layer, heads in enumerate(layers) for head in range(len(heads)))


def tables(results: dict[str, Any]) -> Iterator[Table]:
    """A table per measure, in Markdown: mean and, from two seeds on, standard deviation."""
    for measure, by_model in summarise(results).items():
        lengths = sorted({length for by_length in by_model.values() for length in by_length})
        table = Table(MEASURES[measure], *map(str, lengths), box=box.MARKDOWN)
        for name, by_length in by_model.items():
            table.add_row(name, *(_mean_and_spread(by_length[length]) for length in lengths))
        yield table


def _mean_and_spread(numbers: Sequence[float]) -> str:
    mean = f"{statistics.fmean(numbers):.1f}"
    return f"{mean} ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else mean


def draw(results: dict[str, Any], path: Path) -> None:
    """Each measure over length: mean of the seeds, a point for each, and the band from the lowest to the highest."""
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(12, 3.8), layout="constrained")
        for axes, (measure, by_model) in zip(figure.subplots(1, 3), summarise(results).items(), strict=True):
            for name, by_length in by_model.items():
                lengths = sorted(by_length)
                colour = MODELS[name.removesuffix(SHARPENED)].colour
                line = "--" if name.endswith(SHARPENED) else "-"
                means = [statistics.fmean(by_length[length]) for length in lengths]
                axes.plot(lengths, means, line, color=colour, label=name)
                low, high = ([end(by_length[length]) for length in lengths] for end in (min, max))
                axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
                for length in lengths:
                    axes.plot([length] * len(by_length[length]), by_length[length], ".", color=colour, markersize=3)
            axes.set_xscale("log", base=2)
            axes.set_xticks(lengths, map(str, lengths))
            axes.set_xlabel(f"tokens (trained on {lengths[0]})")
            axes.set_title(MEASURES[measure], loc="left")
            if measure == "support":
                axes.set_yscale("log")
            else:
                axes.set_ylim(-3, 103)
            axes.grid(color="0.92")
        figure.axes[0].legend(frameon=False, loc="lower left")
        figure.savefig(path, dpi=130)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="sizes; the options below change them")
    parser.add_argument("--seeds", type=_at_least(1), help="runs of each model; the preset's unless given")
    parser.add_argument("--steps", type=_at_least(1), help="training steps; the preset's unless given")
    parser.add_argument("--seqlen", type=_training_length, help="of the training; the preset's unless given")
    parser.add_argument("--queries", type=_at_least(1), help="of the test, at each length; the preset's unless given")
    parser.add_argument("--device", type=torch.device, help="cuda for the preset gpu, else cpu, unless given")
    parser.add_argument("--out", type=output(".png"), default="long_context_recall.png", help="picture to write")
    parser.add_argument("--json", type=output(".json"), default="long_context_recall.json", help="results to write")
    parser.add_argument("--first-seed", type=int, default=0, help="the others follow it")
    parser.add_argument(
        "--results", type=Path, nargs="+", metavar="JSON", help="take these results, put together, and train nothing"
    )
    return parser.parse_args(arguments)


def _at_least(lowest: int, multiple_of: int = 1) -> Any:
    def number(text: str) -> int:
        value = int(text)
        if value < lowest or value % multiple_of:
            expected = f"at least {lowest}" + (f", a multiple of {multiple_of}" if multiple_of > 1 else "")
            raise argparse.ArgumentTypeError(f"{value}: expected {expected}")
        return value

    return number


_training_length = _at_least(2 * TOKENS_PER_PAIR, multiple_of=TOKENS_PER_PAIR)


def run_all(results: dict[str, Any], seeds: range, device: torch.device, path: Path, console: Console) -> None:
    """Every model with every seed; each run is in the file as soon as it is done, and Ctrl-C keeps those."""
    setting = Setting(**results["setting"])
    runs = results["runs"]
    progress = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task("training", total=len(seeds) * len(MODELS) * setting.steps, state="")
        try:
            for seed in seeds:
                for name in MODELS:
                    runs.append(run_one(name, seed, setting, device, progress, task))
                    write(results, path)
                    accuracies = ", ".join(f"{at['seqlen']}: {at['accuracy']:.1%}" for at in runs[-1]["lengths"])
                    console.print(f"{name}, seed {seed}: {accuracies} ({runs[-1]['seconds']:.0f} s)", highlight=False)
        except KeyboardInterrupt:
            console.print(f"stopped: {len(runs)} of {len(seeds) * len(MODELS)} runs are done")


def train_all(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    changes = {name: value for name in ("seeds", "steps", "seqlen", "queries") if (value := getattr(options, name))}
    setting = dataclasses.replace(PRESETS[options.preset], **changes)
    device = options.device or torch.device("cuda" if options.preset == "gpu" else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"device={device}: expected one that is there; torch finds no CUDA device")
    seeds = range(options.first_seed, options.first_seed + setting.seeds)
    sizes = dataclasses.asdict(setting)
    del sizes["seeds"]  # the runs tell them
    results: dict[str, Any] = {
        "setting": sizes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in ("adasplash2", "torch")},
        "runs": [],
    }
    run_all(results, seeds, device, options.json, console)
    return results


def write(results: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def together(paths: Sequence[Path]) -> dict[str, Any]:
    """The runs of all files, which must agree in all else."""
    first, *others = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    for path, other in zip(paths[1:], others, strict=True):
        if {**other, "runs": None} != {**first, "runs": None}:
            raise SystemExit(f"{path}: expected the setting, device, threads and versions of {paths[0]}")
        first["runs"] += other["runs"]
    return first


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    results = together(options.results) if options.results else train_all(options, console)
    if not results["runs"]:
        return 130
    write(results, options.json)
    for table in tables(results):
        console.print(table)
    draw(results, options.out)
    for path in (options.json, options.out):
        console.print(f"written: {path.resolve()}", soft_wrap=True, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
