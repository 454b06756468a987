"""entmax as a drop-in: any dimension, any alpha that broadcasts, against the functions of the package entmax."""

from __future__ import annotations

import entmax as package
import pytest
import torch

import adasplash2


def scores(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()


def assert_same(ours, theirs, *inputs):
    torch.testing.assert_close(ours, theirs)
    dp = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2), dtype=theirs.dtype)
    for one, other in zip(torch.autograd.grad(ours, inputs, dp), torch.autograd.grad(theirs, inputs, dp), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dim", [-1, 0, 1, -2])
class TestDropIn:
    def test_entmax15(self, dim):
        x = scores(4, 5, 6)
        assert_same(adasplash2.entmax(x, 1.5, dim, backend="reference"), package.entmax15(x, dim), x)

    def test_sparsemax(self, dim):
        x = scores(4, 5, 6)
        assert_same(adasplash2.entmax(x, 2, dim, backend="reference"), package.sparsemax(x, dim), x)

    def test_entmax_bisect(self, dim):
        x = scores(4, 5, 6)
        for alpha in (1.2, 1.75):
            ours = adasplash2.entmax(x, alpha, dim, backend="reference")
            assert_same(ours, package.entmax_bisect(x, alpha, dim), x)

    @pytest.mark.parametrize("per", ["call", "row", "slice"])
    def test_entmax_bisect_with_an_alpha_that_learns(self, dim, per):
        x = scores(4, 5, 6)
        shape = {"call": [], "row": list(x.shape), "slice": [1, 1, 1]}[per]
        if per != "call":
            shape[dim] = 1
        if per == "slice":
            other = (dim + 1) % 3
            shape[other] = x.shape[other]
        generator = torch.Generator().manual_seed(1)
        alpha = (1.1 + 0.8 * torch.rand(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        ours = adasplash2.entmax(x, alpha, dim, backend="reference")
        # Theirs takes an alpha with all of x's dimensions.
        theirs = package.entmax_bisect(x, alpha.expand([n if i != dim % 3 else 1 for i, n in enumerate(x.shape)]), dim)
        assert_same(ours, theirs, x, alpha)


def test_a_vector():
    x = scores(7)
    assert_same(adasplash2.entmax(x, backend="reference"), package.entmax15(x), x)


def test_an_alpha_of_fewer_dimensions():
    x = scores(4, 5, 6)
    alpha = torch.tensor([[1.2], [1.4], [1.6], [1.8], [2.0]], dtype=torch.float64)
    p = adasplash2.entmax(x, alpha, backend="reference")
    for i, value in enumerate(alpha[:, 0].tolist()):
        torch.testing.assert_close(p[:, i], adasplash2.entmax(x[:, i], value, backend="reference"))


def test_a_masked_score_has_no_weight():
    x = torch.tensor([1.0, -torch.inf, 0.5, -torch.inf])
    for alpha in (1, 1.5, 2):
        p = adasplash2.entmax(x, alpha, backend="reference")
        assert p[[1, 3]].tolist() == [0, 0]
        torch.testing.assert_close(p.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtype_and_shape_are_those_of_x(dtype):
    x = torch.randn(3, 4, 5).to(dtype).transpose(0, 2).requires_grad_()
    p = adasplash2.entmax(x, dim=1, backend="reference")
    assert (p.dtype, p.shape) == (dtype, x.shape)
    (dx,) = torch.autograd.grad(p.sum(), x)
    assert (dx.dtype, dx.shape) == (dtype, x.shape)
