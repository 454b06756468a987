"""The README does what it says."""

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEST_COMMAND = "python3 -m pip install tox && python3 -m tox"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_python_blocks_run_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = _blocks("python")
    assert len(blocks) >= 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "of the weights are zero" in printed
    assert re.search(r"tensor\(\[\[0\.\d+, 0\.\d+, 0\.0000\]\]\)", printed)


def test_first_commands_are_those_that_ci_runs() -> None:
    first, second = _blocks("sh")
    assert first.strip() == f"{TEST_COMMAND} -e demo"
    assert second.strip() == TEST_COMMAND
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in script if line and not line.startswith(("#", "set ", "cd "))]
    assert " && ".join(commands) == TEST_COMMAND


def test_every_tox_environment_is_told_and_there() -> None:
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    there = {section.removeprefix("testenv:") for section in tox if section.startswith("testenv:")} - {".pkg"}
    there |= {name.strip() for name in tox["tox"]["env_list"].split(",")}
    told = set(re.findall(r"`tox -e (\w+)", README))
    assert told == there


def test_every_environment_variable_is_told() -> None:
    pattern = re.compile(r"ADASPLASH2_[A-Z_]+")
    read = {
        name
        for folder in ("adasplash2", "backends")
        for path in (ROOT / folder).rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "environ" in line
        for name in pattern.findall(line)
    }
    assert read
    assert set(pattern.findall(README)) == read
