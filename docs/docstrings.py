"""How mkdocstrings reads the docstrings."""

from typing import Any

import griffe

__all__ = ["OneColon"]


class OneColon(griffe.Extension):
    """Docstrings announce code as reStructuredText does, with two colons; Markdown shows both."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Take one of them away."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("::\n", ":\n")
