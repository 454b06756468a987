"""On what and with what a result was measured."""

from __future__ import annotations

import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from adasplash2.bench.machine import machine

__all__ = ["machine_slug", "stamp"]


def stamp(device: torch.device) -> dict[str, Any]:
    """Commit, and all that ``adasplash2.bench.machine`` tells; ready for JSON."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "entmax": _version("entmax"),
    } | machine(device)


def machine_slug(stamp: dict[str, Any]) -> str:
    """The device and its threads as part of a file name."""
    name = f"{stamp['info']['cpu']}-{stamp['threads']}-threads" if stamp["device"] == "cpu" else stamp["device"]
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


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
