"""The Triton backend's own parts: what it refuses, what compiles, and what does not again, streams and graphs."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from strategies import Case
from torch.utils._python_dispatch import TorchDispatchMode

from adasplash2 import registry
from adasplash2.contract import AttentionRequest, EntmaxRequest
from adasplash2.testing import assert_attention, assert_close, attention_truth, run_attention

triton = pytest.importorskip("triton")

from triton_interpreter import quicken  # noqa: E402

from adasplash2.backends._math import MANY, TARGET  # noqa: E402
from adasplash2.backends.triton_gpu import TritonBackend, backend, decode, kernels  # noqa: E402
from adasplash2.backends.triton_gpu.config import Config, Launch, configure, padded  # noqa: E402

HALF = torch.float16
# Shared memory of a block, in bytes, by compute capability.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}

is_interpreted = backend._is_interpreted()
compiled_only = pytest.mark.skipif(is_interpreted, reason="Triton's interpreter compiles nothing")


def request_of(*, dtype: torch.dtype = HALF, head_dim: int = 64, **options: Any) -> AttentionRequest:
    request, _ = Case(40, 60, head_dim=head_dim, head_dim_v=head_dim, dtype=dtype, **options).build(torch.device("cpu"))
    return request


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, wide heads and other devices, each with its reason, and nothing else."""
    monkeypatch.setattr(backend, "_is_interpreted", lambda: True)
    serves = TritonBackend().unsupported_reasons
    for dtype in (torch.float16, torch.float32):
        for head_dim in (1, 80, 256):
            assert serves(request_of(dtype=dtype, head_dim=head_dim)) == ()
    assert serves(request_of(dtype=torch.float64)) == ("got torch.float64; needs float16, bfloat16 or float32",)
    assert serves(request_of(head_dim=257)) == (
        "got head_dim=257; needs at most 256",
        "got head_dim_v=257; needs at most 256",
    )
    (reason,) = TritonBackend().entmax_unsupported_reasons(EntmaxRequest(torch.zeros(2, 3, dtype=torch.float64)))
    assert "float64" in reason
    monkeypatch.setattr(backend, "_is_interpreted", lambda: False)
    assert serves(request_of()) == ("got a tensor on cpu; needs one on cuda",)
    assert serves(request_of(dtype=torch.bfloat16)) == ("got a tensor on cpu; needs one on cuda",)


def test_old_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_is_interpreted", lambda: False)
    monkeypatch.setattr(backend, "_capability", lambda device: (7, 5))
    on_cuda = SimpleNamespace(dtype=HALF, device=torch.device("cuda", 0))
    assert backend._tensor_reasons(cast(torch.Tensor, on_cuda)) == (
        "got a device of compute capability 7.5; needs 8.0",
    )


@pytest.mark.parametrize("dim", [1, 16, 17, 64, 80, 128, 129, 256])
def test_padded(dim: int) -> None:
    assert padded(dim) >= max(dim, 16)
    assert padded(dim) & (padded(dim) - 1) == 0


def test_vectors_follow_what_rows_are_aligned_to() -> None:
    def vector(t: torch.Tensor) -> int:
        return backend._layout("q", t)[0]

    t = torch.zeros(2, 3, 40, 64, dtype=HALF)
    assert backend._layout("k", t) == (8, {"stride_kb": 960, "stride_kh": 320, "stride_kn": 8})
    assert backend._layout("o", t[:1, ..., 4:]) == (4, {"stride_ob": 0, "stride_oh": 640, "stride_om": 16})
    assert vector(t[..., 1:]) == 1
    assert vector(torch.zeros(2, 3, 40, 20, dtype=HALF)) == 4
    assert vector(torch.zeros(1, 1, 1, 3, dtype=HALF)) == 8
    assert vector(t.float()) == 4


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Launch, dict[str, Any]]]:
    """Every launch is recorded, and nothing runs."""
    found: list[tuple[Any, Launch, dict[str, Any]]] = []

    def record(kernel: Any, programs: int, launch: Launch, **arguments: Any) -> None:
        assert 0 < programs < 2**31
        found.append((kernel, launch, arguments))

    monkeypatch.setattr(backend, "_launch", record)
    return found


def names_of(module: Any) -> set[str]:
    return {name for name in module.__all__ if name.startswith("entmax")}


def run_everything(request: AttentionRequest) -> None:
    """Every kernel, that of a few queries over many keys on k and v as often as it takes."""
    whole = TritonBackend()
    times = -(-MANY // max(request.seqlen_k, 1))
    few = {name: getattr(request, name).repeat(1, 1, times, 1) for name in "kv"}
    whole.forward(dataclasses.replace(request, q=request.q[:, :, :3], **few, seqlens_q=None, seqlens_k=None))
    request = dataclasses.replace(request, save_for_backward=True)
    result = whole.forward(request)
    whole.backward(request, result.out, result.tau, result.saved, torch.zeros_like(result.out))
    whole.support(request, 64, 64)
    x = torch.zeros(4, 100, dtype=request.q.dtype)
    alpha_rows = None if request.alpha_heads is None else torch.full((4,), 1.5)
    whole.entmax_backward(whole.entmax(EntmaxRequest(x, request.alpha, alpha_rows)), x, request.alpha, alpha_rows)


class Memory(TorchDispatchMode):
    """Bytes of the tensors that were made under it: held now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        assert "empty" in func.name(), f"{func.name()} is not counted"
        self.add(made.nbytes)
        weakref.finalize(made, self.add, -made.nbytes)
        return made

    def add(self, size: int) -> None:
        self.held += size
        self.most = max(self.most, self.held)


@pytest.mark.parametrize(("head_dim", "programs"), [(64, 2), (128, 1)])
def test_memory_of_a_training_step(head_dim: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the results a byte per tile and block; in backward also tau with delta, and a list entry a program."""
    monkeypatch.setattr(backend, "_launch", lambda *_, **__: None)
    rows = (1, 16, 8192)
    q, k, v, dout = torch.zeros((4, *rows, head_dim), dtype=torch.bfloat16)
    request = AttentionRequest(q, k, v, head_dim**-0.5, is_causal=True, save_for_backward=True)
    blocks = 16 * (8192 // 128) * (8192 // 64)
    with Memory() as memory:
        result = TritonBackend().forward(request)
        forward = memory.held
        grads = TritonBackend().backward(request, result.out, result.tau, result.saved, dout)
    assert [t.nbytes for t in result.saved] == [blocks]
    assert forward == result.out.nbytes + result.tau.nbytes + blocks
    assert memory.held == forward + q.nbytes + k.nbytes + v.nbytes
    assert memory.most == memory.held + 2 * result.tau.nbytes + 2 * programs * blocks
    assert grads.dq.nbytes == q.nbytes


_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def compile_for(capability: int, kernel: Any, launch: Launch, arguments: dict[str, Any]) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            attributes[i,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    options = {name: value for name, value in launch.options.items() if value is not None}
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", capability, 32), options=options
    )


@compiled_only
@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "case"),
    [
        (90, Case(200, 300, head_dim=64, head_dim_v=64, dtype=torch.bfloat16, is_causal=True)),
        (90, Case(200, 300, head_dim=128, head_dim_v=80, is_causal=True)),
        (80, Case(200, 300, head_dim=128, head_dim_v=128, dtype=torch.bfloat16, is_causal=True, alpha=2.0)),
        (86, Case(200, 300, head_dim=64, head_dim_v=128, dtype=HALF, alpha=1.3)),
        (120, Case(3, 300, head_dim=64, head_dim_v=64, dtype=HALF, is_causal=True, seqlens_k=(200,))),
    ],
    ids=lambda value: value if isinstance(value, int) else f"{value.dtype}-{value.head_dim}-{value.seqlen_q}",
)
def test_every_kernel_compiles(
    capability: int,
    case: Case,
    launched: list[tuple[Any, Launch, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On machines without a GPU too, and the configuration fits into the shared memory of the architecture."""
    monkeypatch.setattr(backend, "_shared_memory", lambda device: SHARED_MEMORY[capability])
    run_everything(case.build(torch.device("cpu"))[0])
    found = {kernel.fn.__name__ for kernel, _, _ in launched}
    assert found >= names_of(kernels)
    assert found - names_of(kernels) == (names_of(decode) if case.dtype.itemsize == 2 else set())
    for kernel, launch, arguments in launched:
        name, compiled = kernel.fn.__name__, compile_for(capability, kernel, launch, arguments)
        shared = compiled.metadata.shared
        assert shared <= SHARED_MEMORY[capability], f"{name}: {shared} bytes of shared memory"
        if capability == 90 and arguments.get("BLOCK_M") == 128:
            # More than a few, and scores move between threads before they are summed: longer than the product takes.
            assert compiled.asm["ptx"].count("shfl.sync.idx") <= 2, name


def _constants(launched: list[tuple[Any, Launch, dict[str, Any]]]) -> Iterator[tuple[Any, ...]]:
    for kernel, launch, arguments in launched:
        yield backend._variant(kernel, launch, [arguments[name] for name in kernel.arg_names])[0]


@compiled_only
def test_a_new_length_batch_or_number_of_heads_compiles_nothing(
    launched: list[tuple[Any, Launch, dict[str, Any]]],
) -> None:
    """What is compiled depends on none of them: the compile-time arguments, dtypes and alignments are the same."""
    variants = []
    shapes: tuple[dict[str, Any], ...] = (
        {"seqlen_q": 64, "seqlen_k": 64},
        {"seqlen_q": 101, "seqlen_k": 1003, "batch": 3},
        {"seqlen_q": 17, "seqlen_k": 1, "heads_kv": 2, "group": 3},
    )
    for shape in shapes:
        run_everything(
            Case(head_dim=24, head_dim_v=24, dtype=HALF, is_causal=True, **shape).build(torch.device("cpu"))[0]
        )
        variants.append(list(_constants(launched)))
        launched.clear()
    assert variants[0] == variants[1] == variants[2]
    for kernel in (getattr(module, name) for module in (kernels, decode) for name in names_of(module)):
        run_time = [parameter for parameter in kernel.params if not parameter.is_constexpr]
        integers = [parameter for parameter in run_time if parameter.name in decode.INTEGERS]
        assert [parameter.num for parameter in integers] == backend._places(kernel).integers
        assert all(parameter.do_not_specialize for parameter in integers)
        others = {parameter.name for parameter in run_time} - {parameter.name for parameter in integers}
        assert {name for name in others if name.islower()} <= {"alpha_minus_1", "scale", "target"}


class Recorder:
    """A kernel, and what is compiled from it: records how it is called."""

    arg_names = ("X", "Y", "n", "stride_xm", "BLOCK", "WIDE")

    def __init__(self, name: str, found: list[tuple[Any, ...]]) -> None:
        self.fn, self.name, self.found = object(), name, found
        self.params = [
            SimpleNamespace(is_constexpr=name in ("BLOCK", "WIDE"), do_not_specialize=name in ("n", "stride_xm"))
            for name in self.arg_names
        ]

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*values: Any, **options: Any) -> Recorder:
            self.found.append((self.name, grid, values))
            return Recorder("compiled", self.found)

        return run


def test_arguments_are_bound_once_for_each_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """After that the compiled kernel is called, and gets addresses in place of tensors."""
    monkeypatch.setattr(backend, "_is_interpreted", lambda: False)
    monkeypatch.setattr(backend, "_compiled", {})
    found: list[tuple[Any, ...]] = []
    kernel, x = Recorder("kernel", found), torch.zeros(64)
    arguments = {"X": x, "Y": None, "n": 64, "stride_xm": 1, "BLOCK": 16, "WIDE": False, "unused": 3}
    for changed in ({}, {"n": 5}, {"X": x[1:]}, {"BLOCK": 32}, {"n": 2**31}, {"n": 2**40}, {"X": x[4:], "n": -7}):
        backend._launch(kernel, 7, Launch(4, 1), **arguments | changed)
    names = ["kernel", "compiled", "kernel", "kernel", "kernel", "compiled", "compiled"]
    assert [name for name, _, _ in found] == names
    assert found[0][1:] == ((7,), (x, None, 64, 1, 16, False))
    assert found[1][1:] == ((7, 1, 1), (x.data_ptr(), None, 5, 1, 16, False))
    assert found[6][1:] == ((7, 1, 1), (x.data_ptr() + 16, None, -7, 1, 16, False))


def device_here() -> torch.device:
    """Where the kernels run; skips where they do not."""
    candidate = registry.find("triton")
    if isinstance(candidate.backend, str):
        pytest.skip(candidate.backend)
    return torch.device("cpu" if is_interpreted else "cuda")


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    """Every launch runs, and is recorded with how many programs it had."""
    found: list[tuple[int, dict[str, Any]]] = []
    launch_as_shipped = backend._launch

    def record(kernel: Any, programs: int, launch: Launch, **arguments: Any) -> None:
        found.append((programs, arguments))
        launch_as_shipped(kernel, programs, launch, **arguments)

    monkeypatch.setattr(backend, "_launch", record)
    return found


@pytest.mark.parametrize(
    ("case", "is_left"),
    [
        (Case(16, 4200, head_dim=64, head_dim_v=64, dtype=HALF), False),
        (Case(4, 4200, head_dim=64, head_dim_v=64, group=4, dtype=HALF, is_causal=True), False),
        (Case(1, 4200, head_dim=64, head_dim_v=64, kind="topics", dtype=HALF), False),
        (Case(1, 2100, head_dim=64, kind="equal", dtype=HALF), True),
    ],
    ids=lambda value: value if isinstance(value, bool) else f"{value.kind}-{value.seqlen_q}x{value.group}",
)
def test_what_decoding_leaves_to_the_other_kernels(
    case: Case, is_left: bool, watched: list[tuple[int, dict[str, Any]]]
) -> None:
    """Heads in which a row has more keys above its bound than its list holds; also, buffers have no unused rows."""
    request, _ = case.build(device_here())
    TritonBackend().forward(request)
    (maxima, flags) = next((a["MAXIMA"], a["FLAGS"]) for _, a in watched if "MAXIMA" in a)
    assert maxima.shape[0] == request.heads_q * request.seqlen_q
    assert flags.tolist() == [is_left]


@pytest.mark.parametrize("slots", [2, 7])
def test_slots_of_several_products(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with very many keys, where a group is more than the eight keys of one product."""
    device = device_here()
    monkeypatch.setattr(backend, "SLOTS", slots)
    for case in (
        Case(2, 2500, head_dim=64, head_dim_v=40, group=2, dtype=HALF, is_causal=True, alpha=(1.5, 1.2)),
        Case(1, 4200, kind="topics", batch=2, seqlens_k=(4200, 2049), dtype=HALF),
    ):
        assert_attention(TritonBackend(), case.build(device)[0])


@pytest.mark.parametrize("most", [1, 100])
def test_a_bad_key_in_any_chunk(
    most: int, monkeypatch: pytest.MonkeyPatch, watched: list[tuple[int, dict[str, Any]]]
) -> None:
    """Whether a program of the check takes all keys of a head or only some of them."""
    device = device_here()
    monkeypatch.setattr(backend, "CHECKS_PER_MULTIPROCESSOR", 1)
    monkeypatch.setattr(backend, "multiprocessors", lambda device: most)
    request, _ = Case(300, 300, heads_kv=2, is_causal=True).build(device)
    request.k[0, 1, 270, 3] = torch.nan
    out = TritonBackend().forward(request).out
    assert next(programs for programs, a in watched if "chunk" in a) == (2 if most == 1 else 6)
    assert out[0, 0].isfinite().all()
    assert out[0, 1, :270].isfinite().all()
    assert out[0, 1, 270:].isnan().all()


@pytest.mark.parametrize("init", ["maxima", "histogram"])
def test_initialisations(init: Any) -> None:
    """Both give a lower bound, so the results agree to rounding."""
    device = device_here()
    for kind in ("iid", "narrow", "topics", "equal"):
        request, dout = Case(150, 300, head_dim=64, kind=kind, is_causal=True, dtype=HALF).build(device)
        truth = attention_truth(request, dout)
        for quantity, result in run_attention(TritonBackend(init), request, dout).items():
            assert_close(result, truth, quantity, f"{init}, {kind}")


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.2])
def test_out_without_its_correction(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bfloat16 gets it, which the interpreter cannot multiply: here within the bounds of float16."""
    monkeypatch.setattr(backend, "CORRECTED", ())
    monkeypatch.setitem(TARGET, HALF, TARGET[torch.bfloat16])
    device = device_here()
    for kind in ("iid", "narrow", "topics", "ties"):
        case = Case(70, 200, head_dim=64, kind=kind, is_causal=True, dtype=HALF, alpha=alpha)
        assert_attention(TritonBackend(), *case.build(device))
    # With the slope before the last step of tau, tau was four times as far off as it may be.
    case = Case(128, 256, head_dim=64, head_dim_v=64, kind="topics", is_causal=True, dtype=HALF, gain=0.15, seed=907850)
    assert_attention(TritonBackend(), *case.build(device))


@pytest.mark.skipif(not is_interpreted, reason="needs Triton's interpreter")
def test_the_interpreter_as_the_tests_have_it(quick_interpreter: pytest.MonkeyPatch) -> None:
    """It gives the bits that the interpreter gives as it is shipped."""
    case = Case(30, 150, head_dim=24, group=2, is_causal=True, alpha=(1.5, 1.2), seqlens_k=(130,))
    request, dout = case.build(torch.device("cpu"))

    def run() -> list[torch.Tensor]:
        support = TritonBackend().support(request, 16, 16)
        return [*run_attention(TritonBackend(), request, dout).values(), support.size, support.block_map]

    quick = run()
    quick_interpreter.undo()
    try:
        as_shipped = run()
    finally:
        quicken(quick_interpreter)
    for one, other in zip(quick, as_shipped, strict=True):
        assert torch.equal(one, other)


def test_configurations_are_pure() -> None:
    assert configure(HALF, 64, 64, False, 232_448) == configure(HALF, 64, 64, False, 232_448)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_dim in (1, 64, 80, 128, 256):
            for short in (False, True):
                for shared in set(SHARED_MEMORY.values()):
                    found = configure(dtype, head_dim, head_dim, short, shared)
                    assert isinstance(found, Config)
                    assert found.block_m % 16 == found.block_n % 8 == 0
                    assert found.block_m % found.dkv_parts == 0
