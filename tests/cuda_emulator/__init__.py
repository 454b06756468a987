"""Runs CUDA C++ kernels on the CPU: for tests of their logic on a machine without a GPU.

g++ compiles the kernels as they are. The words of CUDA C++ come from include/emulator.hpp, what is inline PTX on a GPU
from include/ptx.cuh in place of the kernels' own ptx.cuh, and runtime/ runs the threads.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

_HERE = Path(__file__).parent
_RUNTIME_SOURCES = tuple(
    f"runtime/{name}.cpp" for name in ("runtime", "operations", "warpgroups", "copies", "checks", "chains")
)
# What runtime/checks.cpp has the functions for.
_CHECKS = ("-fsanitize=thread", "-fsanitize=alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero")
_ERROR_BYTES = 4096
_MAX_THREADS = 1024
_MAX_SHARED_BYTES = 1 << 20
# What a structure's members may ask for: a TensorMap does.
_ALIGNMENT = 64
_MAP = np.dtype("V128")
_IS_MAP = 0x70616D5F64746D65

# The runtime runs one grid at a time.
_lock = threading.Lock()


class KernelError(RuntimeError):
    """What a kernel did wrong: divergence, a barrier that not all reach, an access out of bounds, a race."""


class CompileError(RuntimeError):
    """What g++ says of a kernel."""


class _Kernel(ctypes.Structure):
    _fields_ = (
        ("call", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
        ("n_arguments", ctypes.c_int),
        ("sizes", ctypes.POINTER(ctypes.c_int)),
        ("kinds", ctypes.c_char_p),
    )


class _Region(ctypes.Structure):
    _fields_ = (("begin", ctypes.c_void_p), ("end", ctypes.c_void_p))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.POINTER(_Kernel)),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_int64),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("seed", ctypes.c_uint64),
        ("is_shuffled", ctypes.c_int),
        ("is_checked", ctypes.c_int),
        ("follows", ctypes.c_int),
        ("regions", ctypes.POINTER(_Region)),
        ("n_regions", ctypes.c_int),
        ("error", ctypes.c_char_p),
        ("error_bytes", ctypes.c_int),
    )


@functools.cache
def unavailable() -> str | None:
    """Why the emulator cannot run here, in one sentence; None if it can."""
    system = os.uname() if hasattr(os, "uname") else None
    if system is None or system.sysname != "Linux":
        return "the emulator of CUDA kernels runs on Linux only"
    if system.machine not in ("x86_64", "aarch64"):
        return f"the emulator of CUDA kernels cannot switch threads on {system.machine}"
    return None if shutil.which("g++") else "the emulator of CUDA kernels needs g++"


class EmulatedLauncher:
    """Compiles the kernels of a folder, each instantiation once, and runs them on CPU tensors.

    Args:
        kernels_dir: folder of .cu and .cuh files. The emulator's own ptx.cuh takes the place of theirs.
        seed: None runs blocks, warps and lanes in their order. An integer draws another order of the blocks, of the
            warps between two barriers and of the lanes between two collectives; no result may depend on it.
        is_checked: every load and store is looked at: out of bounds of the tensors or of shared memory, not aligned,
            of shared memory that nobody wrote, or in a race with another thread's; and undefined arithmetic of
            integers is an error. Some 15 times as slow.
        cache_dir: where compiled kernels are kept, by a hash of all that they are made of. Defaults to a folder in the
            system's temporary one.
        flags: more flags for g++, as ``["-DNAME=1"]``.

    Raises:
        RuntimeError: the emulator cannot run here.
        ValueError: kernels_dir holds no kernels.
    """

    def __init__(
        self,
        kernels_dir: str | Path,
        seed: int | None = None,
        *,
        is_checked: bool = False,
        cache_dir: str | Path | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        if reason := unavailable():
            raise RuntimeError(reason)
        self.kernels_dir = Path(kernels_dir)
        self.seed = seed
        self.is_checked = is_checked
        self._cache = Path(cache_dir).absolute() if cache_dir else _temporary_cache()
        self._flags = ["-O1", "-include", "emulator.hpp", "-I.", "-Wno-unknown-pragmas", *flags]
        self._kernels: dict[tuple[str, str], _Kernel] = {}
        files = sorted(file for file in self.kernels_dir.rglob("*.cu*") if file.name != "ptx.cuh")
        self._sources = {str(f.relative_to(self.kernels_dir)): _as_gcc_reads_it(f.read_text()) for f in files}
        if not self._sources:
            raise ValueError(f"got kernels_dir={str(kernels_dir)!r}, which holds no .cu file")

    def launch(
        self,
        source: str,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        shared_bytes: int,
        args: Any,
        follows: bool = False,
    ) -> None:
        """Runs a kernel to its end.

        Args:
            source: the file that holds it, as ``"scan.cu"``.
            kernel: its name with template arguments, as ``"entmax_attn_fwd_scan<bf16, 64, ALPHA_1_5>"``.
            grid: blocks along x, y and z; those left out are 1.
            block: threads along x, y and z.
            shared_bytes: dynamic shared memory of a block, in bytes.
            args: a list of CPU tensors for pointers (None for a null one), NumPy scalars, and structured NumPy arrays
                of no dimensions, whose uint64 fields are pointers, and whose fields of 128 raw bytes are tensor maps. A
                kernel's only argument may come without the list.
            follows: whether on a GPU it may begin before the kernel before it has ended, once that one lets it. Here it
                does not; but with is_checked, what it does before it waits must be nothing to that one, and the other
                way round.

        Raises:
            CompileError: what g++ says.
            KernelError: what the kernel did wrong.
            TypeError: an argument is not what the kernel's parameter is.
            ValueError: an impossible size.
        """
        if not 0 <= shared_bytes <= _MAX_SHARED_BYTES:
            raise ValueError(f"got shared_bytes={shared_bytes}: expected 0 to {_MAX_SHARED_BYTES}")
        n_threads = np.prod(_sizes("block", block))
        if n_threads > _MAX_THREADS:
            raise ValueError(f"got block={block}: expected at most {_MAX_THREADS} threads")
        self.compile(source, [kernel])
        compiled = self._kernels[source, kernel]
        values = _pack(kernel, compiled, args if isinstance(args, list | tuple) else [args])
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        regions = [_Region(*extent) for extent in self._extents(args)]
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        request = _Launch(
            ctypes.pointer(compiled),
            (ctypes.c_uint32 * 3)(*_sizes("grid", grid)),
            (ctypes.c_uint32 * 3)(*_sizes("block", block)),
            shared_bytes,
            pointers,
            self.seed or 0,
            self.seed is not None,
            self.is_checked,
            follows,
            (_Region * len(regions))(*regions),
            len(regions),
            ctypes.cast(error, ctypes.c_char_p),
            _ERROR_BYTES,
        )
        with _lock:
            has_failed = self._runtime.emulator_launch(ctypes.byref(request))
        if has_failed:
            raise KernelError(f"{kernel}: {_with_lines(error.value.decode(errors='replace'))}")

    def compile(self, source: str, kernels: Iterable[str]) -> None:
        """Compiles instantiations of one file's kernels together, which is quicker than one by one."""
        if source not in self._sources:
            raise ValueError(f"got source={source!r}: expected one of {', '.join(self._sources)}")
        missing = [kernel for kernel in dict.fromkeys(kernels) if (source, kernel) not in self._kernels]
        if not missing:
            return
        text = f'#include "{source}"\n'
        for i, kernel in enumerate(missing):
            text += f"extern const emulator::Kernel kernel_{i};\n"
            text += f"const emulator::Kernel kernel_{i} = emulator::describe({kernel});\n"
        flags = [*self._flags, *_CHECKS] if self.is_checked else self._flags
        sources = self._sources | _files("include") | {"instantiations.cpp": text}
        library = ctypes.CDLL(str(self._built(sources, ["instantiations.cpp"], flags, [str(self._runtime_path)])))
        for i, kernel in enumerate(missing):
            self._kernels[source, kernel] = _Kernel.in_dll(library, f"kernel_{i}")

    def tensor_map(
        self, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
    ) -> bytes | None:
        """What bulk_copy_rows reads of a tensor of 5 dimensions, of numbers of 2 bytes.

        Args:
            address: of the first number.
            sizes: in numbers, innermost dimension first.
            strides: in bytes, of all dimensions but the innermost.
            box: sizes of what is copied at once.

        Returns:
            128 bytes, or None where CUDA's driver would refuse (for a swizzle of 128 bytes).
        """
        is_possible = (
            address % 16 == 0
            and all(0 < size <= 2**32 for size in sizes)
            and all(stride % 16 == 0 and 0 <= stride < 2**40 for stride in strides)
            and all(0 < size <= 256 for size in box)
            and box[0] * 2 % 16 == 0
            and box[0] * 2 <= 128
        )
        return np.array((address, *sizes, *strides, *box, _IS_MAP), np.uint64).tobytes() if is_possible else None

    @functools.cached_property
    def _runtime_path(self) -> Path:
        sources = _files("include") | _files("runtime", "runtime/")
        return self._built(sources, _RUNTIME_SOURCES, ["-O3", "-Wall", "-Wextra", "-Iinclude", "-I."], ["-ldl"])

    @functools.cached_property
    def _runtime(self) -> ctypes.CDLL:
        library = ctypes.CDLL(str(self._runtime_path))
        library.emulator_launch.restype = ctypes.c_int
        return library

    def _built(
        self, sources: dict[str, str], mains: Sequence[str], flags: Sequence[str], linked: Sequence[str]
    ) -> Path:
        """The library made of these sources, from the cache or new."""
        # Templates of one name in two libraries must not become one.
        flags = ["-std=c++17", "-march=native", "-fPIC", "-fno-gnu-unique", "-g1", "-gdwarf-4", *flags]
        parts = repr((_toolchain(), flags, linked, mains, sorted(sources.items())))
        target = self._cache / hashlib.sha256(parts.encode()).hexdigest()[:32]
        library = target / "library.so"
        if library.exists():
            return library
        self._cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._cache) as name:
            folder = Path(name) / "build"
            for file, text in sources.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_text(text)
            # Linked without the flags: -fsanitize would add its own library.
            objects = [f"{Path(main).stem}.o" for main in mains]
            for main, compiled in zip(mains, objects, strict=True):
                _run(["g++", *flags, "-c", main, "-o", compiled], folder)
            _run(["g++", "-shared", "-Wl,-Bsymbolic", *objects, *linked, "-o", library.name], folder)
            try:
                folder.rename(target)
            except OSError:
                if not library.exists():  # else another process was first
                    raise
        return library

    def _extents(self, args: Any) -> Iterator[tuple[int, int]]:
        """First address and the one past the last of all tensors given."""
        if isinstance(args, list | tuple):
            yield from (_extent(arg) for arg in args if isinstance(arg, torch.Tensor) and arg.numel())
        if self.is_checked:
            structures = [a for a in (args if isinstance(args, list | tuple) else [args]) if _is_structure(a)]
            yield from _extents_of_pointers({p: f for structure in structures for p, f in _pointers_in(structure)})


@functools.cache
def _temporary_cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"cuda_emulator_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@functools.cache
def _toolchain() -> str:
    """The compiler and what this processor can do, as the compiler's own macros tell it."""
    return _run(["g++", "-march=native", "-dM", "-E", "-x", "c++", os.devnull], _HERE)


def _run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def _files(folder: str, prefix: str = "") -> dict[str, str]:
    return {prefix + file.name: file.read_text() for file in sorted((_HERE / folder).iterdir())}


def _as_gcc_reads_it(source: str) -> str:
    """Dynamic shared memory becomes a pointer to the runtime's, which lies between pages that nobody may touch."""
    return re.sub(
        r"extern\s+__shared__\s+(?:__align__\(\w+\)\s+)?([\w\s]+?)\s*\b(\w+)\[\];",
        r"\1* const \2 = reinterpret_cast<\1*>(::emulator::shared_memory);",
        source,
    )


def _sizes(name: str, sizes: int | Sequence[int]) -> tuple[int, ...]:
    given = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    if not 1 <= len(given) <= 3 or any(size < 1 for size in given):
        raise ValueError(f"got {name}={sizes}: expected one to three positive sizes")
    return (*given, 1, 1)[:3]


def _pack(kernel: str, compiled: _Kernel, args: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """The bytes of each argument, checked against the kernel's parameters."""
    if len(args) != compiled.n_arguments:
        raise TypeError(f"{kernel} takes {compiled.n_arguments} arguments, got {len(args)}")
    values = []
    for i, arg in enumerate(args):
        value, kind = _value(kernel, i, arg)
        expected = chr(compiled.kinds[i])
        if kind != expected or value.nbytes != compiled.sizes[i]:
            words = {"p": "a pointer", "f": "a floating point number", "i": "an integer", "s": "a structure"}
            got = arg.dtype if isinstance(arg, torch.Tensor) else f"{words[kind]} of {value.nbytes} bytes"
            raise TypeError(
                f"{kernel}, argument {i}: expected {words[expected]} of {compiled.sizes[i]} bytes, got {got}"
            )
        values.append(value)
    return values


def _value(kernel: str, i: int, arg: Any) -> tuple[np.ndarray[Any, Any], str]:
    if arg is None:
        return np.array(0, np.uint64), "p"
    if isinstance(arg, torch.Tensor):
        if arg.device.type != "cpu":
            raise TypeError(f"{kernel}, argument {i}: expected a tensor on the CPU, got one on {arg.device}")
        return np.array(arg.data_ptr(), np.uint64), "p"
    if _is_structure(arg):
        return _aligned(np.array(arg)), "s"
    if isinstance(arg, np.generic) and arg.dtype.kind in "iufb":
        return np.array(arg), "f" if arg.dtype.kind == "f" else "i"
    raise TypeError(
        f"{kernel}, argument {i}: expected a tensor, a NumPy scalar or a structured NumPy array of no dimensions, "
        f"got {type(arg).__name__} {arg!r}"
    )


def _is_structure(arg: Any) -> bool:
    return isinstance(arg, np.generic | np.ndarray) and arg.dtype.fields is not None and arg.ndim == 0


def _aligned(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Its bytes, where a structure may lie."""
    memory = np.empty(value.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    memory[start : start + value.nbytes] = np.frombuffer(value.tobytes(), np.uint8)
    return memory[start : start + value.nbytes]


def _pointers_in(structure: Any) -> Iterator[tuple[int, str]]:
    for name in structure.dtype.names:
        kind = structure.dtype[name]
        if kind in (np.uint64, _MAP):
            pointer = int(np.frombuffer(structure[name].tobytes(), np.uint64)[0])  # a map begins with its tensor's
            if pointer:
                yield pointer, name


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _extents_of_pointers(pointers: dict[int, str]) -> Iterator[tuple[int, int]]:
    """Of bare addresses: the largest of the living tensors that start there."""
    extents: dict[int, tuple[int, int]] = {}
    for tensor in gc.get_objects() if pointers else ():
        if not issubclass(type(tensor), torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            continue
        try:
            begin, end = _extent(tensor) if tensor.numel() else (0, 0)
        except RuntimeError:  # a tensor of a trace has no memory
            continue
        if begin in pointers and end > extents.get(begin, (0, 0))[1]:
            extents[begin] = begin, end
    for pointer, name in pointers.items():
        if pointer not in extents:
            raise ValueError(f"got {name}={pointer:#x}, where no tensor starts that is in use")
    yield from extents.values()


def _with_lines(message: str) -> str:
    """Addresses in a library become lines of the kernel's source, with those that they were inlined into."""

    def lines(match: re.Match[str]) -> str:
        return " in ".join(_source_lines(match["library"], match["offset"])) or match["site"] or "an unknown line"

    return re.sub(r"(?P<site>[\w.]*:\d+)?\[(?P<library>[^\]+]+)\+(?P<offset>0x[0-9a-f]+)\]", lines, message)


@functools.cache
def _source_lines(library: str, offset: str) -> list[str]:
    """Of an address in a library: ["common.cuh:12", "scan.cu:34"], from the inside out."""
    if not shutil.which("addr2line"):
        return []
    found = subprocess.run(["addr2line", "-i", "-s", "-e", library, offset], capture_output=True, text=True).stdout
    lines = [line.split(" ")[0] for line in found.splitlines() if not re.match(r"\?|emulator\.hpp|ptx\.cuh", line)]
    return list(dict.fromkeys(lines))
