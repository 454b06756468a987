"""The demo: its text, its models, its clock, and the program as a person runs it."""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from adasplash2 import demo
from adasplash2.demo.model import Transformer, capture_qkv, entmax_attend, softmax_attend
from adasplash2.demo.report import attention_weights
from adasplash2.demo.text import Corpus, Tokenizer, load_corpus
from adasplash2.demo.train import Learner, TimedAttend, held_out_loss, train


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus(64)


def _arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(options)


_TOKENIZER = Tokenizer(b"def attend(self, query):\n    return self.softmax(query)\n" * 3, vocab_size=270)


@given(st.binary(max_size=60) | st.text(alphabet="def self.\n\tquery", max_size=60).map(str.encode))
@example("\r\n  é self.selfish query".encode())
def test_every_text_is_encoded_without_loss(text: bytes) -> None:
    assert _TOKENIZER.decode(_TOKENIZER.encode(text)) == text


def test_frequent_words_are_one_token() -> None:
    assert [_TOKENIZER.label(token) for token in _TOKENIZER.encode(b"    return self\n").tolist()][-2:] == [
        "·self",
        "↵",
    ]
    assert _TOKENIZER.vocab_size == 266  # 256 bytes, and all ten longer pieces of the text


def test_targets_follow_their_inputs(corpus: Corpus) -> None:
    inputs, targets = corpus.batch(3, 64, torch.Generator().manual_seed(0))
    assert inputs.shape == targets.shape == (3, 64)
    assert inputs[:, 1:].equal(targets[:, :-1])
    inputs, targets = corpus.held_out_windows(2, 64)
    assert inputs[0].equal(corpus.held_out[:64])
    assert targets[1].equal(corpus.held_out[-64:])


def test_files_are_either_trained_on_or_held_out(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"module{i:02}.py").write_text(f"name{i:02}\n" * 9)
    corpus = load_corpus(8, folder=tmp_path)
    held_out = corpus.tokenizer.decode(corpus.held_out).decode()
    assert held_out == "name09\n" * 9 + "name19\n" * 9
    assert not set(held_out.split()) & set(corpus.tokenizer.decode(corpus.train).decode().split())


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "only.py").write_text("x = 1\n")
    with pytest.raises(RuntimeError, match=r"holds 1 Python files.*seqlen 64 need more text"):
        load_corpus(64, folder=tmp_path)


def test_the_models_differ_in_attention_alone(corpus: Corpus) -> None:
    sizes = {"layers": 2, "heads": 2, "head_dim": 16}
    tokens = corpus.held_out[None, :48]
    entmax = Transformer(corpus.tokenizer.vocab_size, entmax_attend(1.5), **sizes)
    softmax = Transformer(corpus.tokenizer.vocab_size, softmax_attend, **sizes)
    assert all(torch.equal(a, b) for a, b in zip(entmax.parameters(), softmax.parameters(), strict=True))
    assert entmax(tokens, softmax_attend).equal(softmax(tokens))


def test_a_prediction_does_not_see_what_follows(corpus: Corpus) -> None:
    model = Transformer(corpus.tokenizer.vocab_size, entmax_attend(1.5), layers=2, heads=2, head_dim=16)
    for name, weight in model.named_parameters():
        if "project_out" in name:
            torch.nn.init.normal_(weight)
    tokens = corpus.held_out[None, :48]
    changed = tokens.clone()
    changed[:, 30:] = 7
    before, after = model(tokens), model(changed)
    assert not before[:, 30:].isclose(after[:, 30:]).all()
    torch.testing.assert_close(before[:, :30], after[:, :30])


def test_captured_qkv_are_what_attention_gets(corpus: Corpus) -> None:
    model = Transformer(corpus.tokenizer.vocab_size, entmax_attend(1.5), layers=2, heads=2, head_dim=16)
    tokens = corpus.held_out[:48]
    captured = capture_qkv(model, tokens[None])
    assert [tuple(tensor.shape) for layer in captured for tensor in layer] == [(1, 2, 48, 16)] * 6
    weights = attention_weights(model, tokens)
    assert weights.shape == (2, 2, 48, 48)
    assert weights.triu(1).count_nonzero() == 0
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 48))
    for layer, (q, k, v) in enumerate(captured):
        torch.testing.assert_close(weights[layer] @ v[0], model.attend(q, k, v)[0])


class _Slow(torch.autograd.Function):
    """Returns q; takes 20 ms forward and 40 ms backward."""

    @staticmethod
    def forward(ctx: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        time.sleep(0.02)
        return q.clone()

    @staticmethod
    def backward(ctx: object, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        time.sleep(0.04)
        return dout, dout, dout


def test_the_clock_runs_in_attention_alone() -> None:
    attend = TimedAttend(_Slow.apply)
    q, k, v = (torch.ones(1, 1, 4, 4, requires_grad=True) for _ in range(3))
    for _ in range(2):
        out = attend(2 * q, 2 * k, 2 * v)
        time.sleep(0.2)
        out.sum().backward()
    assert 0.12 <= attend.seconds < 0.4


def test_training_lowers_both_losses_and_repeats_itself(corpus: Corpus) -> None:
    def losses() -> list[list[float]]:
        attends = (entmax_attend(1.5), softmax_attend)
        sizes = {"layers": 1, "heads": 2, "head_dim": 16}
        learners = [Learner("", Transformer(corpus.tokenizer.vocab_size, attend, **sizes)) for attend in attends]
        assert list(train(learners, corpus, steps=50, batch=4, seqlen=64)) == list(range(1, 51))
        held_out = held_out_loss(learners[0].model, corpus, seqlen=64)
        assert held_out < math.log(corpus.tokenizer.vocab_size) - 0.5
        assert all(learner.tokens == 50 * 4 * 64 and learner.attention.seconds > 0 for learner in learners)
        assert all(learner.attention.seconds < learner.seconds for learner in learners)
        return [learner.losses for learner in learners]

    first = losses()
    assert all(loss[-1] < loss[0] - 0.5 for loss in first)
    assert losses() == first


def test_training_ends_when_its_time_is_over(corpus: Corpus) -> None:
    learner = Learner("", Transformer(corpus.tokenizer.vocab_size, softmax_attend, layers=1, heads=1, head_dim=16))
    done = list(train([learner], corpus, steps=10**6, seqlen=32, seconds=0.3))
    assert 1 <= len(done) < 10**4


def test_the_program_shows_tables_and_writes_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    assert demo.run(_arguments("--steps=3", "--seqlen=64", "--alpha=1.7", f"--out={picture}")) == 0
    printed = capsys.readouterr().out
    for part in ("alpha 1.7: served by", "step 3/3", "held-out loss", "│ entmax", "│ softmax", "│ layer 3", "head 3"):
        assert part in printed
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.skipif(os.name == "nt", reason="a Ctrl-C cannot be sent to a single process on Windows")
def test_ctrl_c_ends_it_with_what_it_has(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    command = [sys.executable, "-m", "adasplash2", "demo", "--steps=240", "--seqlen=64", f"--out={picture}"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_unbuffered()
    ) as process:
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if line.startswith("step "):
                process.send_signal(signal.SIGINT)
                break
        rest, errors = process.communicate(timeout=120)
    printed += rest
    assert process.returncode == 0, printed + errors
    assert "of 240 steps" in printed
    assert "│ layer 3" in printed
    assert "Traceback" not in errors
    assert picture.stat().st_size > 0


def _unbuffered() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1"}


def test_a_missing_extra_is_named() -> None:
    program = "import sys; sys.modules['rich'] = None\nfrom adasplash2 import demo\nsys.exit(demo.run(None))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 2
    assert done.stderr == "the demo needs rich: python -m pip install 'adasplash2[demo]'\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--alpha=1", "1: expected more than 1"),
        ("--alpha=2.5", "at most 2"),
        ("--steps=0", "0: expected at least 1"),
        ("--seqlen=8", "8: expected at least 32"),
        ("--seconds=nan", "nan: expected more than 0"),
        ("--out=picture.jpg", "expected the name of a .png file"),
        ("--out=no-such-folder/picture.png", "its folder does not exist"),
    ],
)
def test_bad_options_are_refused(option: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        _arguments(option)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
