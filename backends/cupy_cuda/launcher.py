"""Compiles the kernels by NVRTC through CuPy, and puts them on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import threading
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["KERNELS", "MAP_ALIGNMENT", "MAP_BYTES", "CupyLauncher", "Record", "options", "unavailable_reason"]

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


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of CUDA's driver API: which one, and its value, here a number in a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("unused", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of CUDA's driver API."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION: a kernel begins once all programs of the one before ask for it.
_FOLLOWS = ctypes.pointer(_Attribute(id=6, value=(1,)))
# What the driver makes of a tensor for the bulk copy engine, CUtensorMap, and words of cuTensorMapEncodeTiled.
MAP_BYTES = 128
MAP_ALIGNMENT = 64
_UINT16 = 1
_NO_INTERLEAVE = 0
_SWIZZLE_128B = 3
_PROMOTION_L2_256B = 3
_FILL_ZEROS = 0

_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
# The oldest driver that captures such launches in a graph.
_FOLLOWING_DRIVER = 12_030


class CupyLauncher:
    """Launches on the current device; each instantiation is compiled once per machine, and loaded once per device.

    By the driver itself, as CuPy's own launch has no attributes, and takes the host longer.

    Args:
        overlaps: whether a kernel may begin before the one before it has ended, where device and driver can do that.
    """

    def __init__(self, overlaps: bool = True) -> None:
        self._overlaps = overlaps
        self._functions: dict[tuple[int, str], Any] = {}
        self._loading = threading.Lock()

    def launch(
        self,
        source: str,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        args: Record,
        follows: bool,
    ) -> None:
        stream = torch.cuda.current_stream()
        index = stream.device_index
        function = self._functions.get((index, kernel))
        if function is None:
            function = self._loaded(index, source, kernel, shared_bytes)
        n_attributes = int(follows and self._overlaps and _can_follow(index))
        config = _LaunchConfig(grid, block, shared_bytes, stream.cuda_stream, _FOLLOWS, n_attributes)
        arguments = (ctypes.c_void_p * 1)(args.ctypes.data)
        launch = _driver().cuLaunchKernelEx
        status = launch(ctypes.byref(config), function.ptr, arguments, None)
        if status == _INVALID_CONTEXT:
            _make_context_current()
            status = launch(ctypes.byref(config), function.ptr, arguments, None)
        if status != 0:
            import cupy

            raise cupy.cuda.driver.CUDADriverError(status)

    def _loaded(self, index: int, source: str, kernel: str, shared_bytes: int) -> Any:
        """Once, whichever threads ask at the same time: it takes seconds, and what is loaded in vain is unloaded."""
        with self._loading:
            key = index, kernel
            if key not in self._functions:
                self._functions[key] = _load(source, kernel, shared_bytes)
            return self._functions[key]

    def tensor_map(
        self, address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]
    ) -> bytes | None:
        return _tensor_map(address, sizes, strides, box)


# Where memory is allocated again and again, tensors come back at the same addresses.
@functools.lru_cache(maxsize=1024)
def _tensor_map(address: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes | None:
    rank = len(sizes)
    room = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
    place = ctypes.addressof(room) + -ctypes.addressof(room) % MAP_ALIGNMENT
    status = _driver().cuTensorMapEncodeTiled(
        place,
        _UINT16,
        rank,
        address,
        (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides),
        (ctypes.c_uint32 * rank)(*box),
        (ctypes.c_uint32 * rank)(*[1] * rank),
        _NO_INTERLEAVE,
        _SWIZZLE_128B,
        _PROMOTION_L2_256B,
        _FILL_ZEROS,
    )
    return ctypes.string_at(place, MAP_BYTES) if status == 0 else None


@functools.cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    driver.cuLaunchKernelEx.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
    number, pointer = ctypes.c_int, ctypes.c_void_p
    driver.cuTensorMapEncodeTiled.argtypes = (
        *(pointer, number, number, pointer, pointer, pointer, pointer, pointer),
        *(number, number, number, number),
    )
    return driver


def _make_context_current() -> None:
    """For a thread that has not used CUDA before."""
    import cupy

    cupy.cuda.runtime.free(0)


@functools.cache
def _can_follow(index: int) -> bool:
    import cupy

    can_wait = torch.cuda.get_device_capability(index) >= (9, 0)
    return can_wait and cupy.cuda.runtime.driverGetVersion() >= _FOLLOWING_DRIVER


def _load(source: str, kernel: str, shared_bytes: int) -> Any:
    import cupy

    module = cupy.RawModule(
        code=_sources()[source],
        options=options(torch.cuda.get_device_capability()),
        name_expressions=(kernel,),
    )
    function = module.get_function(kernel)
    function.max_dynamic_shared_size_bytes = shared_bytes
    return function.kernel


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
