"""Entmax attention on a CPU, compiled by Numba at first use."""

from .backend import BACKEND, NumbaBackend

__all__ = ["BACKEND", "NumbaBackend"]
