"""``python -m adasplash2 demo``: entmax and softmax attention side by side, on the CPU, on real text, in minutes."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from adasplash2 import options

if TYPE_CHECKING:
    from rich.console import Console

    from adasplash2.demo.report import Results

__all__ = ["add_arguments", "run"]

_MAP_TOKENS = 32
# A model this young gains more from many steps than from large batches.
_BATCH = 1
_STEPS_BETWEEN_MEASUREMENTS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to a parser."""
    parser.add_argument("--steps", type=options.integer(1), default=400, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--seqlen", type=options.integer(_MAP_TOKENS), default=1024, help="tokens per sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--alpha", type=options.alpha, default=1.5, help="entmax exponent in (1, 2] (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: %(default)s)")
    parser.add_argument(
        "--seconds",
        type=options.seconds,
        default=120.0,
        help="end training after this time even if steps are left (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=options.output(".png"), default=Path("demo.png"), help="picture to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo with parsed options.

    Returns:
        0; 2 where an optional dependency is missing; 130 where Ctrl-C left nothing to show.
    """
    missing = [name for name in ("matplotlib", "rich") if find_spec(name) is None]
    if missing:
        print(f"the demo needs {' and '.join(missing)}: python -m pip install 'adasplash2[demo]'", file=sys.stderr)
        return 2

    from rich.console import Console

    from adasplash2.demo import report

    console = Console()
    try:
        results = _train(args, console)
        if results is None:
            console.print("interrupted before the first step: nothing to show")
            return 130
        console.print(report.loss_table(results), report.support_table(results))
        report.draw(results, args.out)
    except KeyboardInterrupt:
        console.print("interrupted again: stopped at once")
        return 130
    console.print(f"picture: {args.out.resolve()}", soft_wrap=True)
    return 0


def _train(args: argparse.Namespace, console: Console) -> Results | None:
    """Trains both models, shows how it goes, and measures what came out; None if no step was done."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    import adasplash2
    from adasplash2.demo.model import Transformer, capture_qkv, entmax_attend, softmax_attend
    from adasplash2.demo.report import Results, attention_weights
    from adasplash2.demo.text import load_corpus
    from adasplash2.demo.train import Learner, held_out_loss, support_per_layer, train

    corpus = load_corpus(args.seqlen)
    sample, _ = corpus.held_out_windows(1, args.seqlen)
    vocab_size = corpus.tokenizer.vocab_size
    entmax = Learner("entmax", Transformer(vocab_size, entmax_attend(args.alpha), seed=args.seed))
    softmax = Learner("softmax", Transformer(vocab_size, softmax_attend, seed=args.seed))
    learners = (entmax, softmax)
    console.print(
        f"text: {len(corpus.train):,} tokens of Python's standard library; {len(corpus.held_out):,} more are held out\n"
        f"models: {sum(p.numel() for p in entmax.model.parameters()):,} parameters each, "
        f"{len(entmax.model.blocks)} layers, {args.seqlen} tokens per sequence\n"
        f"threads: {torch.get_num_threads()}"
    )
    q, k, v = capture_qkv(softmax.model, sample)[0]
    served = adasplash2.explain(q, k, v, alpha=args.alpha, is_causal=True)
    console.print(f"entmax attention, alpha {args.alpha:g}: served by the backend {served.chosen}", highlight=False)
    with console.status("compiling the kernels, if this is the first time"):
        # Backends may compile when they first meet a kind of scores: sparse ones, and equal ones, which are dense.
        for gain in (1.0, 0.0):
            entmax.model.attend((gain * q).requires_grad_(), k, v).sum().backward()

    def share_of_zeros() -> float:
        stats = support_per_layer(entmax.model, sample, args.alpha)
        return 1 - sum(layer.element_density for layer in stats) / len(stats)

    zeros = share_of_zeros()
    progress = Progress(
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
        console=console,
        expand=True,
        disable=not console.is_terminal,
    )
    with progress, _interruptible() as interrupted:
        task = progress.add_task("training", total=args.steps, state="")
        plan = {"steps": args.steps, "batch": _BATCH, "seqlen": args.seqlen, "seed": args.seed, "seconds": args.seconds}
        for step in train(learners, corpus, **plan):
            if step % _STEPS_BETWEEN_MEASUREMENTS == 0:
                zeros = share_of_zeros()
            state = "  ".join(
                f"{learner.name} {learner.losses[-1]:.2f} ({learner.tokens_per_second:,.0f} tok/s)"
                for learner in learners
            )
            state += f"  zeros {zeros:.1%}"
            progress.update(task, completed=step, state=state)
            if not console.is_terminal and step % max(1, args.steps // 12) == 0:
                console.print(f"step {step}/{args.steps}  {state}", highlight=False)
            if interrupted():
                break
    steps = len(entmax.losses)
    if steps == 0:
        return None
    if steps < args.steps:
        console.print(f"training ended after {steps} of {args.steps} steps")

    with console.status("measuring on held-out text"):
        shown = sample[0, :_MAP_TOKENS]
        return Results(
            learners=learners,
            alpha=args.alpha,
            bytes_per_token=len(corpus.tokenizer.decode(corpus.held_out)) / len(corpus.held_out),
            held_out=[held_out_loss(learner.model, corpus, seqlen=args.seqlen) for learner in learners],
            support=support_per_layer(entmax.model, sample, args.alpha),
            labels=[corpus.tokenizer.label(token) for token in shown.tolist()],
            weights=[attention_weights(learner.model, shown) for learner in learners],
        )


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Lets the first Ctrl-C only raise a flag, so that the step at work is finished; a second one stops at once.

    Yields:
        A function that says whether Ctrl-C came.
    """
    came = False

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)
