"""Runs CUDA C++ kernels on the CPU: for tests of the kernels' logic on a machine without a GPU.

g++ compiles the kernels as they are; the words of the language come from include/emulator.hpp, inline PTX from
include/ptx.cuh instead of the kernels' own ptx.cuh, and runtime.cpp runs the threads as fibers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

_HERE = Path(__file__).parent
_INCLUDE = _HERE / "include"
_ERROR_BYTES = 4096

# The runtime has one grid at a time.
_lock = threading.Lock()


class KernelError(RuntimeError):
    """What went wrong in a kernel: divergence, a missed barrier, an access out of bounds."""


class CompileError(RuntimeError):
    """What g++ says of a kernel."""


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("call", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
        ("arguments", ctypes.c_int),
        ("sizes", ctypes.POINTER(ctypes.c_int)),
        ("kinds", ctypes.c_char_p),
    )


class _Region(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p), ("argument", ctypes.c_int))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.POINTER(_Kernel)),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_int64),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("seed", ctypes.c_uint64),
        ("shuffled", ctypes.c_int),
        ("checked", ctypes.c_int),
        ("regions", ctypes.POINTER(_Region)),
        ("region_count", ctypes.c_int),
        ("error", ctypes.c_char_p),
        ("error_bytes", ctypes.c_int),
    )


@functools.cache
def unavailable() -> str | None:
    """Why the emulator cannot run here, or None."""
    if os.name != "posix" or os.uname().sysname != "Linux":
        return "the emulator of CUDA kernels runs on Linux only"
    if os.uname().machine not in ("x86_64", "aarch64"):
        return f"the emulator of CUDA kernels has no switch of fibers for {os.uname().machine}"
    return None if shutil.which("g++") else "the emulator of CUDA kernels needs g++ on the PATH"


@functools.cache
def _temporary_cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"cuda_emulator_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@functools.cache
def _toolchain() -> str:
    """The compiler's version and what this processor can do, as the compiler's own macros."""
    return _run(["g++", "-march=native", "-dM", "-E", "-x", "c++", "/dev/null"])


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


class EmulatedLauncher:
    """Compiles the kernels of a folder, each instantiation once, and runs them on CPU tensors.

    Args:
        kernels_dir: folder of .cu and .cuh files. Its ptx.cuh, if any, is replaced by the emulator's.
        seed: None runs warps and lanes in their order. An integer draws another order of lanes between any two
            collectives, of warps between any two barriers, and of blocks: results must not depend on it.
        checked: every load and store of the kernel is checked, about ten times as slow: outside of the tensors given,
            outside of shared memory, and shared memory that two threads touch without a barrier between them.
        cache_dir: where compiled kernels are kept, by the hash of all sources. Defaults to a folder in the system's
            temporary one.
        flags: further flags of g++, as ("-DNAME=1",).
    """

    def __init__(
        self,
        kernels_dir: str | Path,
        seed: int | None = None,
        *,
        checked: bool = False,
        cache_dir: str | Path | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        if reason := unavailable():
            raise RuntimeError(reason)
        self.kernels_dir = Path(kernels_dir)
        self.seed = seed
        self.checked = checked
        self._cache = Path(cache_dir) if cache_dir else _temporary_cache()
        self._flags = ["-std=c++17", "-march=native", "-fPIC", "-g1", "-Wno-unknown-pragmas", *flags]
        self._kernels: dict[str, _Kernel] = {}
        sources = sorted(p for p in self.kernels_dir.rglob("*") if p.suffix in (".cu", ".cuh") and p.name != "ptx.cuh")
        self._sources = {p.relative_to(self.kernels_dir): p.read_text() for p in sources}
        if not self._sources:
            raise ValueError(f"got kernels_dir={str(kernels_dir)!r}, which holds no .cu or .cuh file")

    def launch(
        self,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        args: Sequence[Any],
    ) -> None:
        """Runs a kernel to its end.

        Args:
            kernel: the name with its template arguments, as ``"entmax_attn_fwd_scan<__nv_bfloat16, 64, 0>"``.
            grid: blocks along x, y and z; those left out are 1.
            block: threads along x, y and z.
            shared_bytes: dynamic shared memory of a block, in bytes.
            args: CPU tensors for pointers (None for a null pointer), NumPy scalars or ctypes values for the others.

        Raises:
            KernelError: what the kernel did wrong.
            CompileError: what g++ says.
            TypeError: an argument is not what the kernel's signature tells.
        """
        compiled = self._find(kernel)
        values, regions = _pack(kernel, compiled, args)
        pointers = (ctypes.c_void_p * max(len(values), 1))(*(ctypes.addressof(value) for value in values))
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        request = _Launch(
            ctypes.pointer(compiled),
            (ctypes.c_uint32 * 3)(*_three("grid", grid)),
            (ctypes.c_uint32 * 3)(*_three("block", block)),
            shared_bytes,
            ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p)),
            self.seed or 0,
            self.seed is not None,
            self.checked,
            (_Region * max(len(regions), 1))(*regions),
            len(regions),
            ctypes.cast(error, ctypes.c_char_p),
            _ERROR_BYTES,
        )
        with _lock:
            failed = self._runtime.emulator_launch(ctypes.byref(request))
        if failed:
            raise KernelError(f"{kernel}: {_with_lines(error.value.decode(errors='replace'))}")

    def compile(self, kernels: Sequence[str]) -> None:
        """Compiles several instantiations at once, which takes less time than one after another."""
        missing = [kernel for kernel in dict.fromkeys(kernels) if kernel not in self._kernels]
        if not missing:
            return
        files = dict.fromkeys(self._file_of(kernel) for kernel in missing)
        text = "".join(f'#include "{file}"\n' for file in files)
        for i, kernel in enumerate(missing):
            text += f"extern const emulator::Kernel kernel_{i};\n"
            text += f"const emulator::Kernel kernel_{i} = emulator::describe(&{kernel});\n"
        library = ctypes.CDLL(str(self._build(text)))
        for i, kernel in enumerate(missing):
            self._kernels[kernel] = _Kernel.in_dll(library, f"kernel_{i}")

    def _find(self, kernel: str) -> _Kernel:
        self.compile([kernel])
        return self._kernels[kernel]

    def _file_of(self, kernel: str) -> Path:
        name = kernel.split("<")[0].strip()
        pattern = re.compile(rf"__global__\b[^;{{}}]*?\b{re.escape(name.split('::')[-1])}\s*\(")
        for file, text in self._sources.items():
            if pattern.search(text):
                return file
        raise ValueError(f"got kernel={kernel!r}: no __global__ function {name!r} in {self.kernels_dir}")

    @functools.cached_property
    def _runtime(self) -> ctypes.CDLL:
        # Loaded for all: the kernels' libraries find it by its symbols.
        library = ctypes.CDLL(str(self._runtime_path), mode=ctypes.RTLD_GLOBAL)
        library.emulator_launch.restype = ctypes.c_int
        return library

    @functools.cached_property
    def _runtime_path(self) -> Path:
        sources = {p.name: p.read_text() for p in (_HERE / "runtime.cpp", *sorted(_INCLUDE.iterdir()))}
        return self._built(sources, "runtime.cpp", ["-O3", "-fno-omit-frame-pointer"])

    def _build(self, text: str) -> Path:
        assert self._runtime
        sources = {str(file): _as_gcc_reads_it(source) for file, source in self._sources.items()}
        sources |= {p.name: p.read_text() for p in sorted(_INCLUDE.iterdir())}
        flags = ["-O1", "-include", "emulator.hpp", "-I", "."]
        if self.checked:
            flags.append("-fsanitize=thread")
        return self._built(sources | {"instantiations.cpp": text}, "instantiations.cpp", flags)

    def _built(self, sources: dict[str, str], main: str, flags: list[str]) -> Path:
        """The shared object of a source file beside others, from the cache or new."""
        flags = [*self._flags, *flags]
        digest = hashlib.sha256(repr((_toolchain(), flags, sorted(sources.items()))).encode()).hexdigest()[:32]
        target = self._cache / digest / "kernels.so"
        if target.exists():
            return target
        self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._cache) as name:
            folder = Path(name) / "build"
            for file, source in sources.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(source)
            # Linked without -fsanitize: the runtime has the functions that it calls.
            _run(["g++", *flags, "-c", main, "-o", "kernels.o"], cwd=folder)
            _run(["g++", "-shared", "kernels.o", "-o", "kernels.so", "-ldl"], cwd=folder)
            try:
                folder.rename(target.parent)
            except OSError:
                if not target.exists():  # else another process was first
                    raise
        return target


def _as_gcc_reads_it(source: str) -> str:
    """Dynamic shared memory as a pointer into the runtime's, which lies between pages that cannot be touched."""
    return re.sub(
        r"extern\s+__shared__\s+(?:__align__\s*\(\s*\w+\s*\)\s+)?([\w\s:]+?)\s*\b(\w+)\s*\[\s*\]\s*;",
        r"\1* const \2 = reinterpret_cast<\1*>(::emulator::shared_memory);",
        source,
    )


def _three(name: str, sizes: Sequence[int]) -> tuple[int, int, int]:
    if not 1 <= len(sizes) <= 3 or any(size < 1 for size in sizes):
        raise ValueError(f"got {name}={tuple(sizes)}: expected one to three positive sizes")
    if name == "block" and np.prod(sizes) > 1024:
        raise ValueError(f"got block={tuple(sizes)}: expected at most 1024 threads")
    x, y, z = (*sizes, 1, 1)[:3]
    return int(x), int(y), int(z)


def _pack(kernel: str, compiled: _Kernel, args: Sequence[Any]) -> tuple[list[Any], list[_Region]]:
    """The arguments as ctypes values, checked against the kernel's signature, and the memory that they point to."""
    if len(args) != compiled.arguments:
        raise TypeError(f"{kernel} takes {compiled.arguments} arguments, got {len(args)}")
    values: list[Any] = []
    regions: list[_Region] = []
    for i, arg in enumerate(args):
        kind, size = chr(compiled.kinds[i]), compiled.sizes[i]
        value, given = _value(kernel, i, arg)
        if given != kind or ctypes.sizeof(value) != size:
            expected = {"p": "a tensor", "f": "a float", "i": "an integer", "s": "a structure"}[kind]
            raise TypeError(f"{kernel}, argument {i}: expected {expected} of {size} bytes, got {_name(arg)}")
        values.append(value)
        if isinstance(arg, torch.Tensor) and arg.numel():
            extent = sum((size - 1) * stride for size, stride in zip(arg.shape, arg.stride(), strict=True)) + 1
            regions.append(_Region(arg.data_ptr(), arg.data_ptr() + extent * arg.element_size(), i))
    return values, regions


def _value(kernel: str, i: int, arg: Any) -> tuple[Any, str]:
    if arg is None:
        return ctypes.c_void_p(None), "p"
    if isinstance(arg, torch.Tensor):
        if arg.device.type != "cpu":
            raise TypeError(f"{kernel}, argument {i}: expected a tensor on the CPU, got one on {arg.device}")
        return ctypes.c_void_p(arg.data_ptr()), "p"
    if isinstance(arg, np.generic):
        raw = (ctypes.c_char * arg.itemsize).from_buffer_copy(arg.tobytes())
        return raw, "f" if arg.dtype.kind == "f" else "i" if arg.dtype.kind in "iub" else "s"
    if isinstance(arg, ctypes.Structure):
        return arg, "s"
    if isinstance(arg, ctypes._SimpleCData):
        return arg, "f" if isinstance(arg.value, float) else "i"
    raise TypeError(f"{kernel}, argument {i}: expected a tensor, a NumPy scalar or a ctypes value, got {_name(arg)}")


def _name(arg: Any) -> str:
    return f"a tensor of {arg.dtype}" if isinstance(arg, torch.Tensor) else f"{type(arg).__name__} {arg!r}"


def _with_lines(message: str) -> str:
    """Addresses in a library become the kernel's source lines."""

    def line(match: re.Match[str]) -> str:
        command = ["addr2line", "-s", "-e", match[1], match[2]]
        try:
            found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        except OSError:  # binutils are not installed
            found = ""
        return f", {found.split(' (')[0]}" if found and "?" not in found else ""

    return re.sub(r" \[(\S+)\+(0x[0-9a-f]+)\]", line, message)
