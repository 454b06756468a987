"""attention and entmax of DTensors: each process works on its own part of the batch and of the heads.

Loaded by the first call with a DTensor, because ``torch.distributed.tensor`` takes a second to import. What has to move
is moved and differentiated by DTensor's own ``redistribute`` and ``to_local``; the operators see plain tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

__all__ = ["attention", "entmax"]

_BATCH, _HEADS = 0, 1


def attention(
    attend: Callable[..., Any],
    q: DTensor,
    k: DTensor,
    v: DTensor,
    alpha: float | DTensor,
    seqlens_q: DTensor | None,
    seqlens_k: DTensor | None,
    **options: Any,
) -> Any:
    """``adasplash2.attention`` of DTensors over one mesh, split over the batch, over the heads, or over both.

    Args:
        attend: the attention of plain tensors.
        q: (batch, heads_q, seqlen_q, head_dim); in each dimension of the mesh Shard(0), Shard(1), Replicate() or
            Partial(), which is reduced. Where q is not split, but k or v is, q is split as they are.
        k: (batch, heads_kv, seqlen_k, head_dim), brought to the placements of q. Where there are more processes than
            heads_kv, each reads the head that its query heads share.
        v: (batch, heads_kv, seqlen_k, head_dim_v), as k.
        alpha: a number, or a DTensor of shape (heads_q,) or ().
        seqlens_q: (batch,) or None.
        seqlens_k: (batch,) or None.
        **options: the other arguments of ``attend``.

    Returns:
        What ``attend`` returns, as DTensors, split as q.

    Raises:
        TypeError: if one of the tensors is no DTensor.
        ValueError: for tensors on different meshes, another dimension that is split, or heads that the processes cannot
            share evenly.
    """
    mesh = q.device_mesh
    for name, value in (("k", k), ("v", v), ("alpha", alpha), ("seqlens_q", seqlens_q), ("seqlens_k", seqlens_k)):
        _check(name, value, mesh)
    allowed = {_BATCH: "the batch", _HEADS: "the heads"}
    splits = _splits({"q": q, "k": k, "v": v}, allowed)
    heads_q, heads_kv = q.shape[_HEADS], k.shape[_HEADS]
    processes, index = 1, 0
    for i, split in enumerate(splits):
        if split == _HEADS:
            processes, index = processes * mesh.size(i), index * mesh.size(i) + mesh.get_local_rank(i)
    shares_kv = heads_kv % processes != 0
    if heads_q % processes or (shares_kv and processes % heads_kv):
        raise ValueError(
            f"heads_q={heads_q}, heads_kv={heads_kv}: expected numbers that {processes} processes can share evenly"
        )
    shape = (*q.shape[:3], v.shape[3])
    whole = {_BATCH: 0, _HEADS: 1}
    q_part = _local(q, splits, whole)
    k_part, v_part = (_local(tensor, splits, {_BATCH: 0} if shares_kv else whole) for tensor in (k, v))
    if shares_kv:
        head = index // (processes // heads_kv)
        k_part, v_part = k_part.narrow(_HEADS, head, 1), v_part.narrow(_HEADS, head, 1)
    result = attend(
        q_part,
        k_part,
        v_part,
        alpha=_local(alpha, splits, {_HEADS: 0} if alpha.ndim else {}) if isinstance(alpha, DTensor) else alpha,
        seqlens_q=None if seqlens_q is None else _local(seqlens_q, splits, {_BATCH: 0}),
        seqlens_k=None if seqlens_k is None else _local(seqlens_k, splits, {_BATCH: 0}),
        **options,
    )
    if isinstance(result, Tensor):
        return _whole(result, mesh, splits, shape)
    out, tau = result
    return _whole(out, mesh, splits, shape), _whole(tau, mesh, splits, shape[:3])


def entmax(transform: Callable[..., Tensor], x: DTensor, alpha: float | DTensor, dim: int, **options: Any) -> DTensor:
    """``adasplash2.entmax`` of a DTensor that is split in any dimensions but ``dim``.

    Args:
        transform: the entmax of plain tensors.
        x: scores of any shape; Partial() is reduced.
        alpha: a number, or a DTensor that broadcasts to x.
        dim: the dimension that sums to 1.
        **options: the other arguments of ``transform``.

    Returns:
        p, split as x.

    Raises:
        TypeError: if alpha is a plain tensor.
        ValueError: if x is split in ``dim``, or alpha lies on another mesh.
    """
    _check("alpha", alpha, x.device_mesh)
    allowed = {i: f"dimension {i}" for i in range(x.ndim) if i != dim % x.ndim}
    splits = _splits({"x": x}, allowed)
    own_alpha: float | Tensor = alpha
    if isinstance(alpha, DTensor):
        missing = x.ndim - alpha.ndim
        own = {missing + i: i for i, size in enumerate(alpha.shape) if size == x.shape[missing + i]}
        own_alpha = _local(alpha, splits, own)
    p = transform(_local(x, splits, {i: i for i in allowed}), own_alpha, dim, **options)
    return _whole(p, x.device_mesh, splits, x.shape)


def _check(name: str, value: object, mesh: DeviceMesh) -> None:
    if isinstance(value, DTensor):
        if value.device_mesh != mesh:
            raise ValueError(f"{name}.device_mesh={value.device_mesh}: expected {mesh}, that of the first argument")
    elif isinstance(value, Tensor):
        raise TypeError(f"{name} is a plain tensor: expected a DTensor, as the first argument is one")


def _splits(tensors: Mapping[str, DTensor], allowed: Mapping[int, str]) -> list[int | None]:
    """In each dimension of the mesh the dimension of the tensors that is split, None where nothing is."""
    for name, tensor in tensors.items():
        for placement in tensor.placements:
            split = type(placement) is Shard and placement.dim in allowed
            if not (split or isinstance(placement, (Replicate, Partial))):
                choice = ", ".join(f"Shard({i}) ({meaning})" for i, meaning in allowed.items())
                raise ValueError(
                    f"{name}.placements={tensor.placements}: expected {choice}, Replicate() or Partial(); "
                    "redistribute it first"
                )
    columns = zip(*(tensor.placements for tensor in tensors.values()), strict=True)
    return [next((at.dim for at in column if isinstance(at, Shard)), None) for column in columns]


def _placements(splits: Sequence[int | None], dims: Mapping[int, int]) -> list[Placement]:
    """Those of a tensor whose dimension ``dims[split]`` is the one that is split; without one the tensor is whole."""
    return [Replicate() if split is None or split not in dims else Shard(dims[split]) for split in splits]


def _local(tensor: DTensor, splits: Sequence[int | None], dims: Mapping[int, int]) -> Tensor:
    """This process's part of a tensor, and of its gradient: a share where the call is split and the tensor is not."""
    placements = _placements(splits, dims)
    if list(tensor.placements) != placements:
        tensor = tensor.redistribute(placements=placements)
    shared = [split is not None and split not in dims for split in splits]
    gradients = [Partial() if share else at for share, at in zip(shared, placements, strict=True)]
    return tensor.to_local(grad_placements=gradients)


def _whole(part: Tensor, mesh: DeviceMesh, splits: Sequence[int | None], shape: Sequence[int]) -> DTensor:
    # The shape is told, because parts of an uneven split do not tell it.
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    placements = _placements(splits, {i: i for i in range(len(shape))})
    return DTensor.from_local(
        part.contiguous(), mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )
