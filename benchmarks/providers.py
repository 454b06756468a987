"""Who is timed: our backends through the public API, and what a user would have instead.

A provider's setup gets a case and its arguments, and answers with a ``Ready`` (a function of those arguments, through
autograd) or with the reason why it cannot take part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from cases import Case
from gate import Function
from torch import Tensor

import adasplash2
from adasplash2 import registry
from adasplash2.bench.measure import Forward
from adasplash2.bench.providers import entmax_attention, softmax_attention

__all__ = ["Provider", "Ready", "baseline", "providers"]


@dataclass(frozen=True)
class Ready:
    """What will be timed.

    Attributes:
        forward: of the case's arguments (q, k, v or x), on any thread count that torch is set to.
        no_backward: why it has no gradients, or None.
    """

    forward: Forward
    no_backward: str | None = None


Setup = Callable[[Case, tuple[Tensor, ...]], Ready | str]


@dataclass(frozen=True)
class Provider:
    """One competitor for one operator.

    Attributes:
        name: for the command line.
        label: for people.
        op: operator of the cases that it takes part in.
        function: what it computes.
        setup: as the module says.
        dtype: of its inputs, where that is not the case's.
    """

    name: str
    label: str
    op: Literal["attention", "entmax"]
    function: Function
    setup: Setup
    dtype: torch.dtype | None = None


HISTOGRAM = "numba-histogram"
DENSE_REASON = "needs O(seqlen ** 2) memory, or long to compile: timed at a short case alone"


def _backend_attention(backend: str, case: Case, arguments: tuple[Tensor, ...]) -> Ready | str:
    attend = entmax_attention(backend, case, arguments)
    if isinstance(attend, str):
        return attend
    if backend == "reference" and not case.dense_peers:
        return DENSE_REASON
    return Ready(attend)


def _histogram_variant(case: Case, arguments: tuple[Tensor, ...]) -> Ready | str:
    if not case.compare_inits:
        return "the other initialisation is timed at a few cases"
    from adasplash2.backends.numba_cpu import NumbaBackend

    variant = NumbaBackend(init="histogram")
    variant.name = HISTOGRAM
    registry.register(HISTOGRAM, variant)
    return _backend_attention(HISTOGRAM, case, arguments)


def _backend_entmax(backend: str, case: Case, arguments: tuple[Tensor, ...]) -> Ready | str:
    if unavailable := adasplash2.available_backends()[backend]:
        return unavailable
    if backend == "reference" and not case.dense_peers:
        return DENSE_REASON
    return Ready(functools.partial(adasplash2.entmax, alpha=case.alpha, backend=backend))


def _sdpa(case: Case, arguments: tuple[Tensor, ...]) -> Ready | str:
    if arguments[0].dtype != case.dtype and (case.kind != "iid" or case.seqlen > 2048):
        return "its speed does not depend on the inputs; in another dtype than the case's timed at iid, to 2048 keys"
    return Ready(softmax_attention(case))


def _pinned_sdpa(kernel: str, case: Case, arguments: tuple[Tensor, ...]) -> Ready | str:
    if arguments[0].device.type != "cuda":
        return "runs on CUDA devices alone"
    from torch.nn.attention import SDPBackend, sdpa_kernel

    only = getattr(SDPBackend, kernel)
    attend = softmax_attention(case)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(only):
            return attend(q, k, v)

    return Ready(forward)


def _adasplash(version: int, case: Case, arguments: tuple[Tensor, ...]) -> Ready | str:
    if arguments[0].device.type != "cuda":
        return "runs on CUDA devices alone"
    if case.alpha != 1.5 or not case.is_causal or arguments[0].dtype != torch.bfloat16 or case.gain != 1:
        return "timed at alpha = 1.5, causal, in bfloat16 alone: it tunes itself for minutes at each other setting"
    try:
        import adasplash
        import adasplash.adasplash_v2 as peer
    except ImportError as error:
        return f"{error} (pip install adasplash)"
    if version == 1:
        return Ready(functools.partial(adasplash.adasplash_v1, alpha=case.alpha, is_causal=case.is_causal))
    # Its full lists take one to three minutes for each head_dim and length, and gain it up to 9 %.
    for tuner in (tuner for tuner in vars(peer).values() if type(tuner).__name__ == "Autotuner"):
        own = [config for config in tuner.configs if config.num_warps == 4 and config.num_stages in (2, 3)]
        tuner.configs = (own or tuner.configs)[:2]
    return Ready(functools.partial(adasplash.adasplash, alpha=case.alpha, is_causal=case.is_causal))


def _flex(case: Case, arguments: tuple[Tensor, ...]) -> Ready | str:
    if not (case.dense_peers or (case.device == "cuda" and case.quick)):
        return DENSE_REASON
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = arguments
    mask = None
    if case.is_causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, case.seqlen, case.seqlen, device=str(q.device))
    compiled = torch.compile(flex_attention)
    forward = functools.partial(compiled, block_mask=mask, scale=case.scale)
    try:
        with torch.no_grad():
            forward(q, k, v)
    except Exception as error:  # inductor fails in many ways, most often for want of a C++ compiler
        return f"does not compile here: {str(error).strip().splitlines()[0]}"
    return Ready(forward, "flex_attention has no backward on CPU" if q.device.type == "cpu" else None)


def _package_entmax(name: str, case: Case, arguments: tuple[Tensor, ...]) -> Ready | str:
    try:
        import entmax
    except ImportError as error:
        return f"{error} (pip install entmax)"
    needs = {"entmax15": 1.5, "sparsemax": 2.0}.get(name, case.alpha)
    if case.alpha != needs:
        return f"got alpha={case.alpha:g}; needs {needs:g}"
    function = getattr(entmax, name)
    transform = functools.partial(function, alpha=case.alpha) if name == "entmax_bisect" else function
    if case.op == "entmax":
        return Ready(functools.partial(transform, dim=-1))
    if not case.dense_peers:
        return DENSE_REASON
    hidden = torch.ones(case.seqlen, case.seqlen, dtype=torch.bool, device=arguments[0].device).triu(1)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * case.scale
        if case.is_causal:
            scores = scores.masked_fill(hidden, -torch.inf)
        return transform(scores, dim=-1) @ v

    return Ready(dense)


def providers() -> list[Provider]:
    """All providers, the backends of the package first."""
    found = []
    for name in registry.names():
        if name == HISTOGRAM:
            continue
        label = f"adasplash2 {name}"
        found.append(Provider(name, label, "attention", "entmax", functools.partial(_backend_attention, name)))
        found.append(Provider(name, label, "entmax", "entmax", functools.partial(_backend_entmax, name)))
    found += [
        Provider(HISTOGRAM, "adasplash2 numba, tau from a histogram", "attention", "entmax", _histogram_variant),
        Provider("sdpa-f32", "torch softmax f32", "attention", "softmax", _sdpa, torch.float32),
        Provider("sdpa-bf16", "torch softmax bf16", "attention", "softmax", _sdpa, torch.bfloat16),
        Provider(
            "fa2",
            "FlashAttention-2 (softmax)",
            "attention",
            "softmax",
            functools.partial(_pinned_sdpa, "FLASH_ATTENTION"),
        ),
        Provider(
            "cudnn", "cuDNN (softmax)", "attention", "softmax", functools.partial(_pinned_sdpa, "CUDNN_ATTENTION")
        ),
        Provider("adasplash", "adasplash 0.2.2", "attention", "rough entmax", functools.partial(_adasplash, 2)),
        Provider("adasplash-v1", "adasplash 0.2.2, v1", "attention", "rough entmax", functools.partial(_adasplash, 1)),
        Provider("flex", "flex_attention (softmax)", "attention", "softmax", _flex),
    ]
    for name in ("entmax15", "sparsemax", "entmax_bisect"):
        setup = functools.partial(_package_entmax, name)
        found.append(Provider(name, f"{name} (package entmax)", "attention", "entmax", setup))
        found.append(Provider(name, f"{name} (package entmax)", "entmax", "entmax", setup))
    return found


def baseline(case: Case) -> str:
    """Whom a case's ratios are against: torch's softmax (FlashAttention-2 on a GPU), the package entmax's function."""
    if case.op == "entmax":
        return {1.5: "entmax15", 2.0: "sparsemax"}.get(case.alpha, "entmax_bisect")
    if case.device == "cuda":
        return "fa2"
    return "sdpa-bf16" if case.dtype == torch.bfloat16 else "sdpa-f32"
