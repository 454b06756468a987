"""What backends share on the host."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from adasplash2.contract import AttentionRequest, SupportStats

__all__ = [
    "MANY",
    "SHORT",
    "TARGET",
    "in_dtype_of",
    "is_decoding",
    "is_dq_one_pass",
    "keys_seen",
    "live_blocks",
    "multiprocessors",
    "readable",
    "support_stats",
    "tiles_and_blocks",
    "visible_counts",
    "wide_heads",
]

SHORT = 16  # queries, at most, that are few
MANY = 2048  # keys, at least, that are split over programs of a GPU when the queries are few

# What may be left of tau's error when the output pass of a GPU begins, in units of the mean u. The output pass ends it.
# Where the dtype would show the error, out is corrected by a product of its own, which squares it; in bfloat16 a tile's
# worst row is off by a quarter of its last bit, others by less. On float32 at alpha = 2 the bound is that of rounding.
TARGET = {torch.float16: 1e-3, torch.bfloat16: 5e-4, torch.float32: 1e-6}


def keys_seen(request: AttentionRequest) -> Tensor:
    """(batch, seqlen_q) int64: how many keys, from the first one, each query sees."""
    device = request.q.device
    full_q, full_k = (torch.full((request.batch,), n, device=device) for n in (request.seqlen_q, request.seqlen_k))
    lengths_q = (full_q if request.seqlens_q is None else request.seqlens_q.to(torch.int64))[:, None]
    lengths_k = (full_k if request.seqlens_k is None else request.seqlens_k.to(torch.int64))[:, None]
    rows = torch.arange(request.seqlen_q, device=device)[None]
    seen = lengths_k.expand(-1, request.seqlen_q)
    if request.is_causal:
        seen = torch.minimum(seen, (rows + 1 + lengths_k - lengths_q).clamp(min=0))
    return seen.masked_fill(rows >= lengths_q, 0)


def visible_counts(request: AttentionRequest, block_m: int, block_n: int) -> tuple[int, int]:
    """How many (query, key) pairs, and how many (block_m, block_n) blocks of them, the mask leaves visible."""
    seen = keys_seen(request)
    rows = torch.nn.functional.pad(seen, (0, -request.seqlen_q % block_m)).unflatten(1, (-1, block_m))
    blocks = -(-rows.amax(-1) // block_n) if seen.numel() else seen
    return int(seen.sum()) * request.heads_q, int(blocks.sum()) * request.heads_q


def support_stats(
    request: AttentionRequest, tau: Tensor, size: Tensor, block_map: Tensor, block_m: int, block_n: int
) -> SupportStats:
    """What ``Backend.support`` returns, with the densities that follow from sizes and blocks."""
    pairs, visible_blocks = visible_counts(request, block_m, block_n)
    return SupportStats(
        tau,
        size,
        block_map.bool(),
        block_m,
        block_n,
        element_density=int(size.sum()) / pairs if pairs else 0.0,
        block_density=int(block_map.sum()) / visible_blocks if visible_blocks else 0.0,
    )


def in_dtype_of(alphas: Tensor | None, dalpha: Tensor | None) -> Tensor | None:
    """The gradient of a tensor alpha in alpha's dtype; None where there is none."""
    return None if alphas is None or dalpha is None else dalpha.to(alphas.dtype)


def is_dq_one_pass(request: AttentionRequest) -> bool:
    """Whether dq loses nothing where dout . out stands for delta at first (entmax_attn_bwd_dq of the Triton backend).

    The gradient of alpha needs a pass of its own anyway.
    """
    return request.alpha_heads is None and request.alpha <= 1.5


def is_decoding(request: AttentionRequest) -> bool:
    """Whether there are few queries over many keys, and no backward pass."""
    return not request.save_for_backward and request.seqlen_q <= SHORT and request.seqlen_k >= MANY


def wide_heads(request: AttentionRequest) -> tuple[str, ...]:
    """The reasons against heads that are wider than a GPU's kernels take."""
    sizes = {"head_dim": request.head_dim, "head_dim_v": request.head_dim_v}
    return tuple(f"got {name}={size}; needs at most 256" for name, size in sizes.items() if size > 256)


def readable(t: Tensor) -> Tensor:
    """The tensor with dense rows: a copy only where it has none."""
    if t.requires_grad:
        t = t.detach()
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def tiles_and_blocks(request: AttentionRequest, block_m: int, block_n: int) -> tuple[int, int]:
    """Tiles of queries and blocks of keys of one head."""
    return -(-request.seqlen_q // block_m), -(-request.seqlen_k // block_n)


def live_blocks(request: AttentionRequest, block_m: int, block_n: int) -> Tensor:
    """Room for a byte per tile of queries and block of keys."""
    shape = (request.batch, request.heads_q, *tiles_and_blocks(request, block_m, block_n))
    return request.q.new_empty(shape, dtype=torch.int8)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; an H100's where kernels run without one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
