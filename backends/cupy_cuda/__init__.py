"""The GPU backend written in CUDA C++, compiled at run time by NVRTC through CuPy."""

from .backend import BACKEND, CupyBackend

__all__ = ["BACKEND", "CupyBackend"]
