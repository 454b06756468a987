"""How a model trained with softmax becomes sparse: convert it, and raise alpha while it is trained further.

A small causal transformer made of torch's own layers learns the source code of Python's standard library with softmax
attention. Three copies of it are then trained further, on the same batches: with softmax as before, with entmax from
one step to the next, and with entmax whose alpha rises from 1. Two minutes on two cores:

    python examples/softmax_to_entmax.py --plot softmax_to_entmax.png
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import adasplash2
from adasplash2.demo.text import Corpus, load_corpus
from adasplash2.nn import AlphaSchedule, EntmaxAttention, convert

WIDTH, HEADS, LAYERS = 128, 4, 3
BATCH = 4
PEAK_LEARNING_RATE, WARMUP = 2e-3, 20
FURTHER_LEARNING_RATE = 5e-4
WINDOWS = 32  # held-out sequences
MEASUREMENTS = 12  # of each further training


class LanguageModel(nn.Module):
    """Next-token model of torch's encoder layers, with learned positions and tied embeddings."""

    def __init__(self, vocab_size: int, seqlen: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, WIDTH)
        self.position = nn.Embedding(seqlen, WIDTH)
        for embedding in (self.embed, self.position):
            nn.init.normal_(embedding.weight, std=0.02)
        # Dropout 0, because entmax attention drops no weights, and a conversion must not change anything else.
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, seqlen) int64 to (batch, seqlen, vocab_size)."""
        seqlen = tokens.shape[1]
        x = self.embed(tokens) + self.position.weight[:seqlen]
        mask = nn.Transformer.generate_square_subsequent_mask(seqlen)
        return F.linear(self.layers(x, mask, is_causal=True), self.embed.weight)


@torch.no_grad()
def held_out_loss(model: nn.Module, corpus: Corpus, seqlen: int) -> float:
    inputs, targets = corpus.held_out_windows(WINDOWS, seqlen)
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()


@torch.no_grad()
def share_of_zeros(model: nn.Module, corpus: Corpus, seqlen: int) -> float:
    """Of the weights that the causal mask lets be other than zero, on held-out text, over all layers and heads."""
    shares = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _out: object) -> None:
        _, weights = module.forward(*args, **{**kwargs, "need_weights": True, "average_attn_weights": False})
        visible = torch.ones(weights.shape[-2:], dtype=torch.bool).tril()
        shares.append((weights[..., visible] == 0).float().mean().item())

    hooks = [
        module.register_forward_hook(look, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, (nn.MultiheadAttention, EntmaxAttention))
    ]
    model(corpus.held_out_windows(4, seqlen)[0])
    for hook in hooks:
        hook.remove()
    return sum(shares) / len(shares)


def train(
    model: nn.Module,
    corpus: Corpus,
    *,
    steps: int,
    seqlen: int,
    learning_rate: float,
    seed: int,
    after_step: Callable[[int], None],
) -> None:
    """AdamW on random windows, with a warm-up and a learning rate that falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / WARMUP) * (1 - n / steps))
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        inputs, targets = corpus.batch(BATCH, seqlen, generator)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        after_step(step)


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    corpus = load_corpus(args.seqlen)
    torch.manual_seed(args.seed)
    softmax = LanguageModel(corpus.tokenizer.vocab_size, args.seqlen)
    begin, begin_cpu = perf_counter(), process_time()

    def measured(model: nn.Module, alpha: float) -> dict[str, float]:
        return {
            "alpha": alpha,
            "held_out_loss": held_out_loss(model, corpus, args.seqlen),
            "zeros": share_of_zeros(model, corpus, args.seqlen),
        }

    with Progress(console=console) as progress:

        def further(name: str, model: nn.Module, schedule: AlphaSchedule | None = None) -> list[tuple[int, float]]:
            """Trains a copy further; its held-out loss on the way."""
            bar = progress.add_task(name, total=args.further)
            curve = [(0, held_out_loss(model, corpus, args.seqlen))]

            def after_step(step: int) -> None:
                if schedule is not None:
                    schedule.step()
                progress.update(bar, completed=step)
                if step % max(1, args.further // MEASUREMENTS) == 0 or step == args.further:
                    curve.append((step, held_out_loss(model, corpus, args.seqlen)))

            options = {"steps": args.further, "seqlen": args.seqlen, "seed": args.seed + 1}
            train(model, corpus, **options, learning_rate=FURTHER_LEARNING_RATE, after_step=after_step)
            return curve

        bar = progress.add_task("softmax, from scratch", total=args.steps)
        train(
            softmax,
            corpus,
            steps=args.steps,
            seqlen=args.seqlen,
            learning_rate=PEAK_LEARNING_RATE,
            seed=args.seed,
            after_step=lambda step: progress.update(bar, completed=step),
        )
        rows = {"softmax, trained": measured(softmax, 1.0)}
        at_once = convert(copy.deepcopy(softmax), alpha=args.alpha)
        rows["converted, not trained further"] = measured(at_once, args.alpha)
        gradual = convert(copy.deepcopy(softmax), alpha=1.0)
        schedule = AlphaSchedule(gradual, args.alpha, steps=max(1, args.further * 2 // 3))

        curves = {"softmax, trained further": further("softmax, further", softmax)}
        rows["softmax, trained further"] = measured(softmax, 1.0)
        curves["converted at once, trained further"] = further("entmax at once", at_once)
        rows["converted at once, trained further"] = measured(at_once, args.alpha)
        curves["converted, alpha raised in training"] = further("entmax, alpha raised", gradual, schedule)
        rows["converted, alpha raised in training"] = measured(gradual, schedule.alpha)

    return {
        "settings": {name: getattr(args, name) for name in ("steps", "further", "seqlen", "alpha", "seed")},
        "model": {"layers": LAYERS, "heads": HEADS, "width": WIDTH, "batch": BATCH},
        "versions": {
            "adasplash2": adasplash2.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": {"architecture": platform.machine(), "threads": torch.get_num_threads()},
        "seconds": round(perf_counter() - begin, 1),
        "cpu_seconds": round(process_time() - begin_cpu, 1),  # of all threads
        "results": rows,
        "held_out_loss_by_step": curves,
    }


def cells(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [
        (name, f"{row['alpha']:g}", f"{row['held_out_loss']:.3f}", f"{row['zeros']:.1%}")
        for name, row in results["results"].items()
    ]


def table(results: dict[str, Any]) -> Table:
    shown = Table("model", "alpha", "held-out loss", "zeros")
    for row in cells(results):
        shown.add_row(*row)
    return shown


def draw(results: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, curve), color in zip(
        results["held_out_loss_by_step"].items(), ("#1d4ed8", "#a3a3a3", "#c2410c"), strict=True
    ):
        axes.plot(*zip(*curve, strict=True), color=color, marker=".", label=name)
    axes.set(
        xlabel=f"steps after {results['settings']['steps']} with softmax",
        ylabel="held-out loss, nats per token",
        title=f"From softmax to entmax, alpha {results['settings']['alpha']:g}",
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected at least 1")
    return value


def exponent(text: str) -> float:
    value = float(text)
    if not 1 < value <= 2:
        raise argparse.ArgumentTypeError(f"{text}: expected a number in (1, 2]")
    return value


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=500, help="with softmax (default: %(default)s)")
    parser.add_argument("--further", type=positive, default=200, help="steps after that (default: %(default)s)")
    parser.add_argument("--seqlen", type=positive, default=256, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--alpha", type=exponent, default=1.5, help="in the end (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, default=Path("softmax_to_entmax.json"), help="results (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, help="picture of the losses, .png (default: none)")
    args = parser.parse_args(arguments)
    console = Console()
    results = run(args, console)
    console.print(table(results))
    args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
