"""NumPy and CuPy arrays in and out."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch

import adasplash2
from adasplash2.arrays import from_torch, library_of, to_torch


class FakeCuPyArray:
    """What the front touches of a cupy.ndarray, around a CPU tensor."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.strides = tuple(stride * tensor.itemsize for stride in tensor.stride())

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@pytest.fixture
def cupy(monkeypatch):
    module = types.SimpleNamespace(ndarray=FakeCuPyArray, from_dlpack=FakeCuPyArray)
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def numpy_qkv(dtype=np.float32):
    generator = np.random.default_rng(0)
    shapes = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)
    return [generator.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_in_numpy_out(dtype):
    arrays = numpy_qkv(dtype)
    alpha, lengths = np.array([1.5, 1.2, 2.0, 1.7], dtype), np.array([7, 2])
    options: dict[str, Any] = {"is_causal": True, "backend": "reference"}
    out, tau = adasplash2.attention(*arrays, alpha=alpha, seqlens_k=lengths, return_tau=True, **options)
    expected, expected_tau = adasplash2.attention(
        *map(torch.tensor, arrays),
        alpha=torch.tensor(alpha),
        seqlens_k=torch.tensor(lengths),
        return_tau=True,
        **options,
    )
    assert isinstance(out, np.ndarray)
    assert isinstance(tau, np.ndarray)
    np.testing.assert_array_equal(out, expected.numpy())
    np.testing.assert_array_equal(tau, expected_tau.numpy())
    assert (out.dtype, out.flags.writeable) == (dtype, True)
    np.testing.assert_array_equal(
        adasplash2.attention(*arrays, alpha=1), adasplash2.attention(*map(torch.tensor, arrays), alpha=1).numpy()
    )


def test_numpy_for_the_others():
    q, k, v = numpy_qkv()
    assert adasplash2.explain(q, k, v, backend="reference").chosen == "reference"
    stats = adasplash2.support(q, k, block_m=2, block_n=2, backend="reference")
    expected = adasplash2.support(torch.tensor(q), torch.tensor(k), block_m=2, block_n=2, backend="reference")
    for name in ("tau", "size", "block_map"):
        assert isinstance(getattr(stats, name), np.ndarray)
        np.testing.assert_array_equal(getattr(stats, name), getattr(expected, name).numpy())
    assert stats.element_density == expected.element_density
    for alpha in (1, 1.5, np.full((4, 1, 1), 1.5)):
        p = adasplash2.entmax(q, alpha, -2, backend="reference")
        assert isinstance(p, np.ndarray)
        same_alpha = torch.tensor(alpha) if isinstance(alpha, np.ndarray) else alpha
        expected_p = adasplash2.entmax(torch.tensor(q), same_alpha, -2, backend="reference")
        np.testing.assert_array_equal(p, expected_p.numpy())


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        read_only,
        lambda a: a.T,
        lambda a: a[:, ::2],
        lambda a: a[1:],
        lambda a: np.broadcast_to(a[0], (3, 4)),
        lambda a: a[:0],
    ],
    ids=["plain", "read-only", "transposed", "step", "offset", "broadcast", "empty"],
)
def test_views_share_their_memory(view):
    array = view(np.arange(12.0).reshape(3, 4))
    library, (tensor, number) = to_torch(x=array, alpha=1.5)
    assert (library, number) == ("numpy", 1.5)
    np.testing.assert_array_equal(tensor.numpy(), array)
    if array.size:
        assert tensor.data_ptr() == array.ctypes.data
        assert np.shares_memory(from_torch(tensor, "numpy"), array)


def test_negative_strides_are_copied():
    array = np.arange(12.0).reshape(3, 4)[::-1, ::-1]
    _, (tensor,) = to_torch(x=array)
    np.testing.assert_array_equal(tensor.numpy(), array)
    p = adasplash2.entmax(array, backend="reference")
    np.testing.assert_array_equal(p, adasplash2.entmax(array.copy(), backend="reference"))


def test_a_library_that_exports_nothing_read_only_is_served_with_a_copy(monkeypatch):
    array = read_only(np.arange(4.0))
    refused = []

    class OldArray(np.ndarray):
        def __dlpack__(self, **options):
            if not self.flags.writeable:
                refused.append(True)
                raise BufferError("Cannot export readonly array")
            return super().__dlpack__(**options)

    _, (tensor,) = to_torch(x=array.view(OldArray))
    assert refused
    np.testing.assert_array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("dtype", [">f4", object, np.longdouble])
def test_a_dtype_that_torch_does_not_know(dtype):
    with pytest.raises(TypeError, match=r"^x has dtype .*; expected one that torch knows \(DLPack only supports"):
        adasplash2.entmax(np.ones((2, 3)).astype(dtype))


def test_cupy_arrays_come_back_as_they_came(cupy):
    q, k, v = (torch.tensor(array) for array in numpy_qkv())
    alpha = torch.full((4,), 1.5)
    out, tau = adasplash2.attention(
        *map(FakeCuPyArray, (q, k, v)), alpha=FakeCuPyArray(alpha), backend="reference", return_tau=True
    )
    expected, expected_tau = adasplash2.attention(q, k, v, alpha=alpha, backend="reference", return_tau=True)
    assert isinstance(out, FakeCuPyArray)
    assert torch.equal(out.tensor, expected)
    assert torch.equal(tau.tensor, expected_tau)
    p = adasplash2.entmax(FakeCuPyArray(q), backend="reference")
    assert torch.equal(p.tensor, adasplash2.entmax(q, backend="reference"))


def test_mixed_libraries_are_refused(cupy):
    q, k, v = numpy_qkv()
    for mixed, text in (
        ((q, torch.tensor(k), v), "q is a NumPy array, k is a torch tensor; expected arrays of one library"),
        ((torch.tensor(q), torch.tensor(k), v), "q is a torch tensor, v is a NumPy array"),
        ((FakeCuPyArray(torch.tensor(q)), k, v), "q is a CuPy array, k is a NumPy array"),
    ):
        with pytest.raises(TypeError, match=text):
            adasplash2.attention(*mixed, backend="reference")
    with pytest.raises(TypeError, match="q is a NumPy array, seqlens_k is a torch tensor"):
        adasplash2.attention(q, k, v, seqlens_k=torch.tensor([7, 7]), backend="reference")


def test_a_library_that_is_not_loaded_is_not_asked(monkeypatch):
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert library_of(FakeCuPyArray(torch.zeros(1))) is None
    assert "cupy" not in sys.modules
