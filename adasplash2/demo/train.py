"""Training of several models side by side, on the same batches, with the time spent in attention."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional as F

import adasplash2
from adasplash2.contract import SupportStats
from adasplash2.demo.model import Attend, Transformer, capture_qkv
from adasplash2.demo.text import Corpus

__all__ = ["Learner", "TimedAttend", "held_out_loss", "support_per_layer", "train"]

_PEAK_LEARNING_RATE = 4e-3
_WARMUP_STEPS = 20


class TimedAttend:
    """An attention that adds up the seconds spent in it, forward and backward."""

    def __init__(self, attend: Attend) -> None:
        self.attend = attend
        self.seconds = 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention's result; the clock runs meanwhile, and again in backward."""
        start = perf_counter()
        out = self.attend(q, k, v)
        self.seconds += perf_counter() - start
        if out.requires_grad:
            self._time_backward((q, k, v), out)
        return out

    def _time_backward(self, inputs: Sequence[Tensor], out: Tensor) -> None:
        # Autograd calls out's hook right before attention's backward, and the first of its inputs' hooks right after.
        started: list[float] = []

        def start(_grad: Tensor) -> None:
            started.append(perf_counter())

        def stop(_grad: Tensor) -> None:
            if started:
                self.seconds += perf_counter() - started.pop()

        out.register_hook(start)
        for tensor in inputs:
            tensor.register_hook(stop)


@dataclass
class Learner:
    """A model in training and what is known about it.

    Attributes:
        name: for people.
        model: trained in place.
        losses: training loss of each step, nats per token.
        seconds: spent in its steps.
        tokens: seen so far.
    """

    name: str
    model: Transformer
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        self.attention = TimedAttend(self.model.attend)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    @property
    def tokens_per_second(self) -> float:
        """Speed of training so far."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def step(self, inputs: Tensor, targets: Tensor, learning_rate: float) -> None:
        """One step of AdamW on inputs and targets, each (batch, seqlen) int64."""
        start = perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = F.cross_entropy(self.model(inputs, self.attention).flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds += perf_counter() - start
        self.tokens += inputs.numel()


def train(
    learners: Sequence[Learner],
    corpus: Corpus,
    *,
    steps: int,
    batch: int = 2,
    seqlen: int = 1024,
    seed: int = 0,
    seconds: float = math.inf,
) -> Iterator[int]:
    """Trains all learners on the same random batches, one step of each in turn.

    The learning rate falls to zero over the steps, or over the time if that runs out first.

    Args:
        learners: trained in this order at each step.
        corpus: what the batches are drawn from.
        steps: number of steps.
        batch: sequences per step.
        seqlen: tokens per sequence.
        seed: of the batches.
        seconds: no step starts later than this after the first one.

    Yields:
        The number of steps done, after each.
    """
    generator = torch.Generator().manual_seed(seed)
    begin = perf_counter()
    for step in range(steps):
        progress = max(step / steps, (perf_counter() - begin) / seconds)
        if progress >= 1:
            return
        learning_rate = _PEAK_LEARNING_RATE * min(1.0, (step + 1) / _WARMUP_STEPS) * (1 - progress)
        inputs, targets = corpus.batch(batch, seqlen, generator)
        for learner in learners:
            learner.step(inputs, targets, learning_rate)
        yield step + 1


@torch.no_grad()
def held_out_loss(model: Transformer, corpus: Corpus, *, seqlen: int, windows: int = 16) -> float:
    """Mean loss on text that no model was trained on, in nats per token."""
    losses = [
        F.cross_entropy(model(inputs[None]).flatten(0, 1), targets)
        for inputs, targets in zip(*corpus.held_out_windows(windows, seqlen), strict=True)
    ]
    return torch.stack(losses).mean().item()


def support_per_layer(model: Transformer, tokens: Tensor, alpha: float, block: int = 16) -> list[SupportStats]:
    """Where each layer's entmax attention is not zero.

    Args:
        model: trained with entmax attention of this alpha.
        tokens: (batch, seqlen) int64.
        alpha: in (1, 2].
        block: queries and keys per block of the block map.
    """
    return [
        adasplash2.support(q, k, alpha=alpha, is_causal=True, block_m=block, block_n=block)
        for q, k, _ in capture_qkv(model, tokens)
    ]
