"""On what and with what a result was measured."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import os
from typing import Any

import torch

from adasplash2 import info

__all__ = ["machine"]


def machine(device: torch.device) -> dict[str, Any]:
    """Time, device, threads, load, and what ``python -m adasplash2 info`` says; ready for JSON."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        # The machine is shared where this is more than a few tenths.
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "info": _info(),
    }


def _info() -> dict[str, str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        info.run(argparse.Namespace())
    found: dict[str, str] = {}
    for line in text.getvalue().splitlines():
        # A version comes before the backend of the same name.
        found.setdefault(line[:12].rstrip(), line[13:])
    return found
