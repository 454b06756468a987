"""What is timed: shapes, alpha, mask and inputs, each case with the support that its inputs turn out to have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import adasplash2
from adasplash2.testing import make_inputs

__all__ = ["Case"]


@dataclass(frozen=True)
class Case:
    """One comparison: everyone gets the same tensors.

    Attributes:
        kind: of ``adasplash2.testing.make_inputs``.
        seqlen: queries and keys.
        head_dim: of q, k and v.
        heads: query heads, each with keys of its own.
        batch: sequences.
        alpha: of entmax.
        is_causal: mask.
        dtype: of the inputs and the output.
        gain: factor of the scores, on top of 1 / sqrt(head_dim).
        share: of "topics": the probability that a query wants a topic.
    """

    kind: str
    seqlen: int
    head_dim: int = 64
    heads: int = 8
    batch: int = 1
    alpha: float = 1.5
    is_causal: bool = True
    dtype: torch.dtype = torch.float32
    gain: float = 1.0
    share: float = 0.25

    @property
    def scale(self) -> float:
        """Factor of the scores q . k."""
        return self.gain / math.sqrt(self.head_dim)

    def inputs(self, device: torch.device) -> tuple[tuple[Tensor, ...], Tensor]:
        """The arguments (q, k, v), and a gradient of the output."""
        options: dict[str, Any] = {"share": self.share} if self.kind == "topics" else {}
        made = make_inputs(
            self.kind,
            batch=self.batch,
            heads_q=self.heads,
            seqlen_q=self.seqlen,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=device,
            **options,
        )
        return (made.q, made.k, made.v), made.dout

    def support(self, arguments: tuple[Tensor, ...], **options: Any) -> dict[str, float]:
        """Keys per row with p > 0 (mean), their share of the visible pairs, and that of the blocks with any.

        Args:
            arguments: those of ``inputs``.
            options: of ``adasplash2.support``, to which the case adds its own.
        """
        q, k, _ = arguments
        # The blocks that the backends for the device skip.
        block_m = 64 if q.device.type == "cpu" else 128
        stats = adasplash2.support(
            q, k, alpha=self.alpha, is_causal=self.is_causal, scale=self.scale, block_m=block_m, **options
        )
        return {
            "size": stats.size.double().mean().item(),
            "elements": stats.element_density,
            "blocks": stats.block_density,
        }
