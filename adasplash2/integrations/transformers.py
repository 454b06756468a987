"""``attn_implementation="adasplash2"`` for the models of Hugging Face transformers.

``register`` adds an attention function and a mask function to transformers' registries. The mask function makes, once
per forward pass of a model and kind of layer, a small ``Mask`` in place of a (batch, 1, seqlen_q, seqlen_k) tensor;
the attention function calls ``adasplash2.attention`` with it. What these cannot express is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adasplash2 import registry
from adasplash2.interface import attention
from adasplash2.registry import DEFAULT_BACKEND

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
except ImportError as error:
    raise ImportError(
        "adasplash2.integrations.transformers needs transformers 5.4 or newer, which "
        f"\"pip install 'adasplash2[transformers]'\" brings: {error}"
    ) from error

__all__ = ["Mask", "register"]

# By their names among the arguments of attention functions.
_REFUSED = {
    "softcap": "a soft cap of the scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias added to the scores",
    "head_mask": "a mask of heads",
    "layer_head_mask": "a mask of heads",
    "indices": "a choice of keys for each query",
    "block_indices": "a choice of keys for each query",
    "cu_seq_lens_q": "packed sequences",
    "cu_seq_lens_k": "packed sequences",
    "output_attentions": "the weights, which are never all in memory",
}


def register(alpha: float = 1.5, backend: str = DEFAULT_BACKEND, name: str = "adasplash2") -> None:
    """Make ``attn_implementation=name`` mean α-entmax attention in every model that uses transformers' interface.

    A second call with the same name takes the place of the first, also for models that are there already.

    α of an attention layer is the first of these that is there:

    - ``entmax_alpha`` of the attention module: a number, or a tensor of shape (heads_q,) or (), which may require grad;
    - ``entmax_alpha`` of the module's config: a number; a list of one number per head; or a list of one list per layer,
      each of one number or one per head;
    - ``alpha``.

    Args:
        alpha: a number in [1, 2]; 1.5 by default; 1 is softmax.
        backend: as for ``adasplash2.attention``, with its default.
        name: what models are given as ``attn_implementation``; "adasplash2" by default.

    Raises:
        TypeError: alpha is no number, or name no string.
        ValueError: alpha lies outside [1, 2], the backend is unknown, or name has a meaning for transformers.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (float, Real)):
        raise TypeError(f"alpha={alpha!r}: expected a number in [1, 2]")
    if not 1 <= alpha <= 2:
        raise ValueError(f"alpha={alpha!r}: expected a number in [1, 2]")
    backends = ("auto", *registry.names())
    if backend not in backends:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(backends)}")
    if not isinstance(name, str):
        raise TypeError(f"name={name!r}: expected a string")
    known: object = AttentionInterface._global_mapping.get(name)
    is_ours = isinstance(known, partial) and known.func is _attention
    # transformers looks for these inside a name.
    is_special = any(part in name for part in ("eager", "sdpa", "flash", "flex_attention", "/", "|"))
    if is_special or (known is not None and not is_ours):
        raise ValueError(f"name={name!r}: expected one that has no meaning for transformers, such as 'adasplash2'")
    AttentionInterface.register(name, partial(_attention, alpha=float(alpha), backend=backend))
    AttentionMaskInterface.register(name, _mask)


class Mask(NamedTuple):
    """Which keys each query sees: what attention layers are given as ``attention_mask``.

    Attributes:
        is_causal: whether a query sees no key after its own.
        seqlen_q: queries, padding included.
        seqlen_k: keys, padding included.
        seqlens_q: (batch,) valid queries of each sequence, or None for all.
        seqlens_k: (batch,) valid keys of each sequence, or None for all.
        order_q: (batch, seqlen_q) indices that bring the valid queries to the front, or None where they are there.
        order_k: (batch, seqlen_k) the same for the keys.
    """

    is_causal: bool
    seqlen_q: int
    seqlen_k: int
    seqlens_q: Tensor | None = None
    seqlens_k: Tensor | None = None
    order_q: Tensor | None = None
    order_k: Tensor | None = None

    @property
    def ndim(self) -> int:
        """4, as of the tensors in its place: generate makes masks ahead, and the model must see that they are made."""
        return 4


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | Mask | None = None,
    local_size: int | None = None,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Mask:
    """The mask function; its arguments are those of transformers' ``sdpa_mask``.

    Positions count from the start of the padded sequence: queries lie at q_offset and after, keys at kv_offset and
    after. A static cache has keys past the last query, not written yet. In a causal mask the queries are among the
    keys. So wherever padding lies, the valid queries are the last of the valid keys up to the last query, in one order;
    with the valid ones in front, this is the alignment of ``adasplash2.attention``.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask
    if attention_mask is not None and attention_mask.ndim != 2:
        raise _bad_mask(attention_mask)
    # Only transformers' bidirectional masks have this option.
    is_causal = allow_is_bidirectional_skip is None
    if is_causal and isinstance(q_offset, int) and not kv_offset <= q_offset <= kv_offset + kv_length - q_length:
        positions = f"of queries at {q_offset} to {q_offset + q_length}, keys at {kv_offset} to {kv_offset + kv_length}"
        raise ValueError(f"attention_mask is causal, {positions}: expected the queries among the keys")
    if use_vmap:
        raise ValueError("attention_mask is changed by functions of the model: expected a causal or bidirectional one")
    positions_q = q_offset + torch.arange(q_length, device=device)
    positions_k = kv_offset + torch.arange(kv_length, device=device)
    stop = q_offset + q_length if is_causal else kv_offset + kv_length

    valid_q = valid_k = None
    if attention_mask is not None:
        padded = F.pad(attention_mask, (0, max(kv_offset + kv_length - attention_mask.shape[1], 0)))
        valid_k = padded[:, kv_offset : kv_offset + kv_length] & (positions_k < stop)
        if is_causal or q_length == kv_length:
            valid_q = padded[:, positions_q]
    if mask_function is not (causal_mask_function if is_causal else bidirectional_mask_function):
        batch = torch.arange(batch_size, device=device)[:, None]
        visible = partial(mask_function, batch, batch.new_zeros(()))
        _check_reach(visible, is_causal, positions_q, positions_k, valid_q, valid_k, local_size)

    seqlens_q = seqlens_k = order_q = order_k = None
    if valid_k is not None:
        seqlens_k, order_k = _valid_first(valid_k)
        if is_causal and valid_q is not None:
            seqlens_q, order_q = _valid_first(valid_q)
    elif isinstance(stop, Tensor) or stop < kv_offset + kv_length:
        seqlens_k = torch.as_tensor(stop - kv_offset, device=device).expand(batch_size)
    return Mask(is_causal, q_length, kv_length, seqlens_q, seqlens_k, order_q, order_k)


def _valid_first(valid: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(batch,) lengths and (batch, n) order of a mask (batch, n); None for what changes nothing.

    A compiled model cannot look at the mask, and always takes both.
    """
    seqlens = valid.sum(-1)
    if not torch.compiler.is_compiling():
        is_prefix = valid == (torch.arange(valid.shape[1], device=valid.device) < seqlens[:, None])
        are_first, are_all = torch.stack([is_prefix.all(), valid.all()]).tolist()
        if are_first:
            return (None if are_all else seqlens), None
    return seqlens, valid.int().argsort(dim=-1, descending=True, stable=True)


def _check_reach(
    visible: Callable[[Tensor, Tensor], Tensor],
    is_causal: bool,
    positions_q: Tensor,
    positions_k: Tensor,
    valid_q: Tensor | None,
    valid_k: Tensor | None,
    local_size: int | None,
) -> None:
    """Refuse a mask function that differs from a causal or a bidirectional one on valid queries and keys.

    It is asked for the pairs in which windows, chunks, packed sequences and blocks differ first, of which there are no
    more than queries: the first key (bidirectional: and the last) with every query, which windows and the like hide
    from the farthest; each query with the key after it, which blocks show.

    Args:
        visible: the mask function of positions of queries and keys.
        is_causal: which of the two it should be.
        positions_q: (seqlen_q,) positions of the queries.
        positions_k: (seqlen_k,) positions of the keys.
        valid_q: (batch, seqlen_q), or None for all.
        valid_k: (batch, seqlen_k), or None for all.
        local_size: of a window or chunk, or None.
    """
    if valid_q is None:
        valid_q = torch.ones_like(positions_q, dtype=torch.bool)[None]
    if valid_k is None:
        valid_k = torch.ones_like(positions_k, dtype=torch.bool)[None]
    first = positions_k[valid_k.int().argmax(-1, keepdim=True)]
    wrong = ~visible(positions_q, first)
    if is_causal:
        wrong[..., :-1] |= visible(positions_q[:-1], positions_q[1:]) & valid_q[:, 1:]
    else:
        last = positions_k[-1 - valid_k.flip(-1).int().argmax(-1, keepdim=True)]
        wrong = wrong | ~visible(positions_q, last)
    wrong = (wrong & valid_q).any()
    found = "packed sequences or blocks" if local_size is None else f"windows or chunks of local_size={local_size}"
    kind = "causal" if is_causal else "bidirectional"
    message = f"attention_mask has {found} that hide or show keys: expected one that is {kind} on the keys at hand"
    if torch.compiler.is_compiling():
        torch._assert_async(~wrong, message)
    elif wrong:
        raise ValueError(message)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Mask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    *,
    alpha: float,
    backend: str,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function; its arguments are those of transformers' ``sdpa_attention_forward``.

    Returns:
        out (batch, seqlen_q, heads_q, head_dim_v), and None in place of the weights. Padded queries of a causal mask
        give zeros.
    """
    for name, meaning in _REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{name} asks for {meaning}: expected None; entmax attention has no such thing")
    if dropout:
        raise ValueError(f"dropout={dropout}: expected 0 (set the attention dropout of the model's config to 0)")
    seqlen_q, seqlen_k = query.shape[2], key.shape[2]
    if attention_mask is None:
        mask = _unmasked(module, seqlen_q, seqlen_k, is_causal, sliding_window)
    elif isinstance(attention_mask, Mask):
        mask = attention_mask
    else:
        raise _bad_mask(attention_mask)
    if (mask.seqlen_q, mask.seqlen_k) != (seqlen_q, seqlen_k):
        expected = f"one of {seqlen_q} queries and {seqlen_k} keys, as query and key have"
        raise ValueError(f"attention_mask is of {mask.seqlen_q} queries and {mask.seqlen_k} keys: expected {expected}")
    out = attention(
        _reorder(query, mask.order_q),
        _reorder(key, mask.order_k),
        _reorder(value, mask.order_k),
        alpha=_alpha(module, query, alpha),
        is_causal=mask.is_causal,
        scale=scaling,
        seqlens_q=mask.seqlens_q,
        seqlens_k=mask.seqlens_k,
        backend=backend,
    )
    if mask.order_q is not None:
        out = _reorder(out, mask.order_q.argsort(-1))
    return out.transpose(1, 2).contiguous(), None


def _unmasked(
    module: nn.Module, seqlen_q: int, seqlen_k: int, is_causal: bool | None, sliding_window: int | None
) -> Mask:
    """The mask of a layer that is given none; as with sdpa, it is causal where the call or the module says so."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", None)
    if is_causal is None:
        raise ValueError(f"attention_mask=None: expected a mask, or is_causal in the call or {type(module).__name__}")
    if is_causal and seqlen_q not in (1, seqlen_k):
        raise ValueError(f"attention_mask=None: expected a mask where {seqlen_q} queries are among {seqlen_k} keys")
    if sliding_window is not None and sliding_window < seqlen_k:
        raise ValueError(f"sliding_window={sliding_window}: expected at least the {seqlen_k} keys at hand")
    return Mask(bool(is_causal), seqlen_q, seqlen_k)


def _alpha(module: nn.Module, query: Tensor, default: float) -> Any:
    """α of an attention layer, as ``register`` tells it: a number or a tensor."""
    alpha = getattr(module, "entmax_alpha", None)
    if alpha is None:
        alpha = getattr(getattr(module, "config", None), "entmax_alpha", None)
    if alpha is None:
        return default
    if not isinstance(alpha, (list, tuple)):
        return alpha  # checked by adasplash2.attention
    row = alpha
    if all(isinstance(entry, (list, tuple)) for entry in alpha):
        layer = getattr(module, "layer_idx", None)
        if layer is None or layer >= len(alpha):
            where = f"layer {layer} of {type(module).__name__}"
            raise ValueError(f"entmax_alpha={alpha!r}: expected a list for {where}, or one list of numbers")
        row = alpha[layer]
    heads = query.shape[1]
    if len(row) not in (1, heads) or not all(isinstance(entry, (float, int)) and 1 <= entry <= 2 for entry in row):
        raise ValueError(f"entmax_alpha={alpha!r}: expected per layer one number in [1, 2], or {heads}, one per head")
    if len(row) == 1:
        return float(row[0])
    return torch.tensor(row, dtype=torch.float64, device=query.device)


def _reorder(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else torch.take_along_dim(x, order[:, None, :, None], 2)


def _bad_mask(mask: object) -> ValueError:
    what = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
    return ValueError(
        f"attention_mask is {what}: expected (batch, seqlen_k), 1 for tokens and 0 for padding; entmax attention takes "
        "no other"
    )
