"""Entmax attention as a module, in the place of ``torch.nn.MultiheadAttention``, and the way from softmax to it.

``EntmaxAttention`` is built, called and loaded as torch's module is. ``convert`` turns the softmax attention of a model
into it, weights kept; ``AlphaSchedule`` then raises alpha from 1, which is softmax, over the steps of a training.
"""

from adasplash2.nn.attention import EntmaxAttention
from adasplash2.nn.from_softmax import AlphaSchedule, convert

__all__ = ["AlphaSchedule", "EntmaxAttention", "convert"]
