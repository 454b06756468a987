"""attention, entmax, explain and support: what users call. Every check of their arguments is made here, once."""

from __future__ import annotations

import dataclasses
import math
import sys
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adasplash2 import autograd, registry
from adasplash2.arrays import Array, from_torch, to_torch
from adasplash2.contract import AttentionRequest, EntmaxRequest, Explanation, SupportStats
from adasplash2.registry import DEFAULT_BACKEND

__all__ = ["attention", "entmax", "explain", "support"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    alpha: float | Array = 1.5,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    backend: str = DEFAULT_BACKEND,
    return_tau: bool = False,
) -> Any:
    """α-entmax attention: softmax attention's shape and use, with weights of which most are exactly zero.

    For one query row (AdaSplash-2, arXiv 2604.15180)::

        z_j = (alpha - 1) * scale * q . k_j
        p_j = max(z_j - tau, 0) ** (1 / (alpha - 1)),    sum_j p_j = 1  (fixes tau)
        out = sum_j p_j v_j

    Differentiable once in q, k, v and in a tensor alpha (Correia et al. 2019, arXiv 1909.00015). One operator of torch,
    so it works under ``torch.compile(fullgraph=True)``.

    q, k and v are torch tensors, or all NumPy arrays, or all CuPy arrays; the other array arguments are of the same
    library, and the results too. Any strides; nothing is written to.

    The causal mask aligns the last query with the last key (bottom right); 1 = visible::

        seqlen_q 2, seqlen_k 4        seqlen_q 4, seqlen_k 2

        1 1 1 0                       0 0
        1 1 1 1                       0 0
                                      1 0
                                      1 1

    A row that sees no key gives zeros in out, +inf in tau, and takes no gradient; so does a row past its seqlens_q. A
    NaN or inf in a query gives NaN in that row only, in a key in every row that sees the key.

    Args:
        q: (batch, heads_q, seqlen_q, head_dim), float16, bfloat16, float32 or float64. Any length may be 0.
        k: (batch, heads_kv, seqlen_k, head_dim), q's dtype and device. heads_q is a multiple of heads_kv: query head h
            reads the head h // (heads_q / heads_kv) of k and v (grouped-query and multi-query attention).
        v: (batch, heads_kv, seqlen_k, head_dim_v), q's dtype and device.
        alpha: a number in [1, 2], or a tensor of shape (heads_q,), or () for all heads, with entries in (1, 2], which
            may require grad. 1.5 by default; 2 is sparsemax; 1 is softmax, which torch's own
            ``scaled_dot_product_attention`` computes, as it treats NaN and inf, without a backend of this package.
        is_causal: whether query i sees key j only if j - i <= seqlen_k - seqlen_q; with seqlens, the lengths of the
            sequence take the place of seqlen_q and seqlen_k. False by default.
        scale: finite factor of the scores q . k; 1 / sqrt(head_dim) by default.
        seqlens_q: (batch,) int32 or int64 on q's device, the valid queries of each padded sequence, from 0 to seqlen_q;
            all by default.
        seqlens_k: (batch,) int32 or int64 on q's device, the valid keys of each padded sequence, from 0 to seqlen_k;
            all by default.
        backend: "auto" for the first backend in the order for the device that can serve the call, or a name of
            ``available_backends()``, which then serves the call or raises. The environment variable
            ADASPLASH2_BACKEND, read at import, changes the default, "auto".
        return_tau: whether to return (out, tau) in place of out. Refused at alpha = 1, where there is no tau.

    Returns:
        out (batch, heads_q, seqlen_q, head_dim_v) in q's dtype; with return_tau also tau (batch, heads_q,
        seqlen_q), float32 (float64 for float64), in units of z, detached. Under ``torch.autocast`` q, k and v are cast
        as for torch's own attention, and out has that dtype.

    Raises:
        TypeError: an argument of the wrong type or dtype, or arrays of two libraries.
        ValueError: a shape, device or value out of place. The entries of a tensor alpha and of seqlens are checked on
            the CPU alone: on an accelerator the check would wait for the device, and what a wrong entry gives is
            unspecified. At alpha = 1 under ``torch.compile`` they are not checked either.
        UnsupportedError: the named backend cannot serve the call; the message has its reasons.
        NoBackendError: no backend can; the message has the reasons of each.
    """
    if _is_dtensor(q):
        from adasplash2 import sharding

        options = {"is_causal": is_causal, "scale": scale, "backend": backend, "return_tau": return_tau}
        return sharding.attention(attention, q, k, v, alpha, seqlens_q, seqlens_k, **options)
    library, request = _attention_request(q, k, v, alpha, is_causal, scale, seqlens_q, seqlens_k, return_tau)
    if _is_softmax(request):
        return from_torch(_softmax_attention(request), library)
    out, tau, _ = autograd.attention(request, backend)
    if library != "torch":
        out, tau = from_torch(out, library), from_torch(tau, library)
    return (out, tau) if return_tau else out


def explain(
    q: Array,
    k: Array,
    v: Array,
    *,
    alpha: float | Array = 1.5,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    backend: str = DEFAULT_BACKEND,
    return_tau: bool = False,
) -> Explanation:
    """Which backend would serve ``attention`` with these arguments, and why each other one would not; runs nothing.

    Args:
        q: as for ``attention``, and so are all the others.

    Returns:
        Explanation: ``chosen`` is a name, None if none can serve the call, "scaled_dot_product_attention" at alpha = 1;
        ``reasons`` has each backend's reasons against the call. ``print`` shows it as a table.

    Raises:
        TypeError: as ``attention``.
        ValueError: as ``attention``.
    """
    _, request = _attention_request(q, k, v, alpha, is_causal, scale, seqlens_q, seqlens_k, return_tau)
    autograd.check_values(request)
    if _is_softmax(request):
        reason = (f"got alpha={request.alpha}; needs alpha in (1, 2]",)
        return Explanation("scaled_dot_product_attention", dict.fromkeys(registry.names(), reason))
    return registry.explain(request, backend, registry.candidates(request))


def support(
    q: Array,
    k: Array,
    *,
    alpha: float | Array = 1.5,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_q: Array | None = None,
    seqlens_k: Array | None = None,
    block_m: int = 64,
    block_n: int = 64,
    backend: str = DEFAULT_BACKEND,
) -> SupportStats:
    """Where the weights of ``attention`` are not zero: tau, support size per row, a map of blocks, two densities.

    Never makes an array of seqlen_q times seqlen_k, and is not differentiable.

    Args:
        q: (batch, heads_q, seqlen_q, head_dim); this and the others as for ``attention``, but alpha = 1 is refused:
            softmax has no tau, and no zeros.
        k: (batch, heads_kv, seqlen_k, head_dim).
        alpha: in (1, 2]; 1.5 by default.
        is_causal: whether the mask is causal, bottom right; False by default.
        scale: factor of the scores; 1 / sqrt(head_dim) by default.
        seqlens_q: (batch,) valid queries; all by default.
        seqlens_k: (batch,) valid keys; all by default.
        block_m: queries per block of the map, at least 1; 64 by default.
        block_n: keys per block of the map, at least 1; 64 by default.
        backend: as for ``attention``.

    Returns:
        SupportStats: arrays of the library that q is of.

    Raises:
        TypeError: as ``attention``.
        ValueError: as ``attention``.
    """
    # The support does not depend on v; k has the shape of one that every backend can take.
    library, request = _attention_request(q, k, k, alpha, is_causal, scale, seqlens_q, seqlens_k, return_tau=False)
    if _is_softmax(request):
        raise _bad("alpha", alpha, "more than 1, up to 2: softmax has no tau, and no zeros")
    _check_int("block_m", block_m, least=1)
    _check_int("block_n", block_n, least=1)
    with torch.no_grad():
        request = dataclasses.replace(request, save_for_backward=False)
        autograd.check_values(request)
        stats = registry.resolve(request, backend).support(request, block_m, block_n)
    return dataclasses.replace(
        stats,
        tau=from_torch(stats.tau, library),
        size=from_torch(stats.size, library),
        block_map=from_torch(stats.block_map, library),
    )


def entmax(x: Array, alpha: float | Array = 1.5, dim: int = -1, *, backend: str = DEFAULT_BACKEND) -> Array:
    """α-entmax along one dimension: like softmax, but with exact zeros.

    The distribution p that maximises p . x + H_alpha(p), with H_alpha Tsallis' entropy (Peters et al. 2019, arXiv
    1905.05702)::

        z_j = (alpha - 1) * x_j
        p_j = max(z_j - tau, 0) ** (1 / (alpha - 1)),    sum_j p_j = 1  (fixes tau)

    Differentiable once in x and in a tensor alpha (Correia et al. 2019, arXiv 1909.00015). Takes the place of the
    functions of the package entmax: ``entmax_bisect(x, alpha, dim)`` is ``entmax(x, alpha, dim)``, ``entmax15(x, dim)``
    is ``entmax(x, 1.5, dim)``, ``sparsemax(x, dim)`` is ``entmax(x, 2, dim)``.

    Args:
        x: scores of any shape, float16, bfloat16, float32 or float64; a torch tensor, NumPy or CuPy array. An entry of
            -inf is masked out: p = 0. A row with NaN or +inf, or of -inf alone, gives NaN.
        alpha: a number in [1, 2], or a tensor with entries in (1, 2] that broadcasts to x and has size 1 along dim; it
            may require grad. 1.5 by default; 2 is sparsemax; 1 is ``torch.softmax``.
        dim: the dimension that sums to 1; the last by default.
        backend: as for ``attention``.

    Returns:
        p with x's shape and dtype, also under ``torch.autocast``.

    Raises:
        TypeError: an argument of the wrong type or dtype, or arrays of two libraries.
        ValueError: a shape, device or value out of place; entries of a tensor alpha are checked on the CPU alone.
        UnsupportedError: the named backend cannot serve the call; the message has its reasons.
        NoBackendError: no backend can; the message has the reasons of each.
    """
    if _is_dtensor(x):
        from adasplash2 import sharding

        _check_int("dim", dim, least=-x.ndim, most=x.ndim - 1)
        return sharding.entmax(entmax, x, alpha, dim, backend=backend)
    library = "torch"
    if not isinstance(x, Tensor):
        library, (x, alpha) = to_torch(x=x, alpha=alpha)
    _check_tensor("x", x, "the scores")
    _check_int("dim", dim, least=-max(x.ndim, 1), most=max(x.ndim, 1) - 1)
    moved = x.movedim(dim, -1) if x.ndim else x[None]
    shape, n = moved.shape, moved.shape[-1]
    alpha_rows = None
    if isinstance(alpha, Tensor):
        _check_alpha_tensor(alpha, x.device)
        alpha_rows = _alpha_rows(alpha, x, dim)
        alpha = 1.5  # the request's default, ignored
    else:
        alpha = _checked_alpha(alpha)
    if alpha == 1 or x.numel() == 0:
        return from_torch(torch.softmax(x, dim), library)
    p = autograd.entmax(EntmaxRequest(moved.reshape(-1, n), alpha, alpha_rows), backend).view(shape)
    return from_torch(p.movedim(-1, dim) if x.ndim else p[0], library)


def _alpha_rows(alpha: Tensor, x: Tensor, dim: int) -> Tensor:
    """(rows,), the alpha of each row of x when dim is moved last."""
    shape = list(x.shape)
    if shape:
        shape[dim] = 1
    fits = (size in (1, full) for size, full in zip(reversed(alpha.shape), reversed(shape), strict=False))
    if alpha.ndim > x.ndim or not all(fits):
        raise _bad("alpha.shape", tuple(alpha.shape), f"one that broadcasts to {tuple(shape)}, x's with 1 along dim")
    rows = alpha.expand(shape)
    return rows.movedim(dim, -1).reshape(-1) if shape else rows.reshape(1)


def _attention_request(
    q: Array,
    k: Array,
    v: Array,
    alpha: float | Array,
    is_causal: bool,
    scale: float | None,
    seqlens_q: Array | None,
    seqlens_k: Array | None,
    return_tau: bool,
) -> tuple[str, AttentionRequest]:
    """The library of the arrays, and the request, checked but for what only the data can tell."""
    library = "torch"
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        library, (q, k, v, alpha, seqlens_q, seqlens_k) = to_torch(
            q=q, k=k, v=v, alpha=alpha, seqlens_q=seqlens_q, seqlens_k=seqlens_k
        )
    _check_tensor("q", q, "(batch, heads_q, seqlen_q, head_dim)", ndim=4)
    _check_tensor("k", k, "(batch, heads_kv, seqlen_k, head_dim)", ndim=4)
    _check_tensor("v", v, "(batch, heads_kv, seqlen_k, head_dim_v)", ndim=4)
    device = q.device
    if _is_autocast(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        q, k, v = (tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in (q, k, v))
    _check_agreement(q, k, v)
    batch, heads_q, _, head_dim = q.shape

    alpha_heads = None
    if isinstance(alpha, Tensor):
        _check_alpha_tensor(alpha, device)
        if alpha.shape not in ((), (heads_q,)):
            raise _bad("alpha.shape", tuple(alpha.shape), f"(heads_q,), which is ({heads_q},), or ()")
        alpha_heads = alpha if alpha.ndim else alpha.repeat(heads_q)
        alpha = 1.5  # the request's default, ignored
    else:
        alpha = _checked_alpha(alpha)
    if not isinstance(is_causal, bool):
        raise _bad("is_causal", is_causal, "a bool", TypeError)
    if not isinstance(return_tau, bool):
        raise _bad("return_tau", return_tau, "a bool", TypeError)
    if alpha == 1 and return_tau:
        raise _bad("return_tau", return_tau, "False at alpha = 1: softmax has no tau")
    if seqlens_q is not None:
        _check_seqlens("seqlens_q", seqlens_q, batch, device)
    if seqlens_k is not None:
        _check_seqlens("seqlens_k", seqlens_k, batch, device)

    needs_grad = q.requires_grad or k.requires_grad or v.requires_grad
    if alpha_heads is not None:
        needs_grad = needs_grad or alpha_heads.requires_grad
    return library, AttentionRequest(
        q=q,
        k=k,
        v=v,
        scale=head_dim**-0.5 if scale is None else _checked_scale(scale),
        alpha=alpha,
        alpha_heads=alpha_heads,
        is_causal=is_causal,
        seqlens_q=seqlens_q,
        seqlens_k=seqlens_k,
        save_for_backward=needs_grad and torch.is_grad_enabled(),
    )


def _is_autocast(device_type: str) -> bool:
    # Asked first because it is one question; torch 2.11 cannot trace the second.
    if not torch._C._is_any_autocast_enabled():
        return False
    has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


def _is_softmax(request: AttentionRequest) -> bool:
    return request.alpha == 1 and request.alpha_heads is None


def _softmax_attention(request: AttentionRequest) -> Tensor:
    """The request at alpha = 1, by torch's own attention, with the mask and the lengths of this package."""
    q, k, v = request.q, request.k, request.v
    seqlen_q, seqlen_k = request.seqlen_q, request.seqlen_k
    options: dict[str, Any] = {"scale": request.scale}
    if request.heads_q != request.heads_kv:
        options["enable_gqa"] = True
    if request.seqlens_q is not None or request.seqlens_k is not None:
        if not torch.compiler.is_compiling():
            autograd.check_values(request)
        return _padded_softmax_attention(request, options)
    if not request.is_causal or seqlen_q == 1:
        return F.scaled_dot_product_attention(q, k, v, **options)
    if seqlen_q < seqlen_k:
        # torch's own bottom-right mask (torch.nn.attention.bias) cannot be traced.
        mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).tril(seqlen_k - seqlen_q)
        return F.scaled_dot_product_attention(q, k, v, mask, **options)
    blind = seqlen_q - seqlen_k  # rows that see no key
    out = F.scaled_dot_product_attention(q[:, :, blind:], k, v, is_causal=True, **options)
    return F.pad(out, (0, 0, blind, 0)) if blind else out


def _padded_softmax_attention(request: AttentionRequest, options: dict[str, Any]) -> Tensor:
    i = torch.arange(request.seqlen_q, device=request.device)[:, None]
    j = torch.arange(request.seqlen_k, device=request.device)
    # [batch, 1, 1, 1]
    lengths_q = request.seqlen_q if request.seqlens_q is None else request.seqlens_q.view(-1, 1, 1, 1)
    lengths_k = request.seqlen_k if request.seqlens_k is None else request.seqlens_k.view(-1, 1, 1, 1)
    is_key = j < lengths_k
    visible = (i < lengths_q) & is_key
    if request.is_causal:
        visible = visible & (j - i <= lengths_k - lengths_q)
    # A blind row is given every key, for torch to stay away from 0 / 0, and its result is dropped. What nobody sees is
    # zeroed, because 0 * NaN is NaN.
    blind = ~visible.any(-1, keepdim=True)
    q, k, v = request.q.masked_fill(blind, 0), request.k, request.v
    if request.seqlens_k is not None:
        k, v = (tensor.masked_fill(~is_key.mT, 0) for tensor in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, visible | blind, **options)
    return out.masked_fill(blind, 0)


def _is_dtensor(value: object) -> bool:
    """Whether it is a DTensor, of which there is none before its module is loaded."""
    if type(value) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _check_tensor(name: str, value: object, meaning: str, ndim: int | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: expected a torch tensor, NumPy or CuPy array, {meaning}")
    if _is_dtensor(value):
        raise TypeError(f"{name} is a DTensor: expected a plain tensor (its to_local()), or a DTensor in place of each")
    if ndim is not None and value.ndim != ndim:
        raise _bad(f"{name}.shape", tuple(value.shape), f"{ndim} dimensions, {meaning}")
    if value.dtype not in _DTYPES:
        raise _bad(f"{name}.dtype", value.dtype, "float16, bfloat16, float32 or float64", TypeError)
    if value.layout is not torch.strided:
        raise _bad(f"{name}.layout", value.layout, "torch.strided, a dense tensor", TypeError)


def _check_agreement(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not (k.dtype == v.dtype == q.dtype and k.device == v.device == q.device):
        for name, tensor in (("k", k), ("v", v)):
            if tensor.dtype != q.dtype:
                raise _bad(f"{name}.dtype", tensor.dtype, f"{q.dtype}, the dtype of q", TypeError)
            _check_device(name, tensor, q.device)
    batch, heads_q, _, head_dim = q.shape
    k_batch, heads_kv, seqlen_k, k_head_dim = k.shape
    if head_dim < 1:
        raise _bad("q.shape", tuple(q.shape), "a head_dim (the last) of at least 1")
    if k_batch != batch or k_head_dim != head_dim:
        expected = f"({batch}, heads_kv, seqlen_k, {head_dim}), for q of shape {tuple(q.shape)}"
        raise _bad("k.shape", tuple(k.shape), expected)
    v_batch, v_heads, v_seqlen_k, _ = v.shape
    if v_batch != batch or v_heads != heads_kv or v_seqlen_k != seqlen_k:
        expected = f"({batch}, {heads_kv}, {seqlen_k}, head_dim_v), for k of shape {tuple(k.shape)}"
        raise _bad("v.shape", tuple(v.shape), expected)
    if heads_q % heads_kv if heads_kv else heads_q:
        raise _bad("heads_q", heads_q, f"a multiple of heads_kv, which is {heads_kv}")


def _check_seqlens(name: str, seqlens: object, batch: int, device: torch.device) -> None:
    if not isinstance(seqlens, Tensor):
        raise TypeError(f"{name} is a {type(seqlens).__name__}: expected an array of the library of q, (batch,)")
    if seqlens.shape != (batch,):
        raise _bad(f"{name}.shape", tuple(seqlens.shape), f"(batch,), which is ({batch},)")
    if seqlens.dtype not in (torch.int32, torch.int64):
        raise _bad(f"{name}.dtype", seqlens.dtype, "int32 or int64", TypeError)
    _check_device(name, seqlens, device)


def _check_alpha_tensor(alpha: Tensor, device: torch.device) -> None:
    if not alpha.dtype.is_floating_point:
        raise _bad("alpha.dtype", alpha.dtype, "a floating dtype", TypeError)
    _check_device("alpha", alpha, device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise _bad(f"{name}.device", str(tensor.device), f"{str(device)!r}, the device of the scores")


def _checked_alpha(alpha: object) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, (float, Real)):
        raise _bad("alpha", alpha, "a number in [1, 2], or an array of the library of the scores", TypeError)
    value = float(alpha)
    if not 1 <= value <= 2:
        raise _bad("alpha", alpha, "a number in [1, 2]")
    return value


def _checked_scale(scale: object) -> float:
    if isinstance(scale, bool) or not isinstance(scale, (float, Real)):
        raise _bad("scale", scale, "a number", TypeError)
    value = float(scale)
    if not math.isfinite(value):
        raise _bad("scale", scale, "a finite number")
    return value


def _check_int(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _bad(name, value, "an int", TypeError)
    if value < least or (most is not None and value > most):
        raise _bad(name, value, f"at least {least}" if most is None else f"from {least} to {most}")


def _bad(name: str, value: object, expected: str, error: type[Exception] = ValueError) -> Exception:
    return error(f"{name}={value!r}: expected {expected}")
