"""The torch operators that carry attention and entmax through autograd and ``torch.compile``, whatever the backend.

``adasplash2::attention`` and ``adasplash2::entmax`` take the fields of their request in order, then the name of the
backend ("auto" included); their schemas are made from those fields, so that a new one is added in ``contract`` alone.
The backend is chosen inside the operator and inside its fake: tracing sees neither the registry nor a backend.

A call that torch's dispatcher would hand to the kernel of the operator without more ado goes there directly, which
spares most of the front's time.

There are first derivatives only, by backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.overrides import has_torch_function
from torch.utils._pytree import tree_map

from adasplash2 import registry
from adasplash2.contract import AttentionGrads, AttentionRequest, AttentionResult, Backend, EntmaxRequest

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


_NAMES = [field.name for field in fields(AttentionRequest)]
_TENSORS = [field.name for field in fields(AttentionRequest) if "Tensor" in str(field.type)]
_OPTIONS = [name for name in _NAMES if name not in _TENSORS]
_DIFFERENTIABLE = [name.removeprefix("d") for name in AttentionGrads._fields]


def attention(request: AttentionRequest, backend: str) -> AttentionResult:
    """The result of a validated request, differentiable, as the operator gives it.

    ``save_for_backward`` must tell whether anything is to be differentiated.
    """
    if torch.compiler.is_compiling() or _is_intercepted(
        request.q, request.k, request.v, request.alpha_heads, request.seqlens_q, request.seqlens_k
    ):
        return AttentionResult(*_attention_op(*_arguments(request), backend))
    if request.save_for_backward or forward_ad._current_level >= 0:
        inputs = (getattr(request, name) for name in _DIFFERENTIABLE)
        return AttentionResult(*_Attention.apply(_attention_kernel, request, backend, *inputs))
    return _attention_kernel(request, registry.resolve(request, backend))


def entmax(request: EntmaxRequest, backend: str) -> Tensor:
    """p of a validated request, differentiable, as the operator gives it."""
    arguments = (request.x, request.alpha, request.alpha_rows, backend)
    p: Tensor
    if torch.compiler.is_compiling() or _is_intercepted(request.x, request.alpha_rows):
        p = _entmax_op(*arguments)
    elif _is_differentiated(request.x, request.alpha_rows):
        p = _Entmax.apply(_entmax_kernel, *arguments)
    else:
        p = _entmax_kernel(*arguments)
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


def _is_recording() -> bool:
    # In forward mode autograd.Function refuses the call; passing it by would lose the tangent without a word.
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def _is_differentiated(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


_C = torch._C


def _bits(*names: str) -> int:
    bits = 0
    for name in names:
        bits |= _C.DispatchKeySet(getattr(_C.DispatchKey, name)).raw_repr()
    return bits


# All but what plain tensors have, and what a thread has when nothing is switched on.
_NOT_PLAIN = ~_bits(
    *("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "ADInplaceOrView", "BackendSelect")
)


def _is_intercepted(*tensors: Tensor | None) -> bool:
    """Whether a call of an operator with these tensors meets anything before autograd and the kernel.

    Dispatch keys tell of modes, torch.func's transforms, traces, subclasses and lazy negation.
    """
    if _C._dispatch_tls_local_include_set().raw_repr() & _NOT_PLAIN:
        return True
    for tensor in tensors:
        if tensor is not None and _C._dispatch_keys(tensor).raw_repr() & _NOT_PLAIN:
            return True
    return has_torch_function(tensors) or _C._autograd._profiler_enabled()


def _is_direct(*tensors: Tensor | None) -> bool:
    """Whether a call with these tensors goes to the kernel at once, past autograd, too."""
    return not (torch.compiler.is_compiling() or _is_intercepted(*tensors) or _is_recording())


def _below_autograd(operator: Function, *args: Any) -> Any:
    """The operator as a Function's forward must call it.

    Under torch.func's transforms that is at the next level, which differentiates on its own.
    """
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _C._AutoDispatchBelowAutograd():
        return operator(*args)


class _FirstOrder(_SingleLevelFunction):
    """One level of autograd; the levels of torch.func's transforms are separated by the dispatcher already."""

    apply: ClassVar[Function]

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            "adasplash2 has no forward mode AD (jvp, jacfwd, hessian): expected reverse mode, as backward, "
            "torch.func.grad, vjp and jacrev are"
        )


def _arguments(request: AttentionRequest) -> list[Any]:
    return [getattr(request, name) for name in _NAMES]


def _attention(*args: Any) -> AttentionResult:
    request = AttentionRequest(*args[:-1])
    return _attention_kernel(request, registry.resolve(request, args[-1]))


def _attention_kernel(request: AttentionRequest, backend: Backend) -> AttentionResult:
    check_values(request)
    return backend.forward(request)


def _attention_below(request: AttentionRequest, backend: Backend) -> AttentionResult:
    return AttentionResult(*_below_autograd(_attention_op, *_arguments(request), backend.name))


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
    request = AttentionRequest(*args[:-1])
    inputs = [getattr(request, name) for name in _DIFFERENTIABLE]
    if _is_differentiated(*inputs):
        with enable_single_level_autograd_function():
            return _Attention.apply(_attention_below, request, args[-1], *inputs)
    with _C._AutoDispatchBelowAutograd():
        return _attention_op(*args)


class _Attention(_FirstOrder):
    @staticmethod
    def forward(
        ctx: Any, run: Function, request: AttentionRequest, name: str, *_: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        if not request.save_for_backward:
            request = replace(request, save_for_backward=True)
        # Chosen here, because backward must meet the backend that wrote ``saved``.
        backend = registry.resolve(request, name)
        out, tau, saved = run(request, backend)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(tau)
        ctx.save_for_backward(*(getattr(request, name) for name in _TENSORS), out, tau, *saved)
        ctx.options = {name: getattr(request, name) for name in _OPTIONS}
        ctx.backend = backend
        # A list passes through untouched: autograd does not see the saved tensors.
        return out, tau, saved

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        dinputs: list[Tensor | None] = [None] * len(_DIFFERENTIABLE)
        if dout is not None:
            tensors = ctx.saved_tensors
            inputs, (out, tau, *saved) = tensors[: len(_TENSORS)], tensors[len(_TENSORS) :]
            request = AttentionRequest(**dict(zip(_TENSORS, inputs, strict=True)), **ctx.options)
            if _is_direct(dout, *inputs):
                return None, None, None, *ctx.backend.backward(request, out, tau, saved, dout)
            arguments = (dout, out, tau, saved, *_arguments(request), ctx.backend.name)
            grads = iter(_gradients(_attention_backward_op, _attention_backward, (dout, *inputs), *arguments))
            dinputs = [None if getattr(request, name) is None else next(grads) for name in _DIFFERENTIABLE]
        return None, None, None, *dinputs


def _attention_backward(dout: Tensor, out: Tensor, tau: Tensor, saved: Sequence[Tensor], *args: Any) -> list[Tensor]:
    request = AttentionRequest(*args[:-1])
    grads = registry.resolve(request, args[-1]).backward(request, out, tau, saved, dout)
    return [grad for grad in grads if grad is not None]


def _attention_backward_fake(
    dout: Tensor, out: Tensor, tau: Tensor, saved: Sequence[Tensor], *args: Any
) -> list[Tensor]:
    request = AttentionRequest(*args[:-1])
    inputs = [getattr(request, name) for name in _DIFFERENTIABLE]
    return [tensor.new_empty(tensor.shape) for tensor in inputs if tensor is not None]


def _entmax_kernel(x: Tensor, alpha: float, alpha_rows: Tensor | None, backend: str) -> Tensor:
    request = EntmaxRequest(x, alpha, alpha_rows)
    check_values(request)
    return registry.resolve(request, backend).entmax(request)


def _entmax_fake(x: Tensor, alpha: float, alpha_rows: Tensor | None, backend: str) -> Tensor:
    registry.resolve(EntmaxRequest(x, alpha, alpha_rows), backend)
    return x.new_empty(x.shape)


def _entmax_autograd(x: Tensor, alpha: float, alpha_rows: Tensor | None, backend: str) -> Any:
    if _is_differentiated(x, alpha_rows):
        run = partial(_below_autograd, _entmax_op)
        with enable_single_level_autograd_function():
            return _Entmax.apply(run, x, alpha, alpha_rows, backend)
    with _C._AutoDispatchBelowAutograd():
        return _entmax_op(x, alpha, alpha_rows, backend)


class _Entmax(_FirstOrder):
    @staticmethod
    def forward(ctx: Any, run: Function, x: Tensor, alpha: float, alpha_rows: Tensor | None, backend: str) -> Tensor:
        p: Tensor = run(x, alpha, alpha_rows, backend)
        ctx.save_for_backward(p, alpha_rows)
        ctx.alpha, ctx.backend = alpha, backend
        return p

    @staticmethod
    def backward(ctx: Any, dp: Tensor) -> tuple[Tensor | None, ...]:
        p, alpha_rows = ctx.saved_tensors
        arguments = (p, dp, ctx.alpha, alpha_rows, ctx.backend)
        dx, *dalpha_rows = _gradients(_entmax_backward_op, _entmax_backward, (p, dp, alpha_rows), *arguments)
        return None, dx, None, dalpha_rows[0] if dalpha_rows else None, None


def _entmax_backward(p: Tensor, dp: Tensor, alpha: float, alpha_rows: Tensor | None, backend: str) -> list[Tensor]:
    # p has what the choice depends on: x's shape, dtype and device.
    chosen = registry.resolve(EntmaxRequest(p, alpha, alpha_rows), backend)
    return [grad for grad in chosen.entmax_backward(p, dp, alpha, alpha_rows) if grad is not None]


def _entmax_backward_fake(p: Tensor, dp: Tensor, alpha: float, alpha_rows: Tensor | None, backend: str) -> list[Tensor]:
    return [like.new_empty(like.shape) for like in (p, alpha_rows) if like is not None]


class _FirstDerivatives(_FirstOrder):
    """Carries the gradients of a ``create_graph=True`` backward, up to the attempt to differentiate them."""

    @staticmethod
    def forward(ctx: Any, run: Function, *args: Any) -> tuple[Tensor, ...]:
        return tuple(run(*args))

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError("adasplash2 has first derivatives only; a gradient of its gradients was asked for")


def _gradients(operator: Function, kernel: Function, tensors: Sequence[Tensor | None], *args: Any) -> list[Tensor]:
    """What a backward operator gives; ``tensors`` are those of its arguments that come from outside."""
    if torch.compiler.is_compiling() or _is_intercepted(*tensors):
        grads: list[Tensor] = operator(*args)
    elif _is_recording():
        grads = list(_FirstDerivatives.apply(kernel, *args))
    else:
        grads = kernel(*args)
    return grads


def _backward_autograd(operator: Function, *args: Any) -> list[Tensor]:
    if _is_recording():
        with enable_single_level_autograd_function():
            run = partial(_below_autograd, operator)
            return list(_FirstDerivatives.apply(run, *args))
    with _C._AutoDispatchBelowAutograd():
        grads: list[Tensor] = operator(*args)
        return grads


def _attention_backward_autograd(*args: Any) -> list[Tensor]:
    return _backward_autograd(_attention_backward_op, *args)


def _entmax_backward_autograd(*args: Any) -> list[Tensor]:
    return _backward_autograd(_entmax_backward_op, *args)


def _fold(tensor: Tensor | None, in_dim: int | None, size: int, into: int) -> Tensor | None:
    """A tensor with the dimension that vmap maps over, of this size, folded into another."""
    if tensor is None:
        return None
    moved = tensor.expand(size, *tensor.shape) if in_dim is None else tensor.movedim(in_dim, 0)
    folded: Tensor = moved.movedim(0, into).flatten(into, into + 1)
    return folded


def _unfold(tensor: Tensor, size: int, into: int) -> Tensor:
    unfolded: Tensor = tensor.unflatten(into, (size, tensor.shape[into] // size))
    return unfolded


def _one_by_one(operator: Function, size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """The rule of vmap for what cannot be folded."""

    def at(i: int, value: Any, in_dim: Any) -> Any:
        if isinstance(value, list):
            return [at(i, *pair) for pair in zip(value, in_dim, strict=True)]
        return value if in_dim is None else value.select(in_dim, i)

    results = [operator(*(at(i, *pair) for pair in zip(args, in_dims, strict=True))) for i in range(size)]
    stacked = tree_map(lambda *tensors: torch.stack(tensors), *results)
    return stacked, tree_map(lambda _: 0, stacked)


def _folded_request(size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[list[Any], int] | None:
    """The fields of one call that stands for all of vmap's, and the dimension of q that holds them; None if none does.

    That is the batch, or, as each call has gradients of its own alpha, the heads.
    """
    fields_, dims = dict(zip(_NAMES, args, strict=True)), dict(zip(_NAMES, in_dims, strict=True))
    into = 0 if fields_["alpha_heads"] is None else 1
    for name in ("q", "k", "v"):
        fields_[name] = _fold(fields_[name], dims[name], size, into)
    fields_["alpha_heads"] = _fold(fields_["alpha_heads"], dims["alpha_heads"], size, 0)
    for name in ("seqlens_q", "seqlens_k"):
        if into == 0:
            fields_[name] = _fold(fields_[name], dims[name], size, 0)
        elif dims[name] is not None:
            return None
    return list(fields_.values()), into


def _attention_vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    size = info.batch_size
    folded = _folded_request(size, in_dims[:-1], args[:-1])
    if folded is None:
        return _one_by_one(_attention_op, size, in_dims, args)
    request, into = folded
    out, tau, saved = _attention_op(*request, args[-1])
    # What is saved serves the backward of the folded call alone, and is not taken apart.
    return (_unfold(out, size, into), _unfold(tau, size, into), saved), (into, into, [None] * len(saved))


def _attention_backward_vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    size, (*results, saved), dims = info.batch_size, args[:4], in_dims[:3]
    folded = _folded_request(size, in_dims[4:-1], args[4:-1])
    # An out or a tau that is the same for all is of a forward that was not mapped over.
    if folded is None or None in dims[1:]:
        return _one_by_one(_attention_backward_op, size, in_dims, args)
    request, into = folded
    folded_results = (_fold(result, dim, size, into) for result, dim in zip(results, dims, strict=True))
    grads = _attention_backward_op(*folded_results, saved, *request, args[-1])
    places = [into, into, into, 0][: len(grads)]
    return [_unfold(grad, size, place) for grad, place in zip(grads, places, strict=True)], places


def _rowwise_vmap(operator: Function, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    size = info.batch_size
    folded = (
        _fold(value, in_dim, size, 0) if isinstance(value, Tensor) else value
        for value, in_dim in zip(args, in_dims, strict=True)
    )
    results = tree_map(lambda tensor: _unfold(tensor, size, 0), operator(*folded))
    return results, tree_map(lambda _: 0, results)


def _entmax_vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    return _rowwise_vmap(_entmax_op, info, in_dims, *args)


def _entmax_backward_vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    return _rowwise_vmap(_entmax_backward_op, info, in_dims, *args)


def _legacy_vmap(*_: Any) -> None:
    raise NotImplementedError(
        "adasplash2 cannot be mapped over by is_grads_batched=True of torch.autograd.grad, nor by vectorize=True of "
        "torch.autograd.functional: expected torch.func.vmap of torch.func.vjp, or torch.func.jacrev"
    )


_library = torch.library.Library("adasplash2", "DEF")


def _define(schema: str, kernel: Function, fake: Function, autograd: Function, vmap: Function) -> Function:
    """Register an operator and return it; the first three functions take its arguments by position.

    As ``torch.library.custom_op`` does, which takes longer per call because it flattens nested arguments and compares
    the storages of all tensors, and whose gradients torch.func's transforms refuse.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"adasplash2::{name}", fake, lib=_library)
    torch.library.register_vmap(f"adasplash2::{name}", vmap, lib=_library)
    _library.impl(name, _legacy_vmap, "Batched")
    operator: Function = getattr(torch.ops.adasplash2, name).default
    return operator


_attention_op = _define(
    f"attention({_schema(AttentionRequest)}, str backend) -> (Tensor out, Tensor tau, Tensor[] saved)",
    _attention,
    _attention_fake,
    _attention_autograd,
    _attention_vmap,
)
_attention_backward_op = _define(
    f"attention_backward(Tensor dout, Tensor out, Tensor tau, Tensor[] saved, {_schema(AttentionRequest)}, str backend)"
    " -> Tensor[]",
    _attention_backward,
    _attention_backward_fake,
    _attention_backward_autograd,
    _attention_backward_vmap,
)
_entmax_op = _define(
    f"entmax({_schema(EntmaxRequest)}, str backend) -> Tensor",
    _entmax_kernel,
    _entmax_fake,
    _entmax_autograd,
    _entmax_vmap,
)
_entmax_backward_op = _define(
    "entmax_backward(Tensor p, Tensor dp, float alpha, Tensor? alpha_rows, str backend) -> Tensor[]",
    _entmax_backward,
    _entmax_backward_fake,
    _entmax_backward_autograd,
    _entmax_backward_vmap,
)
