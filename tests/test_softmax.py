"""alpha = 1: torch's own attention under this package's conventions, and the limit of entmax."""

from __future__ import annotations

import itertools

import pytest
import torch

import adasplash2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def dense(q, k, v, is_causal, scale, lengths_q, lengths_k):
    """Softmax attention, one row at a time."""
    group = q.shape[1] // k.shape[1]
    rows = []
    for b, h, i in itertools.product(*map(range, q.shape[:3])):
        n_q, n_k = lengths_q[b], lengths_k[b]
        keys = n_k if i < n_q else 0
        if is_causal:
            keys = min(keys, max(0, i + 1 + n_k - n_q))
        weights = torch.softmax(scale * (k[b, h // group, :keys] @ q[b, h, i]), 0)
        rows.append(weights @ v[b, h // group, :keys])
    return torch.stack(rows).view(*q.shape[:3], v.shape[-1])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padded", [None, "q", "k", "qk"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(6, 6), (4, 7), (7, 4), (1, 5), (5, 1), (3, 0)])
def test_attention(seqlen_q, seqlen_k, padded, is_causal, device):
    batch, scale = 3, 0.7
    shapes = (batch, 4, seqlen_q, 5), (batch, 2, seqlen_k, 5), (batch, 2, seqlen_k, 3)
    q, k, v = (torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes)
    lengths_q = [seqlen_q, 0, 1] if padded in ("q", "qk") else [seqlen_q] * batch
    lengths_k = [min(1, seqlen_k), seqlen_k, 0] if padded in ("k", "qk") else [seqlen_k] * batch
    seqlens_q = torch.tensor(lengths_q, device=device) if padded in ("q", "qk") else None
    seqlens_k = torch.tensor(lengths_k, dtype=torch.int32, device=device) if padded in ("k", "qk") else None
    for b in range(batch):
        q[b, :, lengths_q[b] :] = torch.nan
        k[b, :, lengths_k[b] :] = v[b, :, lengths_k[b] :] = torch.nan
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    copies = [tensor.detach().clone().requires_grad_() for tensor in inputs]

    out = adasplash2.attention(
        q, k, v, alpha=1.0, is_causal=is_causal, scale=scale, seqlens_q=seqlens_q, seqlens_k=seqlens_k
    )
    expected = dense(copies[0], copies[1], copies[2], is_causal, scale, lengths_q, lengths_k)
    torch.testing.assert_close(out, expected)

    dout = torch.randn_like(out)
    out.backward(dout)
    expected.backward(dout)
    for got, copy in zip(inputs, copies, strict=True):
        # Where no row looks, the dense loop has no gradient at all.
        torch.testing.assert_close(got.grad, torch.zeros_like(got) if copy.grad is None else copy.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_torch_attention_where_that_has_the_same_conventions(dtype):
    q, k, v = (torch.randn(2, 3, 9, 8, dtype=dtype) for _ in range(3))
    for is_causal in (False, True):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        assert torch.equal(adasplash2.attention(q, k, v, alpha=1, is_causal=is_causal), expected)


def test_entmax_is_torch_softmax():
    x = torch.randn(3, 4, 5)
    for dim in (0, 1, -1):
        assert torch.equal(adasplash2.entmax(x, 1, dim), torch.softmax(x, dim))


def test_alpha_towards_1_goes_towards_softmax():
    q, k, v = (torch.randn(1, 2, 9, 8, dtype=torch.float64) for _ in range(3))
    softmax = adasplash2.attention(q, k, v, alpha=1, is_causal=True)
    gaps = [
        (adasplash2.attention(q, k, v, alpha=1 + step, is_causal=True, backend="reference") - softmax).abs().max()
        for step in (1e-2, 1e-3, 1e-4)
    ]
    # The gap is proportional to alpha - 1.
    assert gaps[2] < gaps[1] / 5 < gaps[0] / 25
