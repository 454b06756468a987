"""Formulas that the backends share on the host; tau, z and alpha as in ``adasplash2.contract``."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["exponent", "tau_width"]


def exponent(alpha: float | Tensor) -> float | Tensor:
    """r = 1 / (alpha - 1), the exponent of p = u ** r."""
    return 1 / (alpha - 1)


def tau_width(n: Tensor, alpha: float | Tensor) -> Tensor:
    """Width of the bracket of tau over n keys: max z - 1 <= tau <= max z - 1 + width, with width = 1 - n ** (1 - alpha).

    The left end holds because the largest key alone has u <= 1, the right end because n keys with sum p = 1 have a
    largest p of at least 1 / n. Written with expm1, since alpha near 1 cancels everything else.
    """
    return -torch.expm1((1 - alpha) * torch.log(n))
