"""The Numba backend's own parts: micro-kernels, bounds, initialisations, cache and memory."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import adasplash2
from adasplash2 import testing
from adasplash2.contract import AttentionRequest

numba = pytest.importorskip("numba", reason="needs numba")

from adasplash2.backends.numba_cpu import NumbaBackend, kernels, simd  # noqa: E402 - after the check for numba

FLOATS = (np.float32, np.float64)


@numba.njit
def call_scan_tile(q, k, n_pairs, scores, stride):
    simd.scan_tile(q, k, n_pairs, scores, stride)


@numba.njit
def call_scan_row(scores, n, threshold, base, keys, maxima):
    return simd.scan_row(scores, n, threshold, base, keys, maxima)


@numba.njit
def call_gemm_tile(a, a_row, a_col, x, x_stride, n, c, c_stride, accumulate, like):
    simd.gemm_tile(a, a_row, a_col, x, x_stride, n, c, c_stride, accumulate, like)


@numba.njit
def call_rows(x, rows, stride, keys, n, dim, dots, weights, out, like):
    simd.dot_rows(x, rows, stride, keys, n, dim, dots, like)
    simd.accumulate_rows(rows, stride, keys, weights, n, dim, out, like)


@numba.njit
def call_power(src, n, exponent, out, tau):
    simd.power_row(src, n, exponent, out)
    return simd.power_sums(src, n, tau, exponent)


@numba.njit
def call_maximum(values, n, like):
    return simd.maximum(values, n, like)


@numba.njit
def call_norm(row, dim, scratch, like):
    return kernels.row_norm(row, dim, scratch, scratch + 8, 4, like)


def address(array: np.ndarray) -> int:
    return array.ctypes.data


@given(pairs=st.integers(1, 130), seed=st.integers(0, 2**32 - 1))
def test_scan_tile_is_exact(pairs, seed):
    rng = np.random.default_rng(seed)
    q = rng.integers(-3000, 3000, (pairs, simd.MR, 2)).astype(np.int16)
    k = rng.integers(-3000, 3000, (pairs, simd.NR, 2)).astype(np.int16)
    scores = np.zeros((simd.MR, simd.NR + 3), np.int32)
    call_scan_tile(address(q), address(k), pairs, address(scores), scores.strides[0])
    expected = np.einsum("prt,pnt->rn", q.astype(np.int64), k.astype(np.int64))
    np.testing.assert_array_equal(scores[:, : simd.NR], expected)
    assert not scores[:, simd.NR :].any()


@given(n=st.integers(0, 300), share=st.sampled_from([0.0, 0.02, 0.3, 1.0]), seed=st.integers(0, 2**32 - 1))
def test_scan_row_finds_what_is_above(n, share, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-(2**31), 2**31, 384).astype(np.int32)
    threshold = int(np.quantile(scores[:n], 1 - share)) if n else 0
    keys, maxima = np.full(n + 8, -1, np.int32), np.zeros(simd.GROUPS, np.int32)
    found = call_scan_row(address(scores), n, threshold, 7, address(keys), address(maxima))
    np.testing.assert_array_equal(keys[:found], 7 + np.flatnonzero(scores[:n] > threshold))
    # The groups are a matter of the vectors; that each maximum is a score, and the largest among them, is what counts.
    assert set(maxima) <= {*scores[:n], -(2**31)}
    assert maxima.max() == (scores[:n].max() if n else -(2**31))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("transposed", [False, True])
@given(n=st.integers(0, 70), accumulate=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_gemm_tile(dtype, transposed, n, accumulate, seed):
    rng = np.random.default_rng(seed)
    columns = simd.NR * 4 // np.dtype(dtype).itemsize
    a = rng.standard_normal((n, simd.MR) if transposed else (simd.MR, n)).astype(dtype)
    a_row, a_col = a.strides[::-1] if transposed else a.strides
    x, c = rng.standard_normal((n, columns)).astype(dtype), rng.standard_normal((simd.MR, columns)).astype(dtype)
    factor = a.T if transposed else a
    expected = factor.astype(np.float64) @ x + (c if accumulate else 0)
    call_gemm_tile(
        address(a), a_row, a_col, address(x), x.strides[0], n, address(c), c.strides[0], int(accumulate), dtype(0)
    )
    bound = np.finfo(dtype).eps * (n + 1) * (np.abs(factor) @ np.abs(x) + np.abs(expected) + 1)
    assert (np.abs(c - expected) <= bound).all()


@pytest.mark.parametrize("dtype", FLOATS)
@given(n=st.integers(0, 20), dim=st.integers(1, 270), seed=st.integers(0, 2**32 - 1))
def test_rows_of_any_width(dtype, n, dim, seed):
    rng = np.random.default_rng(seed)
    rows = np.full((40, dim + 5), np.nan, dtype)  # what lies between the rows must not be read into the result
    rows[:, :dim] = rng.standard_normal((40, dim))
    x, keys = rng.standard_normal(dim).astype(dtype), rng.integers(0, 40, n).astype(np.int32)
    weights, dots = rng.standard_normal(n).astype(dtype), np.zeros(n, dtype)
    out = np.zeros(dim + 8, dtype)
    out[dim:] = 7
    call_rows(
        address(x), address(rows), rows.strides[0], address(keys), n, dim, address(dots), address(weights),
        address(out), dtype(0),
    )  # fmt: skip
    picked = rows[keys, :dim].astype(np.float64)
    eps = np.finfo(dtype).eps
    assert (np.abs(dots - picked @ x) <= eps * dim * (np.abs(picked) @ np.abs(x))).all()
    assert (np.abs(out[:dim] - weights @ picked) <= eps * (n + 1) * (np.abs(weights) @ np.abs(picked))).all()
    assert (out[dim:] == 7).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("exponent", [0.0, 0.01, 0.5, 1.0, 1.7, 2.0, 5.0, 60.0])
def test_powers(dtype, exponent):
    u = np.concatenate([np.linspace(-0.2, 1, 777), [1e-6, 1.0]]).astype(dtype)
    out = np.zeros_like(u)
    lower, upper = call_power(address(u), u.size, dtype(exponent), address(out), dtype(0))
    alive = u > 0
    expected = np.where(alive, np.where(alive, u, 1).astype(np.float64) ** np.float64(dtype(exponent)), 0)
    # Of a power, the relative error is that of the logarithm times the exponent: 2 eps per binary digit of the result.
    digits = np.abs(exponent * np.log2(np.where(alive, u, 1)))
    assert (np.abs(out - expected) <= np.finfo(dtype).eps * (4 + 2 * digits) * expected + np.finfo(dtype).tiny).all()
    if exponent >= 1:
        below = np.where(alive, np.where(alive, u, 1).astype(np.float64) ** (exponent - 1), 0)
        for total, terms in ((lower, below), (upper, expected)):
            error = float(np.finfo(dtype).eps) * (4 + 2 * digits + np.log2(u.size)) @ terms
            assert abs(total - terms.sum()) <= error


@pytest.mark.parametrize("dtype", FLOATS)
def test_maximum(dtype):
    values = np.random.default_rng(0).standard_normal(101).astype(dtype)
    for n in (1, 7, 8, 100, 101):
        assert call_maximum(address(values), n, dtype(0)) == values[:n].max()
    values[50] = np.nan
    assert math.isnan(call_maximum(address(values), 101, dtype(0)))
    assert call_maximum(address(values), 0, dtype(0)) == -np.inf


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_norm_leaves_the_range_of_no_finite_row(scale):
    row = (np.random.default_rng(0).standard_normal(67) * scale).astype(np.float32)
    scratch = np.zeros(2, np.int64)
    norm = call_norm(address(row), row.size, address(scratch), np.float32(0))
    assert norm == pytest.approx(np.linalg.norm(row.astype(np.float64)), rel=1e-5)
    row[3] = np.inf
    assert not math.isfinite(call_norm(address(row), row.size, address(scratch), np.float32(0)))


@given(
    dim=st.integers(1, 256),
    outliers=st.sampled_from([0.0, 10.0, 1e4]),
    seed=st.integers(0, 2**32 - 1),
)
def test_scan_error_bounds_every_score(dim, outliers, seed):
    """An int16 score is never further from the score than the bound by which candidates are kept."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((8, dim)), rng.standard_normal((64, dim))
    k[:, 0] *= 1 + outliers
    k[0] *= 1 + outliers
    norm = kernels.QUANTISED_NORM
    q_step = np.linalg.norm(q, axis=1, keepdims=True) / norm
    k_step = np.linalg.norm(k, axis=1).max() / norm
    scores = np.rint(q / q_step).astype(np.int64) @ np.rint(k / k_step).astype(np.int64).T
    assert np.abs(scores).max() < 2**31
    assert (np.abs(scores * q_step * k_step - q @ k.T) <= kernels.scan_error.py_func(dim) * q_step * k_step).all()


@given(
    r=st.sampled_from([1.0, 2.0, 10.0, 1 / 0.3]),
    n=st.integers(1, 400),
    spread=st.sampled_from([0.0, 0.01, 1.0, 100.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_bounds_of_tau_hold(r, n, spread, seed):
    """Newton on the norm never passes tau, and a histogram of the scores bounds it from below."""
    z = np.random.default_rng(seed).standard_normal(n) * spread
    low, high = z.max() - 1, z.max()
    for _ in range(100):
        tau = (low + high) / 2
        low, high = (tau, high) if (np.maximum(z - tau, 0) ** r).sum() >= 1 else (low, tau)
    slack = 1e-12 * (1 + np.abs(z).max())
    previous = z.max() - 1
    for steps in range(6):
        bound = refine(z, z.max() - 1, r, steps)
        assert previous - slack <= bound <= low + slack
        previous = bound
    assert refine(z, z.max() - 1, r, 50) == pytest.approx(low, abs=slack * 10)
    assert histogram(z, r) <= low + slack


@numba.njit
def refine_at(z, n, lower, r, steps):
    return kernels.refine(z, n, lower, r, steps, 0.0, np.float64(0))


@numba.njit
def histogram_at(z, n, r):
    return kernels.histogram_bound(z, n, r, 8, np.float64(0))


def refine(z, lower, r, steps):
    return refine_at(address(z), z.size, lower, r, steps)


def histogram(z, r):
    return histogram_at(address(z), z.size, r)


@pytest.mark.parametrize("kind", testing.INPUT_KINDS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_histogram_initialisation_gives_the_same_attention(kind, is_causal):
    q, k, v, dout = testing.make_inputs(kind, batch=1, heads_q=2, heads_kv=1, seqlen_q=150, seqlen_k=1200, head_dim=40)
    request = AttentionRequest(q, k, v, 40**-0.5, is_causal=is_causal, save_for_backward=True)
    testing.assert_attention(NumbaBackend("histogram"), request, dout)


@pytest.mark.parametrize("std", [1.0, 0.02], ids=["sparse", "dense"])
def test_memory_is_linear_in_the_length(std):
    """At 16384 keys one head of scores would take a gigabyte."""
    script = f"""
import resource, torch, adasplash2
torch.manual_seed(0)
def run(n):
    q, k, v = (torch.randn(1, 1, n, 32) * s for s in ({std}, 1, 1))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    adasplash2.attention(q, k, v, is_causal=True, backend="numba").sum().backward()
run(512)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(16384)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    megabytes = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)
    assert megabytes < 250


ATTENTION = """
for case in (Case(70, 130, head_dim=40, is_causal=True), Case(70, 130, head_dim=40, kind="narrow")):
    request, dout = case.build(torch.device("cpu"))
    assert_attention(BACKEND, request, dout)
"""
ENTMAX = """
request, _ = EntmaxCase(70, 130).build(torch.device("cpu"))
assert_close(BACKEND.entmax(request), entmax_truth(request), "p")
"""


# A narrower set, and what is compiled the soonest on none: attention takes its time.
@pytest.mark.parametrize(
    ("features", "check", "lanes"), [("+avx2,+fma", ATTENTION, 8), ("", ENTMAX, 4)], ids=["avx2", "baseline"]
)
def test_instruction_sets_that_the_host_goes_beyond(tmp_path, features, check, lanes):
    """Kernels of the host's vectors, compiled for a target without them, ended the process."""
    if features and platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip(f"{features} are features of x86-64")
    script = f"""
import torch
from strategies import Case, EntmaxCase
from adasplash2.backends.numba_cpu import BACKEND, simd
from adasplash2.testing import assert_attention, assert_close, entmax_truth
{check}
print(simd.LANES)
"""
    target = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    environment = {**os.environ, **target, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == lanes


def test_cache_follows_an_edit_of_any_file(tmp_path):
    """Compiles once, then not again, then again after an edit of a file that the compiled one only imports."""
    front = Path(adasplash2.__file__).parent
    package = tmp_path / "adasplash2"
    shutil.copytree(front, package, ignore=shutil.ignore_patterns("__pycache__", "backends"))
    backends = Path(kernels.__file__).parents[1]
    shutil.copytree(backends, package / "backends", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    script = "import torch, adasplash2; adasplash2.entmax(torch.randn(3, 9), 1.5, backend='numba')"

    def compiles():
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, cwd=tmp_path)
        return done.stderr.count("compiling the CPU kernels")

    assert [compiles(), compiles()] == [1, 0]
    with (package / "backends" / "numba_cpu" / "simd.py").open("a") as file:
        file.write("# edited\n")
    assert compiles() == 1


def test_small_and_large_calls_on_any_number_of_threads():
    q, k, v, dout = testing.make_inputs("iid", batch=1, heads_q=1, heads_kv=1, seqlen_q=700, seqlen_k=700, head_dim=64)
    request = AttentionRequest(q, k, v, 0.125, save_for_backward=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(testing.run_attention(NumbaBackend(), request, dout))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for quantity, value in results[0].items():
            assert torch.equal(value, other[quantity]), quantity
