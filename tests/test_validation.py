"""Every bad call: the error's type, and a message with the argument, its value and what was expected."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import adasplash2

F32, F64, META = torch.float32, torch.float64, torch.device("meta")


def z(*shape, **options):
    return torch.zeros(shape, **options)


GOOD = {"q": z(2, 4, 5, 8), "k": z(2, 2, 7, 8), "v": z(2, 2, 7, 3)}

# Changed arguments, error, message.
BAD_ATTENTION = {
    "q is a list": (
        {"q": [[1.0]]},
        TypeError,
        "q is a list: expected a torch tensor, NumPy or CuPy array, (batch, heads_q,",
    ),
    "k is None": ({"k": None}, TypeError, "k is a NoneType: expected a torch tensor"),
    "v is a number": ({"v": 1.0}, TypeError, "v is a float: expected a torch tensor"),
    "arrays are mixed": (
        {"k": np.zeros((2, 2, 7, 8), np.float32)},
        TypeError,
        "q is a torch tensor, k is a NumPy array; expected arrays of one library",
    ),
    "three dimensions": (
        {"q": z(2, 5, 8)},
        ValueError,
        "q.shape=(2, 5, 8): expected 4 dimensions, (batch, heads_q, seqlen_q, head_dim)",
    ),
    "five dimensions": ({"v": z(1, 2, 2, 7, 3)}, ValueError, "v.shape=(1, 2, 2, 7, 3): expected 4 dimensions"),
    "integers": (
        {"q": z(2, 4, 5, 8, dtype=torch.int64)},
        TypeError,
        "q.dtype=torch.int64: expected float16, bfloat16,",
    ),
    "complex": ({"v": z(2, 2, 7, 3, dtype=torch.complex64)}, TypeError, "v.dtype=torch.complex64: expected float16,"),
    "two dtypes": (
        {"k": z(2, 2, 7, 8, dtype=F64)},
        TypeError,
        "k.dtype=torch.float64: expected torch.float32, the dtype of q",
    ),
    "sparse": ({"q": z(2, 4, 5, 8).to_sparse()}, TypeError, "q.layout=torch.sparse_coo: expected torch.strided"),
    "two devices": ({"v": z(2, 2, 7, 3, device=META)}, ValueError, "v.device='meta': expected 'cpu'"),
    "batch of k": (
        {"k": z(3, 2, 7, 8)},
        ValueError,
        "k.shape=(3, 2, 7, 8): expected (2, heads_kv, seqlen_k, 8), for q of",
    ),
    "head_dim of k": (
        {"k": z(2, 2, 7, 9)},
        ValueError,
        "k.shape=(2, 2, 7, 9): expected (2, heads_kv, seqlen_k, 8), for q of",
    ),
    "batch of v": (
        {"v": z(1, 2, 7, 3)},
        ValueError,
        "v.shape=(1, 2, 7, 3): expected (2, 2, 7, head_dim_v), for k of shape",
    ),
    "heads of v": (
        {"v": z(2, 4, 7, 3)},
        ValueError,
        "v.shape=(2, 4, 7, 3): expected (2, 2, 7, head_dim_v), for k of shape",
    ),
    "seqlen of v": (
        {"v": z(2, 2, 6, 3)},
        ValueError,
        "v.shape=(2, 2, 6, 3): expected (2, 2, 7, head_dim_v), for k of shape",
    ),
    "heads do not divide": ({"q": z(2, 3, 5, 8)}, ValueError, "heads_q=3: expected a multiple of heads_kv, which is 2"),
    "fewer heads of q": ({"q": z(2, 1, 5, 8)}, ValueError, "heads_q=1: expected a multiple of heads_kv, which is 2"),
    "no heads of k": (
        {"k": z(2, 0, 7, 8), "v": z(2, 0, 7, 3)},
        ValueError,
        "heads_q=4: expected a multiple of heads_kv, which is 0",
    ),
    "head_dim 0": (
        {"q": z(2, 4, 5, 0), "k": z(2, 2, 7, 0)},
        ValueError,
        "q.shape=(2, 4, 5, 0): expected a head_dim (the last) of at least 1",
    ),
    "alpha below 1": ({"alpha": 0.99}, ValueError, "alpha=0.99: expected a number in [1, 2]"),
    "alpha above 2": ({"alpha": 2.5}, ValueError, "alpha=2.5: expected a number in [1, 2]"),
    "alpha NaN": ({"alpha": math.nan}, ValueError, "alpha=nan: expected a number in [1, 2]"),
    "alpha inf": ({"alpha": math.inf}, ValueError, "alpha=inf: expected a number in [1, 2]"),
    "alpha a bool": ({"alpha": True}, TypeError, "alpha=True: expected a number in [1, 2], or an array"),
    "alpha a string": ({"alpha": "1.5"}, TypeError, "alpha='1.5': expected a number in [1, 2], or an array"),
    "alpha None": ({"alpha": None}, TypeError, "alpha=None: expected a number in [1, 2], or an array"),
    "alpha a list": (
        {"alpha": [1.5] * 4},
        TypeError,
        "alpha=[1.5, 1.5, 1.5, 1.5]: expected a number in [1, 2], or an array",
    ),
    "alpha of NumPy": ({"alpha": np.full(4, 1.5)}, TypeError, "alpha=array([1.5, 1.5, 1.5, 1.5]): expected a number"),
    "alpha per heads_kv": (
        {"alpha": z(2) + 1.5},
        ValueError,
        "alpha.shape=(2,): expected (heads_q,), which is (4,), or ()",
    ),
    "alpha per row": (
        {"alpha": z(4, 1) + 1.5},
        ValueError,
        "alpha.shape=(4, 1): expected (heads_q,), which is (4,), or ()",
    ),
    "alpha of integers": ({"alpha": z(4).int() + 2}, TypeError, "alpha.dtype=torch.int32: expected a floating dtype"),
    "alpha elsewhere": ({"alpha": z(4, device=META)}, ValueError, "alpha.device='meta': expected 'cpu'"),
    "an alpha of 1": (
        {"alpha": torch.tensor([1.5, 1.0, 2.0, 2.0])},
        ValueError,
        "alpha has entries from 1.0 to 2.0: expected entries in (1, 2]",
    ),
    "an alpha of 2.25": (
        {"alpha": torch.tensor(2.25)},
        ValueError,
        "alpha has entries from 2.25 to 2.25: expected entries",
    ),
    "an alpha of NaN": (
        {"alpha": torch.tensor([1.5, math.nan, 2.0, 2.0])},
        ValueError,
        "alpha has entries from nan to nan: expected entries in (1, 2]",
    ),
    "is_causal a number": ({"is_causal": 1}, TypeError, "is_causal=1: expected a bool"),
    "return_tau a string": ({"return_tau": "yes"}, TypeError, "return_tau='yes': expected a bool"),
    "tau of softmax": ({"alpha": 1, "return_tau": True}, ValueError, "return_tau=True: expected False at alpha = 1"),
    "scale NaN": ({"scale": math.nan}, ValueError, "scale=nan: expected a finite number"),
    "scale inf": ({"scale": -math.inf}, ValueError, "scale=-inf: expected a finite number"),
    "scale a tensor": ({"scale": torch.tensor(1.0)}, TypeError, "scale=tensor(1.): expected a number"),
    "scale a bool": ({"scale": False}, TypeError, "scale=False: expected a number"),
    "seqlens a list": (
        {"seqlens_k": [7, 7]},
        TypeError,
        "seqlens_k is a list: expected an array of the library of q, (batch,)",
    ),
    "seqlens of NumPy": (
        {"seqlens_q": np.array([5, 5])},
        TypeError,
        "seqlens_q is a ndarray: expected an array of the library",
    ),
    "seqlens too many": (
        {"seqlens_q": z(3).int()},
        ValueError,
        "seqlens_q.shape=(3,): expected (batch,), which is (2,)",
    ),
    "seqlens per head": (
        {"seqlens_k": z(2, 4).int()},
        ValueError,
        "seqlens_k.shape=(2, 4): expected (batch,), which is (2,)",
    ),
    "seqlens floating": ({"seqlens_k": z(2)}, TypeError, "seqlens_k.dtype=torch.float32: expected int32 or int64"),
    "seqlens bytes": ({"seqlens_k": z(2).byte()}, TypeError, "seqlens_k.dtype=torch.uint8: expected int32 or int64"),
    "seqlens elsewhere": (
        {"seqlens_q": z(2, device=META).int()},
        ValueError,
        "seqlens_q.device='meta': expected 'cpu'",
    ),
    "seqlens_q too long": (
        {"seqlens_q": torch.tensor([6, 1])},
        ValueError,
        "seqlens_q has entries from 1 to 6: expected entries from 0 to seqlen_q = 5",
    ),
    "seqlens_k negative": (
        {"seqlens_k": torch.tensor([7, -1])},
        ValueError,
        "seqlens_k has entries from -1 to 7: expected entries from 0 to seqlen_k = 7",
    ),
    "seqlens_k of softmax": (
        {"seqlens_k": torch.tensor([8, 1]), "alpha": 1},
        ValueError,
        "seqlens_k has entries from 1 to 8: expected entries from 0 to seqlen_k = 7",
    ),
    "backend unknown": (
        {"backend": "cuda"},
        ValueError,
        "backend='cuda': expected one of 'auto', 'triton', 'cupy', 'numba',",
    ),
}


@pytest.mark.parametrize("function", [adasplash2.attention, adasplash2.explain])
@pytest.mark.parametrize(("changed", "error", "message"), BAD_ATTENTION.values(), ids=BAD_ATTENTION)
def test_bad_attention(function, changed, error, message):
    with pytest.raises(error) as caught:
        function(**{**GOOD, "backend": "reference", **changed})
    assert type(caught.value) is error
    assert message in str(caught.value)


BAD_SUPPORT = {
    "q is a list": ({"q": []}, TypeError, "q is a list: expected a torch tensor"),
    "alpha 1": (
        {"alpha": 1.0},
        ValueError,
        "alpha=1.0: expected more than 1, up to 2: softmax has no tau, and no zeros",
    ),
    "alpha above 2": ({"alpha": 3}, ValueError, "alpha=3: expected a number in [1, 2]"),
    "block_m 0": ({"block_m": 0}, ValueError, "block_m=0: expected at least 1"),
    "block_n negative": ({"block_n": -64}, ValueError, "block_n=-64: expected at least 1"),
    "block_n floating": ({"block_n": 64.0}, TypeError, "block_n=64.0: expected an int"),
    "block_m a bool": ({"block_m": True}, TypeError, "block_m=True: expected an int"),
    "seqlens out of range": ({"seqlens_k": torch.tensor([8, 8])}, ValueError, "seqlens_k has entries from 8 to 8"),
    "backend unknown": ({"backend": "Numba"}, ValueError, "backend='Numba': expected one of 'auto'"),
}


@pytest.mark.parametrize(("changed", "error", "message"), BAD_SUPPORT.values(), ids=BAD_SUPPORT)
def test_bad_support(changed, error, message):
    with pytest.raises(error) as caught:
        adasplash2.support(**{"q": GOOD["q"], "k": GOOD["k"], "backend": "reference", **changed})
    assert type(caught.value) is error
    assert message in str(caught.value)


X = z(3, 4, 5)
BAD_ENTMAX = {
    "x is a list": ({"x": [1.0, 2.0]}, TypeError, "x is a list: expected a torch tensor, NumPy or CuPy array"),
    "x of integers": ({"x": X.int()}, TypeError, "x.dtype=torch.int32: expected float16, bfloat16, float32 or float64"),
    "dim too large": ({"dim": 3}, ValueError, "dim=3: expected from -3 to 2"),
    "dim too small": ({"dim": -4}, ValueError, "dim=-4: expected from -3 to 2"),
    "dim without dimensions": ({"x": z(), "dim": 1}, ValueError, "dim=1: expected from -1 to 0"),
    "dim floating": ({"dim": 1.0}, TypeError, "dim=1.0: expected an int"),
    "dim None": ({"dim": None}, TypeError, "dim=None: expected an int"),
    "alpha too small": ({"alpha": -1.5}, ValueError, "alpha=-1.5: expected a number in [1, 2]"),
    "alpha a string": ({"alpha": "2"}, TypeError, "alpha='2': expected a number in [1, 2], or an array of the library"),
    "alpha along dim": (
        {"alpha": z(3, 4, 5) + 1.5},
        ValueError,
        "alpha.shape=(3, 4, 5): expected one that broadcasts to (3, 4, 1)",
    ),
    "alpha along another dim": (
        {"alpha": z(4, 1) + 1.5, "dim": 1},
        ValueError,
        "alpha.shape=(4, 1): expected one that broadcasts to (3, 1, 5)",
    ),
    "alpha with more dimensions": (
        {"alpha": z(1, 3, 4, 1) + 1.5},
        ValueError,
        "alpha.shape=(1, 3, 4, 1): expected one that broadcasts to (3, 4, 1)",
    ),
    "alpha of integers": ({"alpha": torch.tensor(2)}, TypeError, "alpha.dtype=torch.int64: expected a floating dtype"),
    "an alpha of 1": (
        {"alpha": torch.tensor(1.0)},
        ValueError,
        "alpha has entries from 1.0 to 1.0: expected entries in (1, 2]",
    ),
    "an alpha of NaN": ({"alpha": torch.tensor(math.nan)}, ValueError, "alpha has entries from nan to nan"),
    "arrays are mixed": (
        {"x": X.numpy(), "alpha": torch.tensor(1.5)},
        TypeError,
        "x is a NumPy array, alpha is a torch tensor; expected arrays of one library",
    ),
    "backend unknown": ({"backend": "none"}, ValueError, "backend='none': expected one of 'auto'"),
}


@pytest.mark.parametrize(("changed", "error", "message"), BAD_ENTMAX.values(), ids=BAD_ENTMAX)
def test_bad_entmax(changed, error, message):
    with pytest.raises(error) as caught:
        adasplash2.entmax(**{"x": X, "backend": "reference", **changed})
    assert type(caught.value) is error
    assert message in str(caught.value)


@pytest.mark.parametrize("alpha", [2, np.float32(1.5), np.int64(2), Fraction(3, 2), 1.0 + 1e-9])
def test_numbers_of_any_kind_are_an_alpha(alpha):
    q, k, v = (torch.randn(tensor.shape) for tensor in GOOD.values())
    out = adasplash2.attention(q, k, v, alpha=alpha, backend="reference")
    assert torch.equal(out, adasplash2.attention(q, k, v, alpha=float(alpha), backend="reference"))


@pytest.mark.parametrize("alpha", [1, 1.5])
@pytest.mark.parametrize(
    ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "head_dim_v"),
    [
        (0, 4, 2, 5, 7, 3),
        (2, 0, 2, 5, 7, 3),
        (2, 0, 0, 5, 7, 3),
        (2, 4, 2, 0, 7, 3),
        (2, 4, 2, 5, 0, 3),
        (2, 4, 2, 0, 0, 3),
        (2, 4, 2, 5, 7, 0),
        (1, 1, 1, 1, 1, 1),
    ],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_length_from_0_up(batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim_v, is_causal, alpha):
    q = torch.randn(batch, heads_q, seqlen_q, 1, requires_grad=True)
    k = torch.randn(batch, heads_kv, seqlen_k, 1, requires_grad=True)
    v = torch.randn(batch, heads_kv, seqlen_k, head_dim_v, requires_grad=True)
    out = adasplash2.attention(q, k, v, is_causal=is_causal, alpha=alpha, backend="reference")
    assert out.shape == (batch, heads_q, seqlen_q, head_dim_v)
    if seqlen_k == 0:
        assert not out.any()
    for tensor, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert grad.shape == tensor.shape
        assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 3), (1,), (2, 3, 4)])
@pytest.mark.parametrize("alpha", [1, 1.5, 2])
def test_entmax_of_every_shape(shape, alpha):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for dim in range(-max(len(shape), 1), max(len(shape), 1)):
        p = adasplash2.entmax(x, alpha, dim, backend="reference")
        assert p.shape == x.shape
        torch.testing.assert_close(p.sum(dim), torch.ones_like(x.sum(dim)) if x.numel() else x.sum(dim))
        (dx,) = torch.autograd.grad(p.sum(), x)
        assert dx.shape == x.shape


def test_no_argument_is_written_to():
    q, k, v = (torch.randn(tensor.shape) for tensor in GOOD.values())
    arguments = [q, k, v, torch.tensor([7, 3]), torch.full((4,), 1.5)]
    copies = [tensor.clone() for tensor in arguments]
    for alpha in (1, arguments[4]):
        adasplash2.attention(q, k, v, seqlens_k=arguments[3], alpha=alpha, backend="reference")
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(arguments, copies, strict=True))
