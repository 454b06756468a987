"""Numba's on-disk cache, made to follow every source file of this folder.

Numba checks only the file of the compiled function itself, so an edit of simd.py would leave stale kernels.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile

__all__ = ["stage"]

_log = logging.getLogger("adasplash2")
_announced = False


def _sources_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _sources_digest()


class _SourcesCache(FunctionCache):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path, filename_base=self._impl.filename_base, source_stamp=_STAMP
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        if found is None:
            _announce()
        return found


def _announce() -> None:
    global _announced
    if not _announced:
        _announced = True
        _log.warning("adasplash2: compiling the CPU kernels; this takes some seconds, once per machine and version")


def stage(function: Callable[..., None]) -> Any:
    """Compiles a stage to run without the GIL, kept on disk between processes where a cache folder can be written."""
    compiled: Any = njit(nogil=True, error_model="numpy")(function)
    try:
        compiled._cache = _SourcesCache(function)
    except RuntimeError:  # Numba's answer when it finds no folder that it may write
        _log.info("adasplash2: no cache folder can be written; the CPU kernels are compiled in every process")
    return compiled
