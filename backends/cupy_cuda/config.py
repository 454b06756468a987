"""Tile sizes, warps and pipeline stages of the kernels: a pure function of dtype, head sizes and compute capability.

For compute capability 9.0 up to 128 channels by measurements on an H100 and an H200, on which some kernels of 8.0 were
timed, too; else chosen from what the compiler reports (no spills) and from what fits into shared memory. Nothing is
tuned while a user waits.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from adasplash2.contract import AttentionRequest

__all__ = [
    "CAPABILITIES",
    "ENTRY_ROOM",
    "GROUPS",
    "SHARED_MEMORY",
    "Config",
    "DecodeConfig",
    "Launch",
    "configure",
    "configure_decode",
    "decode_memory",
    "head_class",
    "leads",
    "shared_memory",
]

# Bytes of shared memory that a program may have, by compute capability (CUDA C++ Programming Guide, technical
# specifications); a newer device gets what the nearest older one here has.
SHARED_MEMORY = {
    (7, 5): 65_536,
    (8, 0): 166_912,
    (8, 6): 101_376,
    (8, 7): 166_912,
    (8, 9): 101_376,
    (9, 0): 232_448,
    (10, 0): 232_448,
    (12, 0): 101_376,
}
CAPABILITIES = tuple(SHARED_MEMORY)

SCRATCH = 128  # bytes that each kernel has for reductions
LIST = 4096  # bytes of the lists in shared memory (backward.cu)
HEAD_CLASSES = (64, 128, 256)
# Of calls in which "auto" asks this backend first: queries and keys; of all heads and sequences, queries and pairs.
LONG, LONGEST = 4096, 131_072
MANY_ROWS = 131_072
MANY_PAIRS = 2**30

# Of calls with few queries over many keys (decode.cu).
GROUPS = 16
CANDIDATES = 2048

ROW_ENTRIES = {64: 204, 128: 164}  # above the bound of tau that two rows have room for (refine.cu), by head
# Of tiles that are taken entry by entry (entries.cuh, entries.cu).
ENTRY_ROOM = 64  # words of four bytes that a row has, at most
ENTRIES = 5440
ENTRY_BLOCKS = 2048
ENTRY_WARPS = {"dq_entries": 8, "dkv_entries": 4}
TAKEN = 1024
WEIGHTS = 640


@dataclass(frozen=True, slots=True)
class Launch:
    """Of one kernel.

    Attributes:
        warps: of a program.
        columns: of scores that are in registers at once; keys, and queries in dkv.
        stages: of the pipeline, each with its own buffer.
        programs: that a multiprocessor holds at once, at least: it bounds the registers of a thread.
        wgmma: whether warpgroups multiply, by the instructions that only capability 9.0 has.
        producers: warps more, where the bulk copy engine brings the tiles, that do nothing but ask it for them.
    """

    warps: int
    columns: int
    stages: int
    programs: int
    wgmma: bool = False
    producers: int = 0


@dataclass(frozen=True, slots=True)
class Config:
    """How one call is cut up.

    Attributes:
        head: channels that heads are padded to, in shared memory and registers alone.
        head_v: channels of v that the output kernel takes at once.
        block_m: queries of a tile.
        block_n: keys of a block, the unit that is skipped.
        scan, refine, output, dq, dkv: of the kernels.
        entries: whether tiles of little support are taken entry by entry.
    """

    head: int
    head_v: int
    block_m: int
    block_n: int
    scan: Launch
    refine: Launch
    output: Launch
    dq: Launch
    dkv: Launch
    entries: bool = False

    def parts(self, stage: str) -> int:
        """Programs of the output or the dq kernel to a tile: a warp has 16 rows."""
        launch: Launch = getattr(self, stage)
        return self.block_m // (16 * launch.warps)


def leads(request: AttentionRequest) -> bool:
    """Whether it was faster than the Triton backend in what was measured of such calls, or as fast but for a hundredth.

    That is in docs/performance.md.
    """
    rows = request.batch * request.heads_q * request.seqlen_q
    return (
        LONG <= request.seqlen_q <= LONGEST
        and LONG <= request.seqlen_k <= LONGEST
        and rows >= MANY_ROWS
        and rows * request.seqlen_k >= MANY_PAIRS
        and request.q.dtype.itemsize == 2
        and max(request.head_dim, request.head_dim_v) <= 128
        and torch.cuda.get_device_capability(request.device) == (9, 0)
    )


@functools.cache
def head_class(head_dim: int, head_dim_v: int) -> int:
    """The channels that the kernels are compiled for."""
    return next(size for size in HEAD_CLASSES if max(head_dim, head_dim_v) <= size)


def _nearest(capability: tuple[int, int]) -> tuple[int, int]:
    return max(known for known in CAPABILITIES if known <= capability)


@functools.cache
def configure(dtype: torch.dtype, head: int, capability: tuple[int, int]) -> Config | None:
    """The configuration of a call, or None where nothing fits.

    Args:
        dtype: of q, k and v.
        head: ``head_class`` of the heads.
        capability: of the device, as (9, 0).
    """
    nearest = _nearest(capability)
    room = SHARED_MEMORY[nearest]
    of_all, of_one = (_HALF, _HALF_OF_ONE) if dtype.itemsize == 2 else (_FLOAT, _FLOAT_OF_ONE)
    candidates = [of_one[nearest, head]] if (nearest, head) in of_one else of_all[head]
    if dtype is torch.bfloat16 and (nearest, head) in _BFLOAT16_OUTPUT:
        candidates = [replace(config, output=_BFLOAT16_OUTPUT[nearest, head]) for config in candidates]
    for config in candidates:
        if _fits(config, dtype, room):
            with_entries = replace(config, entries=True)
            return with_entries if _can_have_entries(config, dtype) and _fits(with_entries, dtype, room) else config
    return None


def _can_have_entries(config: Config, dtype: torch.dtype) -> bool:
    """A warp of refine lists those of 16 rows, and so does one of dq_entries."""
    warps = {config.refine.warps, ENTRY_WARPS["dq_entries"]}
    return dtype.itemsize == 2 and config.head in ROW_ENTRIES and {config.block_m // 16} == warps


def _fits(config: Config, dtype: torch.dtype, room: int) -> bool:
    kernels = ["scan", "refine", "output", "dq", "dkv"] + ["dq_entries", "dkv_entries"] * config.entries
    return all(shared_memory(config, kernel, dtype) <= room for kernel in kernels)


def shared_memory(config: Config, kernel: str, dtype: torch.dtype) -> int:
    """Bytes of shared memory that a program of the kernel takes, as the kernel lays it out."""
    if kernel == "dq_entries":
        return SCRATCH + ENTRIES * 10 + ENTRY_WARPS[kernel] * (ENTRY_BLOCKS + WEIGHTS) * 2
    if kernel == "dkv_entries":
        return SCRATCH + TAKEN * 8 + ENTRY_WARPS[kernel] * (32 * 8 + (TAKEN + WEIGHTS) * 2)
    launch: Launch = getattr(config, kernel)
    row, row_v = config.head * dtype.itemsize, config.head_v * dtype.itemsize
    tile, block = config.block_m * row, config.block_n * row
    staging = 0 if dtype.itemsize == 2 else launch.warps * 16 * (launch.columns + 4) * 4
    if kernel == "scan":
        ring = launch.stages * launch.columns * row
        in_registers = dtype.itemsize == 2 and config.head <= 128 and config.head * launch.columns <= 8192
        return SCRATCH + (max(tile, ring) if in_registers else tile + ring)
    if kernel == "refine":
        ring = launch.stages * block
        listed = launch.warps * 8 * ROW_ENTRIES[config.head] * 6 if config.entries else 0
        leaves = launch.wgmma or (dtype.itemsize == 2 and config.head == 128)
        return SCRATCH + (max(tile, ring) if leaves else tile + ring) + listed
    if kernel == "output":
        return SCRATCH + tile // config.parts(kernel) + launch.stages * (block + config.block_n * row_v) + staging
    if kernel == "dq":
        return SCRATCH + LIST + 2 * tile // config.parts(kernel) + launch.stages * 2 * block + staging
    part = launch.columns * (2 * row + 2 * 4)
    return SCRATCH + LIST + 2 * block + launch.stages * part + staging


@dataclass(frozen=True, slots=True)
class DecodeConfig:
    """How a call with few queries over many keys is cut up.

    Attributes:
        block_m: queries that a program of the scan takes, of those that share keys.
        scan, output: of the kernels; columns are keys that are in shared memory in one piece.
    """

    block_m: int
    scan: Launch
    output: Launch


@functools.cache
def configure_decode(dtype: torch.dtype, head: int, capability: tuple[int, int], rows: int) -> DecodeConfig:
    """The configuration of a call that the other kernels serve.

    Args:
        dtype: of q, k and v.
        head: ``head_class`` of the heads.
        capability: of the device, as (9, 0).
        rows: queries that share keys.
    """
    room = SHARED_MEMORY[_nearest(capability)]
    has_room = room > 160_000
    row = head * dtype.itemsize
    # With up to 32 KiB of queries.
    block_m = next(size for size in (16, 32, 64) if size >= min(rows, 64, 32_768 // row))
    # Pieces of 16 KiB, several of them under way, keep the memory busy.
    keys = min(max(16_384 // row, 64 if dtype.itemsize == 2 else 32), 128)
    scan = Launch(4, keys, max((65_536 if has_room else 32_768) // (keys * row), 2), 1)
    programs = room // (decode_memory("scan", scan, block_m, row) + 1024)
    scan = replace(scan, programs=min(max(programs, 1), 3))
    batch = min((32_768 if has_room else 16_384) // row, 128)
    stages = 1 if capability < (8, 0) else 2 if has_room else 3
    # For capability 10.0 the compiler would spill registers.
    programs = 3 if row == 128 and has_room and capability < (10, 0) else 1
    return DecodeConfig(block_m, scan, Launch(8, batch, stages, programs))


def decode_memory(kernel: str, launch: Launch, block_m: int, row: int) -> int:
    """Bytes of shared memory that a program of decode.cu takes; ``row`` are those of a row of k."""
    if kernel == "scan":
        return (block_m + launch.stages * launch.columns) * row
    return SCRATCH + (16 + launch.stages * launch.columns) * row + CANDIDATES * 14


_Numbers = tuple[int, int, int, int]


def _config(
    sizes: _Numbers, scan: _Numbers, output: _Numbers, dq: _Numbers, dkv: _Numbers, refine: _Numbers | None = None
) -> Config:
    """refine as output, unless it has a launch of its own."""
    return Config(*sizes, Launch(*scan), Launch(*(refine or output)), Launch(*output), Launch(*dq), Launch(*dkv))


# The first that fits is taken.
_HALF = {
    64: [
        _config((64, 64, 128, 64), (4, 64, 3, 4), (4, 16, 2, 3), (4, 16, 2, 3), (4, 16, 3, 3), refine=(8, 64, 2, 2)),
        _config((64, 64, 64, 64), (4, 64, 2, 2), (4, 32, 2, 1), (4, 32, 1, 1), (4, 32, 2, 1)),
    ],
    128: [
        _config((128, 128, 128, 64), (4, 64, 3, 3), (8, 16, 2, 1), (8, 16, 2, 1), (4, 16, 2, 1), refine=(8, 64, 3, 2)),
        _config((128, 128, 64, 64), (4, 64, 2, 2), (4, 16, 2, 1), (4, 16, 1, 1), (4, 16, 2, 1)),
        _config((128, 128, 64, 32), (4, 32, 2, 2), (4, 16, 1, 1), (4, 32, 1, 1), (2, 16, 1, 1)),
    ],
    256: [
        _config((256, 128, 64, 32), (4, 32, 2, 1), (4, 16, 2, 1), (4, 16, 2, 1), (2, 16, 2, 1)),
        _config((256, 128, 32, 32), (2, 32, 1, 1), (2, 16, 1, 1), (2, 16, 1, 1), (2, 16, 1, 1)),
    ],
}
# Where one architecture has instructions of its own, or its compiler would spill registers otherwise.
_SMALL_64 = _config((64, 64, 128, 64), (4, 64, 3, 3), (4, 16, 2, 3), (8, 16, 2, 1), (4, 32, 2, 2), refine=(8, 16, 2, 2))
_BLACKWELL_64 = _config((64, 64, 128, 64), (4, 64, 3, 3), (8, 16, 2, 1), (8, 16, 2, 1), (4, 32, 2, 2))
_HALF_OF_ONE = {
    ((7, 5), 64): _config(
        (64, 64, 128, 64), (4, 64, 3, 2), (4, 16, 2, 3), (4, 16, 2, 3), (4, 32, 2, 2), refine=(8, 64, 2, 1)
    ),
    ((8, 6), 64): _SMALL_64,
    ((8, 9), 64): _SMALL_64,
    ((9, 0), 64): Config(
        64,
        64,
        128,
        64,
        scan=Launch(8, 128, 3, 2, True),
        refine=Launch(8, 64, 4, 2, True),
        output=Launch(4, 64, 4, 3, True),
        dq=Launch(4, 64, 2, 3, True),
        dkv=Launch(4, 64, 2, 3, True),
    ),
    ((9, 0), 128): Config(
        128,
        128,
        128,
        64,
        scan=Launch(8, 128, 2, 2, True),
        refine=Launch(8, 64, 3, 2, True),
        output=Launch(4, 64, 3, 2, True, producers=4),
        dq=Launch(4, 64, 2, 2, True),
        dkv=Launch(4, 64, 2, 2, True),
    ),
    ((9, 0), 256): _config((256, 128, 64, 32), (4, 32, 2, 1), (4, 16, 3, 1), (4, 16, 2, 1), (2, 16, 1, 1)),
    ((10, 0), 64): _BLACKWELL_64,
    ((10, 0), 128): _config((128, 64, 128, 64), (4, 64, 3, 2), (8, 16, 2, 1), (4, 16, 2, 1), (4, 16, 2, 1)),
    ((10, 0), 256): _config((256, 128, 64, 32), (4, 32, 2, 1), (4, 16, 3, 1), (2, 16, 2, 1), (2, 16, 2, 1)),
    ((12, 0), 64): _BLACKWELL_64,
    ((12, 0), 256): _config((256, 64, 32, 32), (2, 32, 1, 1), (2, 16, 1, 1), (2, 16, 1, 1), (2, 16, 1, 1)),
    ((12, 0), 128): _config((128, 64, 64, 64), (4, 64, 2, 2), (4, 16, 2, 1), (2, 16, 1, 1), (4, 16, 2, 1)),
}
# Which has one sum where float16 has two, and so registers for more numbers, programs or warps.
_BFLOAT16_OUTPUT = {
    ((8, 0), 128): Launch(4, 32, 2, 2),
    ((9, 0), 64): Launch(4, 64, 4, 3, True, producers=4),
}
_FLOAT = {
    64: [
        _config((64, 64, 64, 32), (4, 32, 2, 1), (4, 32, 2, 1), (4, 32, 1, 1), (2, 32, 1, 1)),
    ],
    128: [
        _config((128, 128, 32, 32), (2, 32, 1, 1), (2, 32, 1, 1), (2, 16, 1, 1), (2, 16, 1, 1)),
        _config((128, 128, 32, 16), (2, 16, 1, 1), (2, 16, 1, 1), (2, 16, 1, 1), (1, 16, 1, 1)),
    ],
    256: [
        _config((256, 128, 32, 16), (2, 16, 1, 1), (2, 16, 1, 1), (2, 16, 1, 1), (1, 8, 2, 1)),
        _config((256, 128, 16, 16), (1, 16, 1, 1), (1, 16, 1, 1), (1, 16, 1, 1), (1, 8, 1, 1)),
    ],
}
_FLOAT_OF_ONE = {
    ((9, 0), 256): _config((256, 128, 32, 32), (2, 32, 1, 1), (2, 16, 1, 1), (2, 16, 2, 1), (2, 8, 2, 1)),
}
