"""The CuPy backend's own parts: what it refuses, what it launches, what compiles, and its kernels run by an emulator.

``python tests/test_cupy.py [capability ...]`` compiles every shipped instantiation for the given compute capabilities
(all, by default) and prints the compiler's report as a table.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import re
import shutil
import struct
import sys
import time
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cuda_emulator import EmulatedLauncher, unavailable
from strategies import Case

from adasplash2 import registry
from adasplash2.backends._math import MANY
from adasplash2.backends.cupy_cuda import CupyBackend, backend, launcher
from adasplash2.backends.cupy_cuda.config import (
    CAPABILITIES,
    ENTRY_WARPS,
    SHARED_MEMORY,
    configure,
    configure_decode,
    decode_memory,
    head_class,
    leads,
    shared_memory,
)
from adasplash2.contract import AttentionRequest, AttentionResult, EntmaxRequest
from adasplash2.testing import (
    assert_attention,
    assert_close,
    assert_support,
    entmax_backward_truth,
    entmax_truth,
    run_attention,
)

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
CPU = torch.device("cpu")
HEADS = (64, 128, 256)
ALPHAS = (1.5, 2.0, 1.3, (1.2,))
KERNELS = {
    *("entmax_attn_check_keys", "entmax_attn_fwd_scan", "entmax_attn_fwd_refine", "entmax_attn_fwd_output"),
    *("entmax_attn_bwd_dq", "entmax_attn_bwd_dkv", "entmax_attn_support", "entmax_rows_fwd", "entmax_rows_bwd"),
}
DECODE_KERNELS = {"entmax_attn_decode_scan", "entmax_attn_decode_output"}
ENTRIES_KERNELS = {"entmax_attn_bwd_dq_entries", "entmax_attn_bwd_dkv_entries"}

emulated = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


class Launched(NamedTuple):
    source: str
    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared_bytes: int
    args: Any
    follows: bool


class Recorder:
    """A launcher that runs nothing."""

    def __init__(self, has_maps: bool = True) -> None:
        self.launches: list[Launched] = []
        self.mapped: list[tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []
        self._has_maps = has_maps

    def launch(
        self,
        source: str,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        args: launcher.Record,
        follows: bool,
    ) -> None:
        self.launches.append(Launched(source, kernel, tuple(grid), tuple(block), shared_bytes, args, follows))

    def tensor_map(
        self, address: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]
    ) -> bytes | None:
        self.mapped.append((address, tuple(sizes), tuple(strides), tuple(box)))
        return bytes([len(self.mapped)] * launcher.MAP_BYTES) if self._has_maps else None


def is_bulk(kernel: str) -> bool:
    """Whether the bulk copy engine brings its tiles: the flag behind that of wgmma."""
    return re.search(r", true, true(, \d+)?>$", kernel) is not None


def everything(whole: CupyBackend, request: AttentionRequest) -> None:
    """Each kernel once."""
    request = dataclasses.replace(request, save_for_backward=True)
    result = whole.forward(request)
    whole.backward(request, result.out, result.tau, result.saved, torch.zeros_like(result.out))
    whole.support(request, 64, 64)
    for group in (1, 2, 4):
        whole.forward(few_queries(request, 16, group))
    x = torch.zeros(4, 100, dtype=request.q.dtype)
    alpha_rows = None if request.alpha_heads is None else torch.full((4,), 1.2)
    whole.entmax_backward(whole.entmax(EntmaxRequest(x, request.alpha, alpha_rows)), x, request.alpha, alpha_rows)


def few_queries(request: AttentionRequest, seqlen_q: int, group: int) -> AttentionRequest:
    """The like of a call, as in decoding: zeros."""
    alphas = request.alpha_heads
    return dataclasses.replace(
        request,
        q=request.q.new_zeros(1, group, seqlen_q, request.head_dim),
        k=request.k.new_zeros(1, 1, MANY, request.head_dim),
        v=request.v.new_zeros(1, 1, MANY, request.head_dim_v),
        alpha_heads=None if alphas is None else alphas[:1].expand(group),
        save_for_backward=False,
    )


def shipped(
    capability: tuple[int, int],
    dtypes: Sequence[torch.dtype] = (HALF, BF16, FLOAT),
    heads: Sequence[int] = HEADS,
    alphas: Sequence[Any] = ALPHAS,
    inits: Sequence[Any] = ("maxima", "histogram"),
) -> dict[str, Launched]:
    """Every instantiation that calls of these kinds launch on such a device."""
    found: dict[str, Launched] = {}
    # The bulk copy engine reads no head of 8 rows.
    for init, dtype, head, alpha, rows in itertools.product(inits, dtypes, heads, alphas, (8, 64)):
        recorder = Recorder()
        whole = CupyBackend(init, recorder, capability)
        request, _ = Case(rows, rows, head_dim=head, head_dim_v=head, dtype=dtype, alpha=alpha).build(CPU)
        if not whole.unsupported_reasons(request):
            everything(whole, request)
            found |= {launch.kernel: launch for launch in recorder.launches}
    return found


# ---- what is refused


def request_of(dtype: torch.dtype = HALF, head_dim: int = 64, **options: Any) -> AttentionRequest:
    return Case(40, 60, head_dim=head_dim, head_dim_v=head_dim, dtype=dtype, **options).build(CPU)[0]


def test_what_is_refused() -> None:
    serves = CupyBackend(launcher=Recorder(), capability=(9, 0)).unsupported_reasons
    for dtype in (HALF, BF16, FLOAT):
        for head_dim in (1, 80, 256):
            assert serves(request_of(dtype, head_dim)) == ()
    assert serves(request_of(torch.float64)) == ("got torch.float64; needs float16, bfloat16 or float32",)
    assert serves(request_of(head_dim=257)) == (
        "got head_dim=257; needs at most 256",
        "got head_dim_v=257; needs at most 256",
    )
    assert CupyBackend().unsupported_reasons(request_of()) == ("got a tensor on cpu; needs one on cuda",)
    (reason,) = CupyBackend().entmax_unsupported_reasons(EntmaxRequest(torch.zeros(2, 3)))
    assert reason == "got a tensor on cpu; needs one on cuda"


def test_where_it_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def device_has(*capability: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    def is_first(
        seqlen_q: int, seqlen_k: int, head_dim: int = 64, dtype: torch.dtype = BF16, batch: int = 4, heads: int = 4
    ) -> bool:
        q, k = (torch.empty(batch, heads, n, head_dim, dtype=dtype, device="meta") for n in (seqlen_q, seqlen_k))
        return leads(AttentionRequest(q, k, k, scale=1.0))

    device_has(9, 0)
    assert is_first(8192, 20_000)
    assert is_first(30_000, 8192, 128, HALF)
    assert is_first(131_072, 131_072, batch=1, heads=1)
    assert is_first(4096, 4096, batch=16)
    assert not is_first(4095, 20_000, batch=16)
    assert not is_first(20_000, 4095)
    assert not is_first(131_073, 20_000)
    assert not is_first(20_000, 131_073)
    assert not is_first(8192, 20_000, heads=3)
    assert not is_first(4096, 4096, batch=15)
    assert not is_first(1, 65_536)
    assert not is_first(20_000, 20_000, 129)
    assert not is_first(20_000, 20_000, dtype=FLOAT)
    device_has(8, 0)
    assert not is_first(20_000, 20_000)


def test_what_turing_and_older_devices_are_refused() -> None:
    turing = CupyBackend(launcher=Recorder(), capability=(7, 5)).unsupported_reasons
    assert turing(request_of(HALF)) == turing(request_of(FLOAT)) == ()
    assert turing(request_of(BF16)) == ("got torch.bfloat16 on a device of compute capability 7.5; needs 8.0",)
    for dtype in (HALF, FLOAT):
        assert turing(request_of(dtype, 200)) == (
            f"got a head of 200 {dtype} on compute capability 7.5; needs at most 128",
        )
    volta = CupyBackend(launcher=Recorder(), capability=(7, 0)).unsupported_reasons
    assert volta(request_of()) == ("got torch.float16 on a device of compute capability 7.0; needs 7.5",)


def fake_cupy(
    monkeypatch: pytest.MonkeyPatch,
    *,
    built_for: int = 12,
    driver: int = 12,
    nvrtc: int | Exception = 12,
    hip: bool = False,
) -> None:
    """A cupy as ``import cupy`` would find it."""

    def version() -> tuple[int, int]:
        if isinstance(nvrtc, Exception):
            raise nvrtc
        return nvrtc, 4

    runtime = types.SimpleNamespace(
        is_hip=hip,
        runtimeGetVersion=lambda: built_for * 1000 + 20,
        driverGetVersion=lambda: driver * 1000,
        getDeviceCount=lambda: 1,
    )
    cuda = types.SimpleNamespace(runtime=runtime, nvrtc=types.SimpleNamespace(getVersion=version))
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(__version__="14.0", cuda=cuda))


def test_why_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence for each thing that may be missing, and nothing breaks at import."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = launcher.unavailable_reason
    fake_cupy(monkeypatch)
    assert reason() is None
    fake_cupy(monkeypatch, driver=0)
    assert reason() == "cupy 14.0 finds no CUDA driver"
    fake_cupy(monkeypatch, built_for=13, nvrtc=13)
    assert reason() == "cupy 14.0 is built for CUDA 13, the driver for CUDA 12; needs adasplash2[cuda12]"
    fake_cupy(monkeypatch, driver=13)
    assert reason() is None
    fake_cupy(monkeypatch, nvrtc=13)
    assert reason() == "cupy 14.0 is built for CUDA 12 and finds the NVRTC of CUDA 13"
    fake_cupy(monkeypatch, nvrtc=RuntimeError("failed to load libnvrtc.so.12\nmore"))
    assert reason() == "cupy 14.0 cannot use CUDA 12 (failed to load libnvrtc.so.12)"
    fake_cupy(monkeypatch, hip=True)
    assert reason() == "cupy 14.0 is built for ROCm; needs one for CUDA"
    fake_cupy(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "no CUDA device is visible to torch"
    monkeypatch.setitem(sys.modules, "cupy", None)
    missing = reason()
    assert missing is not None
    assert missing.startswith("cupy cannot be imported (")
    assert missing.endswith("); needs adasplash2[cuda12] or adasplash2[cuda13]")


# ---- what is launched


def test_configurations_fit_the_devices() -> None:
    for dtype, head, capability in itertools.product((HALF, BF16, FLOAT), HEADS, CAPABILITIES):
        config = configure(dtype, head, capability)
        if config is None:
            assert capability == (7, 5)
            assert head == 256
            continue
        for name in ("scan", "refine", "output", "dq", "dkv"):
            assert shared_memory(config, name, dtype) <= SHARED_MEMORY[capability]
            launch = getattr(config, name)
            rows = config.block_n if name == "dkv" else config.block_m
            if name in ("output", "dq"):
                rows //= config.parts(name)
            assert rows % (16 * launch.warps) == 0
            columns = config.block_m if name == "dkv" else config.block_n
            assert (launch.columns % columns if name == "scan" else columns % launch.columns) == 0
            assert dtype == FLOAT or launch.columns % 16 == 0
        for rows in (1, 16, 17, 33, 500):
            few = configure_decode(dtype, head, capability, rows)
            assert few.block_m >= min(rows, 32)
            assert few.scan.columns % (32 if dtype == FLOAT else 64) == 0
            for name in ("scan", "output"):
                memory = decode_memory(name, getattr(few, name), few.block_m, head * dtype.itemsize)
                assert memory <= SHARED_MEMORY[capability]
        has_room = capability in ((8, 0), (8, 7), (9, 0), (10, 0))
        assert config.entries == (dtype != FLOAT and head <= 128 and has_room)
        for name in ("dq_entries", "dkv_entries"):
            assert not config.entries or shared_memory(config, name, dtype) <= SHARED_MEMORY[capability]
    # A newer device gets what the nearest older one has.
    assert configure(HALF, 64, (12, 1)) is configure(HALF, 64, (12, 1))
    assert configure(HALF, 64, (9, 9)) == configure(HALF, 64, (9, 0))
    assert [head_class(*sizes) for sizes in ((1, 1), (64, 65), (128, 5), (129, 1))] == [64, 128, 128, 256]


def test_records_have_the_layout_of_the_kernels() -> None:
    """The fields in order, and their widths."""
    widths = {"long long": "i8", "float": "f4", "int": "i4", "TensorMap": f"V{launcher.MAP_BYTES}"}
    for file, kind_of, structure in (
        ("common.cuh", "Params", backend.PARAMS),
        ("rows.cu", "RowParams", backend.ROW_PARAMS),
    ):
        text = re.sub(r"//.*", "", (launcher.KERNELS / file).read_text(encoding="utf-8"))
        body = re.search(rf"struct {kind_of} {{(.*?)}};", text, re.DOTALL)
        assert body is not None
        fields = []
        for declaration in filter(None, (part.strip() for part in body[1].split(";"))):
            found = re.fullmatch(r"(?:const )?(long long|\w+(?: char)?)(\*?) (.*)", declaration, re.DOTALL)
            assert found is not None, declaration
            kind = "u8" if found[2] else widths[found[1]]
            fields += [(name.strip(), np.dtype(kind)) for name in found[3].split(",")]
        record = structure.dtype
        assert record.fields is not None
        assert record.itemsize % (launcher.MAP_ALIGNMENT if structure.maps else 8) == 0
        names = [name for name in record.names or () if name != "padding"]
        assert fields == [(name, record.fields[name][0]) for name in names]
        assert [*structure.maps, *structure.pointers, *structure.numbers] == names
        assert structure.packer.size == record.itemsize
        numbers = dict(zip(structure.numbers, range(1, 1 + len(structure.numbers)), strict=True))
        maps = {name: bytes([i] * launcher.MAP_BYTES) for i, name in enumerate(structure.maps)}
        packed = backend._record(structure, maps | numbers | {structure.pointers[0]: torch.zeros(4)[1:]})
        assert all(packed[name].tobytes() == of_tensor for name, of_tensor in maps.items())
        assert [packed[name] for name in structure.numbers] == list(numbers.values())
        assert packed[structure.pointers[0]] % 4 == 0
        assert packed[structure.pointers[0]] > 0 == packed[structure.pointers[1]]


def test_launches_of_a_call() -> None:
    """Grids, shared memory and arguments, in the order of the stages; every strided input is read in place."""
    recorder = Recorder()
    whole = CupyBackend(launcher=recorder, capability=(9, 0))
    case = Case(
        300, 500, batch=2, heads_kv=3, group=2, head_dim=40, head_dim_v=80, dtype=BF16, is_causal=True, layout="sliced"
    )
    request, dout = case.build(CPU)
    request = dataclasses.replace(request, scale=-0.5, save_for_backward=True)
    result = whole.forward(request)
    grads = whole.backward(request, result.out, result.tau, result.saved, dout)
    config = configure(BF16, 128, (9, 0))
    assert config is not None
    tiles, blocks = -(-300 // config.block_m), -(-500 // config.block_n)
    check, scan, refine, output, dq, dq_entries, dkv, dkv_entries = recorder.launches
    assert [launch.kernel.partition("<")[0] for launch in recorder.launches] == [
        *("entmax_attn_check_keys", "entmax_attn_fwd_scan", "entmax_attn_fwd_refine", "entmax_attn_fwd_output"),
        *("entmax_attn_bwd_dq", "entmax_attn_bwd_dq_entries"),
        *("entmax_attn_bwd_dkv", "entmax_attn_bwd_dkv_entries"),
    ]
    assert check.grid == (2 * 3 * 4, 1, 1)
    assert scan.grid == refine.grid == dq_entries.grid == (2 * 6 * tiles, 1, 1)
    assert output.grid == (2 * 6 * tiles * config.parts("output"), 1, 1)
    assert dq.grid == (2 * 6 * tiles * config.parts("dq"), 1, 1)
    assert dkv.grid == (2 * 3 * blocks, 1, 1)
    assert dkv_entries.grid == (2 * 2 * 3 * blocks, 1, 1)
    names = ("scan", "refine", "output", "dq", "dq_entries", "dkv", "dkv_entries")
    for name, launch in zip(names, recorder.launches[1:], strict=True):
        warps = ENTRY_WARPS[name] if name in ENTRY_WARPS else getattr(config, name).warps
        assert launch.block == (32 * warps, 1, 1)
        assert launch.shared_bytes == shared_memory(config, name, BF16)
        for tensor in ("q", "k", "v"):
            given = getattr(request, tensor)
            assert launch.args[tensor] == given.data_ptr()
            axes = "bhm" if tensor == "q" else "bhn"
            assert [launch.args[f"stride_{tensor}{axis}"] for axis in axes] == list(given.stride()[:3])
        assert (launch.args["sign"], launch.args["scale"]) == (-1, 0.5)
        assert (launch.args["n_tiles"], launch.args["n_blocks"]) == (tiles, blocks)
        assert launch.args["tau"] == result.tau.data_ptr()
        assert launch.args["live"] == result.saved[0].data_ptr()
        assert launch.args["alpha_heads"] == launch.args["seqlens_q"] == 0
    assert [launch.follows for launch in recorder.launches] == [False, True, True, True, False, True, True, True]
    assert refine.args["out"] == output.args["out"] == result.out.data_ptr()
    assert refine.args["entries"] == dq_entries.args["entries"] == result.saved[1].data_ptr()
    assert dq.args["dq"] == grads.dq.data_ptr()
    assert (dkv.args["dk"], dkv.args["dv"]) == (grads.dk.data_ptr(), grads.dv.data_ptr())
    assert dq.args["dout"] == dout.data_ptr()
    assert result.saved[0].shape == (2, 6, tiles, blocks)
    assert dq_entries.args["transposed"] == dkv_entries.args["transposed"] != 0


@pytest.mark.parametrize(("seqlen_k", "has_entries"), [(131_072, True), (131_073, False)])
def test_longer_sequences_have_no_entries(seqlen_k: int, has_entries: bool) -> None:
    """Nor room for them, which is not small."""
    recorder = Recorder()
    request, dout = Case(20, seqlen_k, head_dim=8, head_dim_v=8, dtype=BF16).build(CPU)
    request = dataclasses.replace(request, save_for_backward=True)
    whole = CupyBackend(launcher=recorder, capability=(9, 0))
    result = whole.forward(request)
    whole.backward(request, result.out, result.tau, result.saved, dout)
    assert len(result.saved) == 1 + has_entries
    assert all(launch.args["by_entries"] == has_entries for launch in recorder.launches[1:4])
    assert sum("entries" in launch.kernel for launch in recorder.launches) == 2 * has_entries


@pytest.mark.parametrize(
    ("capability", "heads", "n_programs", "n_splits"),
    # So many programs a multiprocessor at most, of 132, and no fewer than 256 keys each.
    [((9, 0), 1, 3, 98), ((9, 0), 24, 3, 16), ((8, 6), 24, 2, 11)],
)
def test_launches_of_few_queries(capability: tuple[int, int], heads: int, n_programs: int, n_splits: int) -> None:
    """The keys of a head are split so that all multiprocessors have work; the other kernels have the flags."""
    recorder = Recorder()
    case = Case(2, 25_000, heads_kv=heads, group=3, head_dim=40, head_dim_v=80, dtype=BF16, layout="sliced")
    request, _ = case.build(CPU)
    result = CupyBackend(launcher=recorder, capability=capability).forward(request)
    assert result.saved == []
    scan, output, *others = recorder.launches
    assert [launch.kernel.partition("<")[0] for launch in recorder.launches] == [
        *("entmax_attn_decode_scan", "entmax_attn_decode_output", "entmax_attn_check_keys"),
        *("entmax_attn_fwd_scan", "entmax_attn_fwd_refine", "entmax_attn_fwd_output"),
    ]
    few = configure_decode(BF16, 128, capability, 6)
    assert (few.block_m, few.scan.programs) == (16, n_programs)
    assert scan.grid == (heads * n_splits, 1, 1)
    assert output.grid == (3 * heads * 2, 1, 1)
    for launch in (scan, output):
        assert launch.args["out"] == result.out.data_ptr()
        assert launch.args["tau"] == result.tau.data_ptr()
        assert launch.args["n_splits"] == n_splits
        assert launch.args["split"] * few.scan.columns * n_splits >= 25_000
        assert launch.args["split"] % launch.args["slot"] == 0
        assert launch.args["n_slots"] <= backend.SLOTS
    assert [launch.follows for launch in recorder.launches] == [False, True, True, True, True, True]
    assert all(launch.args["flags"] == scan.args["flags"] != 0 for launch in recorder.launches)
    assert all(launch.args["maxima"] == 0 for launch in others)


class Driver:
    """Answers launches with these statuses, and keeps what it was told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, statuses: Sequence[int], can_follow: bool = True) -> None:
        self.told: list[tuple[Any, int, int]] = []
        self.n_contexts_made = 0
        self._statuses = list(statuses)
        stream = types.SimpleNamespace(device_index=1, cuda_stream=1 << 40)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(launcher, "_driver", lambda: self)
        monkeypatch.setattr(launcher, "_load", lambda *_: types.SimpleNamespace(ptr=1 << 41))
        monkeypatch.setattr(launcher, "_can_follow", lambda index: can_follow and index == 1)
        monkeypatch.setattr(launcher, "_make_context_current", self._make_context)

    def cuTensorMapEncodeTiled(
        self,
        place: int,
        kind: int,
        rank: int,
        address: int,
        sizes: Any,
        strides: Any,
        box: Any,
        steps: Any,
        *words: int,
    ) -> int:
        # As CUDA's header has them: numbers of two bytes, no interleaving, rows of 128 bytes permuted, zeros outside.
        assert (place % 64, kind, rank, list(steps), words) == (0, 1, 5, [1] * 5, (0, 3, 3, 0))
        self.mapped = address, list(sizes), list(strides), list(box)
        ctypes.memset(place, 7, launcher.MAP_BYTES)
        return self._statuses.pop(0)

    def cuLaunchKernelEx(self, config: Any, function: int, arguments: Any, extra: None) -> int:
        self.told.append((type(config._obj).from_buffer_copy(config._obj), function, arguments[0]))
        return self._statuses.pop(0)

    def _make_context(self) -> None:
        self.n_contexts_made += 1


@pytest.mark.parametrize("can_follow", [True, False])
def test_what_the_driver_is_told(monkeypatch: pytest.MonkeyPatch, can_follow: bool) -> None:
    driver = Driver(monkeypatch, [0, launcher._INVALID_CONTEXT, 0], can_follow)
    record = np.zeros((), backend.PARAMS.dtype)
    for follows in (False, True):
        launcher.CupyLauncher().launch("scan.cu", "kernel", (3, 1, 1), (64, 1, 1), 4096, record, follows)
    assert driver.n_contexts_made == 1  # before the third
    for config, function, argument in driver.told:
        # As in CUDA's header, on every system: seven numbers, the stream, the attributes and how many they are.
        assert struct.unpack("@7IPPIxxxx", config)[:8] == (3, 1, 1, 64, 1, 1, 4096, 1 << 40)
        assert (function, argument) == (1 << 41, record.ctypes.data)
    assert [config.n_attributes for config, *_ in driver.told] == [0, can_follow, can_follow]
    attribute = driver.told[1][0].attributes[0]
    assert struct.unpack_from("@IxxxxI", attribute) == (6, 1)
    assert len(bytes(attribute)) == 72


def test_what_the_driver_makes_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch, [0, 1])
    launcher._tensor_map.cache_clear()
    sizes, strides, box = (64, 8, 1, 5, 3), (128, 128, 1024, 5120), (64, 8, 1, 8, 1)
    for _ in range(2):  # the second time as it is kept
        assert launcher.CupyLauncher().tensor_map(4096, sizes, strides, box) == bytes([7] * launcher.MAP_BYTES)
    assert driver.mapped == (4096, list(sizes), list(strides), list(box))
    assert launcher.CupyLauncher().tensor_map(4112, sizes, strides, box) is None
    launcher._tensor_map.cache_clear()


def test_threads_that_ask_together_load_a_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[types.SimpleNamespace] = []

    def load(*_: Any) -> types.SimpleNamespace:
        time.sleep(0.1)
        loaded.append(types.SimpleNamespace(ptr=len(loaded)))
        return loaded[-1]

    driver = Driver(monkeypatch, [0] * 8)
    monkeypatch.setattr(launcher, "_load", load)
    record, one = np.zeros((), backend.PARAMS.dtype), launcher.CupyLauncher()
    with ThreadPoolExecutor(4) as pool:
        for kernel in ("first", "second"):
            arguments = ("scan.cu", kernel, (3, 1, 1), (64, 1, 1), 4096, record, False)
            for future in [pool.submit(one.launch, *arguments) for _ in range(4)]:
                future.result()
    assert [function for _, function, _ in driver.told] == [0] * 4 + [1] * 4


def test_what_the_driver_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    class RefusedError(RuntimeError):
        """CuPy's own asks the driver for the text."""

    monkeypatch.setattr(pytest.importorskip("cupy").cuda.driver, "CUDADriverError", RefusedError)
    Driver(monkeypatch, [1])
    record = np.zeros((), backend.PARAMS.dtype)
    with pytest.raises(RefusedError, match=r"^1$"):
        launcher.CupyLauncher().launch("scan.cu", "kernel", (3, 1, 1), (64, 1, 1), 4096, record, False)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=BF16)


@pytest.mark.parametrize(
    ("k", "sizes", "strides", "heads_apart"),
    [
        # Rows of 256 bytes in twelve groups of eight, three heads of 25600 bytes to a sequence.
        (zeros(2, 3, 100, 128), (64, 8, 2, 12, 6), (256, 128, 2048, 25_600), 3),
        (zeros(2, 1, 100, 64), (64, 8, 1, 12, 2), (128, 128, 1024, 12_800), 1),
        (zeros(2, 100, 3, 128).transpose(1, 2), (64, 8, 2, 12, 303), (768, 128, 6144, 256), 300),
        (zeros(2, 100, 9, 128).transpose(1, 2)[:, 3:6], (64, 8, 2, 12, 903), (2304, 128, 18_432, 256), 900),
        (zeros(1, 3, 100, 128).expand(2, 3, 100, 128), (64, 8, 2, 12, 3), (256, 128, 2048, 25_600), 0),
    ],
)
def test_what_the_bulk_copy_engine_reads(
    k: torch.Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], heads_apart: int
) -> None:
    recorder = Recorder()
    q = zeros(2, k.shape[1], 10, k.shape[3])
    CupyBackend(launcher=recorder, capability=(9, 0)).forward(AttentionRequest(q, k, k, scale=1.0))
    box = (*sizes[:3], 8, 1)
    assert recorder.mapped == [(k.data_ptr(), sizes, strides, box)] * 2  # keys and values
    _, *launches = recorder.launches
    assert all(is_bulk(launch.kernel) for launch in launches)
    args = launches[0].args
    assert (args["heads_apart_k"], args["heads_apart_v"]) == (heads_apart, heads_apart)
    assert {args["map_of_k"].tobytes()[0], args["map_of_v"].tobytes()[0]} == {1, 2}


@pytest.mark.parametrize(
    "k",
    [
        zeros(2, 1, 100, 128).expand(2, 3, 100, 128),
        zeros(6, 100, 128).as_strided((2, 3, 100, 128), (19_200, 12_800, 128, 1)),
        zeros(2, 3, 63, 128),
        zeros(2, 3, 100, 120),
        zeros(2, 3, 100, 132)[..., :128],
        zeros(2, 3, 100, 136)[..., 4:132],
    ],
    ids=["one head for all", "sequences in between", "few rows", "narrow", "rows not aligned", "not aligned"],
)
def test_what_the_threads_read_themselves(k: torch.Tensor) -> None:
    recorder = Recorder()
    q = zeros(2, 3, 10, k.shape[3])
    CupyBackend(launcher=recorder, capability=(9, 0)).forward(AttentionRequest(q, k, k, scale=1.0))
    assert recorder.mapped == []
    _, *launches = recorder.launches
    assert all(launch.kernel.endswith(", true, false>") for launch in launches)


def test_each_kernel_has_copies_of_its_own_kind() -> None:
    """By what it reads, whether numbers of rows of a head are aligned, and where the driver refuses a tensor."""

    def kinds(seqlen_q: int, v_width: int, has_maps: bool = True) -> list[bool]:
        recorder = Recorder(has_maps)
        whole = CupyBackend(launcher=recorder, capability=(9, 0))
        request = AttentionRequest(
            zeros(1, 2, seqlen_q, 64), zeros(1, 2, 80, 64), zeros(1, 2, 80, v_width), scale=1.0, save_for_backward=True
        )
        result = whole.forward(request)
        whole.backward(request, result.out, result.tau, result.saved, torch.zeros_like(result.out))
        names = ("fwd_scan", "fwd_refine", "fwd_output", "bwd_dq<", "bwd_dkv<")
        (kernels,) = [[launch.kernel for launch in recorder.launches if any(name in launch.kernel for name in names)]]
        return [is_bulk(kernel) for kernel in kernels]

    assert kinds(80, 64) == [True] * 5
    assert kinds(80, 40) == [True, True, False, False, False]
    assert kinds(40, 64) == kinds(81, 64) == [True, True, True, True, False]
    assert kinds(80, 64, has_maps=False) == [False] * 5


@pytest.mark.parametrize(("dtype", "head", "producers"), [(BF16, 64, 4), (BF16, 128, 4), (HALF, 64, 0), (HALF, 128, 4)])
def test_warps_that_only_ask_for_tiles(dtype: torch.dtype, head: int, producers: int) -> None:
    """They come with the bulk copy engine alone."""
    config = configure(dtype, head, (9, 0))
    assert config is not None
    for has_maps in (True, False):
        recorder = Recorder(has_maps)
        k = torch.zeros(1, 2, 80, head, dtype=dtype)
        CupyBackend(launcher=recorder, capability=(9, 0)).forward(AttentionRequest(k, k, k, scale=1.0))
        (output,) = [launch for launch in recorder.launches if "fwd_output" in launch.kernel]
        more = producers if has_maps else 0
        assert output.block == (32 * (config.output.warps + more), 1, 1)
        assert output.kernel.endswith(f", true, {str(has_maps).lower()}{f', {more}' * (more > 0)}>")


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "saves"), [(17, 4000, False), (16, 2047, False), (1, 4000, True)])
def test_what_the_other_kernels_do(seqlen_q: int, seqlen_k: int, saves: bool) -> None:
    recorder = Recorder()
    request = dataclasses.replace(Case(seqlen_q, seqlen_k, dtype=HALF).build(CPU)[0], save_for_backward=saves)
    CupyBackend(launcher=recorder, capability=(9, 0)).forward(request)
    assert not any("decode" in launch.kernel for launch in recorder.launches)
    assert all(launch.args["flags"] == 0 for launch in recorder.launches)


def test_alignment_decides_how_rows_are_read() -> None:
    t = torch.zeros(2, 3, 40, 64, dtype=HALF)
    for tensor, expected in (
        (t, 1),
        (t[..., 8:], 1),
        (t[..., 4:], 0),
        (t[..., :12], 0),
        (t[:, :, ::2], 1),
        (torch.zeros(1, 1, 1, 8, dtype=HALF), 1),
        (torch.zeros(1, 1, 2, 12, dtype=HALF), 0),
        (torch.zeros(1, 1, 2, 12), 1),
        (torch.empty_strided((1, 1, 2, 8), (0, 0, 2**31 - 8, 1), dtype=HALF, device="meta"), 1),
        (torch.empty_strided((1, 1, 2, 8), (0, 0, 2**31, 1), dtype=HALF, device="meta"), 0),
    ):
        assert backend._layout("q", tensor)["aligned_q"] == expected


def test_instructions_of_hopper_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy's own option names an architecture without them; with it, the compiler must still take ours."""
    compiler = pytest.importorskip("cupy").cuda.compiler
    monkeypatch.setattr(compiler, "_get_arch_for_options_for_nvrtc", lambda arch: (f"-arch=sm_{arch}", "cubin"))
    source = 'extern "C" __global__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }'
    binary, _ = compiler.compile_using_nvrtc(source, launcher.options((9, 0)), "90")
    assert binary
    with pytest.raises(compiler.CompileException, match="wgmma"):
        compiler.compile_using_nvrtc(source, launcher.options((8, 0)), "90")


def test_a_new_length_batch_or_number_of_heads_compiles_nothing() -> None:
    found = []
    for shape in ((64, 64, {}), (101, 1003, {"batch": 3}), (17, 1, {"heads_kv": 2, "group": 3})):
        recorder = Recorder()
        case = Case(*shape[:2], head_dim=24, head_dim_v=24, dtype=HALF, is_causal=True, **shape[2])  # type: ignore[arg-type]
        everything(CupyBackend(launcher=recorder, capability=(8, 0)), case.build(CPU)[0])
        found.append([launch.kernel for launch in recorder.launches])
    assert found[0] == found[1] == found[2]


def test_every_kernel_is_shipped() -> None:
    assert {
        kernel.partition("<")[0] for kernel in shipped((9, 0), (HALF,), (64,), (1.5,))
    } == KERNELS | DECODE_KERNELS | ENTRIES_KERNELS


# ---- what compiles


class Report(NamedTuple):
    registers: int
    stack: int
    spills: int


def compiled(source: str, kernels: Sequence[str], capability: str) -> dict[str, Report]:
    """What the compiler says of these instantiations; NVRTC alone, no driver. CuPy adds options of its own."""
    nvrtc = pytest.importorskip("cupy").cuda.nvrtc
    text = (launcher.KERNELS / source).read_text(encoding="utf-8")
    program = nvrtc.createProgram(text, source, [], [])
    for kernel in kernels:
        nvrtc.addNameExpression(program, kernel)
    device = numbers(capability)
    try:
        nvrtc.compileProgram(
            program, ["-arch=sm_{}{}".format(*device), *launcher.options(device), "-ftz=true", "--ptxas-options=-v"]
        )
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    # What the compiler says where products by wgmma wait for each other: they must not.
    assert "(C75" not in nvrtc.getProgramLog(program)
    names = {nvrtc.getLoweredName(program, kernel): kernel for kernel in kernels}
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    found = re.findall(pattern, nvrtc.getProgramLog(program), re.DOTALL)
    reports = {
        names[name]: Report(int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in found
    }
    assert reports.keys() == set(kernels)
    return reports


def reported(launches: dict[str, Launched], capability: str) -> Iterator[tuple[Launched, Report]]:
    for source, of_source in by_source(launches).items():
        reports = compiled(source, of_source, capability)
        yield from ((launches[kernel], reports[kernel]) for kernel in of_source)


def by_source(launches: dict[str, Launched]) -> dict[str, list[str]]:
    """The kernels of each file."""
    found: dict[str, list[str]] = {}
    for kernel, launch in launches.items():
        found.setdefault(launch.source, []).append(kernel)
    return found


def numbers(name: str) -> tuple[int, int]:
    """A compute capability from its name, as "90a"."""
    digits = name.rstrip("a")
    return int(digits[:-1]), int(digits[-1])


# A part of what is shipped for each, so that together they have each kernel, dtype, head class and alpha class; all of
# it takes minutes, and is what this file does as a script.
PARTS: list[tuple[str, torch.dtype, int, Any, str]] = [
    ("75", HALF, 64, 1.5, "maxima"),
    ("75", FLOAT, 128, (1.2,), "maxima"),
    ("80", BF16, 128, 1.3, "histogram"),
    ("86", BF16, 64, (1.2,), "maxima"),
    ("86", FLOAT, 256, 1.5, "maxima"),
    ("89", HALF, 256, 2.0, "maxima"),
    ("90a", BF16, 64, 1.5, "maxima"),
    ("90a", BF16, 128, 1.5, "maxima"),
    ("90a", HALF, 128, (1.2,), "histogram"),
    ("100", BF16, 256, (1.2,), "maxima"),
    ("120", FLOAT, 64, 2.0, "histogram"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "head", "alpha", "init"), PARTS, ids=str)
def test_instantiations_compile_without_spills(name: str, dtype: torch.dtype, head: int, alpha: Any, init: str) -> None:
    launches = shipped(numbers(name), (dtype,), (head,), (alpha,), (init,))
    config = configure(dtype, head, numbers(name))
    assert config is not None
    expected = KERNELS | DECODE_KERNELS | (ENTRIES_KERNELS if config.entries else set())
    assert {kernel.partition("<")[0] for kernel in launches} == expected
    for launch, report in reported(launches, name):
        assert max(report.spills, report.stack) == 0, f"sm_{name}, {launch.kernel}: {report}"
        assert launch.shared_bytes <= SHARED_MEMORY[numbers(name)]
        if with_producers := re.search(r"(\d+), true, true, \d+>$", launch.kernel):
            # With fewer than LAUNCHED_REGISTERS, warps would wait for ever for those that others give back.
            assert report.registers == 65_536 // (launch.block[0] * int(with_producers[1])) // 8 * 8
    assert name != "90a" or any(launch.kernel.endswith(", true, true, 4>") for launch in launches.values())


# ---- the kernels, run


EMULATED = [
    ((8, 0), Case(70, 90, head_dim=64, head_dim_v=64, dtype=BF16, is_causal=True)),
    ((8, 0), Case(50, 200, head_dim=128, head_dim_v=96, dtype=HALF, kind="topics")),
    ((9, 0), Case(70, 90, head_dim=64, head_dim_v=64, dtype=BF16, is_causal=True)),
    ((9, 0), Case(150, 300, batch=2, heads_kv=2, group=2, head_dim=40, head_dim_v=25, dtype=HALF, is_causal=True)),
    ((9, 0), Case(150, 201, head_dim=33, head_dim_v=64, dtype=BF16, alpha=2.0, layout="sliced")),
    ((9, 0), Case(130, 100, head_dim=24, head_dim_v=40, dtype=HALF, alpha=1.25, group=2, is_causal=True)),
    ((9, 0), Case(70, 300, head_dim=64, dtype=HALF, group=3, alpha=(1.1, 1.5, 1.9), is_causal=True)),
    ((9, 0), Case(50, 200, head_dim=128, head_dim_v=96, dtype=BF16, kind="topics")),
    (
        (9, 0),
        Case(
            136,
            200,
            batch=2,
            group=2,
            head_dim=64,
            head_dim_v=64,
            dtype=HALF,
            is_causal=True,
            layout="transposed",
            seqlens_q=(136, 99),
            seqlens_k=(200, 131),
        ),
    ),
    ((9, 0), Case(200, 136, heads_kv=2, head_dim=128, head_dim_v=128, dtype=BF16, alpha=1.3, is_causal=True)),
    ((9, 0), Case(30, 70, head_dim=200, head_dim_v=256, dtype=BF16, is_causal=True)),
    ((9, 0), Case(70, 140, head_dim=7, head_dim_v=3, is_causal=True, kind="narrow")),
    # Where the last step of tau is taken with the slope before it, tau is four times as far off as it may be.
    (
        (9, 0),
        Case(128, 256, head_dim=64, head_dim_v=64, dtype=BF16, is_causal=True, kind="topics", gain=0.15, seed=523008),
    ),
    # alpha - 1 of an alpha in float32 was off by as much as alpha is.
    ((9, 0), Case(102, 16, alpha=1.027, kind="narrow", shift=1e5)),
    ((9, 0), Case(40, 90, head_dim=100, head_dim_v=80, alpha=2.0)),
    ((9, 0), Case(20, 40, head_dim=130, head_dim_v=16, is_causal=True)),
    ((9, 0), Case(40, 60, group=2, alpha=(1.5, 1.2), batch=3, seqlens_q=(40, 0, 33), seqlens_k=(0, 60, 20))),
    ((7, 5), Case(130, 150, head_dim=64, head_dim_v=64, dtype=HALF, is_causal=True)),
    ((12, 0), Case(70, 130, head_dim=128, head_dim_v=128, dtype=HALF, is_causal=True)),
]


DECODED = [
    ((9, 0), Case(1, 2500, heads_kv=2, group=4, head_dim=64, head_dim_v=64, dtype=BF16)),
    ((9, 0), Case(1, 2500, group=4, head_dim=64, head_dim_v=40, dtype=HALF, kind="topics", is_causal=True)),
    ((9, 0), Case(5, 2100, group=8, head_dim=24, head_dim_v=16, alpha=2.0, is_causal=True)),
    ((9, 0), Case(16, 4200, group=2, head_dim=128, head_dim_v=128, dtype=BF16, alpha=1.2, is_causal=True)),
    ((9, 0), Case(16, 2048, group=5, head_dim=33, head_dim_v=7, dtype=HALF, alpha=1.3, is_causal=True)),
    ((9, 0), Case(7, 2300, head_dim=200, head_dim_v=256, dtype=BF16, layout="sliced")),
    ((9, 0), Case(2, 2300, group=3, head_dim=100, head_dim_v=128, alpha=1.3, gain=3)),
    ((9, 0), Case(3, 2100, head_dim=130, head_dim_v=200, kind="topics", is_causal=True)),
    (
        (9, 0),
        Case(
            3, 2300, 24, 24, 3, group=2, alpha=(1.5, 1.2), is_causal=True, seqlens_q=(3, 0, 2), seqlens_k=(2300, 9, 0)
        ),
    ),
    ((9, 0), Case(2, 70_001, head_dim=8, head_dim_v=8, dtype=HALF, gain=2)),
    ((8, 6), Case(1, 2100, group=20, head_dim=128, head_dim_v=80, dtype=HALF, alpha=2.0)),
    ((7, 5), Case(4, 2100, group=2, head_dim=64, head_dim_v=64, dtype=HALF, is_causal=True)),
]


@pytest.fixture(scope="module")
def emulator() -> EmulatedLauncher:
    """With the kernels of most tests compiled together, which takes half the time."""
    recorder = Recorder()
    for capability, case in EMULATED:
        request, dout = case.build(CPU)
        run_attention(CupyBackend(launcher=recorder, capability=capability), request, dout)
    for capability, case in DECODED:
        run_attention(CupyBackend(launcher=recorder, capability=capability), case.build(CPU)[0])
    emulated_launcher = EmulatedLauncher(launcher.KERNELS)
    for source, kernels in by_source({launch.kernel: launch for launch in recorder.launches}).items():
        emulated_launcher.compile(source, kernels)
    return emulated_launcher


@emulated
@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "case"), EMULATED, ids=[f"{i}-{case.dtype}-{case.head_dim}" for i, (_, case) in enumerate(EMULATED)]
)
def test_attention(emulator: EmulatedLauncher, capability: tuple[int, int], case: Case) -> None:
    request, dout = case.build(CPU)
    assert_attention(CupyBackend(launcher=emulator, capability=capability), request, dout)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["iid", "narrow", "topics", "equal"])
def test_histogram(emulator: EmulatedLauncher, kind: str) -> None:
    """It is a lower bound as the maxima are, so the results are as good."""
    request, dout = Case(150, 300, head_dim=64, kind=kind, is_causal=True, dtype=HALF).build(CPU)
    assert_attention(CupyBackend("histogram", emulator, (9, 0)), request, dout)


def emulator_of(seed: int, **options: Any) -> EmulatedLauncher:
    return EmulatedLauncher(launcher.KERNELS, seed, **options)


class Only:
    """A launcher that leaves out the kernels of other files."""

    def __init__(self, whole: EmulatedLauncher, source: str) -> None:
        self._whole, self._source = whole, source

    def launch(self, source: str, kernel: str, *rest: Any) -> None:
        if source == self._source:
            self._whole.launch(source, kernel, *rest)

    def tensor_map(self, *tensor: Any) -> bytes | None:
        return self._whole.tensor_map(*tensor)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 100])
@pytest.mark.parametrize("n_keys", [64, 500])
def test_scans_agree(emulator: EmulatedLauncher, head_dim: int, n_keys: int) -> None:
    """Whatever multiplies. The bound of a scan would hide a wrong score, since what follows mends it.

    Scores are whole numbers here, with 4 between one z and the next: where the largest stands alone, tau is the largest
    z less 1, and a scan finds it exactly.
    """
    request, _ = Case(150, n_keys, head_dim=head_dim, dtype=BF16, is_causal=True).build(CPU)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-3, 4, t.shape, generator=generator).to(BF16) for t in (request.q, request.k))
    request = dataclasses.replace(request, q=q, k=k, scale=8.0)
    z = (4 * (q.double() @ k.double().mT)).where(torch.ones(150, n_keys).tril(n_keys - 150) > 0, -torch.inf)
    largest = z.max(-1).values
    stands_alone = (z == largest[..., None]).sum(-1) == 1
    assert stands_alone.sum() > 40
    for capability in ((9, 0), (8, 0)):
        tau = CupyBackend(launcher=Only(emulator, "scan.cu"), capability=capability).forward(request).tau
        assert torch.equal(tau[stands_alone], (largest - 1).float()[stands_alone])


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_are_not_positive(emulator: EmulatedLauncher, scale: float) -> None:
    request, dout = Case(40, 60, head_dim=32, dtype=HALF).build(CPU)
    assert_attention(CupyBackend(launcher=emulator, capability=(9, 0)), dataclasses.replace(request, scale=scale), dout)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("where", ["q", "k"])
def test_numbers_that_are_not_finite(emulator: EmulatedLauncher, where: str) -> None:
    """A bad query makes its row NaN, a bad key all rows that see it; other heads stay as they are."""
    request, dout = Case(60, 80, heads_kv=2, head_dim=24, is_causal=True, dtype=HALF).build(CPU)
    whole = CupyBackend(launcher=emulator, capability=(9, 0))
    clean = run_attention(whole, request, dout)
    getattr(request, where)[0, 1, 50, 3] = torch.inf
    results = run_attention(whole, request, dout)
    first = 50 if where == "q" else 30
    last = 51 if where == "q" else 60
    for quantity in ("out", "tau", "dq"):
        is_bad = torch.zeros(1, 2, 60, dtype=torch.bool)
        is_bad[0, 1, first:last] = True
        assert results[quantity][is_bad].isnan().all()
        assert torch.equal(results[quantity][:, 0], clean[quantity][:, 0])
    assert torch.equal(results["out"][0, 1, :first], clean["out"][0, 1, :first])
    for quantity in ("dk", "dv"):
        assert torch.equal(results[quantity][:, 0], clean[quantity][:, 0])


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [BF16, FLOAT], ids=str)
def test_the_order_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    request, dout = Case(150, 200, head_dim=40, head_dim_v=24, group=2, dtype=dtype, is_causal=True).build(CPU)
    runs = [
        run_attention(CupyBackend(launcher=EmulatedLauncher(launcher.KERNELS, seed), capability=(9, 0)), request, dout)
        for seed in (None, 1)
    ]
    for quantity, result in runs[0].items():
        assert torch.equal(result, runs[1][quantity]), quantity


class WithoutMaps(EmulatedLauncher):
    """As where the driver refuses all tensors."""

    def tensor_map(self, *tensor: Any) -> None:
        return None


@emulated
@pytest.mark.slow
def test_who_copies_changes_no_bit(emulator: EmulatedLauncher) -> None:
    request, dout = Case(200, 300, head_dim=64, head_dim_v=64, dtype=BF16, kind="topics", is_causal=True).build(CPU)
    by_engine, by_threads = (
        run_attention(CupyBackend(launcher=each, capability=HOPPER), request, dout)
        for each in (emulator, WithoutMaps(launcher.KERNELS))
    )
    for quantity, result in by_engine.items():
        assert torch.equal(result, by_threads[quantity]), quantity


@emulated
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(20, 70, head_dim=40, head_dim_v=35, dtype=HALF, alpha=1.5, is_causal=True),
        # Tiles that end in between; and lists that are full while loads are under way.
        Case(136, 200, batch=2, head_dim=64, head_dim_v=64, dtype=HALF, seqlens_q=(136, 99), seqlens_k=(200, 131)),
        Case(128, 900, head_dim=64, head_dim_v=64, dtype=HALF, kind="equal"),
        Case(129, 70, head_dim=128, head_dim_v=128, dtype=HALF, seqlens_k=(0,)),
    ],
    ids=["threads copy", "padded", "full lists", "no keys"],
)
def test_no_access_out_of_bounds_and_no_race(case: Case) -> None:
    launching = EmulatedLauncher(launcher.KERNELS, seed=2, is_checked=True)
    request, dout = case.build(CPU)
    assert_attention(CupyBackend("histogram", launching, (9, 0)), request, dout)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "capability", "case"),
    [
        (0, (9, 0), Case(300, 300, head_dim=64, head_dim_v=64, dtype=BF16, kind="narrow", is_causal=True)),
        (1, (9, 0), Case(300, 300, head_dim=64, head_dim_v=64, dtype=BF16, kind="narrow", is_causal=True)),
        (0, (9, 0), Case(136, 500, batch=2, head_dim=128, head_dim_v=128, dtype=HALF, seqlens_q=(136, 99))),
        (0, (9, 0), Case(130, 400, head_dim=128, head_dim_v=128, dtype=BF16, gain=-1.0)),
        (0, (8, 0), Case(136, 300, head_dim=128, head_dim_v=128, dtype=BF16, kind="topics", is_causal=True)),
    ],
    ids=["64", "64 in another order", "padded", "negative scale", "sm_80"],
)
def test_no_race_where_stages_are_filled_again(seed: int, capability: tuple[int, int], case: Case) -> None:
    """In dkv, tau and delta were once overwritten by the bulk copy engine with no fence behind the threads' reads."""
    request, dout = case.build(CPU)
    checking = CupyBackend(launcher=emulator_of(seed, is_checked=True), capability=capability)
    assert_attention(checking, request, dout)


@emulated
@pytest.mark.slow
def test_no_race_and_no_kernel_too_early() -> None:
    """By blocks, too; warps once read what others wrote where each marked the blocks that are live."""
    request, dout = Case(300, 300, head_dim=64, head_dim_v=64, dtype=BF16, kind="topics", is_causal=True).build(CPU)
    checking = CupyBackend(launcher=emulator_of(0, is_checked=True), capability=HOPPER)
    assert not are_entry_tiles(checking, request).all()
    assert_attention(checking, request, dout)


@emulated
@pytest.mark.slow
def test_support(emulator: EmulatedLauncher) -> None:
    request, _ = Case(150, 170, head_dim=40, group=2, is_causal=True, dtype=HALF).build(CPU)
    assert_support(CupyBackend(launcher=emulator, capability=(9, 0)).support(request, 32, 48), request, "cupy")


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_entmax(emulator: EmulatedLauncher, alpha: float) -> None:
    whole = CupyBackend(launcher=emulator, capability=(9, 0))
    generator = torch.Generator().manual_seed(0)
    x, dp = (torch.randn(300, 5, generator=generator).T for _ in range(2))
    request = EntmaxRequest(x, alpha, torch.tensor([1.3, 1.5, 1.01, 2.0, 1.9]) if alpha == 1.3 else None)
    p = whole.entmax(request)
    assert_close(p, entmax_truth(request), "p")
    dx, dalpha = whole.entmax_backward(p, dp, alpha, request.alpha_rows)
    truth = entmax_backward_truth(p, dp, alpha, request.alpha_rows)
    assert_close(dx, truth, "dx")
    assert (dalpha is None) == (request.alpha_rows is None)
    if dalpha is not None:
        assert_close(dalpha, truth, "dalpha")


# ---- few queries over many keys

HOPPER = (9, 0)


@emulated
@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "case"), DECODED, ids=[f"{i}-{case.dtype}-{case.head_dim}" for i, (_, case) in enumerate(DECODED)]
)
def test_decoding(emulator: EmulatedLauncher, capability: tuple[int, int], case: Case) -> None:
    """By its own kernels alone: no row is left to the others, and they leave it as it is."""
    request, _ = case.build(CPU)
    alone, whole = (
        CupyBackend(launcher=launching, capability=capability) for launching in (Only(emulator, "decode.cu"), emulator)
    )
    assert_attention(alone, request)
    runs = [run_attention(one, request) for one in (alone, whole)]
    for quantity, result in runs[0].items():
        assert torch.equal(result, runs[1][quantity]), quantity


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["narrow", "equal"])
@pytest.mark.parametrize("alpha", [1.3, (1.2, 1.5, 2.0, 1.8)])
def test_more_candidates_than_there_is_room_for(emulator: EmulatedLauncher, kind: str, alpha: Any) -> None:
    """The heads that share these keys are left to the other kernels, the others are not."""
    case = Case(3, 2500, heads_kv=2, group=2, head_dim=32, head_dim_v=32, dtype=HALF, kind=kind, alpha=alpha)
    request, _ = case.build(CPU)
    for tensor in (request.q[:, 2:], request.k[:, 1]):
        tensor.normal_(generator=torch.Generator().manual_seed(tensor.dim()))
    assert_attention(CupyBackend(launcher=emulator, capability=HOPPER), request)
    tau = CupyBackend(launcher=Only(emulator, "decode.cu"), capability=HOPPER).forward(request).tau
    assert tau[:, :2].isnan().any()
    assert not tau[:, 2:].isnan().any()


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_decoding_at_scales_that_are_not_positive(emulator: EmulatedLauncher, scale: float) -> None:
    request, _ = Case(2, 2048, head_dim=32, dtype=HALF).build(CPU)
    assert_attention(CupyBackend(launcher=emulator, capability=HOPPER), dataclasses.replace(request, scale=scale))


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [HALF, FLOAT], ids=str)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_decoding_with_a_bad_number(emulator: EmulatedLauncher, name: str, value: float, dtype: torch.dtype) -> None:
    """It reaches the row that has it, or the rows that see it, in v those in which it has weight; no other bit."""
    case = Case(3, 2100, heads_kv=2, group=2, head_dim=24, head_dim_v=24, is_causal=True, dtype=dtype)
    request, _ = case.build(CPU)
    whole = CupyBackend(launcher=emulator, capability=HOPPER)
    last = 1 if name == "q" else 2098
    if name == "v":
        request.k[0, 1, last] = 4 * request.q[0, 2, 1]  # has weight in this row
    clean = whole.forward(request)
    getattr(request, name)[0, 1, last, 5] = value
    results = whole.forward(request)
    expected = torch.zeros(1, 4, 3, dtype=torch.bool)
    if name == "q":
        expected[0, 1, 1] = True
    elif name == "k":
        expected[0, 2:, 1:] = True
    else:
        sees = clean.out.isfinite().all(-1) & ~results.out.isfinite().all(-1)
        assert sees[0, 2, 1]
        assert not sees[0, :2].any()
        assert not sees[0, :, 0].any()
        expected = sees
    assert torch.equal(~results.out.isfinite().all(-1), expected)
    assert torch.equal(results.tau.isnan(), expected if name != "v" else torch.zeros_like(expected))
    assert torch.equal(results.out[~expected], clean.out[~expected])


@emulated
@pytest.mark.slow
def test_the_order_of_threads_changes_no_bit_in_decoding(emulator: EmulatedLauncher) -> None:
    request, _ = Case(3, 2500, group=2, head_dim=40, head_dim_v=24, dtype=HALF, gain=0.5).build(CPU)
    runs = [
        run_attention(CupyBackend(launcher=order, capability=HOPPER), request) for order in (emulator, emulator_of(1))
    ]
    for quantity, result in runs[0].items():
        assert torch.equal(result, runs[1][quantity]), quantity


@emulated
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 2100, group=9, head_dim=40, head_dim_v=64, dtype=HALF, is_causal=True),
        Case(1, 2051, head_dim=33, head_dim_v=35, alpha=1.3),
        Case(1, 2100, head_dim=16, head_dim_v=16, kind="equal", dtype=HALF),
    ],
    ids=["aligned", "unaligned", "left to the others"],
)
def test_no_access_out_of_bounds_and_no_race_in_decoding(case: Case) -> None:
    request, _ = case.build(CPU)
    assert_attention(CupyBackend(launcher=emulator_of(2, is_checked=True), capability=HOPPER), request)


TURNS = """
#include "common.cuh"
__global__ void turns(const Params params, int* found) {
  const Turn turn = turn_of(params, blockIdx.x, gridDim.x, params.n_tiles);
  found[2 * blockIdx.x] = turn.i_bh;
  found[2 * blockIdx.x + 1] = turn.i;
}
"""


@emulated
@pytest.mark.parametrize(("seqlen_k", "together"), [(0, 7), (8192, 7), (40_000, 3), (300_000, 1)])
def test_order_of_programs(tmp_path: Path, seqlen_k: int, together: int) -> None:
    """The first tiles of as many heads as have their keys in the cache, then their second ones: each tile once."""
    shutil.copytree(launcher.KERNELS, tmp_path / "kernels")
    (tmp_path / "kernels" / "turns.cu").write_text(TURNS)
    heads, n_tiles = 7, 5
    found = torch.full((heads * n_tiles, 2), -1, dtype=torch.int32)
    params = backend._record(backend.PARAMS, {"seqlen_k": seqlen_k, "head_dim": 64, "n_tiles": n_tiles})
    emulated_launcher = EmulatedLauncher(tmp_path / "kernels")
    emulated_launcher.launch("turns.cu", "turns", (heads * n_tiles, 1, 1), (1, 1, 1), 0, [params, found])
    sections = [range(first, min(first + together, heads)) for first in range(0, heads, together)]
    assert found.tolist() == [[i_bh, i] for section in sections for i in range(n_tiles) for i_bh in section]


# ---- entries

ENTRY_TILE = 4  # of `live`, where it speaks of a tile's first block

# How many tiles are entry tiles; they have up to 2,935 entries, a block of one head up to 1,661.
BY_ENTRIES = [
    ("all", Case(150, 2000, head_dim=64, head_dim_v=64, dtype=BF16, is_causal=True)),
    ("some", Case(200, 500, heads_kv=2, group=2, head_dim=64, head_dim_v=64, dtype=HALF, is_causal=True, gain=1.2)),
    ("all", Case(150, 900, batch=2, group=2, head_dim=40, head_dim_v=25, dtype=HALF, is_causal=True, gain=2)),
    ("all", Case(290, 700, head_dim=33, head_dim_v=64, dtype=BF16, alpha=2.0, layout="sliced", gain=0.5)),
    ("all", Case(300, 1000, head_dim=24, head_dim_v=40, dtype=HALF, alpha=1.25, group=2, gain=4)),
    ("some", Case(70, 1200, head_dim=64, head_dim_v=64, dtype=HALF, group=3, alpha=(1.3, 1.5, 1.9))),
    ("some", Case(150, 1500, head_dim=128, head_dim_v=96, dtype=BF16, is_causal=True)),
    ("all", Case(290, 1000, head_dim=80, head_dim_v=37, dtype=BF16, gain=1.5)),
    (
        "some",
        Case(200, 900, 64, 64, 3, dtype=HALF, is_causal=True, seqlens_q=(170, 0, 60), seqlens_k=(850, 600, 0), gain=2),
    ),
    ("all", Case(1500, 400, head_dim=64, head_dim_v=64, dtype=HALF, gain=2)),
    ("all", Case(17, 16500, head_dim=40, head_dim_v=64, dtype=HALF, gain=1.5)),
    ("all", Case(20, 66_000, head_dim=24, head_dim_v=64, dtype=HALF, gain=1.5)),
    # The gradient of alpha is 0 where keys are equal, whatever the 16 bits of u are off by.
    (
        "some",
        Case(
            *(509, 6, 100, 100, 3, 2),
            dtype=BF16,
            alpha=(1.5, 1.25),
            is_causal=True,
            seqlens_k=(0, 0, 6),
            kind="equal",
            gain=1e-3,
            seed=75296,
        ),
    ),
    ("some", Case(2000, 1500, head_dim=64, head_dim_v=64, dtype=HALF, kind="topics", gain=2)),
    ("none", Case(150, 1500, head_dim=64, head_dim_v=64, dtype=HALF, kind="narrow", is_causal=True)),
]


def entry_tiles(result: AttentionResult) -> torch.Tensor:
    """(batch, heads_q, tiles) whether they are: of a forward pass that saved what backward needs."""
    return result.saved[0][..., 0] & ENTRY_TILE != 0


def are_entry_tiles(whole: CupyBackend, request: AttentionRequest) -> torch.Tensor:
    return entry_tiles(whole.forward(dataclasses.replace(request, save_for_backward=True)))


@emulated
@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "i"), [(HOPPER, i) for i in range(len(BY_ENTRIES))] + [((8, 0), i) for i in (1, 6, 8)], ids=str
)
def test_attention_by_entries(emulator: EmulatedLauncher, capability: tuple[int, int], i: int) -> None:
    share, case = BY_ENTRIES[i]
    request, dout = case.build(CPU)
    whole = CupyBackend(launcher=emulator, capability=capability)
    assert_attention(whole, request, dout)
    saving, not_saving = (
        whole.forward(dataclasses.replace(request, save_for_backward=saves)) for saves in (True, False)
    )
    by_entries = entry_tiles(saving)
    assert share == ("all" if by_entries.all() else "some" if by_entries.any() else "none")
    assert torch.equal(saving.out, not_saving.out)
    assert torch.equal(saving.tau, not_saving.tau)


@emulated
@pytest.mark.slow
def test_support_where_tiles_are_entry_tiles(emulator: EmulatedLauncher) -> None:
    """Its own forward pass takes none by entries: it has no values."""
    request, _ = Case(150, 2000, head_dim=64, head_dim_v=64, group=2, dtype=BF16, is_causal=True).build(CPU)
    whole = CupyBackend(launcher=emulator, capability=HOPPER)
    assert are_entry_tiles(whole, request).any()
    assert_support(whole.support(request, 32, 48), request, "cupy")


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("where", ["everywhere", "last"])
def test_more_entries_than_there_is_room_for(emulator: EmulatedLauncher, where: str) -> None:
    """One tile has them, in all blocks or in its last ones, and is taken by blocks; the others stay entry tiles."""
    request, dout = Case(300, 1536, head_dim=64, head_dim_v=64, dtype=HALF, gain=2).build(CPU)
    whole = CupyBackend(launcher=emulator, capability=HOPPER)
    assert are_entry_tiles(whole, request).all()
    if where == "everywhere":
        request.q[:, :, 130] = 0
    else:
        # The rows of the last warp are alike and see, in equal parts, one key of each block and all of the last two.
        row = request.q[:, :, 240:241].clone()
        request.q[:, :, 240:256] = row
        request.k.sub_((request.k @ row.mT) / (row @ row.mT) * row)
        for keys in (slice(0, -128, 64), slice(-128, None)):
            request.k[:, :, keys] += row / 5
    assert are_entry_tiles(whole, request).squeeze().tolist() == [True, False, True]
    assert_attention(whole, request, dout)


@emulated
@pytest.mark.slow
def test_no_room_for_the_header_of_no_entries() -> None:
    """At scores so far from zero no u is above 0; the starts of the rows went past the end of their tensor."""
    case = Case(50, 13, head_dim=1, head_dim_v=1, dtype=BF16, alpha=4 / 3, kind="wide", gain=1e4, shift=1e5)
    request, dout = case.build(CPU)
    checking = CupyBackend(launcher=emulator_of(0, is_checked=True), capability=HOPPER)
    assert_attention(checking, request, dout)
    assert not are_entry_tiles(checking, request).any()


@emulated
@pytest.mark.slow
def test_by_entries_at_a_negative_scale(emulator: EmulatedLauncher) -> None:
    request, dout = Case(140, 600, head_dim=32, dtype=HALF).build(CPU)
    request = dataclasses.replace(request, scale=-0.7)
    whole = CupyBackend(launcher=emulator, capability=HOPPER)
    assert are_entry_tiles(whole, request).any()
    assert_attention(whole, request, dout)


@emulated
@pytest.mark.slow
def test_a_bad_gradient_by_entries(emulator: EmulatedLauncher) -> None:
    """It spoils dq of its row, dk of keys that have an entry there, and dv of those and some of their neighbours."""
    request, dout = Case(150, 600, heads_kv=2, head_dim=40, head_dim_v=64, dtype=HALF, gain=3).build(CPU)
    whole = CupyBackend(launcher=emulator, capability=HOPPER)
    assert are_entry_tiles(whole, request).all()
    clean = run_attention(whole, request, dout)
    dout[0, 1, 130, 7] = torch.nan
    results = run_attention(whole, request, dout)
    assert results["dq"][0, 1, 130].isnan().all()
    for quantity in ("dk", "dv"):
        is_clean = ~results[quantity].isnan().any(-1)
        assert is_clean[0, 0].all()
        assert is_clean[0, 1].sum() in range(300 if quantity == "dv" else 550, 600)
        assert torch.equal(results[quantity][is_clean], clean[quantity][is_clean])
    results["dq"][0, 1, 130] = clean["dq"][0, 1, 130]
    assert torch.equal(results["dq"], clean["dq"])


@emulated
@pytest.mark.slow
def test_the_order_of_threads_changes_no_bit_by_entries(emulator: EmulatedLauncher) -> None:
    request, dout = Case(150, 600, head_dim=64, group=2, dtype=BF16, is_causal=True, gain=2).build(CPU)
    backends = [CupyBackend(launcher=order, capability=HOPPER) for order in (emulator, emulator_of(1))]
    assert are_entry_tiles(backends[0], request).any()
    runs = [run_attention(whole, request, dout) for whole in backends]
    for quantity, result in runs[0].items():
        assert torch.equal(result, runs[1][quantity]), quantity


@emulated
@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case(20, 300, head_dim=40, head_dim_v=64, dtype=HALF, is_causal=True),
        Case(133, 200, head_dim=33, head_dim_v=35, dtype=HALF, group=2, gain=4),
    ],
    ids=["short", "unaligned"],
)
def test_no_access_out_of_bounds_and_no_race_by_entries(emulator: EmulatedLauncher, case: Case) -> None:
    request, dout = case.build(CPU)
    checking = CupyBackend(launcher=emulator_of(2, is_checked=True), capability=HOPPER)
    assert are_entry_tiles(checking, request).any()
    assert_attention(checking, request, dout)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("capability", [(8, 0), (8, 6)])
def test_configurations_of_older_devices(capability: tuple[int, int]) -> None:
    """They run on a newer device too."""
    candidate = registry.find("cupy")
    if isinstance(candidate.backend, str):
        pytest.skip(candidate.backend)
    for dtype, head in itertools.product((HALF, FLOAT), (64, 128, 200)):
        request, dout = Case(300, 400, head_dim=head, head_dim_v=head, dtype=dtype, is_causal=True).build(
            torch.device("cuda")
        )
        assert_attention(CupyBackend(capability=capability), request, dout)


def main(capabilities: Sequence[str]) -> None:
    """The compiler's report of all that is shipped, as a table."""
    print("| sm | kernel | threads | registers | shared memory | spilled bytes |\n|---|---|---:|---:|---:|---:|")
    for name in capabilities:
        for launch, report in reported(shipped(numbers(name)), name):
            row = (name, f"`{launch.kernel}`", launch.block[0], report.registers, launch.shared_bytes, report.spills)
            print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["75", "80", "86", "89", "90a", "100", "120"])
