"""README.md and docs/ do what they say: their blocks run, their tables are those of the code and of the results."""

from __future__ import annotations

import configparser
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from adasplash2 import registry
from adasplash2.__main__ import _COMMANDS

# Scripts, started as files: their folder is no package.
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import features
import report

ROOT = report.ROOT
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEST_COMMAND = "python3 -m pip install tox && python3 -m tox"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Page: what its blocks need beyond the package itself.
NEEDS = {"transformers.md": ("transformers",), "plot.md": ("matplotlib",)}


def _blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The blocks of a language, each with the number of lines before it."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in NEEDS.get(page.name, ()):
        pytest.importorskip(package, reason=f"{page.name} needs {package}")
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"^\s*```(py.*)$", text, re.MULTILINE)) <= {"python"}, "a block that would not be run"
    # What a page registers is gone afterwards.
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(registry, "_found", dict(registry._found))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    for line, block in _blocks(text, "python"):
        # A traceback then shows the line of the page.
        exec(compile("\n" * line + block, page, "exec"), names)
    if page.name == "README.md":
        printed = capsys.readouterr().out
        assert "of the weights are zero" in printed
        assert re.search(r"tensor\(\[\[0\.\d+, 0\.\d+, 0\.0000\]\]\)", printed)


def test_first_commands_are_those_that_ci_runs() -> None:
    first, second = (block.strip() for _, block in _blocks(README, "sh"))
    assert first == f"{TEST_COMMAND} -e demo"
    assert second == TEST_COMMAND
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    commands = [line for line in script if line and not line.startswith(("#", "set ", "cd "))]
    assert " && ".join(commands) == TEST_COMMAND


def test_every_tox_environment_is_told_and_there() -> None:
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini")
    there = {section.removeprefix("testenv:") for section in tox if section.startswith("testenv:")} - {".pkg"}
    default = {name.strip() for name in tox["tox"]["env_list"].split(",")}
    assert set(re.findall(r"^\| `tox -e (\w+)", README, re.MULTILINE)) == there | default
    (row,) = re.findall(r"^\| `tox` \|(.*)\|$", README, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", row)) == default


def test_every_command_is_told_and_there() -> None:
    assert set(re.findall(r"python -m adasplash2 (\w+)", README)) == set(_COMMANDS)


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


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "backends/README.md", ROOT / "benchmarks/README.md"],
    ids=lambda page: page.parent.name + page.name,
)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def test_table_of_features_is_what_the_backends_answer() -> None:
    (committed,) = re.findall(r"<!-- backends:begin -->\n(.*?)\n<!-- backends:end -->", README, re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in committed.splitlines()]
    columns = {column[0].strip("`"): list(column[2:]) for column in zip(*rows, strict=True)}
    titles = columns.pop("")
    asked, failures = features.columns(), features.importable()[1]
    # A backend whose library is not installed cannot be asked here; elsewhere it is.
    stale = {name for name in columns.keys() | asked if columns.get(name) != asked.get(name)}
    assert len(stale - asked.keys()) <= len(failures), f"{stale} cannot be asked: {failures}"
    assert not stale & asked.keys(), "run benchmarks/features.py"
    assert titles == features.TITLES


def test_tables_of_benchmarks_are_those_of_the_results(tmp_path: Path) -> None:
    for page in report.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    report.main(["--readme", str(tmp_path / "README.md")])
    for page in report.PAGES:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text(), "run benchmarks/report.py"
    drawn, committed = ({path.name for path in (root / report.PLOTS).iterdir()} for root in (tmp_path, ROOT))
    assert drawn <= committed


def test_fill_refuses_a_marker_without_its_partner(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- summary:begin -->\nold\n<!-- benchmarks:end -->\n")
    with pytest.raises(ValueError, match="<!-- summary:end -->"):
        report.fill(page, {"summary": "new"})
    page.write_text(
        "<!-- summary:begin -->\nold\n<!-- summary:end -->\n<!-- goals:begin -->\nkept\n<!-- goals:end -->\n"
    )
    report.fill(page, {"summary": "new"})
    assert page.read_text() == (
        "<!-- summary:begin -->\nnew\n<!-- summary:end -->\n<!-- goals:begin -->\nkept\n<!-- goals:end -->\n"
    )


def test_citation_names_the_papers() -> None:
    named = re.findall(r"value: arXiv:(\d{4}\.\d{5})", (ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert set(named) == set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", README))
