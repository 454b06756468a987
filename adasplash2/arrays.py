"""NumPy and CuPy arrays at the edge: into torch tensors and back through DLPack, without a copy where it permits.

Neither library is imported here: an array of one of them cannot exist before its library is in ``sys.modules``.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils.dlpack import from_dlpack

__all__ = ["Array", "from_torch", "library_of", "to_torch"]

Array: TypeAlias = Any
"""A torch tensor, a NumPy or a CuPy array; no type that a checker knows takes in all three without importing them."""

_TITLES = {"torch": "a torch tensor", "numpy": "a NumPy array", "cupy": "a CuPy array"}


def library_of(value: object) -> str | None:
    """The library of an array ("torch", "numpy" or "cupy"), or None if the value is no array."""
    if isinstance(value, Tensor):
        return "torch"
    for library in ("numpy", "cupy"):
        module = sys.modules.get(library)
        if module is not None and isinstance(value, module.ndarray):
            return library
    return None


def to_torch(**arguments: Any) -> tuple[str, list[Any]]:
    """The arguments with every array among them as a tensor; what is no array stays as it is.

    Args:
        **arguments: by name, as the messages shall call them; the first one says which library is expected.

    Returns:
        tuple: the library ("torch" if there is no array), and the arguments in their order. Tensors share memory with
        their arrays where DLPack permits it, so write to neither.

    Raises:
        TypeError: if arrays of two libraries are mixed, or a dtype has no counterpart in torch.
    """
    libraries = {name: library for name, value in arguments.items() if (library := library_of(value)) is not None}
    first = next(iter(libraries), None)
    if first is None:
        return "torch", list(arguments.values())
    for name, library in libraries.items():
        if library != libraries[first]:
            raise TypeError(
                f"{first} is {_TITLES[libraries[first]]}, {name} is {_TITLES[library]}; expected arrays of one library"
            )
    return libraries[first], [
        _tensor(name, value) if libraries.get(name, "torch") != "torch" else value for name, value in arguments.items()
    ]


def from_torch(tensor: Tensor, library: str) -> Array:
    """The tensor as an array of the library, sharing its memory."""
    if library == "torch":
        return tensor
    if library == "numpy":
        return tensor.numpy()
    return sys.modules[library].from_dlpack(tensor)


def _tensor(name: str, array: Array) -> Tensor:
    try:
        # torch.from_dlpack ends the process on a negative stride (seen in torch 2.13).
        if any(stride < 0 for stride in array.strides):
            array = array.copy()
        return from_dlpack(array)
    except BufferError as refusal:
        # NumPy before 2.1 exports no read-only array.
        try:
            return from_dlpack(array.copy())
        except BufferError:
            raise TypeError(f"{name} has dtype {array.dtype}; expected one that torch knows ({refusal})") from refusal
