"""Runs a stage on several threads at once.

Numba's own threading layers abort on concurrent calls (workqueue) or kill a forked child (OpenMP). And threads of
another kind than torch's would have to share the cores with torch's OpenMP threads, which spin for milliseconds after
every operation of torch. So a stage runs as a parallel region of the OpenMP library that torch has loaded, where there
is one, and on Python threads otherwise: on other platforms, and in a forked child, where OpenMP has lost its threads.
The stages release the GIL and take their work from a shared counter.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.compiler_lock import global_compiler_lock

__all__ = ["run_stage"]

_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


def run_stage(stage: Any, threads: int, *args: Any) -> None:
    """Calls stage(counter, *args) on ``threads`` threads and waits for all.

    ``counter`` is the address of two zeroed int64: the next work item, and the next thread number.
    """
    counter = np.zeros(2, np.int64)
    args = (counter.ctypes.data, *args)
    if threads == 1:
        stage(*args)
    elif (parallel := _openmp()) and not _forked:
        entry, slots = _entry(stage, tuple(map(_type_of, args))), np.array(list(_flatten(args)), np.int64)
        parallel(entry, slots.ctypes.data, threads, 0)
    else:
        others = [_pool(os.getpid()).submit(stage, *args) for _ in range(threads - 1)]
        try:
            stage(*args)
        finally:
            for other in others:
                if not other.cancel():
                    other.result()


@cache
def _pool(pid: int) -> ThreadPoolExecutor:
    """One pool for the process; keyed by its id since threads do not survive a fork."""
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="adasplash2")


@cache
def _openmp() -> Callable[..., None] | None:
    """GOMP_parallel of the OpenMP library in this process; LLVM's and Intel's have it too. None without one of them."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return None
    loaded = set(re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)\S*\.so\S*)", maps.read_text()))
    of_torch = [path for path in loaded if "torch" in path] or list(loaded)
    if len(of_torch) != 1:
        return None
    try:
        parallel = ctypes.CDLL(of_torch[0]).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


def _type_of(arg: Any) -> types.Type:
    if isinstance(arg, tuple):
        return types.UniTuple(types.int64, len(arg))
    if isinstance(arg, bool):
        return types.boolean
    if isinstance(arg, np.float32):
        return types.float32
    return types.float64 if isinstance(arg, float) else types.int64


def _flatten(args: tuple[Any, ...]) -> Iterator[int]:
    """Every number of the arguments as 64 bits, those of floats as of a float64."""
    for arg in args:
        if isinstance(arg, tuple):
            yield from arg
        elif isinstance(arg, float | np.floating):
            yield int(np.float64(arg).view(np.int64))
        else:
            yield int(arg)


_entries: dict[tuple[Any, tuple[types.Type, ...]], tuple[int, Any]] = {}


def _entry(stage: Any, signature: tuple[types.Type, ...]) -> int:
    """Address of a C function that calls the stage with the arguments that ``_flatten`` left at its one argument."""
    key = (stage, signature)
    if key not in _entries:
        stage.compile(signature)
        with global_compiler_lock:
            _entries[key] = _compile_entry(stage.overloads[signature])
    return _entries[key][0]


def _compile_entry(compiled: Any) -> tuple[int, Any]:
    """The address of the C function, and what must live as long as it is used."""
    context, description = compiled.target_context, compiled.fndesc
    name = f"{description.llvm_func_name}.entry"
    library = context.codegen().create_library(name)
    module = library.create_ir_module(name)
    slots_type = ir.IntType(64).as_pointer()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [slots_type]), name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    position = count()

    def read(of: types.Type) -> ir.Value:
        if isinstance(of, types.UniTuple):
            return cgutils.pack_array(builder, [read(of.dtype) for _ in range(of.count)])
        bits = builder.load(builder.gep(function.args[0], [ir.Constant(ir.IntType(32), next(position))]))
        if of == types.boolean:
            return builder.trunc(bits, ir.IntType(1))
        if isinstance(of, types.Float):
            value = builder.bitcast(bits, ir.DoubleType())
            return value if of == types.float64 else builder.fptrunc(value, ir.FloatType())
        return bits

    values = [read(of) for of in compiled.signature.args]
    native_type = context.call_conv.get_function_type(description.restype, description.argtypes)
    native = compiled.library.get_pointer_to_function(description.llvm_func_name)
    pointer = builder.inttoptr(ir.Constant(ir.IntType(64), native), native_type.as_pointer())
    context.call_conv.call_function(builder, pointer, description.restype, description.argtypes, values)
    builder.ret_void()
    library.add_ir_module(module)
    library.finalize()
    return library.get_pointer_to_function(name), (library, compiled)
