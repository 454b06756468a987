"""What the package shows to its users: names, signatures, what an import loads, the command line."""

from __future__ import annotations

import importlib.metadata
import inspect
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import adasplash2
from adasplash2.__main__ import main

NAMES = {
    "Explanation",
    "NoBackendError",
    "SupportStats",
    "UnsupportedError",
    "__version__",
    "attention",
    "available_backends",
    "entmax",
    "explain",
    "nn",
    "support",
}

MASKS = (
    "is_causal: bool = False, scale: float | None = None, "
    "seqlens_q: Array | None = None, seqlens_k: Array | None = None"
)
SIGNATURES = {
    "attention": "(q: Array, k: Array, v: Array, *, alpha: float | Array = 1.5, "
    f"{MASKS}, backend: str = 'auto', return_tau: bool = False) -> Any",
    "explain": "(q: Array, k: Array, v: Array, *, alpha: float | Array = 1.5, "
    f"{MASKS}, backend: str = 'auto', return_tau: bool = False) -> Explanation",
    "support": "(q: Array, k: Array, *, alpha: float | Array = 1.5, "
    f"{MASKS}, block_m: int = 64, block_n: int = 64, backend: str = 'auto') -> SupportStats",
    "entmax": "(x: Array, alpha: float | Array = 1.5, dim: int = -1, *, backend: str = 'auto') -> Array",
    "available_backends": "() -> dict[str, str | None]",
}


def child(code, *options, **more):
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, **more)


def test_the_names():
    assert set(adasplash2.__all__) == NAMES
    assert all(hasattr(adasplash2, name) for name in NAMES)
    assert adasplash2.__version__ == importlib.metadata.version("adasplash2")


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signatures(name, monkeypatch):
    signature = str(inspect.signature(getattr(adasplash2, name))).replace("'", "")
    default = adasplash2.registry.DEFAULT_BACKEND
    assert signature.replace(f"backend: str = {default}", "backend: str = auto") == SIGNATURES[name].replace("'", "")


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_everything_is_documented(name):
    assert inspect.getdoc(getattr(adasplash2, name))


def test_the_errors_are_value_errors():
    assert issubclass(adasplash2.NoBackendError, adasplash2.UnsupportedError)
    assert issubclass(adasplash2.UnsupportedError, ValueError)


def test_an_import_loads_no_kernel_library():
    code = """
import sys
import torch
before = set(sys.modules)
import adasplash2
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print(sorted(name for name in sys.modules if name.startswith("adasplash2.backends.")))
"""
    loaded, backends = (eval(line) for line in child(code, check=True).stdout.splitlines())
    assert "adasplash2" in loaded
    assert not {"triton", "cupy", "numba", "llvmlite"} & set(loaded)
    assert backends == []


def test_a_checkout_that_hides_the_backends_explains_itself(tmp_path):
    package = Path(inspect.getfile(adasplash2)).parent
    shutil.copytree(package, tmp_path / "adasplash2", ignore=shutil.ignore_patterns("backends", "__pycache__"))
    # -S: no installed package, editable or not, comes to its help.
    result = child(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import adasplash2", "-S")
    assert result.returncode != 0
    assert "ImportError: this checkout of adasplash2 hides the installed package: install it with" in result.stderr


def test_available_backends_has_every_backend():
    available = adasplash2.available_backends()
    assert list(available) == ["triton", "cupy", "numba", "reference"]
    assert available["reference"] is None
    assert all(reason is None or len(reason) > 0 for reason in available.values())


def test_attention_returns_out_or_out_and_tau():
    q = torch.randn(1, 1, 2, 4)
    out = adasplash2.attention(q, q, q, backend="reference")
    again, tau = adasplash2.attention(q, q, q, backend="reference", return_tau=True)
    assert torch.equal(out, again)
    assert (tau.shape, tau.dtype) == ((1, 1, 2), torch.float32)


def test_support_names_its_blocks():
    q, k = torch.randn(2, 4, 10, 8), torch.randn(2, 2, 13, 8)
    stats = adasplash2.support(q, k, block_m=4, block_n=5, backend="reference")
    assert (stats.block_m, stats.block_n) == (4, 5)
    assert stats.block_map.shape == (2, 4, 3, 3)
    assert stats.size.shape == stats.tau.shape == (2, 4, 10)
    assert 0 < stats.element_density < stats.block_density <= 1


def test_info(capsys):
    assert main(["info"]) == 0
    rows = {line.split(maxsplit=1)[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"python", "adasplash2", "torch", "numpy", "numba", "triton", "cupy", "os", "cpu", "threads", "cuda"} < set(
        rows
    )
    assert adasplash2.__version__ in rows["adasplash2"]
    assert torch.__version__ in rows["torch"]
    for name, reason in adasplash2.available_backends().items():
        assert (reason or "usable") in rows[name]


def test_a_command_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fly"])
    assert exit_.value.code == 2
    assert "invalid choice: 'fly'" in capsys.readouterr().err


def test_a_command_does_not_load_another(capsys):
    code = """
import sys
from adasplash2.__main__ import main
main(["info"])
print(any(name.startswith("adasplash2.demo") for name in sys.modules))
"""
    assert child(code, check=True).stdout.splitlines()[-1] == "False"
