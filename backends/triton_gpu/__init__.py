"""The GPU backend, written in Triton."""

from .backend import BACKEND, TritonBackend

__all__ = ["BACKEND", "TritonBackend"]
