"""A small causal transformer whose attention is an argument, so that two kinds of attention differ in nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adasplash2

__all__ = ["Attend", "Transformer", "capture_qkv", "entmax_attend", "softmax_attend"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal attention: q, k, v, each (batch, heads, seqlen, head_dim), to out of the same shape."""


def entmax_attend(alpha: float) -> Attend:
    """Causal alpha-entmax attention, by the backend that fits the machine."""
    return partial(adasplash2.attention, alpha=alpha, is_causal=True)


softmax_attend: Attend = partial(F.scaled_dot_product_attention, is_causal=True)
"""Causal softmax attention: torch's own."""


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a normalisation and around a residual connection."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        width = heads * head_dim
        self.heads = heads
        self.norm_attention = nn.RMSNorm(width)
        self.project_qkv = nn.Linear(width, 3 * width, bias=False)
        # Normalised q and k give scores of about unit variance from the first step on, as trained models have them.
        # Without it the first scores are nearly equal, and entmax starts out dense.
        self.norm_q = nn.RMSNorm(head_dim)
        self.norm_k = nn.RMSNorm(head_dim)
        self.project_out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.RMSNorm(width)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.contract = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.project_out.weight)
        nn.init.zeros_(self.contract.weight)

    def forward(self, x: Tensor, rotation: Tensor, attend: Attend) -> Tensor:
        """x: (batch, seqlen, width), and back."""
        qkv = self.project_qkv(self.norm_attention(x))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = _rotate(self.norm_q(q), rotation), _rotate(self.norm_k(k), rotation)
        x = x + self.project_out(attend(q, k, v).transpose(1, 2).flatten(2))
        change: Tensor = self.contract(F.relu(self.expand(self.norm_mlp(x))).square())
        return x + change


class Transformer(nn.Module):
    """Next-token model with rotary positions and tied embeddings.

    Args:
        vocab_size: number of tokens.
        attend: the attention of every layer.
        layers: number of blocks.
        heads: attention heads per block.
        head_dim: width of a head, even; the model is heads * head_dim wide.
        seed: of the initial weights. Two models with the same seed and sizes start out equal.
    """

    def __init__(
        self, vocab_size: int, attend: Attend, *, layers: int = 4, heads: int = 4, head_dim: int = 32, seed: int = 0
    ) -> None:
        super().__init__()
        self.attend = attend
        self.head_dim = head_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Embedding(vocab_size, heads * head_dim)
            nn.init.normal_(self.embed.weight, std=0.02)
            self.blocks = nn.ModuleList(Block(heads, head_dim) for _ in range(layers))
            self.norm = nn.RMSNorm(heads * head_dim)

    def forward(self, tokens: Tensor, attend: Attend | None = None) -> Tensor:
        """Scores of the next token.

        Args:
            tokens: (batch, seqlen) int64.
            attend: used for this call in place of the model's own.

        Returns:
            (batch, seqlen, vocab_size) float32.
        """
        rotation = _rotation(tokens.shape[1], self.head_dim)
        x = F.rms_norm(self.embed(tokens), self.norm.normalized_shape)
        for block in self.blocks:
            x = block(x, rotation, attend or self.attend)
        return F.linear(self.norm(x), self.embed.weight)


@torch.no_grad()
def capture_qkv(model: Transformer, tokens: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What each layer's attention is called with.

    Args:
        model: a model, trained or not.
        tokens: (batch, seqlen) int64.

    Returns:
        For each layer q, k, v, each (batch, heads, seqlen, head_dim) float32, after normalisation and rotation.
    """
    captured: list[tuple[Tensor, Tensor, Tensor]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        captured.append((q, k, v))
        return model.attend(q, k, v)

    model(tokens, attend)
    return captured


def _rotation(seqlen: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Unit complex numbers that turn pairs of channels by position: (seqlen, head_dim / 2) complex64."""
    frequency = base ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.outer(torch.arange(seqlen), frequency)
    return torch.polar(torch.ones_like(angle), angle)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2)
