"""The emulator of CUDA kernels: that it computes what a GPU does, and that it finds what is wrong in a kernel."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cuda_emulator
import numpy as np
import pytest
import torch
from cuda_emulator import CompileError, EmulatedLauncher, KernelError
from torch import Tensor

pytestmark = pytest.mark.skipif(cuda_emulator.unavailable() is not None, reason=str(cuda_emulator.unavailable()))

HERE = Path(cuda_emulator.__file__).parent
SAMPLES = HERE / "samples"
SOURCE = "samples.cu"
TYPES = {torch.float16: "half", torch.bfloat16: "bf16"}

KERNELS = (
    *("scaled<half, 3>", "scaled<float, 0>", "scaled_by_structure", "indices", "collectives", "block_sums"),
    *("round_trip<half>", "round_trip<bf16>", "copies<0>", "copies<1>", "copies<2>", "copies<3>"),
    *(f"product<{t}, {transposed}>" for t in ("half", "bf16") for transposed in ("false", "true")),
    *(f"warpgroup_product<{t}, {o}, true, true>" for t in ("half", "bf16") for o in ("ROWS", "REGISTERS", "COLUMNS")),
    *("warpgroup_product<half, ROWS, false, true>", "warpgroup_product<half, ROWS, true, false>"),
    *(f"wide_product<{t}, {by_columns}>" for t in ("half", "bf16") for by_columns in ("false", "true")),
    "products_of_warpgroups_differ",
    *(f"{name}<{on}>" for name in ("reversed", "reversed_in_warp", "reversed_twice") for on in ("false", "true")),
    *("add_atomically", "add_plainly", "mark_plainly", "half_a_warp_votes", "halves_of_a_warp_part"),
    *("half_a_block_waits", "halves_of_a_block_wait_apart", "reads_unwritten", "stores_shared", "stores_global"),
    *("stores_vector", "divides", "copies_from", "loads_matrices_at", "touches_a_copy", "increments_alone"),
    *(f"increments<{early}, {lets_first}>" for early in ("false", "true") for lets_first in ("false", "true")),
    *("copies_box", "copies_bulk", "ring", "hands_over"),
)


class Launchers:
    """One for each order and mode, with all samples compiled at once."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._made: dict[tuple[int | None, bool], EmulatedLauncher] = {}

    def __call__(self, seed: int | None = None, is_checked: bool = False) -> EmulatedLauncher:
        key = seed, is_checked
        if key not in self._made:
            self._made[key] = EmulatedLauncher(SAMPLES, seed, is_checked=is_checked, cache_dir=self.cache)
            self._made[key].compile(SOURCE, KERNELS)
        return self._made[key]


@pytest.fixture(scope="module")
def launchers(tmp_path_factory: pytest.TempPathFactory) -> Launchers:
    return Launchers(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=[(None, False), (1, False), (None, True), (2, True)], ids=str)
def launcher(request: pytest.FixtureRequest, launchers: Launchers) -> EmulatedLauncher:
    return launchers(*request.param)


def line_of(kernel: str, text: str) -> str:
    """Where the samples have a text first, in or after a kernel: "samples.cu:12"."""
    lines = (SAMPLES / SOURCE).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if re.search(rf"\b{kernel}\(", line))
    return f"{SOURCE}:{1 + next(i for i in range(start, len(lines)) if text in lines[i])}"


def constants(enum: str) -> list[str]:
    """Of an enum of the samples."""
    return re.findall(r"\w+", (SAMPLES / SOURCE).read_text().partition(f"enum {enum} {{")[2].partition("}")[0])


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def test_arguments(launcher: EmulatedLauncher) -> None:
    x = random(1000, dtype=torch.float16)
    y = torch.zeros(2000, dtype=torch.float16)
    args = [x, y, np.float32(2), np.int32(990), np.int64(2)]
    launcher.launch(SOURCE, "scaled<half, 3>", 8, 128, 0, args)
    expected = (2 * x.float() + 3).half()
    expected[990:] = 0
    assert torch.equal(y[::2], expected)
    assert not y[1::2].any()


def test_structure_as_argument(launcher: EmulatedLauncher) -> None:
    kind = np.dtype([("x", "u8"), ("y", "u8"), ("factor", "f8"), ("n", "i4")], align=True)
    x, y = random(100), torch.zeros(101)
    record = np.array((x.data_ptr(), y.data_ptr(), 0.5, 100), kind)
    for args in (record, record[()], [record]):
        y.zero_()
        launcher.launch(SOURCE, "scaled_by_structure", (1, 1, 1), (64, 1, 1), 0, args)
        assert torch.equal(y, torch.cat([x * 0.5, torch.zeros(1)]))


@pytest.mark.parametrize(
    ("at", "arg", "message"),
    [
        (0, np.float32(1), "argument 0: expected a pointer of 8 bytes, got a floating point number of 4"),
        (2, 2.0, "argument 2: expected a tensor, a NumPy scalar or .*, got float 2.0"),
        (2, np.float64(2), "argument 2: expected a floating point number of 4 bytes, got .* of 8 bytes"),
        (3, np.float32(2), "argument 3: expected an integer of 4 bytes, got a floating point number"),
        (4, np.int32(2), "argument 4: expected an integer of 8 bytes, got an integer of 4"),
        (4, torch.zeros(1), "argument 4: expected an integer of 8 bytes, got torch.float32"),
        (0, torch.zeros(1, device="meta"), "argument 0: expected a tensor on the CPU, got one on meta"),
    ],
)
def test_wrong_arguments(launchers: Launchers, at: int, arg: Any, message: str) -> None:
    args: list[Any] = [torch.zeros(1), torch.zeros(1), np.float32(1), np.int32(1), np.int64(1)]
    args[at] = arg
    with pytest.raises(TypeError, match=message):
        launchers().launch(SOURCE, "scaled<float, 0>", 1, 32, 0, args)


def test_wrong_launches(launchers: Launchers, tmp_path: Path) -> None:
    launch = launchers().launch
    out = torch.zeros(1)
    with pytest.raises(TypeError, match="indices takes 1 arguments, got 2"):
        launch(SOURCE, "indices", 1, 32, 0, [out, out])
    with pytest.raises(ValueError, match=r"got source='other\.cu': expected one of samples\.cu"):
        launch("other.cu", "indices", 1, 32, 0, [out])
    with pytest.raises(ValueError, match=r"got grid=\(1, 0\): expected one to three positive sizes"):
        launch(SOURCE, "indices", (1, 0), 32, 0, [out])
    with pytest.raises(ValueError, match="got block=1025: expected at most 1024 threads"):
        launch(SOURCE, "indices", 1, 1025, 0, [out])
    with pytest.raises(ValueError, match="got shared_bytes=-1: expected 0 to"):
        launch(SOURCE, "indices", 1, 32, -1, [out])
    with pytest.raises(CompileError, match="unknown_kernel"):
        launch(SOURCE, "unknown_kernel<1>", 1, 32, 0, [out])
    with pytest.raises(ValueError, match=r"which holds no \.cu file"):
        EmulatedLauncher(tmp_path)


def test_indices(launcher: EmulatedLauncher) -> None:
    out = torch.full((24, 30), -1, dtype=torch.int32)
    launcher.launch(SOURCE, "indices", (2, 3, 4), (5, 3, 2), 0, [out])
    assert torch.equal(out, torch.arange(24)[:, None] * 1000 + torch.arange(30))


@pytest.mark.parametrize("dtype", TYPES)
def test_rounding(launchers: Launchers, dtype: torch.dtype) -> None:
    """To nearest even, past the largest number and below the smallest, of halfway cases as well."""
    exact = torch.arange(2**15).to(torch.int16).view(dtype).float()
    exact = exact[exact.isfinite()][::3]
    halfway = (exact[1:].double() + exact[:-1].double()).div(2).float()
    special = torch.tensor([torch.inf, torch.nan, 1e30, 3e38, 1e-45, 65520.0, 65519.0])
    x = torch.cat(
        [exact, halfway, halfway.nextafter(torch.tensor(torch.inf)), halfway.nextafter(-special[:1]), special]
    )
    x = torch.cat([x, -x])
    y, z = torch.zeros(len(x), dtype=dtype), torch.zeros(len(x))
    launchers().launch(SOURCE, f"round_trip<{TYPES[dtype]}>", 1, 1024, 0, [x, y, z, np.int32(len(x))])
    torch.testing.assert_close(y, x.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(z, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_product(launcher: EmulatedLauncher, dtype: torch.dtype, transposed: bool) -> None:
    a, b = random(2, 16, 16, dtype=dtype)
    d = torch.empty(16, 16)
    launcher.launch(SOURCE, f"product<{TYPES[dtype]}, {str(transposed).lower()}>", 1, 32, 1024, [a, b, d])
    torch.testing.assert_close(d, a.float() @ (b.mT if transposed else b).float())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("operands", ["ROWS", "REGISTERS", "COLUMNS"])
def test_product_of_a_warpgroup(launcher: EmulatedLauncher, dtype: torch.dtype, operands: str) -> None:
    a, b = random(2, 64, 64, dtype=dtype)
    d = torch.empty(64, 64)
    kernel = f"warpgroup_product<{TYPES[dtype]}, {operands}, true, true>"
    launcher.launch(SOURCE, kernel, 1, 128, 16384, [a, b, d])
    torch.testing.assert_close(d, 2 * a.float() @ (b if operands == "COLUMNS" else b.mT).float())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("by_columns", [False, True])
def test_wide_product_of_a_warpgroup(launcher: EmulatedLauncher, dtype: torch.dtype, by_columns: bool) -> None:
    a, b = random(64, 16, dtype=dtype), random(*((16, 128) if by_columns else (128, 16)), dtype=dtype)
    d = torch.empty(64, 128)
    launcher.launch(SOURCE, f"wide_product<{TYPES[dtype]}, {str(by_columns).lower()}>", 1, 128, 16384, [a, b, d])
    torch.testing.assert_close(d, a.float() @ (b if by_columns else b.mT).float())


def test_products_of_warpgroups_go_wrong(launchers: Launchers) -> None:
    a, b = random(2, 64, 64, dtype=torch.float16)
    d = torch.zeros(64, 64)
    launchers().launch(SOURCE, "warpgroup_product<half, ROWS, true, false>", 1, 128, 16384, [a, b, d])
    assert d.isnan().all()
    kernel = "warpgroup_product<half, ROWS, false, true>"
    with pytest.raises(KernelError, match="read by wgmma without a fence after it was written: byte 8192 of shared"):
        launchers(is_checked=True).launch(SOURCE, kernel, 1, 128, 16384, [a, b, d])
    launch = launchers().launch
    with pytest.raises(KernelError, match="wgmma of different operands in a warpgroup"):
        launch(SOURCE, "products_of_warpgroups_differ", 1, 128, 8224, [d])
    with pytest.raises(KernelError, match="wgmma out of bounds: byte 8000 of shared memory, which has 8000"):
        launch(SOURCE, "products_of_warpgroups_differ", 1, 128, 8000, [d])
    with pytest.raises(KernelError, match="wgmma in a block without whole warpgroups"):
        launch(SOURCE, "products_of_warpgroups_differ", 1, 64, 8224, [d])


def test_collectives(launcher: EmulatedLauncher) -> None:
    x = torch.arange(64, dtype=torch.int32) * 7 % 50
    out = torch.empty(5, 64, dtype=torch.int32)
    launcher.launch(SOURCE, "collectives", 1, 64, 0, [x, out])
    lanes = torch.arange(64)
    votes = [int(sum((int(value) & 1) << i for i, value in enumerate(warp))) for warp in x.view(2, 32)]
    assert torch.equal(out[0], x[lanes ^ 5])
    assert [int(vote) & 0xFFFFFFFF for vote in out[1, ::32]] == votes
    assert (out[1].view(2, 32) == out[1].view(2, 32)[:, :1]).all()
    assert torch.equal(out[2].view(2, 32), (x.view(2, 32) == 40).any(1, keepdim=True).expand(2, 32).int())
    assert out[3].tolist() == [int(value).bit_count() for value in x]
    for warp, matches in zip((x % 3).view(2, 32).tolist(), out[4].view(2, 32).tolist(), strict=True):
        same = [sum((other == value) << i for i, other in enumerate(warp)) for value in warp]
        assert [match & 0xFFFFFFFF for match in matches] == same


def test_block_sums(launcher: EmulatedLauncher) -> None:
    x, out = random(10, 256), torch.empty(10)
    launcher.launch(SOURCE, "block_sums", 10, 256, 64, [x, out])
    torch.testing.assert_close(out, x.sum(1))


@pytest.mark.parametrize("unfinished", [0, 1, 2, 3])
def test_copies_land_when_waited_for(launchers: Launchers, unfinished: int) -> None:
    x, out = random(64, 3, 4), torch.zeros(64, 3, 4)
    launchers().launch(SOURCE, f"copies<{unfinished}>", 1, 64, 64 * 48, [x, out])
    landed = 3 - unfinished
    assert torch.equal(out[:, : min(landed, 2)], x[:, : min(landed, 2)])
    assert not out[:, 2:landed].any()
    assert out[:, landed:].isnan().all()


def test_copies_under_way_are_not_touched(launchers: Launchers) -> None:
    with pytest.raises(KernelError, match=r"touched while a cp\.async to it is under way: byte 0 of shared memory"):
        launchers(is_checked=True).launch(SOURCE, "touches_a_copy", 1, 1, 64, [torch.zeros(4), torch.zeros(1)])


class TestBoxes:
    """Of three heads of 40 rows of 128 numbers, in groups of eight rows and halves of 64 columns."""

    kind = np.dtype(
        [("map", "V128"), ("out", "u8"), *((name, "i4") for name in ("n", "i_group", "i_head", "at")), ("_", "V40")]
    )
    sizes, strides, box = (64, 8, 2, 5, 3), (256, 128, 2048, 10240), (64, 8, 2, 4, 1)
    x = random(3, 40, 128, dtype=torch.float16)

    def copied(
        self,
        launcher: EmulatedLauncher,
        *,
        sizes: tuple[int, ...] = sizes,
        box: tuple[int, ...] = box,
        i_group: int = 0,
        i_head: int = 2,
        at: int = 1024,
        shared_bytes: int = 9216,
        map: bytes | None = None,
    ) -> Tensor:
        n = 2 * int(np.prod(box))
        out = torch.full((n // 2,), torch.nan, dtype=torch.float16)
        map = map or launcher.tensor_map(self.x.data_ptr(), sizes, self.strides, box)
        record = np.array((map, out.data_ptr(), n, i_group, i_head, at, b""), self.kind)
        launcher.launch(SOURCE, "copies_box", 1, 64, shared_bytes, record)
        return out

    @pytest.mark.parametrize("i_group", [0, 1, 3, 5, -2])
    @pytest.mark.parametrize(("i_head", "sizes"), [(0, sizes), (2, sizes), (3, sizes), (1, (44, 5, 1, 4, 2))])
    def test_right(self, launcher: EmulatedLauncher, i_group: int, i_head: int, sizes: tuple[int, ...]) -> None:
        expected = torch.zeros(6, 16, 2, 8, 64, dtype=torch.float16)  # four groups of zeros before the first
        d0, d1, d2, d3, d4 = sizes
        groups = self.x.view(3, 5, 8, 2, 64).transpose(2, 3)
        expected[:d4, 4 : 4 + d3, :d2, :d1, :d0] = groups[:d4, :d3, :d2, :d1, :d0]
        chunks = expected[i_head, 4 + i_group : 8 + i_group].view(4, 2, 8, 8, 8)
        row, chunk = torch.arange(8)[:, None], torch.arange(8)
        copied = self.copied(launcher, i_group=i_group, i_head=i_head, sizes=sizes)
        assert torch.equal(copied, chunks[:, :, row, chunk ^ row].flatten())

    def test_wrong(self, launcher: EmulatedLauncher) -> None:
        line = line_of("copies_box", "bulk_copy_rows")
        for at, message in (
            (1536, "to byte 1536 of shared memory, which has 9728: expected a multiple of 1024"),
            (2048, "to memory out of bounds: byte 2048 of shared memory, which has 9728"),
        ):
            with pytest.raises(KernelError, match=f"bulk copy of 8192 bytes {message}; thread .* at {line}"):
                self.copied(launcher, shared_bytes=9728, at=at)
        with pytest.raises(KernelError, match=f"by a map that tensor_map has not made; .* at {line}"):
            self.copied(launcher, map=bytes(128))
        with pytest.raises(KernelError, match="bulk copy of rows of 64 bytes: expected 128"):
            self.copied(launcher, box=(32, 8, 2, 4, 1))
        if launcher.is_checked:
            where = "1 bytes past the last of a tensor of 30720"
            with pytest.raises(KernelError, match=f"8192 bytes from memory out of bounds: .*, {where}; .* at {line}"):
                self.copied(launcher, sizes=(64, 8, 2, 6, 3), i_group=2)

    @pytest.mark.parametrize(
        ("address", "sizes", "strides", "box"),
        [
            (8, sizes, strides, box),
            (16, (0, *sizes[1:]), strides, box),
            (16, (*sizes[:4], 2**32 + 1), strides, box),
            (16, sizes, (264, *strides[1:]), box),
            (16, sizes, (*strides[:3], 2**40), box),
            (16, sizes, strides, (128, *box[1:])),
            (16, sizes, strides, (60, *box[1:])),
            (16, sizes, strides, (*box[:4], 0)),
            (16, sizes, strides, (64, 257, *box[2:])),
        ],
    )
    def test_refused(self, launchers: Launchers, address: int, sizes: Any, strides: Any, box: Any) -> None:
        assert launchers().tensor_map(address, sizes, strides, box) is None


class TestBulkCopies:
    @staticmethod
    def copied(launcher: EmulatedLauncher, **options: int) -> tuple[Tensor, Tensor]:
        x = torch.arange(300).to(torch.int8)
        out = torch.zeros_like(x)
        numbers = {"from": 16, "to": 32, "bytes": 256, "mbarrier": 8} | options
        args = [x, out, *(np.int32(number) for number in numbers.values())]
        launcher.launch(SOURCE, "copies_bulk", 1, 1, 1024, args)
        return x, out

    def test_right(self, launcher: EmulatedLauncher) -> None:
        x, out = self.copied(launcher)
        assert torch.equal(out[:256], x[16:272])
        assert not out[256:].any()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"from": 8}, "bulk copy from 0x.*: expected a multiple of 16"),
            ({"bytes": 24}, "bulk copy of 24 bytes: expected a multiple of 16"),
            ({"to": 40}, "bulk copy of 256 bytes to byte 40 of shared memory, .*: expected a multiple of 16"),
            ({"to": 784}, "bulk copy of 256 bytes to memory out of bounds: byte 784 of shared memory, which has 1024"),
            ({"from": 48}, "bulk copy of 256 bytes from memory out of bounds: byte 48 of a tensor of 300 bytes"),
            ({"bytes": -16}, "mbarrier_arrive of -16 bytes: expected 0 to 1048575"),
            ({"mbarrier": 4}, "mbarrier_init at byte 4 of shared memory, which has 1024: expected a multiple of 8"),
            ({"mbarrier": 1024}, "mbarrier_init out of bounds: byte 1024 of shared memory, which has 1024"),
        ],
    )
    def test_wrong(self, launcher: EmulatedLauncher, options: dict[str, int], message: str) -> None:
        with pytest.raises(KernelError, match=rf"{message}.*; thread .* at samples\.cu:\d+"):
            self.copied(launcher, **options)

    def test_over_its_mbarrier(self, launchers: Launchers) -> None:
        with pytest.raises(KernelError, match="touched as data while it is an mbarrier: byte 40 of shared memory"):
            self.copied(launchers(is_checked=True), mbarrier=40)

    def test_before_the_kernel_before_has_ended(self, launchers: Launchers) -> None:
        launcher, x = launchers(is_checked=True), torch.zeros(32, dtype=torch.int32)
        launcher.launch(SOURCE, "increments_alone", 1, 32, 0, [torch.zeros_like(x), x])
        args = [x, torch.zeros_like(x), np.int32(0), np.int32(0), np.int32(128), np.int32(128)]
        with pytest.raises(KernelError, match="read before the kernel that wrote it is waited for: byte 0 of a tensor"):
            launcher.launch(SOURCE, "copies_bulk", 1, 1, 256, args, follows=True)


class TestRing:
    """Of two stages that bulk copies fill."""

    kind = np.dtype(
        [
            ("map", "V128"),
            *((name, "u8") for name in ("numbers", "a", "last", "sums", "products")),
            *(("n", "i4"), ("fault", "i4"), ("_", "V16")),
        ]
    )
    faults = constants("Fault")

    def run(self, launcher: EmulatedLauncher, fault: str, n: int = 6) -> tuple[Tensor, ...]:
        # Whole numbers, of which every sum is exact.
        tiles, a, numbers = ((2 * random(*shape)).round() for shape in ((n, 64, 64), (64, 64), (n, 64)))
        tiles, a = tiles.half(), a.half()
        sums, products = torch.zeros(n, 64, 2), torch.zeros(64, 64)
        map = launcher.tensor_map(tiles.data_ptr(), (64, 8, 1, 8, n), (128, 16, 1024, 8192), (64, 8, 1, 8, 1))
        last = tiles[-1]
        pointers = (tensor.data_ptr() for tensor in (numbers, a, last, sums, products))
        record = np.array((map, *pointers, n, self.faults.index(fault), b""), self.kind)
        launcher.launch(SOURCE, "ring", 1, 128, 16912, record)
        return tiles.float(), a.float(), numbers, sums, products

    @pytest.mark.parametrize(("n", "fault"), [(1, "NONE"), (2, "NONE"), (5, "NONE"), (6, "ONE_WAITS_FOR_ALL")])
    def test_right(self, launcher: EmulatedLauncher, n: int, fault: str) -> None:
        tiles, a, numbers, sums, products = self.run(launcher, fault, n)
        assert torch.equal(products, a @ tiles.sum(0).T)
        assert torch.equal(sums, (tiles * numbers[:, None]).view(n, 64, 2, 32).sum(3))

    @pytest.mark.parametrize("seed", [3, 4, 5])
    def test_right_in_any_order(self, launchers: Launchers, seed: int) -> None:
        self.test_right(launchers(seed, is_checked=True), 5, "NONE")

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("TOO_MANY_BYTES", "bulk copies of 8448 bytes, of which 8432 are announced: the mbarrier at byte 16896 of"),
            (
                "TOO_FEW_BYTES",
                r"mbarrier_wait that nothing ends: the mbarrier at byte 16896 of shared memory, phase 0, has 8448 of "
                r"the 8464 bytes announced at samples\.cu:\d+; block .*, warps 0-3: lanes 0-31 mbarrier_wait at {wait}",
            ),
            ("NO_ARRIVAL", "nothing ends: the mbarrier at byte 16896 of shared memory, phase 0, has 0 of 1 arrivals;"),
            ("TWO_ARRIVALS", "more arrivals in a phase than 1: the mbarrier at byte 16896 of shared memory, phase 0"),
            ("TWO_INITS", "mbarrier_init of one that is initialised: the mbarrier at byte 16904"),
            ("NO_INIT", "mbarrier_arrive of an mbarrier that is not initialised: byte 16896"),
            ("WAIT_AFTER_END", "mbarrier_wait of an mbarrier that is not initialised: byte 16896"),
            ("END_OF_COPY", "mbarrier_invalidate while a bulk copy is under way: the mbarrier at byte 16896"),
            ("COPY_AT_END", "a bulk copy is under way at the end of the block: the mbarrier at byte 16896"),
        ],
    )
    def test_wrong(self, launcher: EmulatedLauncher, fault: str, message: str) -> None:
        with pytest.raises(KernelError, match=message.format(wait=line_of("ring", "mbarrier_wait"))):
            self.run(launcher, fault)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("NO_WAIT", "touched while a bulk copy to it is under way: byte"),
            ("ONE_WAITS", "race: read without a wait after a bulk copy has written it at {copy}: byte"),
            ("WRONG_PARITY", "touched while a bulk copy to it is under way: byte"),
            ("NO_FENCE_AFTER_WRITES", r"without a fence after thread \d+ of block 0 has written it at {zero}"),
            ("NO_FENCE_AFTER_READS", r"without a fence after thread \d+ of block 0 has read it at {read}"),
            ("NO_FENCE_AFTER_INIT", "bulk copy without a fence after its mbarrier was initialised: byte 16896"),
            ("NO_BARRIER_AFTER_WRITES", "touched while a bulk copy to it is under way: byte 4 of"),
            ("NO_BARRIER_AFTER_READS", r"race: written without a barrier after thread \d+ of block 0 has read it at"),
            ("NO_BARRIER_AFTER_INIT", "race: read without a barrier after thread 0 .* has written it at {init}: byte"),
            ("NO_BARRIER_AT_END", r"race: written without a barrier after thread \d+ of block 0 has read it at {wait}"),
            ("TOUCHED_MBARRIER", "touched as data while it is an mbarrier: byte 16896"),
            ("OVERWRITTEN_COPY", "touched while a bulk copy to it is under way: byte 16384"),
            ("TWO_COPIES", "touched while a bulk copy to it is under way: byte 16384"),
        ],
    )
    def test_found_by_checks(self, launchers: Launchers, fault: str, message: str) -> None:
        texts = {"zero": "(smem)[i] = 0", "init": "mbarrier_init", "copy": "bulk_copy_rows", "wait": "mbarrier_wait"}
        lines = {name: line_of("ring", text) for name, text in {**texts, "read": "sum +="}.items()}
        with pytest.raises(KernelError, match=message.format(**lines)):
            self.run(launchers(is_checked=True), fault)


class TestHandover:
    """Of stages that one warp fills and two others use."""

    def run(self, launcher: EmulatedLauncher, fault: str, n: int = 6) -> tuple[Tensor, ...]:
        numbers, out, last = random(n, 64), torch.zeros(n, 64), torch.zeros(64)
        args = [numbers, out, last, np.int32(n), np.int32(constants("HandoverFault").index(fault))]
        launcher.launch(SOURCE, "hands_over", 1, 192, 1024, args)
        return numbers, out, last

    @pytest.mark.parametrize("n", [1, 2, 5])
    def test_right(self, launcher: EmulatedLauncher, n: int) -> None:
        numbers, out, last = self.run(launcher, "WELL", n)
        assert torch.equal(out, numbers.flip(1))
        assert torch.equal(last, numbers[-1].flip(0))

    @pytest.mark.parametrize("seed", [3, 4, 5])
    def test_right_in_any_order(self, launchers: Launchers, seed: int) -> None:
        self.test_right(launchers(seed, is_checked=True), 5)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("GIVEN_BACK_BY_ONE_WARP", "nothing ends: the mbarrier at byte 784 of .*, phase 0, has 1 of 2 arrivals;"),
            ("GIVEN_BACK_TWICE", r"nothing ends: the mbarrier at byte 768 of .*, phase \d, has 0 of 1 arrivals;"),
            ("NOT_WAITED_FOR_FREE", "more arrivals in a phase than 1: the mbarrier at byte 768 of shared memory"),
            ("SYNC_OF_TOO_MANY", r"sync_first of 64 threads by another one; thread \(\d+, 0, 0\)"),
            ("NO_ARRIVALS", "mbarrier_init for 0 arrivals: expected 1 to 1048575"),
        ],
    )
    def test_wrong(self, launcher: EmulatedLauncher, fault: str, message: str) -> None:
        with pytest.raises(KernelError, match=message):
            self.run(launcher, fault)

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ("GIVEN_BACK_EARLY", r"race: written without a barrier after thread \d+ of .* has read it at {read}"),
            ("GIVEN_BACK_BY_ONE_LANE", r"race: written without a barrier after thread \d+ of .* has read it at {read}"),
            ("NO_SYNC", "read before it is written: byte"),
        ],
    )
    @pytest.mark.parametrize("seed", [None, 3])
    def test_found_by_checks(self, launchers: Launchers, fault: str, message: str, seed: int | None) -> None:
        with pytest.raises(KernelError, match=message.format(read=line_of("hands_over", "number = stages"))):
            self.run(launchers(seed, is_checked=True), fault)


def test_unwritten_shared_memory(launchers: Launchers) -> None:
    out = torch.zeros(64)
    launchers().launch(SOURCE, "reads_unwritten", 1, 64, 256, [out])
    assert out.isnan().all()
    line = line_of("reads_unwritten", "out[")
    with pytest.raises(KernelError, match=rf"read before it is written: byte 0 of shared memory.* at {line}"):
        launchers(is_checked=True).launch(SOURCE, "reads_unwritten", 1, 64, 256, [out])


class TestMissingBarrier:
    """Shows in another order, and is named with checks."""

    @pytest.mark.parametrize("kernel", ["reversed", "reversed_in_warp", "reversed_twice"])
    def test_right(self, launcher: EmulatedLauncher, kernel: str) -> None:
        n = 32 if "warp" in kernel else 128
        x, out = random(2, n), torch.zeros(2, n)
        launcher.launch(SOURCE, f"{kernel}<true>", 1, n, 4 * n, [x, out])
        last = 2 if "twice" in kernel else 1
        assert torch.equal(out[:last], x[:last].flip(1))

    @pytest.mark.parametrize("kernel", ["reversed", "reversed_twice"])
    def test_shows_in_another_order(self, launchers: Launchers, kernel: str) -> None:
        x = random(2, 128)
        outs = [torch.zeros(2, 128) for _ in range(4)]
        for seed, out in enumerate(outs):
            launchers(seed).launch(SOURCE, f"{kernel}<false>", 1, 128, 512, [x, out])
        assert not any(torch.equal(out, x.flip(1)) for out in outs)
        assert not all(torch.equal(out.nan_to_num(), outs[0].nan_to_num()) for out in outs)

    @pytest.mark.parametrize("kernel", ["reversed", "reversed_in_warp", "reversed_twice"])
    def test_named(self, launchers: Launchers, kernel: str) -> None:
        n = 32 if "warp" in kernel else 128
        x, out = random(2, n), torch.zeros(2, n)
        read, written = line_of(kernel, "= values["), line_of(kernel, "] = x[")
        first = rf"race: written without a barrier after thread \d+ of block 0 has read it at {read}: .* at {written}"
        second = rf"race: read without a barrier after thread \d+ of block 0 has written it at {written}: .* at {read}"
        third = rf"read before it is written: .* at {read}"
        with pytest.raises(KernelError, match=rf"{first}|{second}|{third}"):
            launchers(is_checked=True).launch(SOURCE, f"{kernel}<false>", 1, n, 4 * n, [x, out])


def test_races_between_blocks(launchers: Launchers) -> None:
    launch = launchers(is_checked=True).launch
    total, bits = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    launch(SOURCE, "add_atomically", 3, 64, 0, [total, bits])
    assert total.tolist() == [192]
    assert bits.tolist() == [-1]
    launch(SOURCE, "mark_plainly", 3, 64, 0, [bits])
    assert bits.tolist() == [1]
    with pytest.raises(KernelError, match=r"race: read without a barrier after thread 0 of block 0 has written"):
        launch(SOURCE, "add_plainly", 2, 1, 0, [total])
    with pytest.raises(
        KernelError, match=r"thread \(1, 0, 0\) of block \(0, 0, 0\) at " + line_of("add_plainly", "+=")
    ):
        launch(SOURCE, "add_plainly", 1, 2, 0, [total])


class TestKernelsThatBeginEarly:
    """What they may do before they wait for the kernel before, which they need not in the emulator itself."""

    @pytest.fixture
    def run(self, launchers: Launchers) -> Callable[..., None]:
        tensors = {name: torch.zeros(32, dtype=torch.int32) for name in "abcd"}

        def run(*kernels: str) -> None:
            for i, text in enumerate(kernels):
                kernel, names = text.split(": ")
                arguments = [tensors[name] for name in names]
                launchers(is_checked=True).launch(SOURCE, kernel, 1, 32, 0, arguments, follows=i > 0)

        return run

    @pytest.mark.parametrize(
        "kernels",
        [
            ("increments_alone: ab", "increments<false, false>: bc", "increments<false, true>: cb"),
            ("increments<false, false>: ab", "increments<true, true>: ac", "increments<false, false>: cb"),
            # The second one has waited before the third begins, so that the first has ended.
            ("increments_alone: ab", "increments<false, false>: ac", "increments<true, false>: bd"),
        ],
    )
    def test_right(self, run: Callable[..., None], kernels: Sequence[str]) -> None:
        run(*kernels)

    @pytest.mark.parametrize(
        ("kernels", "message"),
        [
            (
                ("increments_alone: ab", "increments<true, false>: bc"),
                "read before the kernel that wrote it is waited for",
            ),
            (
                ("increments_alone: ab", "increments<true, false>: ca"),
                "written before the kernel that read it is waited",
            ),
            (
                ("increments_alone: ab", "increments<true, false>: cb"),
                "written before the kernel that wrote it, too, is",
            ),
            (
                ("increments_alone: ab", "increments<true, true>: ac", "increments<true, true>: bd"),
                "read before the kernel that wrote it is waited for",
            ),
            (("increments_alone: ab", "increments_alone: cd"), "no thread waits for the kernel before"),
        ],
    )
    def test_wrong(self, run: Callable[..., None], kernels: Sequence[str], message: str) -> None:
        with pytest.raises(KernelError, match=message):
            run(*kernels)


def test_divergence(launcher: EmulatedLauncher) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    line = line_of("half_a_warp_votes", "any_sync")
    expected = rf"divergence: a part of a warp .* warp \d: lanes 0-15 any_sync at {line}, lanes 16-31 ended"
    with pytest.raises(KernelError, match=expected):
        launcher.launch(SOURCE, "half_a_warp_votes", 1, 64, 0, [out])
    with pytest.raises(KernelError, match="divergence: the lanes of a warp reach different collectives"):
        launcher.launch(SOURCE, "halves_of_a_warp_part", 1, 64, 0, [out])
    with pytest.raises(KernelError, match="any_sync in a warp of 16 threads: expected 32"):
        launcher.launch(SOURCE, "half_a_warp_votes", 1, 16, 0, [out])


def test_barriers(launcher: EmulatedLauncher) -> None:
    line = line_of("half_a_block_waits", "__syncthreads")
    expected = (
        rf"barrier not reached by all threads; block \(0, 0, 0\), warps 0-1: lanes 0-31 __syncthreads at {line}, "
    )
    with pytest.raises(KernelError, match=expected + "warps 2-3: lanes 0-31 ended"):
        launcher.launch(SOURCE, "half_a_block_waits", 1, 128, 0, [])
    with pytest.raises(KernelError, match="the threads of a block reach different barriers"):
        launcher.launch(SOURCE, "halves_of_a_block_wait_apart", 1, 128, 0, [])


@pytest.mark.parametrize("at", [-1, 100, 127, 128, 70_000, 2_000_000])
def test_shared_memory_has_bounds(launcher: EmulatedLauncher, at: int) -> None:
    with pytest.raises(KernelError, match=rf"out of bounds: byte {at} of shared memory|invalid memory access"):
        launcher.launch(SOURCE, "stores_shared", 1, 1, 100, [np.int32(at)])
    launcher.launch(SOURCE, "stores_shared", 1, 1, 100, [np.int32(99)])


@pytest.mark.parametrize("at", [-1, 10, 11])
def test_tensors_have_bounds(launchers: Launchers, at: int) -> None:
    memory = torch.zeros(30)
    where = "4 bytes before the start of" if at < 0 else f"{4 * at - 39} bytes past the last of"
    expected = rf"accessed out of bounds: 0x\w+, {where} a tensor of 40; .* at {line_of('stores_global', 'x[at]')}"
    with pytest.raises(KernelError, match=expected):
        launchers(is_checked=True).launch(SOURCE, "stores_global", 1, 1, 0, [memory[10:20], np.int64(at)])
    assert not memory.any()
    launchers(is_checked=True).launch(SOURCE, "stores_global", 1, 1, 0, [memory[10:20], np.int64(9)])
    assert memory[19] == 1


def test_structures_point_to_tensors(launchers: Launchers) -> None:
    kind = np.dtype([("x", "u8"), ("y", "u8"), ("factor", "f8"), ("n", "i4")], align=True)
    x, y = random(100), torch.zeros(100)
    launcher = launchers(is_checked=True)
    record = np.array((x.data_ptr(), y.data_ptr(), 0.5, 101), kind)
    with pytest.raises(KernelError, match="1 bytes past the last of a tensor of 400"):
        launcher.launch(SOURCE, "scaled_by_structure", 1, 32, 0, record)
    with pytest.raises(ValueError, match=r"got y=0x\w+, where no tensor starts that is in use"):
        launcher.launch(SOURCE, "scaled_by_structure", 1, 32, 0, np.array((x.data_ptr(), 4096, 0.5, 100), kind))


def test_faults(launcher: EmulatedLauncher) -> None:
    """A segmentation fault is an error like others, after which kernels run as before."""
    stored, divided = line_of("stores_global", "x[at]"), line_of("divides", "/")
    for _ in range(2):
        with pytest.raises(KernelError, match=f"(invalid memory access|out of bounds).* at {stored}"):
            launcher.launch(SOURCE, "stores_global", 1, 1, 0, [None, np.int64(0)])
        if launcher.is_checked or platform.machine() == "x86_64":
            with pytest.raises(KernelError, match=f"division of an integer by zero.* at {divided}"):
                launcher.launch(SOURCE, "divides", 1, 1, 0, [torch.zeros(1, dtype=torch.int32)])
    test_block_sums(launcher)


def test_alignment(launcher: EmulatedLauncher) -> None:
    x = torch.zeros(64)
    if launcher.is_checked:
        with pytest.raises(
            KernelError, match=r"not aligned to 16 bytes: byte 4 of .* at " + line_of("stores_vector", "=")
        ):
            launcher.launch(SOURCE, "stores_vector", 1, 1, 0, [x, np.int32(1)])
    launcher.launch(SOURCE, "stores_vector", 1, 1, 0, [x, np.int32(4)])
    assert x[4:8].tolist() == [1, 2, 3, 4]
    with pytest.raises(KernelError, match=r"ldmatrix_x4 at byte 8 of shared memory.*: expected a multiple of 16"):
        launcher.launch(SOURCE, "loads_matrices_at", 1, 32, 64, [np.int32(8)])
    with pytest.raises(KernelError, match="ldmatrix_x4 out of bounds: byte 64 of shared memory, which has 64"):
        launcher.launch(SOURCE, "loads_matrices_at", 1, 32, 64, [np.int32(64)])
    for at, to, message in (
        (1, 0, "from 0x.*: expected a multiple of 16"),
        (0, 8, "to 0x.*: expected a multiple of 16"),
        (64, 0, "from memory out of bounds: 0x.*, 1 bytes past the last of a tensor of 256"),
        (0, 64, "to memory out of bounds: byte 64 of shared memory, which has 64"),
    ):
        with pytest.raises(KernelError, match=rf"cp\.async {message}.* at " + line_of("copies_from", "cp_async_16")):
            launcher.launch(SOURCE, "copies_from", 1, 1, 64, [x, np.int32(at), np.int32(to)])


def test_compiled_kernels_are_kept(launchers: Launchers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    source = kernels / "one.cu"
    source.write_text("__global__ void store(int* x) { *x = VALUE; }\n")
    x = torch.zeros(1, dtype=torch.int32)

    def launch(value: int) -> int:
        launcher = EmulatedLauncher(kernels, cache_dir=launchers.cache, flags=[f"-DVALUE={value}"])
        launcher.launch("one.cu", "store", 1, 1, 0, [x])
        return int(x)

    assert [launch(1), launch(2)] == [1, 2]
    source.write_text("__global__ void store(int* x) { *x = -VALUE; }\n")
    assert launch(1) == -1
    monkeypatch.setattr(cuda_emulator, "_run", lambda command, folder: pytest.fail(f"compiled again: {command}"))
    assert launch(1) == -1


def test_the_same_functions_as_on_a_gpu() -> None:
    """Those of the emulator's ptx.cuh are those of the kernels' own, no more and no fewer."""
    from adasplash2.backends.cupy_cuda.launcher import KERNELS as kernels

    def functions(path: Path) -> set[str]:
        code = re.sub(r"namespace emulator \{.*?\n\}  // namespace emulator", "", path.read_text(), flags=re.DOTALL)
        return set(re.findall(r"^(?:__device__ __forceinline__|inline) [\w<>]+ (\w+)(?:<\w+>)?\(", code, re.MULTILINE))

    only_below_ampere, on_device_only = {"mma_m16n8k8"}, {"smem_address"}
    own, emulated = functions(kernels / "ptx.cuh"), functions(HERE / "include" / "ptx.cuh")
    assert len(emulated) > 15
    assert own - only_below_ampere - on_device_only == emulated
