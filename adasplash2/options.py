"""Types of the options of the command line: each says what it got and what it expected."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

__all__ = ["alpha", "integer", "output", "seconds"]


def integer(lowest: int) -> Callable[[str], int]:
    """A whole number, at least ``lowest``."""

    def parse(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value}: expected at least {lowest}")
        return value

    return parse


def alpha(text: str) -> float:
    """Of entmax that is compared with softmax, in (1, 2]."""
    value = float(text)
    if not 1 < value <= 2:
        raise argparse.ArgumentTypeError(f"{value:g}: expected more than 1 (softmax, the other side) and at most 2")
    return value


def seconds(text: str) -> float:
    """More than zero."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{value:g}: expected more than 0")
    return value


def output(suffix: str) -> Callable[[str], Path]:
    """A file to write, with this suffix, in a folder that is there."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix != suffix:
            raise argparse.ArgumentTypeError(f"{text}: expected the name of a {suffix} file")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: its folder does not exist")
        return path

    return parse
