"""On what and with what a result was measured."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import os
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adasplash2 import info

__all__ = ["machine_slug", "stamp"]


def stamp(device: torch.device) -> dict[str, Any]:
    """Commit, time, device, threads, load, and what ``python -m adasplash2 info`` says; ready for JSON."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        # The machine is shared where this is more than a few tenths.
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "entmax": _version("entmax"),
        "info": _info(),
    }


def machine_slug(stamp: dict[str, Any]) -> str:
    """The device and its threads as part of a file name."""
    name = f"{stamp['info']['cpu']}-{stamp['threads']}-threads" if stamp["device"] == "cpu" else stamp["device"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _info() -> dict[str, str]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        info.run(argparse.Namespace())
    found: dict[str, str] = {}
    for line in text.getvalue().splitlines():
        # A version comes before the backend of the same name.
        found.setdefault(line[:12].rstrip(), line[13:])
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
