"""Compiles the kernels by NVRTC through CuPy, and puts them on torch's current stream."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["KERNELS", "CupyLauncher", "options", "unavailable_reason"]

KERNELS = Path(__file__).parent / "kernels"


@functools.cache
def _sources() -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(KERNELS.glob("*.cu*"))}


@functools.cache
def options() -> tuple[str, ...]:
    """For NVRTC. CuPy's cache looks at the main file alone: the hash tells it about the files that this includes."""
    digest = hashlib.sha256("".join(_sources().values()).encode()).hexdigest()[:16]
    return "--std=c++17", f"-I{KERNELS}", f"-DADASPLASH2_SOURCES=0x{digest}"


class CupyLauncher:
    """Launches on the current device; each instantiation is compiled once per machine, and loaded once per device."""

    def __init__(self) -> None:
        self._functions: dict[tuple[int, str], Any] = {}

    def launch(
        self, source: str, kernel: str, grid: Sequence[int], block: Sequence[int], shared_bytes: int, args: np.void
    ) -> None:
        import cupy

        index = torch.cuda.current_device()
        with cupy.cuda.Device(index), cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream, index):
            function = self._functions.get((index, kernel))
            if function is None:
                module = cupy.RawModule(code=_sources()[source], options=options(), name_expressions=(kernel,))
                function = self._functions[index, kernel] = module.get_function(kernel)
                function.max_dynamic_shared_size_bytes = shared_bytes
            # CuPy passes an array of NumPy's by value.
            function(tuple(grid), tuple(block), (np.asarray(args),), shared_mem=shared_bytes)


def unavailable_reason() -> str | None:
    """Why this machine cannot run the kernels, in one sentence, or None."""
    try:
        import cupy
    except ImportError as error:
        return f"cupy cannot be imported ({str(error).splitlines()[0]}): install adasplash2[cuda12] or adasplash2[cuda13]"
    try:
        devices = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"cupy {cupy.__version__} finds no usable CUDA driver ({error})"
    if devices == 0 or not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    return None
