"""The benchmarks run, measure what they say, and give no time to a provider that is wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adasplash2
from adasplash2.bench import measure as timing

# Scripts, started as files: their folder is no package.
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import cases
import first_call
import gate
import initialisation
import kernels
import measure
import report
import run
from providers import Provider, Ready, providers
from stamp import stamp

CPU = torch.device("cpu")
TINY = cases.Case("iid", 64, heads=2)


@pytest.fixture(scope="module")
def results_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one tiny case."""
    path = tmp_path_factory.mktemp("results") / "tiny-2026-01-01.json"
    two = ("--provider", "numba", "--provider", "sdpa-f32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "CASES", (TINY,))
        assert run.main([*two, "--mode", "fwd_bwd", "--seconds", "0", "--json", str(path)]) == 0
    return path


def test_results_file(results_file: Path) -> None:
    found = json.loads(results_file.read_text())
    assert {"commit", "date", "threads", "info"} <= found["stamp"].keys()
    assert found["stamp"]["info"]["torch"] == torch.__version__
    (case,) = found["cases"]
    q, k, _ = TINY.inputs(CPU)[0]
    stats = adasplash2.support(q, k, is_causal=True, backend="reference")
    assert case["name"] == TINY.name
    assert case["support"]["elements"] == pytest.approx(stats.element_density)
    rows = {row["provider"]: row for row in found["rows"]}
    assert rows.keys() == {"numba", "sdpa-f32"}
    for row in rows.values():
        assert (row["status"], row["mode"], row["rounds"]) == ("timed", "fwd_bwd", 5)
        median, q20, q80 = row["ms"]
        assert 0 < q20 <= median <= q80
        assert row["against"] == "sdpa-f32"
    assert rows["sdpa-f32"]["speedup"] == [1, 1, 1]


def test_report_shows_the_results(results_file: Path, tmp_path: Path) -> None:
    results = report.Results.load(results_file)
    images = report.plots(results)
    assert all(image.read_bytes().startswith(b"\x89PNG") for image in images.values())
    assert images.keys() == {"Speed over length"}
    speed = report._times(results.rows[TINY.name, "numba", "fwd_bwd"])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.main([str(results_file), "--readme", str(readme)])
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in text
    assert speed in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="benchmarks:begin"):
        report.main([str(results_file), "--readme", str(readme)])


def right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return adasplash2.attention(q, k, v, is_causal=True, scale=TINY.scale, backend="reference")


def scaled_gradient(x: Tensor) -> Tensor:
    return x.detach() + 1.001 * (x - x.detach())


def one_nan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = right(q, k, v).clone()
    out[0, 1, 17, 3] = torch.nan
    return out


def raises(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("out of order")


WRONG: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "out off by 0.1 %": (lambda q, k, v: 1.001 * right(q, k, v), "refused", "out"),
    "dq off by 0.1 %": (lambda q, k, v: right(scaled_gradient(q), k, v), "refused", "dq"),
    "dk off by 0.1 %": (lambda q, k, v: right(q, scaled_gradient(k), v), "refused", "dk"),
    "dv off by 0.1 %": (lambda q, k, v: right(q, k, scaled_gradient(v)), "refused", "dv"),
    "no mask": (lambda q, k, v: adasplash2.attention(q, k, v, backend="reference"), "refused", "out"),
    "another head": (lambda q, k, v: right(q, k.flip(1), v), "refused", "out"),
    "one NaN": (one_nan, "refused", "not finite"),
    "half precision": (lambda q, k, v: right(q.half(), k.half(), v.half()), "refused", "dtype"),
    "raises": (raises, "failed", "out of order"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_gate_refuses_a_wrong_provider(fault: str) -> None:
    wrong, status, reason = WRONG[fault]
    competitors = [
        Provider("right", "", "attention", "entmax", lambda case, arguments: Ready(right)),
        Provider("wrong", "", "attention", "entmax", lambda case, arguments: Ready(wrong)),
    ]
    rows = run.time_case(TINY, competitors, timing.MODES, CPU, seconds=0, min_rounds=1)
    assert [(row["provider"], row["status"]) for row in rows] == [("right", "timed")] * 2 + [("wrong", status)] * 2
    for row in rows[2:]:
        assert "ms" not in row
        assert reason in row["reason"]


def test_gate_looks_at_windows_of_long_sequences() -> None:
    """A fault in few rows of one head, anywhere a window lies, is found; the right provider passes."""
    case = cases.Case("iid", 1024, heads=2)
    checks = gate.make_gate(case, *case.inputs(CPU))
    assert checks.rows.shape == (2, 64)
    checks.check(right, "entmax", backward=True)

    def late_fault(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return right(q, k, v) * torch.where(torch.arange(1024) == 1000, 1.001, 1)[:, None]

    with pytest.raises(AssertionError, match="out"):
        checks.check(late_fault, "entmax", backward=False)


@pytest.mark.parametrize("scale", [TINY.scale, 1.001 * TINY.scale])
def test_gate_of_softmax(scale: float) -> None:
    checks = gate.make_gate(TINY, *TINY.inputs(CPU))

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)

    if scale == TINY.scale:
        checks.check(softmax, "softmax", backward=True)
    else:
        with pytest.raises(AssertionError, match="norm of the error"):
            checks.check(softmax, "softmax", backward=True)


@pytest.mark.parametrize("factor", [1, 1.001])
def test_gate_of_entmax(factor: float) -> None:
    case = cases.Case("iid", 32, op="entmax")
    checks = gate.make_gate(case, *case.inputs(CPU))

    def forward(x: Tensor) -> Tensor:
        return factor * adasplash2.entmax(x, backend="reference")

    if factor == 1:
        checks.check(forward, "entmax", backward=True)
    else:
        with pytest.raises(AssertionError, match="p"):
            checks.check(forward, "entmax", backward=True)


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = timing.interleaved(calls, CPU, seconds=0, min_rounds=3)
    assert "".join(order) == "abc" + "cba" + "abc"
    assert {name: len(own) for name, own in times.items()} == dict.fromkeys("abc", 3)


def test_ratio_is_taken_inside_a_round() -> None:
    """The machine slows down tenfold on the way: the ratio of each round does not notice."""
    assert timing.ratio([2, 20, 200], [1, 10, 100]) == (2, 2, 2)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of the resident set")
def test_peak_memory_sees_a_temporary() -> None:
    size = 1 << 26
    peak = measure.peak_memory(lambda: torch.zeros(size, dtype=torch.int8).add_(1)[0], CPU)
    if peak is None:
        pytest.skip("this system does not let a process reset its peak")
    assert size - measure.RSS_ERROR <= peak < 2 * size


@pytest.mark.parametrize("item", initialisation.INITIALISATIONS, ids=lambda item: item.label)
def test_initialisations_are_lower_bounds(item: initialisation.Initialisation) -> None:
    z = initialisation.scaled_scores("topics")[:32]
    tau = initialisation.exact_tau(z)
    rounding = 4 * torch.finfo(z.dtype).eps * z.abs().amax()
    u = (z - tau).clamp(min=0)
    assert ((u**2).sum(-1) - 1).abs().max() <= z.shape[-1] * rounding
    start = item.tau(z)
    assert (start <= tau + rounding).all()
    assert (start >= initialisation.largest_minus_one(z) - rounding).all()
    step = initialisation.newton_step(z, start)
    assert (step >= start - rounding).all()
    assert (step <= tau + rounding).all()


def test_captured_inputs() -> None:
    assert cases.CAPTURED.stat().st_size <= 2_000_000
    made = cases.captured(batch=2, heads_q=8, seqlen_q=2048, head_dim=64)
    assert made.q.shape == made.k.shape == made.v.shape == made.dout.shape == (2, 8, 2048, 64)
    assert made.k[0, :, :1024].equal(made.k[1, :, 1024:])
    assert not made.k[0, 0].equal(made.k[0, 1])
    with pytest.raises(ValueError, match="head_dim=32: expected 64"):
        cases.captured(batch=1, heads_q=1, seqlen_q=8, head_dim=32)


def test_cases_are_found_by_pattern() -> None:
    assert [case.name for case in cases.find(["iid-512-*-bf16"])] == ["iid-512-d64-causal-bf16"]
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)
    assert 0 < len(cases.find([], quick=True)) < len(cases.CASES)
    with pytest.raises(ValueError, match="case='nothing\\*': matches none"):
        cases.find(["nothing*"])


def test_first_calls_of_a_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_call, "CHILD", first_call.CHILD.replace("1024", "64"))
    path = tmp_path / "first.json"
    first_call.main(["cpu", "--backend", "reference", "--dtype", "float64", "--json", str(path)])
    found = json.loads(path.read_text())
    assert (found["backend"], found["dtype"]) == ("reference", "float64")
    assert found["first_calls"].keys() == {"cold", "warm"}
    for seconds in found["first_calls"].values():
        assert seconds.keys() == {"import", "first", "second"}
        assert all(value > 0 for value in seconds.values())


def test_host_times_are_reported(tmp_path: Path) -> None:
    for name, first in (("", 7.0), ("-slow", 9.0)):
        times = {"import": 0.01, "first": first, "second": 0.02}
        setting = {"backend": f"one{name}", "dtype": "float32"}
        found = {"stamp": stamp(CPU), **setting, "first_calls": {"cold": times, "warm": {**times, "first": 0.5}}}
        (tmp_path / f"a-2026-01-01-first-call{name}.json").write_text(json.dumps(found))
    spreads = {"front": (30, 20, 40), "backend": (31, 20, 40), "overhead": (-1, -2, 3)}
    modes = {"forward": {name: timing.Spread(*own)._asdict() for name, own in spreads.items()}}
    found = {"stamp": stamp(CPU), "backend": "one", "microseconds": modes}
    (tmp_path / "a-2026-01-01-overhead.json").write_text(json.dumps(found))
    text = report.host(tmp_path)
    assert "| one | float32 | 7 | 0.5 | 0.02 |" in text
    assert "| one-slow | float32 | 9 | 0.5 | 0.02 |" in text
    assert "| one | forward | 30 | 31 | -1 (-2 to 3) |" in text
    assert report.host(tmp_path / "nothing") == ""


@pytest.fixture(scope="module")
def training_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run at a tiny size, in which one contestant fails."""
    pytest.importorskip("transformers")
    import training

    def fails(case: cases.Case, arguments: tuple[Tensor, ...]) -> Ready:
        return Ready(raises)

    path = tmp_path_factory.mktemp("results") / "tiny-2026-01-01-training.json"
    sizes = ("--seqlen", "64", "--layers", "1", "--heads", "2", "--head-dim", "32", "--steps", "2")
    with pytest.MonkeyPatch.context() as patch:
        known = [provider for provider in providers() if provider.name in ("sdpa-bf16", "numba")]
        peer = Provider("adasplash", "adasplash", "attention", "rough entmax", fails)
        patch.setattr(training, "providers", lambda: [*known, peer])
        arguments = ("--attention", "sdpa-bf16", "numba", "adasplash", "--seconds", "0.01", "--json", str(path))
        assert training.main([*sizes, *arguments]) == 1
    return path


def test_training_file(training_file: Path) -> None:
    found = json.loads(training_file.read_text())
    assert found["setting"]["seqlen"] == 64
    assert [state["steps"] for state in found["states"]] == [0, 2]
    for state in found["states"]:
        (layer,) = state["support"]
        assert 1 < layer["size"] <= 32.5
        softmax, entmax, peer = state["rows"]
        assert (peer["status"], peer["reason"]) == ("failed", "RuntimeError: out of order")
        assert (softmax["status"], entmax["status"]) == ("timed", "timed")
        assert softmax["speedup"] == [1, 1, 1]
        assert any("scaled_dot_product" in operator for operator in softmax["operators"])
        assert entmax["operators"] == ["adasplash2::attention", "adasplash2::attention_backward"]
        assert entmax["tokens_per_second"][0] == pytest.approx(1e3 * 64 / entmax["ms"][0], rel=1e-3)
        # Equal weights, and another attention: nearly the same loss, but not the same.
        assert softmax["loss"] == pytest.approx(entmax["loss"], rel=0.01)
        assert softmax["loss"] != entmax["loss"]
    before, after = (state["rows"][1]["loss"] for state in found["states"])
    assert after < before


def test_training_is_reported(training_file: Path, tmp_path: Path) -> None:
    text = report.training(training_file.parent)
    speed = json.loads(training_file.read_text())["states"][1]["rows"][1]["speedup"][0]
    assert "| after 2 steps with entmax | adasplash2 numba |" in text
    assert f"{speed:.2f}" in text
    assert "`aten::_scaled_dot_product" in text
    assert report.training(tmp_path) == ""


def test_kernels_are_reported(tmp_path: Path) -> None:
    (case,) = cases.find(["topics-8192-d64-causal-b1h16-bf16-cuda"], device="cuda")
    times = {"entmax_attn_fwd_scan": 200.0, "entmax_attn_bwd_dq": 100.0}
    by_entries = {"entmax_attn_bwd_dq_entries": 60.0}
    rows = [
        {"provider": "triton", "label": "ours", "kernels": times, "total": 300.0},
        {"provider": "cupy", "label": "second", "kernels": times | by_entries, "total": 360.0},
        {"provider": "fa2", "label": "theirs", "kernels": {"flash_fwd_kernel": 600.0}, "total": 600.0},
        {"provider": "cudnn", "label": "nobody", "reason": "RuntimeError: none"},
    ]
    found = {
        "stamp": stamp(CPU) | {"device": "A GPU"},
        "cases": [case.describe() | {"support": {"blocks": 0.25}, "rows": rows}],
        "decoding": [{"shape": [8, 16, 4, 1, 65536, 128], "rows": rows}],
    }
    (tmp_path / "a-gpu-2026-01-01-kernels.json").write_text(json.dumps(found))
    text = report.kernels(tmp_path)
    pairs = 16 * 8192 * 8193 / 2
    scan, dq = 2 * 64 * pairs / 200e-6 / 1e12, 0.25 * 4 * 2 * 64 * pairs / 100e-6 / 1e12
    assert f"| topics, 64, 8192, 25% | ours | 200 ({scan:.0f}) |  |  | 100 ({dq:.0f}) |  |  |  | 300 | 0.50 |" in text
    # Of entries no one knows how many products a kernel could not do without.
    assert f"| topics, 64, 8192, 25% | second | 200 ({scan:.0f}) |  |  | 100 |  | 60 |  | 360 | 0.60 |" in text
    assert "| 8, 16:4, 1 x 65536, 128 | ours | 300 | 0.50 |" in text
    assert "nobody" not in text
    assert report.kernels(tmp_path / "nothing") == ""


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("entmax_attn_fwd_scan", "entmax_attn_fwd_scan"),
        ("void entmax_attn_fwd_output<bf16, 64, (int)1>(Params)", "entmax_attn_fwd_output"),
        ("void pytorch_flash::flash_fwd_kernel<Traits<64> >(Params)", "flash_fwd_kernel"),
        ("Memset (Device)", "Memset"),
    ],
)
def test_kernel_names(signature: str, name: str) -> None:
    assert kernels.kernel_name(signature) == name


def test_kernels_that_overlap_are_counted_once() -> None:
    events = [("b", 8.0, 20.0), ("a", 0.0, 10.0), ("c", 9.0, 15.0), ("a", 30.0, 31.0)]
    assert kernels.counted(events) == {"a": 11, "b": 10, "c": 0}


def test_disturbed_rounds_of_a_gpu_are_left_out(results_file: Path, tmp_path: Path) -> None:
    found = json.loads(results_file.read_text())
    found["rows"][0]["speedup"] = [2.0, 1.0, 1.6]
    name = found["rows"][0]["provider"]
    path = tmp_path / "a.json"
    for device, is_left_out in (("cpu", False), ("A GPU", True)):
        found["stamp"]["device"] = device
        path.write_text(json.dumps(found))
        results = report.Results.load(path)
        names = {provider for _, provider, _ in results.rows}
        assert (name not in names) == is_left_out
        assert names
        assert name in {provider for _, provider, _ in results.peaks}
