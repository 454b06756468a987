"""Triton's interpreter, quicker: what it does again and again, or for nothing, is left out, and no bit changes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import triton.language as tl
from triton.runtime import interpreter

_call_as_found = interpreter.InterpretedFunction.__call__
_reduce_as_found = interpreter.ReduceOps.generic_reduce


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone."""
    patch.setattr(interpreter.InterpretedFunction, "__call__", _call)
    patch.setattr(interpreter.ReduceOps, "generic_reduce", _reduce)
    # It would work out whether integers overflow, and then assert nothing, which only its debug mode does.
    quiet = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    patch.setattr(interpreter.interpreter_builder, "options", quiet)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls: for each, the interpreter would look through all of the language once more."""
    if any(tl.core.is_builtin(language.load) for language in _languages(self.fn)):
        return _call_as_found(self, *args, **kwargs)
    return self.rewrite()(*args, **kwargs)


@functools.cache
def _languages(function: Any) -> list[Any]:
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def _reduce(self: Any, operands: tuple[Any, ...]) -> Any:
    """By slices, in the same order; the interpreter would take number by number."""
    if len(operands) > 1 or self.keep_dims:
        return _reduce_as_found(self, operands)
    (operand,), axis = self.unravel(operands, self.axis)
    values = operand.handle.data
    slices = (self.to_tensor(values.take(i, axis), operand.dtype) for i in range(values.shape[axis]))
    return [functools.reduce(self.combine_fn.fn, slices)]
