"""Who is timed: our backends through the public API, and torch's softmax attention."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import adasplash2
from adasplash2 import testing
from adasplash2.bench.cases import Case
from adasplash2.bench.measure import Forward
from adasplash2.contract import AttentionRequest

__all__ = ["check", "entmax_attention", "softmax_attention"]


def entmax_attention(backend: str, case: Case, arguments: tuple[Tensor, ...]) -> Forward | str:
    """The case's attention by one backend, a function of q, k and v, or the reason why the backend cannot serve it."""
    attend = functools.partial(
        adasplash2.attention, alpha=case.alpha, is_causal=case.is_causal, scale=case.scale, backend=backend
    )
    q, k, v = arguments
    reasons = adasplash2.explain(q, k, v, **attend.keywords).reasons[backend]
    return "; ".join(reasons) or attend


def softmax_attention(case: Case) -> Forward:
    """What a user would have instead: torch's own attention with the case's mask and scale."""
    return functools.partial(F.scaled_dot_product_attention, is_causal=case.is_causal, scale=case.scale)


def check(forward: Forward, case: Case, device: torch.device) -> None:
    """Compare out and the gradients on the case's inputs with the float64 reference.

    Args:
        forward: entmax attention, q, k, v to out, as it will be timed.
        case: a small one, for the reference is dense.
        device: where.

    Raises:
        AssertionError: on a result out of the bounds of ``adasplash2.testing``.
    """
    arguments, dout = case.inputs(device)
    leaves = tuple(argument.clone().requires_grad_() for argument in arguments)
    out = forward(*leaves)
    results = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    q, k, v = arguments
    request = AttentionRequest(q, k, v, scale=case.scale, alpha=case.alpha, is_causal=case.is_causal)
    truth = testing.attention_truth(request, dout)
    for quantity, actual in zip(("out", "dq", "dk", "dv"), results, strict=True):
        testing.assert_close(actual, truth, quantity)
