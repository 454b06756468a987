"""``python -m adasplash2 bench``: what it prints, writes and draws, whom it refuses, and how it ends."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import adasplash2
from adasplash2 import bench, registry
from adasplash2.__main__ import main
from adasplash2.backends.reference import ReferenceBackend
from adasplash2.bench import measure, report
from adasplash2.bench.cases import Case
from adasplash2.contract import AttentionRequest, AttentionResult

TINY = ("--seqlen=32", "--kind=iid", "--heads=2", "--head-dim=16", "--seconds=0.01")


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(options)


def run(*options: str) -> int:
    return main(["bench", "--device=cpu", *options])


def test_numbers_table_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine the spreads have more digits than a narrow table has room for.
    monkeypatch.setenv("COLUMNS", "200")
    numbers, picture = tmp_path / "out.json", tmp_path / "out.png"
    status = run(
        *("--seqlen", "32", "48", "--kind", "iid", "narrow", "--backend", "numba", "reference"),
        *("--heads=2", "--head-dim=16", "--alpha=1.7", "--no-causal", "--seconds=0.01"),
        *(f"--json={numbers}", f"--plot={picture}"),
    )
    printed = capsys.readouterr().out
    assert status == 0, printed
    found = json.loads(numbers.read_text())
    assert found["complete"]
    assert found["faults"] == []
    assert found["machine"]["info"]["torch"] == torch.__version__
    assert found["settings"]["kind"] == ["iid", "narrow"]
    assert (found["settings"]["alpha"], found["settings"]["is_causal"]) == (1.7, False)
    names = ("softmax", "numba", "reference")
    inputs = [(32, "iid"), (32, "narrow"), (48, "iid"), (48, "narrow")]
    rows = found["rows"]
    assert [(row["seqlen"], row["kind"], row["name"]) for row in rows] == [
        (*own, name) for own in inputs for name in names
    ]
    for row in rows:
        assert row["rounds"] >= 3
        for mode in measure.MODES:
            for median, q20, q80 in (row["ms"][mode], row["speed"][mode]):
                assert 0 < q20 <= median <= q80
            if row["name"] == "softmax":
                assert row["speed"][mode] == [1, 1, 1]
        case = Case(row["kind"], row["seqlen"], head_dim=16, heads=2, alpha=1.7, is_causal=False)
        q, k, _ = case.inputs(torch.device("cpu"))[0]
        stats = adasplash2.support(q, k, alpha=1.7, backend="reference")
        assert row["elements"] == pytest.approx(stats.element_density, rel=0.02)
    lines = [line.split() for line in printed.splitlines()]
    # The inputs are told once, before the first who was timed on them.
    assert [line[:2] for line in lines if line[3:4] == ["softmax"]] == [[kind, str(seqlen)] for seqlen, kind in inputs]
    assert sum(line[:1] == ["numba"] for line in lines) == sum(line[:1] == ["reference"] for line in lines) == 4
    assert "alpha 1.7, no mask, float32, 2 heads, head_dim 16" in " ".join(printed.split())
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


def rows(name: str, speeds: dict[int, float]) -> list[report.Row]:
    return [
        report.Row(
            "iid",
            seqlen,
            0.0123,
            name,
            5,
            ms=dict.fromkeys(measure.MODES, measure.Spread(1234.5, 1200, 1300)),
            speed=dict.fromkeys(measure.MODES, measure.Spread(speed, speed / 2, 2 * speed)),
        )
        for seqlen, speed in speeds.items()
    ]


def test_the_picture_shows_the_speeds() -> None:
    found = [*rows("softmax", {64: 1, 128: 1}), *rows("numba", {128: 3.0, 64: 2.0}), *rows("other", {64: 0.5})]
    figure: Any = report.picture(found, "title")
    assert figure.get_suptitle() == "title"
    for axes in figure.axes:
        curves = {line.get_label(): list(map(list, line.get_data())) for line in axes.lines}
        assert curves["iid, numba"] == [[64, 128], [2, 3]]
        assert curves["iid, other"] == [[64], [0.5]]
        assert curves["torch's softmax attention"][1] == [1, 1]
        assert len(curves) == 3
        band = axes.collections[0].get_paths()[0].vertices
        assert (band[:, 1].min(), band[:, 1].max()) == (1, 6)


def test_the_table_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    (row,) = rows("reference", {32768: 12.34})
    Console(width=80, highlight=False).print(report.table([replace(row, kind="drifting")]))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split() == ["drifting", "32768", "1.23%", "reference", *["1234", "12.3", "(6.17-24.7)"] * 2]


class Wrong(ReferenceBackend):
    """The reference, off by 0.1 %."""

    name = "wrong"

    def forward(self, request: AttentionRequest) -> AttentionResult:
        result = super().forward(request)
        return result._replace(out=1.001 * result.out)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(registry, "_found", dict(registry._found))
    registry.register("wrong", Wrong())


@pytest.mark.usefixtures("wrong")
def test_a_wrong_backend_gets_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = tmp_path / "out.json"
    assert run(*TINY, "--backend", "wrong", "numba", f"--json={numbers}") == 1
    assert "wrong is not timed, its results are wrong: AssertionError: out: got" in " ".join(
        capsys.readouterr().out.split()
    )
    found = json.loads(numbers.read_text())
    assert [row["name"] for row in found["rows"]] == ["softmax", "numba"]
    assert len(found["faults"]) == 1


def test_a_backend_that_cannot_serve_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    reason = adasplash2.available_backends()["triton"]
    if reason is None:
        pytest.skip("this machine can run Triton")
    assert run(*TINY, "--backend", "triton") == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert f"triton is not timed: {' '.join(reason.split())}" in printed
    assert printed.endswith("no backend can be timed on cpu")


def test_what_was_measured_outlives_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    support = Case.support

    def fails(self: Case, *args: Any, **options: Any) -> dict[str, float]:
        if self.kind == "narrow":
            raise RuntimeError("out of memory")
        return support(self, *args, **options)

    monkeypatch.setattr(Case, "support", fails)
    assert run(*TINY, "--kind", "narrow", "iid") == 1
    printed = capsys.readouterr().out
    assert "narrow, 32 keys: RuntimeError: out of memory" in printed
    assert any(line.startswith("iid") and "softmax" in line for line in printed.splitlines())


@pytest.mark.parametrize("done", [0, 1])
def test_ctrl_c_prints_what_it_has(
    done: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interleaved = measure.interleaved
    calls: list[object] = []

    def interrupted(*args: Any, **options: Any) -> object:
        calls.append(args)
        if len(calls) > done:
            raise KeyboardInterrupt
        return interleaved(*args, **options)

    monkeypatch.setattr(measure, "interleaved", interrupted)
    numbers = tmp_path / "out.json"
    status = run(*TINY, "--kind", "iid", "narrow", f"--json={numbers}")
    printed = capsys.readouterr().out
    if done:
        assert status == 0
        assert "\ninterrupted\n" in printed
        found = json.loads(numbers.read_text())
        assert not found["complete"]
        assert {row["kind"] for row in found["rows"]} == {"iid"}
    else:
        assert status == 130
        assert printed.endswith("nothing to show\n")
        assert not numbers.exists()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("rich", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run(*TINY) == 2
    assert capsys.readouterr().err == "bench needs rich: python -m pip install 'adasplash2[bench]'\n"
    assert run(*TINY, "--plot=out.png") == 2
    assert "bench needs rich and matplotlib:" in capsys.readouterr().err


def test_default_backends_are_those_of_the_device(tmp_path: Path) -> None:
    numbers = tmp_path / "out.json"
    assert run(*TINY, f"--json={numbers}") == 0
    assert [row["name"] for row in json.loads(numbers.read_text())["rows"]] == ["softmax", "numba"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--alpha=1", "1: expected more than 1"),
        ("--seqlen=0", "0: expected at least 1"),
        ("--heads=two", "invalid"),
        ("--kind=none", "invalid choice: 'none'"),
        ("--dtype=int8", "invalid choice: 'int8'"),
        ("--backend=none", "invalid choice: 'none'"),
        ("--device=nowhere", "nowhere: "),
        ("--seconds=0", "0: expected more than 0"),
        ("--plot=out.jpg", "expected the name of a .png file"),
        ("--json=no-such-folder/out.json", "its folder does not exist"),
    ],
)
def test_bad_options_are_refused(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        arguments(option)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
