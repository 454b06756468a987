"""The torch operators that carry attention and entmax through autograd and ``torch.compile``, whatever the backend.

``adasplash2::attention`` and ``adasplash2::entmax`` take the fields of their request in order, then the name of the
backend ("auto" included); their schemas are made from those fields, so that a new one is added in ``contract`` alone.
The backend is chosen inside the operator and inside its fake: tracing sees neither the registry nor a backend.

There are first derivatives only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from adasplash2 import registry
from adasplash2.contract import AttentionGrads, AttentionRequest, AttentionResult, EntmaxRequest

__all__ = ["attention", "check_values", "entmax"]

Function = Callable[..., Any]

_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "int": "int",
    "int | None": "int?",
    "bool": "bool",
}


def _schema(request: type[AttentionRequest] | type[EntmaxRequest]) -> str:
    return ", ".join(f"{_SCHEMA_TYPES[str(field.type)]} {field.name}" for field in fields(request))


# Places among the arguments of adasplash2::attention.
_NAMES = [field.name for field in fields(AttentionRequest)]
_TENSORS = [i for i, field in enumerate(fields(AttentionRequest)) if "Tensor" in str(field.type)]
_DIFFERENTIABLE = [_NAMES.index(name.removeprefix("d")) for name in AttentionGrads._fields]
_SAVE_FOR_BACKWARD = _NAMES.index("save_for_backward")


def attention(request: AttentionRequest, backend: str) -> AttentionResult:
    """The result of a validated request, differentiable, through the operator."""
    arguments = (getattr(request, name) for name in _NAMES)
    return AttentionResult(*_call(_attention_op, _attention_autograd, *arguments, backend))


def entmax(request: EntmaxRequest, backend: str) -> Tensor:
    """p of a validated request, differentiable, through the operator."""
    p: Tensor = _call(_entmax_op, _entmax_autograd, request.x, request.alpha, request.alpha_rows, backend)
    return p


def check_values(request: AttentionRequest | EntmaxRequest) -> None:
    """Check what only the data can tell, on CPU tensors; on an accelerator the check would wait for all work before it.

    Raises:
        ValueError: if a length or an alpha lies outside its range.
    """
    if isinstance(request, EntmaxRequest):
        if request.alpha_rows is not None:
            _check_range("alpha", request.alpha_rows, 1, 2, "entries in (1, 2]")
        return
    if request.alpha_heads is not None:
        _check_range("alpha", request.alpha_heads, 1, 2, "entries in (1, 2]")
    if request.seqlens_q is not None:
        most = request.seqlen_q
        _check_range("seqlens_q", request.seqlens_q, -1, most, f"entries from 0 to seqlen_q = {most}")
    if request.seqlens_k is not None:
        most = request.seqlen_k
        _check_range("seqlens_k", request.seqlens_k, -1, most, f"entries from 0 to seqlen_k = {most}")


def _check_range(name: str, values: Tensor, above: float, most: float, expected: str) -> None:
    if values.device.type != "cpu" or values.numel() == 0:
        return
    low, high = (extreme.item() for extreme in torch.aminmax(values))
    if not (above < low and high <= most):  # false for NaN, too
        raise ValueError(f"{name} has entries from {low} to {high}: expected {expected}")


def _is_differentiated(*tensors: Tensor | None) -> bool:
    # In forward mode autograd.Function refuses the call; passing it by would lose the tangent without a word.
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _attention(*args: Any) -> AttentionResult:
    request = AttentionRequest(*args[:-1])
    check_values(request)
    return registry.resolve(request, args[-1]).forward(request)


def _attention_fake(*args: Any) -> AttentionResult:
    request = AttentionRequest(*args[:-1])
    backend = registry.resolve(request, args[-1])
    rows = (request.batch, request.heads_q, request.seqlen_q)
    return AttentionResult(
        request.q.new_empty((*rows, request.head_dim_v)),
        request.q.new_empty(rows, dtype=request.tau_dtype),
        backend.saved_like(request) if request.save_for_backward else [],
    )


def _attention_autograd(*args: Any) -> Any:
    if _is_differentiated(*(args[i] for i in _DIFFERENTIABLE)):
        return _Attention.apply(*args)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return _attention_op(*args)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        inputs = list(args[:-1])
        inputs[_SAVE_FOR_BACKWARD] = True
        # Named here, because backward must meet the backend that wrote ``saved``.
        backend = registry.resolve(AttentionRequest(*inputs), args[-1]).name
        with torch._C._AutoDispatchBelowAutograd():
            out, tau, saved = _attention_op(*inputs, backend)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(tau)
        ctx.save_for_backward(*(inputs[i] for i in _TENSORS), tau, *saved)
        ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.backend = backend
        # A list passes through untouched: autograd does not see the saved tensors.
        return out, tau, saved

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        dinputs: list[Tensor | None] = [None] * len(_NAMES)
        if dout is not None:
            inputs, tensors = list(ctx.inputs), ctx.saved_tensors
            for i, tensor in zip(_TENSORS, tensors, strict=False):
                inputs[i] = tensor
            tau, *saved = tensors[len(_TENSORS) :]
            arguments = (dout, tau, saved, *inputs, ctx.backend)
            grads = iter(_call(_attention_backward_op, _attention_backward_autograd, *arguments))
            for i in _DIFFERENTIABLE:
                if inputs[i] is not None:
                    dinputs[i] = next(grads)
        return *dinputs, None


def _attention_backward(dout: Tensor, tau: Tensor, saved: Sequence[Tensor], *args: Any) -> list[Tensor]:
    request = AttentionRequest(*args[:-1])
    grads = registry.resolve(request, args[-1]).backward(request, tau, saved, dout)
    return [grad for grad in grads if grad is not None]


def _attention_backward_fake(dout: Tensor, tau: Tensor, saved: Sequence[Tensor], *args: Any) -> list[Tensor]:
    return [args[i].new_empty(args[i].shape) for i in _DIFFERENTIABLE if args[i] is not None]


def _entmax(*args: Any) -> Tensor:
    request = EntmaxRequest(*args[:-1])
    check_values(request)
    return registry.resolve(request, args[-1]).entmax(request)


def _entmax_fake(*args: Any) -> Tensor:
    request = EntmaxRequest(*args[:-1])
    registry.resolve(request, args[-1])
    return request.x.new_empty(request.x.shape)


def _entmax_autograd(x: Tensor, alpha: float, alpha_rows: Tensor | None, backend: str) -> Any:
    if _is_differentiated(x, alpha_rows):
        return _Entmax.apply(x, alpha, alpha_rows, backend)  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        return _entmax_op(x, alpha, alpha_rows, backend)


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float, alpha_rows: Tensor | None, backend: str) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            p: Tensor = _entmax_op(x, alpha, alpha_rows, backend)
        ctx.save_for_backward(p, alpha_rows)
        ctx.alpha, ctx.backend = alpha, backend
        return p

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        p, alpha_rows = ctx.saved_tensors
        arguments = (p, dp, ctx.alpha, alpha_rows, ctx.backend)
        dx, *dalpha_rows = _call(_entmax_backward_op, _entmax_backward_autograd, *arguments)
        return dx, None, dalpha_rows[0] if dalpha_rows else None, None


def _entmax_backward(p: Tensor, dp: Tensor, alpha: float, alpha_rows: Tensor | None, backend: str) -> list[Tensor]:
    # p has what the choice depends on: x's shape, dtype and device.
    chosen = registry.resolve(EntmaxRequest(p, alpha, alpha_rows), backend)
    return [grad for grad in chosen.entmax_backward(p, dp, alpha, alpha_rows) if grad is not None]


def _entmax_backward_fake(p: Tensor, dp: Tensor, alpha: float, alpha_rows: Tensor | None, backend: str) -> list[Tensor]:
    return [like.new_empty(like.shape) for like in (p, alpha_rows) if like is not None]


class _FirstDerivatives(torch.autograd.Function):
    """Carries the gradients of a ``create_graph=True`` backward, up to the attempt to differentiate them."""

    @staticmethod
    def forward(ctx: Any, operator: Function, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(operator(*args))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError("adasplash2 has first derivatives only; a gradient of its gradients was asked for")


def _first_derivatives(operator: Function, *args: Any) -> list[Tensor]:
    if torch.is_grad_enabled():
        return list(_FirstDerivatives.apply(operator, *args))  # type: ignore[no-untyped-call]
    with torch._C._AutoDispatchBelowAutograd():
        grads: list[Tensor] = operator(*args)
        return grads


def _attention_backward_autograd(*args: Any) -> list[Tensor]:
    return _first_derivatives(_attention_backward_op, *args)


def _entmax_backward_autograd(*args: Any) -> list[Tensor]:
    return _first_derivatives(_entmax_backward_op, *args)


def _call(operator: Function, autograd: Function, *args: Any) -> Any:
    """The operator, or outside a trace its autograd kernel: what the dispatcher would call first, 10 us later."""
    return (operator if torch.compiler.is_compiling() else autograd)(*args)


_library = torch.library.Library("adasplash2", "DEF")


def _define(schema: str, kernel: Function, fake: Function, autograd: Function) -> Function:
    """Register an operator and return it; the three functions take its arguments by position.

    As ``torch.library.custom_op`` does, which takes longer per call because it flattens nested arguments and compares
    the storages of all tensors: 49 us against 36 without grad, 355 against 195 forward and backward (AMD EPYC, torch
    2.13, a backend that only allocates its results).
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"adasplash2::{name}", fake, lib=_library)
    operator: Function = getattr(torch.ops.adasplash2, name).default
    return operator


_attention_op = _define(
    f"attention({_schema(AttentionRequest)}, str backend) -> (Tensor out, Tensor tau, Tensor[] saved)",
    _attention,
    _attention_fake,
    _attention_autograd,
)
_attention_backward_op = _define(
    f"attention_backward(Tensor dout, Tensor tau, Tensor[] saved, {_schema(AttentionRequest)}, str backend)"
    " -> Tensor[]",
    _attention_backward,
    _attention_backward_fake,
    _attention_backward_autograd,
)
_entmax_op = _define(
    f"entmax({_schema(EntmaxRequest)}, str backend) -> Tensor",
    _entmax,
    _entmax_fake,
    _entmax_autograd,
)
_entmax_backward_op = _define(
    "entmax_backward(Tensor p, Tensor dp, float alpha, Tensor? alpha_rows, str backend) -> Tensor[]",
    _entmax_backward,
    _entmax_backward_fake,
    _entmax_backward_autograd,
)
