"""Tile sizes, warps and pipeline stages of the kernels: a pure function of dtype, head sizes and device.

The rows for half precision up to 128 channels come from what benchmarks/tune_triton.py measured on an H100; the others
are what compiles and fits, and are still to be tuned. Nothing is tuned while a user waits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

__all__ = ["Config", "Launch", "configure", "decode_launch", "padded"]


class Launch(NamedTuple):
    """Warps of a program, stages of its software pipeline, and registers of a thread at most."""

    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """As Triton's launch takes them; FP fusion by name, since its default is about to change."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.maxnreg,
            "enable_fp_fusion": True,
        }


@dataclass(frozen=True, slots=True)
class Config:
    """How one call is cut up.

    Attributes:
        block_m: queries of a tile.
        block_n: keys of a block, the unit that is skipped.
        scan, refine, output, dq, dkv: of the kernels.
        scan_blocks: blocks that the scan multiplies at once.
        bound_every: products of the scan after which the bound of tau is raised.
        output_programs, dq_programs: of the output and of the dq kernel that share a tile.
        dkv_parts: into how many parts the dkv kernel takes a tile.
    """

    block_m: int
    block_n: int
    scan: Launch
    refine: Launch
    output: Launch
    dq: Launch
    dkv: Launch
    scan_blocks: int = 1
    bound_every: int = 4
    output_programs: int = 1
    dq_programs: int = 1
    dkv_parts: int = 1


def _alike(block_m: int, block_n: int, launch: Launch) -> Config:
    return Config(block_m, block_n, launch, launch, launch, launch, launch)


def padded(head_dim: int) -> int:
    """The power of two that a head is padded to; matrix units take 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length()) if head_dim else 16


@functools.cache
def configure(dtype: torch.dtype, head_dim: int, head_dim_v: int, short: bool, shared_memory: int) -> Config:
    """The configuration of a call.

    Args:
        dtype: of q, k and v.
        head_dim: of q and k.
        head_dim_v: of v.
        short: whether there are at most 16 queries, as in decoding.
        shared_memory: bytes that a program may have.
    """
    row = max(padded(head_dim), padded(head_dim_v)) * dtype.itemsize
    is_half = dtype.itemsize == 2
    is_small = shared_memory < 160_000
    if short:
        few = Launch(4, 4 if row <= 128 else 2)
        if row <= 512 and not (is_small and row > 256):
            return Config(16, 64, few, few, few, few, Launch(4, 2 if row <= 256 else 1), scan_blocks=2)
        return _alike(16, 32, Launch(4, 1))
    if is_small or not is_half:
        if row <= 128:
            return _alike(64, 64, Launch(4, 2))
        if row <= 256:
            return _alike(64, 64 if is_half or not is_small else 32, Launch(4, 1 if is_small else 2))
        return _alike(32, 32, Launch(4, 1))
    if row <= 128:
        # The corrections of float16 (CORRECTED) need registers of their own.
        programs, output = (1, Launch(8, 3, 128)) if dtype is torch.bfloat16 else (2, Launch(4, 3, 168))
        return Config(
            128,
            64,
            scan=Launch(8, 4, 128),
            refine=Launch(4, 4, 168),
            output=output,
            dq=Launch(4, 3, 200),
            dkv=Launch(4, 3),
            scan_blocks=2,
            bound_every=16,
            output_programs=programs,
            dq_programs=2,
            dkv_parts=2,
        )
    if row <= 256:
        # For compute capability 8.0 the compiler would spill thousands of bytes of a whole tile.
        dq, dq_programs = (Launch(8, 3), 1) if shared_memory >= 200_000 else (Launch(8, 2), 2)
        return Config(
            128,
            64,
            scan=Launch(8, 2, 128),
            refine=Launch(8, 4, 128),
            output=Launch(8, 3),
            dq=dq,
            dkv=Launch(4, 3),
            scan_blocks=2,
            bound_every=8,
            dq_programs=dq_programs,
            dkv_parts=4,
        )
    return replace(_alike(64, 64, Launch(8, 2 if shared_memory >= 200_000 else 1)), scan=Launch(4, 2))


def decode_launch(dtype: torch.dtype, head_dim: int, rows: int) -> tuple[Launch | None, int]:
    """Of the scan in decode.py, and how many rows a program takes; no launch where its keys would not fit.

    Args:
        dtype: of q and k.
        head_dim: of q and k.
        rows: queries that share keys.
    """
    row = padded(head_dim) * dtype.itemsize
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if row > 256:
        return None, block_m
    if block_m == 64:
        return Launch(4, 4 if row <= 128 else 2, 168), block_m
    return Launch(4, 4 if row <= 128 else 3, 128), block_m
