"""Which backends there are, in which order they are asked, and which one serves a call.

The front knows a backend only as a name and a module path; the module is imported when a call first asks for it. A
module outside this package takes part by ``register(name, "its.module", devices=("cuda",))``.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from adasplash2.contract import (
    AttentionRequest,
    Backend,
    EntmaxRequest,
    Explanation,
    NoBackendError,
    UnsupportedError,
)

__all__ = [
    "DEFAULT_BACKEND",
    "Candidate",
    "available_backends",
    "candidates",
    "explain",
    "find",
    "names",
    "register",
    "resolve",
    "select",
]

Request = AttentionRequest | EntmaxRequest

DEFAULT_BACKEND = os.environ.get("ADASPLASH2_BACKEND", "auto")
"""Default of every ``backend=`` argument; the environment variable is read once, when the package is imported."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend as ``select`` sees it.

    Attributes:
        name: what ``backend=`` calls it.
        backend: the backend, or the reason (one sentence) why this machine cannot run it.
        devices: device types on which "auto" considers it; empty means that it serves by name only.
    """

    name: str
    backend: Backend | str
    devices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Entry:
    source: str | Backend
    devices: tuple[str, ...]
    # A module whose leads(request) says, by what was measured, whether "auto" asks this backend before all others.
    measured: str | None = None


# "auto" asks in this order.
_entries: dict[str, _Entry] = {
    "triton": _Entry("adasplash2.backends.triton_gpu", ("cuda",)),
    "cupy": _Entry("adasplash2.backends.cupy_cuda", ("cuda",), "adasplash2.backends.cupy_cuda.config"),
    "numba": _Entry("adasplash2.backends.numba_cpu", ("cpu",)),
    "reference": _Entry("adasplash2.backends.reference", ()),
}
_found: dict[str, Candidate] = {}


def register(name: str, source: str | Backend, devices: tuple[str, ...] = ()) -> None:
    """Add a backend behind those that are there, or replace the one of this name in its place.

    Args:
        name: what ``backend=`` will call it; anything but "auto".
        source: a module path whose module exposes ``BACKEND``, imported on first use, or the backend itself.
        devices: device types ("cpu", "cuda", ...) on which "auto" considers it; by default it serves by name only.

    Raises:
        ValueError: if the name is "auto", or not the backend's own.
        TypeError: if the source is neither a module path nor a backend.
    """
    if name == "auto":
        raise ValueError("name='auto': expected another name, this one leaves the choice to the registry")
    if not isinstance(source, (str, Backend)):
        raise TypeError(f"source={source!r}: expected a module path or an object that satisfies contract.Backend")
    if not isinstance(source, str) and source.name != name:
        raise ValueError(f"name={name!r}: expected {source.name!r}, the backend's own name")
    _entries[name] = _Entry(source, tuple(devices))
    _found.pop(name, None)


def find(name: str) -> Candidate:
    """The backend of this name, imported and asked for its availability on first use; the answer is kept.

    Raises:
        ValueError: if no backend has this name.
    """
    candidate = _found.get(name)
    if candidate is None:
        entry = _entries.get(name)
        if entry is None:
            raise _unknown(name, _entries)
        candidate = _found[name] = Candidate(name, _load(name, entry.source), entry.devices)
    return candidate


def names() -> tuple[str, ...]:
    """The names of all backends, in the order in which "auto" asks them; imports none."""
    return tuple(_entries)


def candidates(request: Request | None = None) -> Iterator[Candidate]:
    """All backends in the order in which "auto" asks them, each imported only when the iteration reaches it.

    Args:
        request: the call, for which one that was measured to be faster comes first.
    """
    return (find(name) for name in (names() if request is None else _order(request)))


def _order(request: Request) -> tuple[str, ...]:
    if isinstance(request, EntmaxRequest):
        return names()
    device = request.device.type
    leading = [
        name
        for name, entry in _entries.items()
        if entry.measured and device in entry.devices and _leads(entry.measured)(request)
    ]
    return (*leading, *(name for name in _entries if name not in leading)) if leading else names()


@functools.cache
def _leads(module: str) -> Callable[[AttentionRequest], bool]:
    try:
        leads: Callable[[AttentionRequest], bool] = importlib.import_module(module).leads
    except ImportError:  # the backend has the reason, in its turn
        return lambda request: False
    return leads


def available_backends() -> dict[str, str | None]:
    """Every known backend, in the order of "auto": None where this machine can run it, else why it cannot.

    Imports the libraries behind the backends.

    Returns:
        dict: name to None, or to the reason in one sentence.
    """
    return {found.name: found.backend if isinstance(found.backend, str) else None for found in candidates()}


def resolve(request: Request, name: str) -> Backend:
    """``select`` among the registered backends, without importing any that the choice does not need."""
    if name != "auto":
        return select(request, name, (find(name),))
    device = request.device.type
    for known in _order(request):
        if device in _entries[known].devices:
            candidate = find(known)
            if not _reasons(candidate, request, name) and not isinstance(candidate.backend, str):
                return candidate.backend
    return select(request, name, candidates(request))


def select(request: Request, name: str, candidates: Iterable[Candidate]) -> Backend:
    """The backend that serves the call; pure, and no candidate after the chosen one is looked at.

    Args:
        request: the call.
        name: "auto" for the first candidate that has no reason against the call, or the name of one candidate, which
            then serves the call or raises.
        candidates: in the order in which "auto" asks them.

    Raises:
        NoBackendError: if "auto" finds none; the message lists every candidate with its reasons.
        UnsupportedError: if the named backend cannot serve the call; the message gives its reasons.
        ValueError: if no candidate has this name.
    """
    refused: dict[str, tuple[str, ...]] = {}
    for candidate in candidates:
        if name in ("auto", candidate.name):
            reasons = _reasons(candidate, request, name)
            if not reasons and not isinstance(candidate.backend, str):
                return candidate.backend
            if name != "auto":
                raise UnsupportedError(
                    f"backend={name!r} cannot serve this call ({_describe(request)}): {'; '.join(reasons)}"
                )
        else:
            reasons = ()
        refused[candidate.name] = reasons
    if name != "auto":
        raise _unknown(name, refused)
    table = "".join(f"\n  {refusing}: {'; '.join(reasons)}" for refusing, reasons in refused.items())
    raise NoBackendError(f"no backend can serve this call ({_describe(request)}):{table}")


def explain(request: Request, name: str, candidates: Iterable[Candidate]) -> Explanation:
    """What ``select`` would choose, with the reasons of every candidate; a refusal is an answer, not an error.

    Raises:
        ValueError: if no candidate has this name.
    """
    reasons = {candidate.name: _reasons(candidate, request, name) for candidate in candidates}
    if name not in ("auto", *reasons):
        raise _unknown(name, reasons)
    asked = reasons if name == "auto" else (name,)
    return Explanation(next((candidate for candidate in asked if not reasons[candidate]), None), reasons)


def _load(name: str, source: str | Backend) -> Backend | str:
    if isinstance(source, str):
        try:
            module = importlib.import_module(source)
        except ImportError as error:
            return _import_reason(name, source, error)
        if not isinstance(getattr(module, "BACKEND", None), Backend):
            return f"the module {source} exposes no BACKEND"
        backend: Backend = module.BACKEND
    else:
        backend = source
    return backend.unavailable_reason() or backend


def _import_reason(name: str, path: str, error: ImportError) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    # Only the module itself (or a package above it) being absent means that there is no such backend; what its own
    # imports lack is for the user to install, so that text is kept.
    if missing is not None and f"{path}.".startswith(f"{missing}."):
        return f"the {name} backend is not part of this installation (no module {missing})"
    return f"{path} cannot be imported: {error}"


def _reasons(candidate: Candidate, request: Request, name: str) -> tuple[str, ...]:
    backend = candidate.backend
    if isinstance(backend, str):
        return (backend,)
    device = request.device.type
    if name == "auto" and device not in candidate.devices:
        where = f"tensors on {' or '.join(candidate.devices)}" if candidate.devices else f"backend={candidate.name!r}"
        return (f"got backend='auto' on {device}; needs {where}",)
    if isinstance(request, EntmaxRequest):
        return backend.entmax_unsupported_reasons(request)
    reasons = backend.unsupported_reasons(request)
    missing = [feature for feature in request.features() if feature not in backend.features]
    return (
        (*(f"got {feature}; needs a backend that serves it" for feature in missing), *reasons) if missing else reasons
    )


def _describe(request: Request) -> str:
    if isinstance(request, EntmaxRequest):
        return f"x {tuple(request.x.shape)}, {request.x.dtype}, {request.x.device}"
    shapes = (f"{name} {tuple(getattr(request, name).shape)}" for name in ("q", "k", "v"))
    return ", ".join([*shapes, str(request.q.dtype), str(request.q.device), *request.features()])


def _unknown(name: str, known: Iterable[str]) -> ValueError:
    return ValueError(f"backend={name!r}: expected one of {', '.join(map(repr, ['auto', *known]))}")
