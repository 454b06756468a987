"""``python -m adasplash2 COMMAND``."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Name: the module with add_arguments(parser) and run(args) -> exit status, and one line of help.
_COMMANDS = {
    "info": ("adasplash2.info", "versions, devices, and which backends are usable"),
    "demo": ("adasplash2.demo", "train two small transformers side by side, entmax and softmax, on the CPU"),
    "bench": ("adasplash2.bench", "time the backends that can run here against torch's softmax attention"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those of the command line by default.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m adasplash2", description="Exact, differentiable sparse attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (path, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        # A command's module is imported for that command alone: it may load what another does not need.
        if name in arguments:
            module = importlib.import_module(path)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
