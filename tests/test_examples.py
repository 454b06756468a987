"""The examples run as a person runs them, and what examples/README.md shows is what was measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

# Scripts, started as files: their folder is no package.
sys.path.append(str(Path(__file__).parent.parent / "examples"))

import long_context_recall as recall

EXAMPLES = Path(__file__).parent.parent / "examples"
RESULTS = sorted((EXAMPLES / "results").glob("long_context_recall*.json"))

# Script: its arguments for a run of seconds, and the files that it then writes.
RUNS = {
    "long_context_recall.py": (
        ["--steps=2", "--seqlen=16", "--seeds=1", "--queries=32", "--json=results.json", "--out=picture.png"],
        ["results.json", "picture.png"],
    ),
    "softmax_to_entmax.py": (
        ["--steps=2", "--further=3", "--seqlen=32", "--json=results.json", "--plot=picture.png"],
        ["results.json", "picture.png"],
    ),
}


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-P", str(EXAMPLES / script), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def test_every_example_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == RUNS.keys()


@pytest.mark.parametrize("script", RUNS)
def test_example_runs_and_writes_its_files(script: str, tmp_path: Path) -> None:
    arguments, files = RUNS[script]
    done = subprocess.run(
        command(script, *arguments), cwd=tmp_path, env=environment(), capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "softmax" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    for file in files:
        content = (tmp_path / file).read_bytes()
        assert content.startswith(b"\x89PNG\r\n") if file.endswith(".png") else json.loads(content)


@pytest.mark.skipif(os.name == "nt", reason="a Ctrl-C cannot be sent to a single process on Windows")
def test_ctrl_c_keeps_the_runs_that_are_done(tmp_path: Path) -> None:
    arguments = ["--steps=20", "--seqlen=16", "--seeds=200", "--queries=32"]
    with subprocess.Popen(
        command("long_context_recall.py", *arguments),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        assert process.stdout is not None
        printed = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=300)
    assert process.returncode == 0, printed + rest + errors
    assert printed.startswith("softmax, seed 0: 16: ")
    assert f"of {200 * len(recall.MODELS)} runs are done" in rest
    assert "Traceback" not in errors
    runs = json.loads((tmp_path / "long_context_recall.json").read_text(encoding="utf-8"))["runs"]
    assert 1 <= len(runs) < 200 * len(recall.MODELS)
    assert (tmp_path / "long_context_recall.png").stat().st_size > 0


def test_every_query_has_one_answer() -> None:
    drawn = recall.make_recall(5, 64, 16, torch.Generator().manual_seed(0))
    assert [tuple(tensor.shape) for tensor in drawn] == [(5, 64), (5, 8), (5, 8)]
    for tokens, asked_at, values in zip(*(tensor.tolist() for tensor in drawn), strict=True):
        answer = dict(zip(tokens[0:16:2], tokens[1:16:2], strict=True))
        assert len(answer) == 8  # no key twice
        assert [answer[tokens[at]] for at in asked_at] == values
        # Keys stand nowhere but in the pairs and where they are asked for, each once.
        assert {at for at, token in enumerate(tokens) if token < 16} == {*range(0, 16, 2), *asked_at}
        assert len(set(asked_at)) == 8


@pytest.mark.parametrize("name", recall.MODELS)
def test_the_weights_shown_are_those_of_attention(name: str) -> None:
    torch.manual_seed(0)
    attention = recall.Attention(heads=4, head_dim=8, kind=recall.MODELS[name]).double()
    x = torch.randn(2, 24, 32, dtype=torch.float64)
    rows = torch.tensor([[23, 5, 0], [1, 17, 8]])
    p = attention.weights(x, rows, sharpness=1.5)
    _, _, v = attention.qkv(x)
    out = attention.project_out((p @ v).transpose(1, 2).flatten(2))
    expected = attention(x, sharpness=1.5).gather(1, rows[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(out, expected)


def test_the_position_channel_is_alibi() -> None:
    torch.manual_seed(0)
    attention = recall.Attention(heads=4, head_dim=8, kind=recall.MODELS["softmax"])
    q, k, _ = attention.qkv(torch.randn(1, 12, 32))
    rows = torch.arange(12)
    content = q[..., :8] @ k[..., :8].transpose(2, 3) / 8**0.5
    slopes = torch.tensor([2.0, 1.0, 0.0, 0.0])[:, None, None]
    alibi = content - slopes * (rows[:, None] - rows)
    scores = attention.scale * q @ k.transpose(2, 3)
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    torch.testing.assert_close(
        scores.masked_fill(~visible, -torch.inf).softmax(-1), alibi.masked_fill(~visible, -torch.inf).softmax(-1)
    )


def test_training_lowers_the_loss_and_repeats_itself() -> None:
    setting = recall.Setting(seqlen=16, steps=40, batch=16, heads=2, head_dim=16)

    def losses() -> list[float]:
        torch.manual_seed(0)
        model = recall.Model(setting, recall.MODELS["entmax, α learned"])
        return [loss for loss, _ in recall.train(model, setting, 0, torch.device("cpu"))]

    first = losses()
    assert first[-1] < first[0] - 0.5
    assert losses() == first


def _results(seed: int, **changed: Any) -> dict[str, Any]:
    lengths = [
        {"seqlen": 16, "accuracy": 0.9 + seed / 50, "weight": [[0.1, 0.2], [0.8, 0.3]], "support": [[1, 2], [3, 4]]},
        {"seqlen": 32, "accuracy": 0.5, "weight": [[0.9, 0.9], [0.4, 0.9]], "support": [[9, 9], [6, 9]]},
    ]
    return {"setting": {"steps": 1, **changed}, "runs": [{"model": "softmax", "seed": seed, "lengths": lengths}]}


def test_measures_follow_the_recall_head_of_the_training_length() -> None:
    found = recall.summarise({"runs": _results(0)["runs"] + _results(1)["runs"]})
    assert found["accuracy"]["softmax"] == {16: [90.0, 92.0], 32: [50.0, 50.0]}
    assert found["weight"]["softmax"] == {16: [80.0, 80.0], 32: [40.0, 40.0]}
    assert found["support"]["softmax"] == {16: [3, 3], 32: [6, 6]}


def test_results_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        Path(f"{seed}.json").write_text(json.dumps(_results(seed)), encoding="utf-8")
    assert recall.main(["--results", "0.json", "1.json"]) == 0
    assert "91.0 ± 1.4" in capsys.readouterr().out
    assert [run["seed"] for run in json.loads(Path("long_context_recall.json").read_bytes())["runs"]] == [0, 1]
    assert Path("long_context_recall.png").stat().st_size > 0

    Path("other.json").write_text(json.dumps(_results(2, steps=9)), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"other\.json: expected the setting.*of 0\.json"):
        recall.main(["--results", "0.json", "other.json"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--seqlen=20", "20: expected at least 16, a multiple of 8"),
        ("--steps=0", "0: expected at least 1"),
        ("--seeds=0", "0: expected at least 1"),
        ("--out=picture.jpg", "expected the name of a .png file"),
        ("--json=no-such-folder/results.json", "its folder does not exist"),
    ],
)
def test_bad_options_are_refused(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        recall.parse([option])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="device=cuda: expected one that is there"):
        recall.main(["--preset=gpu"])


def test_a_run_is_in_the_file_before_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    once = recall.run_one
    kept: list[list[str]] = []

    def run_one(name: str, *others: Any) -> dict[str, Any]:
        file = Path("long_context_recall.json")
        kept.append([run["model"] for run in json.loads(file.read_bytes())["runs"]] if file.exists() else [])
        return once(name, *others)

    monkeypatch.setattr(recall, "run_one", run_one)
    assert recall.main(["--steps=1", "--seqlen=16", "--seeds=1", "--queries=32"]) == 0
    assert kept == [list(recall.MODELS)[:i] for i in range(len(recall.MODELS))]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_readme_shows_the_committed_results(path: Path) -> None:
    results = json.loads(path.read_text(encoding="utf-8"))
    assert {(run["model"], run["seed"]) for run in results["runs"]} == {
        (name, seed) for name in recall.MODELS for seed in range(recall.Setting().seeds)
    }
    printed = StringIO()
    console = Console(file=printed, width=200)
    for table in recall.tables(results):
        console.print(table)
    lines = [line.strip() for line in printed.getvalue().splitlines() if line.strip()]
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8").splitlines()
    softmaxes = sum(kind.alpha == 1 for kind in recall.MODELS.values())
    assert len(lines) == 3 * (2 + len(recall.MODELS) + softmaxes)
    assert [line for line in lines if line not in readme] == []
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n")
