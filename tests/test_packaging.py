"""The sdist and the wheel: built, installed, run from another folder, and what is said where that cannot work."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import adasplash2

ROOT = Path(__file__).parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

SMOKE = """
import adasplash2, torch
from importlib.metadata import version
assert adasplash2.__version__ == version("adasplash2")
q, k, v = torch.randn(3, 1, 2, 40, 8, requires_grad=True).unbind()
adasplash2.attention(q, k, v, is_causal=True, backend="reference").sum().backward()
# Of the kernels of the CPU, those that are compiled the soonest.
torch.testing.assert_close(adasplash2.entmax(q), adasplash2.entmax(q, backend="reference"))
print(adasplash2.explain(q, k, v).chosen, adasplash2.__file__)
"""


def _run(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ADASPLASH2"))}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def _succeed(*command: str | Path, cwd: Path, **variables: str) -> str:
    done = _run(*command, cwd=cwd, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel made from it."""
    folder = tmp_path_factory.mktemp("built")
    checkout = folder / "checkout"
    # In a copy, because a build leaves folders behind in the place where it runs.
    shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist"))
    _succeed(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, checkout, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel_files(built: Path) -> set[str]:
    with zipfile.ZipFile(built / f"adasplash2-{VERSION}-py3-none-any.whl") as wheel:
        return set(wheel.namelist())


@pytest.fixture(scope="module")
def installed(built: Path) -> Path:
    """The Python of an environment with the wheel; what the wheel depends on is that of the running environment."""
    folder = built / "venv"
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    _succeed(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"),
        built / f"adasplash2-{VERSION}-py3-none-any.whl",
        cwd=built,
    )
    find_site = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(_succeed(python, "-c", find_site, cwd=built).strip())
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    # After the environment's own folder on the path, so that the wheel comes first.
    (site / "dependencies.pth").write_text("\n".join(paths))
    return python


def test_the_wheel_holds_every_module_and_nothing_else(wheel_files: set[str]) -> None:
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "adasplash2").rglob("*.py")}
    backends = [path for suffix in ("py", "cu", "cuh") for path in (ROOT / "backends").rglob(f"*.{suffix}")]
    expected |= {f"adasplash2/{path.relative_to(ROOT).as_posix()}" for path in backends}
    assert "adasplash2/backends/cupy_cuda/kernels/scan.cu" in expected
    assert "adasplash2/backends/reference.py" in expected
    information = f"adasplash2-{VERSION}.dist-info/"
    assert {name for name in wheel_files if not name.startswith(information)} == expected | {"adasplash2/py.typed"}
    assert f"{information}licenses/LICENSE" in wheel_files


def test_the_sdist_can_be_tested(built: Path) -> None:
    with tarfile.open(built / f"adasplash2-{VERSION}.tar.gz") as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "tox.ini", "constraints.txt", "tests/test_packaging.py"} <= names
    assert {"adasplash2/py.typed", "adasplash2/__init__.py", "backends/reference.py"} <= names


def test_the_wheel_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    printed = _succeed(installed, "-c", SMOKE, cwd=tmp_path)
    chosen, file = printed.split()
    assert chosen == "numba"
    assert Path(file).is_relative_to(installed.parent.parent)


def test_info_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    printed = _succeed(installed, "-m", "adasplash2", "info", cwd=tmp_path)
    assert VERSION in printed
    assert "reference" in printed


def test_a_checkout_that_hides_the_wheel_says_so(installed: Path) -> None:
    done = _run(installed, "-c", "import adasplash2", cwd=ROOT)
    assert done.returncode == 1
    assert "ImportError: this checkout of adasplash2 hides the installed package" in done.stderr
    assert "pip install -e ." in done.stderr
    # What the message recommends works.
    _succeed(installed, "-P", "-c", "import adasplash2.backends.reference", cwd=ROOT)


def test_backends_under_another_name_are_refused(installed: Path) -> None:
    done = _run(installed, "-c", "import backends", cwd=ROOT)
    assert done.returncode == 1
    assert "import it as 'adasplash2.backends'" in done.stderr


def test_the_version_is_written_once() -> None:
    assert adasplash2.__version__ == VERSION
    others = [
        path.relative_to(ROOT).as_posix()
        for folder in ("adasplash2", "backends")
        for path in (ROOT / folder).rglob("*.py")
        if VERSION in path.read_text(encoding="utf-8")
    ]
    assert others == []
