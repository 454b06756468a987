"""Compiles the kernels by NVRTC through CuPy, and puts them on torch's current stream."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["KERNELS", "CupyLauncher", "Record", "options", "unavailable_reason"]

KERNELS = Path(__file__).parent / "kernels"

# The one argument of a kernel: an array of no dimensions, with a field for each member of the structure.
Record: TypeAlias = npt.NDArray[np.void]


@functools.cache
def _sources() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(KERNELS.glob("*.cu*"))}


@functools.cache
def options(capability: tuple[int, int]) -> tuple[str, ...]:
    """For NVRTC, on a device of this compute capability.

    CuPy's cache looks at the main file alone: the hash tells it about the files that this includes. CuPy asks for sm_90
    where sm_90a is needed for wgmma; NVRTC takes the one with more instructions.
    """
    digest = hashlib.sha256("".join(_sources().values()).encode()).hexdigest()[:16]
    architecture = ("-arch=sm_90a",) if capability == (9, 0) else ()
    return "--std=c++17", f"-I{KERNELS}", f"-DADASPLASH2_SOURCES=0x{digest}", *architecture


class CupyLauncher:
    """Launches on the current device; each instantiation is compiled once per machine, and loaded once per device."""

    def __init__(self) -> None:
        self._functions: dict[tuple[int, str], Any] = {}

    def launch(
        self,
        source: str,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        args: Record,
    ) -> None:
        stream = torch.cuda.current_stream()
        index = stream.device_index
        key = index, kernel
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = _load(source, kernel, shared_bytes)
        # CuPy passes an array of NumPy's by value; it would take it time to describe the fields.
        plain = args.view(f"V{args.itemsize}")
        function(grid, block, (plain,), shared_mem=shared_bytes, stream=_stream_at(stream.cuda_stream, index))


@functools.lru_cache(maxsize=256)
def _stream_at(address: int, index: int) -> Any:
    """CuPy's view of a stream of the current device, whose index it is. Not every torch has the protocol itself."""
    import cupy

    return cupy.cuda.Stream.from_external(SimpleNamespace(__cuda_stream__=lambda: (0, address)))


def _load(source: str, kernel: str, shared_bytes: int) -> Any:
    import cupy

    module = cupy.RawModule(
        code=_sources()[source],
        options=options(torch.cuda.get_device_capability()),
        name_expressions=(kernel,),
    )
    function = module.get_function(kernel)
    function.max_dynamic_shared_size_bytes = shared_bytes
    return function


def unavailable_reason() -> str | None:
    """Why this machine cannot run the kernels, in one sentence, or None."""
    try:
        import cupy
    except ImportError as error:
        return f"cupy cannot be imported ({_first_line(error)}); needs adasplash2[cuda12] or adasplash2[cuda13]"
    runtime = cupy.cuda.runtime
    if runtime.is_hip:
        return f"cupy {cupy.__version__} is built for ROCm; needs one for CUDA"
    built_for, driver = runtime.runtimeGetVersion() // 1000, runtime.driverGetVersion() // 1000
    if driver == 0:
        return f"cupy {cupy.__version__} finds no CUDA driver"
    if driver < built_for:
        versions = f"cupy {cupy.__version__} is built for CUDA {built_for}, the driver for CUDA {driver}"
        return f"{versions}; needs adasplash2[cuda{driver}]"
    try:
        runtime.getDeviceCount()
        compiler, _ = cupy.cuda.nvrtc.getVersion()
    except (RuntimeError, ImportError) as error:
        return f"cupy {cupy.__version__} cannot use CUDA {built_for} ({_first_line(error)})"
    if compiler != built_for:
        return f"cupy {cupy.__version__} is built for CUDA {built_for} and finds the NVRTC of CUDA {compiler}"
    return None if torch.cuda.is_available() else "no CUDA device is visible to torch"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
