"""Exact, differentiable sparse attention (α-entmax) for CPU and GPU.

``attention`` is used as torch's ``scaled_dot_product_attention`` is; ``entmax`` as ``torch.softmax``. ``explain`` says
which backend serves a call and why the others do not, ``support`` where the weights are not zero.
"""

import importlib.util
from importlib.metadata import version

if importlib.util.find_spec("adasplash2.backends") is None:
    raise ImportError(
        "this checkout of adasplash2 hides the installed package: install it with 'pip install -e .', or start Python "
        "from another folder or with -P"
    )

from adasplash2 import nn
from adasplash2.contract import Explanation, NoBackendError, SupportStats, UnsupportedError
from adasplash2.interface import attention, entmax, explain, support
from adasplash2.registry import available_backends

__all__ = [
    "Explanation",
    "NoBackendError",
    "SupportStats",
    "UnsupportedError",
    "__version__",
    "attention",
    "available_backends",
    "entmax",
    "explain",
    "nn",
    "support",
]

__version__ = version("adasplash2")
