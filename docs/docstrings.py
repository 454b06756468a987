"""How mkdocstrings reads the docstrings."""

from typing import Any

import griffe

__all__ = ["OneColon"]


class OneColon(griffe.Extension):
    """Docstrings announce code as reStructuredText does, with two colons; Markdown would show both."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Take one of them away, and both where they stand alone."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace(" ::\n", "\n").replace("::\n", ":\n")
