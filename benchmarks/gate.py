"""Correctness before speed: a provider whose results are out of bounds is not timed.

The truth is the float64 reference with the bounds of ``adasplash2.testing``. At long sequences it is taken on a window
of queries of each head, at another place in each, with a gradient of the output that is zero elsewhere: the gradients
of all keys then come from the windows alone, and those of the other queries are exactly zero.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from cases import Case
from torch import Tensor

from adasplash2 import testing
from adasplash2.bench.measure import Forward
from adasplash2.contract import AttentionRequest, EntmaxRequest

__all__ = ["AttentionGate", "EntmaxGate", "Function", "Gate", "make_gate"]

Function = Literal["entmax", "rough entmax", "softmax"]

# Of "rough entmax": relative error (norms) of kernels that stop short of what their dtype allows, and say so.
ROUGH = 0.05

# Norm of a softmax kernel's error, in units of that of dense evaluation in its dtype. torch's own float32 kernel sums
# in another order and was seen at 2 times this unit; a wrong scale or mask is off by thousands.
SOFTMAX_YARDSTICK = 8

# (query, key) pairs of each head, rows of a matrix.
WINDOW_PAIRS = 1 << 16
MATRIX_ROWS = 64


class AttentionGate:
    """The truth about one case with inputs of one dtype."""

    def __init__(self, case: Case, arguments: tuple[Tensor, ...], dout: Tensor) -> None:
        self.case = case
        self.arguments = tuple(argument.detach() for argument in arguments)
        batch, heads, seqlen, _ = dout.shape
        length = min(seqlen, -(-WINDOW_PAIRS // seqlen))
        start = torch.linspace(0, seqlen - length, batch * heads, device=dout.device).round().long()
        # [batch * heads, length]
        self.rows = start[:, None] + torch.arange(length, device=dout.device)
        self.dout = torch.zeros_like(dout)
        self.dout.flatten(0, 1).scatter_(1, self._index(dout), self._window(dout))

    def check(self, forward: Forward, function: Function, backward: bool) -> None:
        """Run the provider once and compare.

        Args:
            forward: q, k, v to out, as it will be timed.
            function: what it computes.
            backward: whether it has gradients.

        Raises:
            AssertionError: on a result out of its bound.
        """
        q, k, v = (argument.clone().requires_grad_(backward) for argument in self.arguments)
        out = forward(q, k, v)
        assert out.shape == self.dout.shape, f"out: shape {tuple(out.shape)}, expected {tuple(self.dout.shape)}"
        assert bool(torch.isfinite(out).all()), "out: entries that are not finite, although all inputs are"
        actual = {"out": self._window(out.detach())}
        if backward:
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), self.dout)
            actual |= {"dq": self._window(dq), "dk": dk.flatten(0, 1), "dv": dv.flatten(0, 1)}
            other = dq.flatten(0, 1).scatter(1, self._index(dq), torch.zeros_like(actual["dq"]))
            assert not other.any(), "dq: not zero at queries whose dout is zero"
        compare = {
            "entmax": self._assert_entmax,
            "rough entmax": self._assert_roughly,
            "softmax": self._assert_softmax,
        }[function]
        compare({quantity: tensor.unsqueeze(1) for quantity, tensor in actual.items()})

    def _index(self, tensor: Tensor) -> Tensor:
        return self.rows[:, :, None].expand(-1, -1, tensor.shape[-1])

    def _window(self, tensor: Tensor) -> Tensor:
        """[batch * heads, length, head_dim] of (batch, heads, seqlen, head_dim)."""
        return tensor.flatten(0, 1).gather(1, self._index(tensor))

    @functools.cached_property
    def _request(self) -> AttentionRequest:
        """Each head as a sequence of its own, whose causal end is the end of its window."""
        q, k, v = self.arguments
        return AttentionRequest(
            self._window(q).unsqueeze(1),
            k.flatten(0, 1).unsqueeze(1),
            v.flatten(0, 1).unsqueeze(1),
            self.case.scale,
            self.case.alpha,
            is_causal=self.case.is_causal,
            seqlens_k=self.rows[:, -1] + 1 if self.case.is_causal else None,
        )

    @functools.cached_property
    def _window_dout(self) -> Tensor:
        return self._window(self.dout).unsqueeze(1)

    @functools.cached_property
    def _truth(self) -> testing.Truth:
        return testing.attention_truth(self._request, self._window_dout)

    def _assert_entmax(self, actual: dict[str, Tensor]) -> None:
        for quantity, tensor in actual.items():
            testing.assert_close(tensor, self._truth, quantity)

    def _assert_roughly(self, actual: dict[str, Tensor]) -> None:
        for quantity, tensor in actual.items():
            exact = self._truth.values[quantity]
            error = ((tensor.double() - exact).norm() / exact.norm()).item()
            assert error <= ROUGH, f"{quantity}: relative error {error:.3g}, limit {ROUGH}"

    def _assert_softmax(self, actual: dict[str, Tensor]) -> None:
        for quantity, tensor in actual.items():
            exact, limit = self._softmax_truth[quantity]
            error = (tensor.double() - exact).norm()
            assert error <= limit, f"{quantity}: norm of the error {error:.3g}, limit {limit:.3g}"

    @functools.cached_property
    def _softmax_truth(self) -> dict[str, tuple[Tensor, Tensor]]:
        """True values, and the norm of the error allowed: that of dense evaluation in the dtype, within a factor."""
        dtype = self.dout.dtype
        truth, plain = self._dense_softmax(torch.float64), self._dense_softmax(dtype)
        return {
            quantity: (
                exact,
                SOFTMAX_YARDSTICK * ((plain[quantity] - exact).norm() + torch.finfo(dtype).eps * exact.norm()),
            )
            for quantity, exact in truth.items()
        }

    def _dense_softmax(self, dtype: torch.dtype) -> dict[str, Tensor]:
        request = self._request
        q, k, v = (tensor.to(dtype).requires_grad_() for tensor in (request.q, request.k, request.v))
        visible = None
        if request.is_causal:
            # [batch * heads, 1, length, seqlen]
            visible = torch.arange(request.seqlen_k, device=q.device) <= self.rows[:, None, :, None]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = F.scaled_dot_product_attention(q, k, v, visible, scale=request.scale)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), self._window_dout.to(dtype))
        return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


class EntmaxGate:
    """The truth about entmax on some rows of a matrix."""

    def __init__(self, case: Case, arguments: tuple[Tensor, ...], dout: Tensor) -> None:
        self.case = case
        self.x = arguments[0].detach()
        self.dp = dout
        self.rows = torch.linspace(0, len(self.x) - 1, min(MATRIX_ROWS, len(self.x)), device=dout.device).round().long()

    def check(self, forward: Forward, function: Function, backward: bool) -> None:
        """Run the provider once and compare; as ``AttentionGate.check``."""
        x = self.x.clone().requires_grad_(backward)
        p = forward(x)
        rows, alpha = self.rows, self.case.alpha
        p_rows = p.detach()[rows]
        testing.assert_close(p_rows, testing.entmax_truth(EntmaxRequest(self.x[rows], alpha)), "p")
        if backward:
            (dx,) = torch.autograd.grad(p, x, self.dp)
            testing.assert_close(dx[rows], testing.entmax_backward_truth(p_rows, self.dp[rows], alpha), "dx")


Gate = AttentionGate | EntmaxGate


def make_gate(case: Case, arguments: tuple[Tensor, ...], dout: Tensor) -> Gate:
    """The gate for the case's operator."""
    return (EntmaxGate if case.op == "entmax" else AttentionGate)(case, arguments, dout)
