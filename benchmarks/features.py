"""The table in README.md of what each backend serves: asked of the backends, which need no device to answer.

python benchmarks/features.py
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from report import ROOT, fill, markdown_table
from torch import Tensor

import adasplash2.backends
from adasplash2 import registry
from adasplash2.contract import AttentionRequest, Backend, EntmaxRequest

__all__ = ["TITLES", "cells", "columns", "importable", "main", "table"]

SERVED = "yes"


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data and without a device: every backend has the same reason against the latter."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _request(
    dtype: torch.dtype = torch.float32, heads_kv: int = 4, head_dim: int = 64, head_dim_v: int = 64, **options: Any
) -> AttentionRequest:
    q = _empty(2, 4, 48, head_dim, dtype=dtype)
    k, v = (_empty(2, heads_kv, 96, width, dtype=dtype) for width in (head_dim, head_dim_v))
    return AttentionRequest(q, k, v, scale=0.125, **options)


def _entmax_request(dtype: torch.dtype = torch.float32, **options: Any) -> EntmaxRequest:
    return EntmaxRequest(_empty(6, 96, dtype=dtype), **options)


_LENGTHS = torch.empty(2, dtype=torch.int32, device="meta")
_PLAIN = _request()
_PLAIN_ENTMAX = _entmax_request()

# What a call may have: the requests that have it. A backend serves it if it has no reason against any of them.
PROBES: dict[str, list[AttentionRequest | EntmaxRequest]] = {
    "float16, bfloat16, float32": [_request(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)],
    "float64": [_request(torch.float64)],
    "`alpha` a number in (1, 2]": [_request(alpha=alpha) for alpha in (1.01, 1.3, 1.5, 1.8, 2.0)],
    "`alpha` per head, learned": [_request(alpha_heads=_empty(4), save_for_backward=True)],
    "`is_causal`": [_request(is_causal=True)],
    "`seqlens_q`, `seqlens_k`": [_request(seqlens_q=_LENGTHS), _request(seqlens_k=_LENGTHS)],
    "grouped-query, multi-query": [_request(heads_kv=heads) for heads in (2, 1)],
    "head_dim from 1 to 256, head_dim_v of its own": [
        _request(head_dim=width, head_dim_v=width_v) for width, width_v in ((1, 1), (80, 64), (256, 200), (24, 256))
    ],
    "head_dim above 256": [_request(head_dim=320, head_dim_v=320)],
    "gradients": [_request(save_for_backward=True)],
    "`entmax`": [
        *(_entmax_request(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)),
        _entmax_request(alpha_rows=_empty(6)),
    ],
    "`entmax`, float64": [_entmax_request(torch.float64)],
}

TITLES = ['`"auto"` asks it on', "tensors on another device", *PROBES]


def _check_that_every_feature_is_probed() -> None:
    known = {f.metadata["feature"] for f in fields(AttentionRequest) if "feature" in f.metadata}
    probed = {
        feature
        for requests in PROBES.values()
        for request in requests
        if isinstance(request, AttentionRequest)
        for feature in request.features()
    }
    if known != probed:
        raise ValueError(f"PROBES has the features {sorted(probed)}: expected those of the contract, {sorted(known)}")


def importable() -> tuple[dict[str, Backend], list[str]]:
    """The backends of this installation, by name in the order of "auto", and why others cannot be imported."""
    found: dict[str, Backend] = {}
    failures = []
    for module in pkgutil.iter_modules(adasplash2.backends.__path__, "adasplash2.backends."):
        if not module.name.rpartition(".")[2].startswith("_"):
            try:
                backend = importlib.import_module(module.name).BACKEND
            except ImportError as error:
                failures.append(f"{module.name} cannot be imported: {error}")
            else:
                found[backend.name] = backend
    return {name: found[name] for name in registry.names() if name in found}, failures


def _reasons(backend: Backend, request: AttentionRequest | EntmaxRequest) -> tuple[str, ...]:
    return registry.explain(request, backend.name, [registry.Candidate(backend.name, backend)]).reasons[backend.name]


def _needs(reasons: tuple[str, ...]) -> str:
    """The second halves of reasons "got X; needs Y"."""
    return "needs " + ", ".join(dict.fromkeys(reason.partition("needs ")[2] for reason in reasons))


def cells(backend: Backend) -> list[str]:
    """A backend's column: whether "auto" asks it, what its tensors must be, and its answer to each probe."""
    devices = registry.find(backend.name).devices
    about_the_device = _reasons(backend, _PLAIN)
    column = [", ".join(devices) or "by name alone", _needs(about_the_device) if about_the_device else SERVED]
    for requests in PROBES.values():
        reasons = {
            reason: None
            for request in requests
            for reason in _reasons(backend, request)
            if reason not in about_the_device and reason not in _reasons(backend, _PLAIN_ENTMAX)
        }
        column.append(_needs(tuple(reasons)) if reasons else SERVED)
    return column


def columns() -> dict[str, list[str]]:
    """The columns of the backends that can be imported here."""
    _check_that_every_feature_is_probed()
    return {name: cells(backend) for name, backend in importable()[0].items()}


def table(columns: Mapping[str, list[str]]) -> str:
    """The columns side by side, with what each row is about."""
    lines = ([title, *(column[i] for column in columns.values())] for i, title in enumerate(TITLES))
    return markdown_table(["", *(f"`{name}`" for name in columns)], lines, align="---")


def main(readme: Path = ROOT / "README.md") -> None:
    """Write the table between the ``backends`` markers.

    Raises:
        ImportError: if a backend of this installation cannot be imported: its column would be lost.
    """
    _, failures = importable()
    if failures:
        raise ImportError("; ".join(failures))
    fill(readme, {"backends": table(columns())})
    print(f"written: {readme}")


if __name__ == "__main__":
    main()
