"""Who may import whom: the front knows the backends as strings, a backend the contract and the shared formulas."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FRONT = {path.stem: path for path in (ROOT / "adasplash2").glob("*.py")}
BACKENDS = [path for path in (ROOT / "backends").rglob("*.py") if path != ROOT / "backends" / "__init__.py"]

# Below: what each module of the front may import of the package.
ALLOWED = {
    "contract": set(),
    "arrays": {"contract"},
    "registry": {"contract", "arrays"},
    "autograd": {"contract", "arrays", "registry"},
    "sharding": set(),
    "interface": {"contract", "arrays", "registry", "autograd", "sharding"},
    "__init__": {"contract", "registry", "interface", "nn"},
    "__main__": set(),
    "info": {"registry"},
    "options": set(),
    "plot": {"contract", "arrays", "registry"},
    "testing": {"contract", "backends"},
}
SHARED = {"adasplash2.contract", "adasplash2.arrays", "adasplash2.backends._math"}
KERNEL_LIBRARIES = {"triton", "cupy", "numba"}


def imported(path):
    """The modules that a file imports, at its top or anywhere else."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = dotted_name(path).split(".")[: -node.level] if node.level else []
            parts = [*package, *([node.module] if node.module else [])]
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def dotted_name(path):
    """As it is imported; a package's ends in __init__."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["adasplash2", *parts] if parts[0] == "backends" else parts)


def of_the_package(path):
    return {name for name in imported(path) if name.partition(".")[0] == "adasplash2"}


@pytest.mark.parametrize("module", sorted(FRONT))
def test_the_front_imports_downwards(module):
    parts = {name.split(".")[1] for name in of_the_package(FRONT[module]) if "." in name}
    assert parts <= ALLOWED[module]


@pytest.mark.parametrize("module", sorted(FRONT))
def test_the_front_loads_no_kernel_library(module):
    assert not KERNEL_LIBRARIES & {name.partition(".")[0] for name in imported(FRONT[module])}


def test_the_demo_uses_what_users_use():
    for path in (ROOT / "adasplash2" / "demo").rglob("*.py"):
        public = {name for name in of_the_package(path) if not name.startswith("adasplash2.demo")}
        allowed = {"adasplash2", "adasplash2.options", "adasplash2.plot"}
        assert all(name in allowed or name.startswith("adasplash2.contract.") for name in public), path


@pytest.mark.parametrize("part", ["nn", "integrations"])
def test_what_builds_on_the_front_uses_it_from_outside(part):
    """Registry: for the names of the backends and the default one."""
    paths = [*(ROOT / "adasplash2" / part).rglob("*.py")]
    assert paths
    for path in paths:
        others = {name for name in of_the_package(path) if not name.startswith(f"adasplash2.{part}")}
        allowed = ("adasplash2.interface.", "adasplash2.registry", "adasplash2.integrations.")
        assert all(name.startswith(allowed) for name in others), path


@pytest.mark.parametrize("path", BACKENDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_backend_imports_the_contract_and_itself(path):
    own = path.relative_to(ROOT / "backends").with_suffix("").parts[0]
    for name in of_the_package(path):
        assert name.startswith(f"adasplash2.backends.{own}.") or any(
            name == shared or name.startswith(f"{shared}.") for shared in SHARED
        ), f"{path} imports {name}"


@pytest.mark.parametrize("path", BACKENDS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_backend_loads_one_kernel_library_at_most(path):
    assert len(KERNEL_LIBRARIES & {name.partition(".")[0] for name in imported(path)}) <= 1


def test_nobody_imports_the_folder_of_the_backends_as_a_package_of_its_own():
    for path in [*FRONT.values(), *BACKENDS, *(ROOT / "tests").glob("*.py")]:
        assert "backends" not in {name.partition(".")[0] for name in imported(path)}, path
