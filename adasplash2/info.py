"""``python -m adasplash2 info``: what a bug report should start with."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch

from adasplash2.registry import DEFAULT_BACKEND, available_backends

__all__ = ["add_arguments", "run"]

_PACKAGES = ("adasplash2", "torch", "numpy", "numba", "llvmlite", "triton", "cupy")
# What the kernels can make use of, among the hundred flags of a processor.
_CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "asimd", "sve")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print versions, devices and backends."""
    for name, value in (*_versions(), *_machine(), *_backends()):
        print(f"{name:12} {value}")
    return 0


def _versions() -> list[tuple[str, str]]:
    # By the names that are imported: CuPy's distributions are called cupy-cuda12x and so on.
    distributions = packages_distributions()
    installed = [(package, distributions.get(package)) for package in _PACKAGES]
    return [
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        *((package, version(found[0]) if found else "not installed") for package, found in installed),
    ]


def _machine() -> list[tuple[str, str]]:
    model, features = _cpu()
    rows = [
        ("os", platform.platform()),
        ("cpu", model),
        ("cpu features", " ".join(features) or "unknown"),
        ("threads", f"{torch.get_num_threads()} of torch, {torch.backends.cpu.get_cpu_capability()}"),
        ("cuda", torch.version.cuda or "torch is built without it"),
    ]
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        rows.append((f"cuda:{i}", f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory >> 20} MiB"))
    return rows


def _cpu() -> tuple[str, list[str]]:
    """Name and features of the processor; where /proc/cpuinfo is not there, what Python knows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    info: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    flags = set(info.get("flags", info.get("Features", "")).split())
    name = info.get("model name") or platform.processor() or platform.machine()
    return name, [feature for feature in _CPU_FEATURES if feature in flags]


def _backends() -> list[tuple[str, str]]:
    return [
        ("backend", f"{DEFAULT_BACKEND!r} by default"),
        *((name, reason or "usable") for name, reason in available_backends().items()),
    ]
