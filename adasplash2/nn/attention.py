"""EntmaxAttention: entmax attention as a module, in the place of ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adasplash2.interface import attention, entmax
from adasplash2.registry import DEFAULT_BACKEND

__all__ = ["MARGIN", "EntmaxAttention", "checked_alpha"]

# A backend's relative error in p is about eps(float32) / (alpha - 1), and the distance to softmax is proportional to
# alpha - 1. On 256 keys with scores of unit variance (float32): error 2e-5 at a distance of 7e-3 for alpha = 1.001, but
# 2e-3 at 7e-5 for alpha = 1.00001. Nothing is to be gained nearer to 1 than this.
MARGIN = 1e-3


class EntmaxAttention(nn.Module):
    """Multi-head α-entmax attention with the habits of ``torch.nn.MultiheadAttention``.

    Constructor, call, initial weights and the names in the state_dict are those of torch's module, whose state_dict
    loads, and which this one replaces in ``torch.nn.TransformerEncoderLayer`` and ``TransformerDecoderLayer``. At
    alpha = 1 the results are the same, too. What differs:

    - The weights are not returned unless asked for: ``need_weights`` is False by default. The output does not depend
      on it.
    - ``is_causal`` alone is a causal mask; no ``attn_mask`` is needed. It aligns the last query with the last key, as
      ``adasplash2.attention`` does.
    - ``attn_mask`` is that causal mask or an error, and ``key_padding_mask`` hides keys or does not: scores cannot be
      shifted by a float mask, other than by -inf.
    - A query that sees no key gives zeros before the output projection, where torch gives NaN. With both a causal mask
      and a ``key_padding_mask``, so does a query at a padded position, the queries being the last of the keys.
    - There is no dropout of weights.

    Args:
        embed_dim: width of the queries and of the output, a multiple of num_heads.
        num_heads: heads of the queries.
        dropout: 0, by default; anything else is refused.
        bias: whether the projections have a bias; True by default.
        add_bias_kv: whether a learned key and value are added to the others; False by default.
        add_zero_attn: whether a key and value of zeros are added to the others; False by default.
        kdim: width of the keys; embed_dim by default.
        vdim: width of the values; embed_dim by default.
        batch_first: whether the layout is (batch, seqlen, width), not (seqlen, batch, width); False by default, as in
            torch.
        device: of the parameters.
        dtype: of the parameters.
        num_kv_heads: heads of the keys and values, which num_heads is a multiple of; num_heads by default.
        alpha: a number in [1, 2], where 1 is softmax and 2 sparsemax; 1.5 by default. It is no part of the state_dict.
        learnable_alpha: whether each head learns its alpha, from the given one on, between 1.001 and 1.999 (Correia et
            al. 2019, arXiv 1909.00015); False by default. The parameter is ``alpha_logit``; a state_dict without it
            leaves it as it is.
        rotary: called with q (batch, num_heads, seqlen_q, head_dim) and k (batch, num_kv_heads, seqlen_k, head_dim)
            after their projection, returns both, for instance rotated by position; None by default. A module becomes a
            submodule.
        backend: as for ``adasplash2.attention``.

    Attributes:
        in_proj_weight: (embed_dim + 2 * num_kv_heads * head_dim, embed_dim), the projections of q, k and v; None where
            kdim or vdim is another than embed_dim, and ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` are
            there in its place.
        in_proj_bias: (embed_dim + 2 * num_kv_heads * head_dim,) or None.
        out_proj: the linear layer at the end.
        alpha_logit: (num_heads,) or None.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of place.
    """

    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kdim: int
    vdim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None
    q_proj_weight: nn.Parameter | None
    k_proj_weight: nn.Parameter | None
    v_proj_weight: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    alpha_logit: nn.Parameter | None
    _alpha: float | Tensor

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        alpha: float = 1.5,
        learnable_alpha: bool = False,
        rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        backend: str = DEFAULT_BACKEND,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        kdim, vdim = (embed_dim if width is None else width for width in (kdim, vdim))
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        for name, size in {**sizes, "kdim": kdim, "vdim": vdim}.items():
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name}={size!r}: expected an int")
            if size < 1:
                raise ValueError(f"{name}={size}: expected at least 1")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim}: expected a multiple of num_heads, which is {num_heads}")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads}: expected a multiple of num_kv_heads, which is {num_kv_heads}")
        if dropout != 0:
            raise ValueError(f"dropout={dropout!r}: expected 0, there is no dropout of entmax weights")

        self.embed_dim, self.kdim, self.vdim = embed_dim, kdim, vdim
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.dropout = 0.0
        self.batch_first, self.add_zero_attn = batch_first, add_zero_attn

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        kv_dim = num_kv_heads * self.head_dim
        packed = kdim == vdim == embed_dim
        self.in_proj_weight = parameter(embed_dim + 2 * kv_dim, embed_dim) if packed else None
        self.q_proj_weight = None if packed else parameter(embed_dim, embed_dim)
        self.k_proj_weight = None if packed else parameter(kv_dim, kdim)
        self.v_proj_weight = None if packed else parameter(kv_dim, vdim)
        self.in_proj_bias = parameter(embed_dim + 2 * kv_dim) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.bias_k = parameter(1, 1, kv_dim) if add_bias_kv else None
        self.bias_v = parameter(1, 1, kv_dim) if add_bias_kv else None
        self.add_entmax(num_kv_heads, alpha, learnable_alpha, rotary, backend)
        self.reset_parameters()

    def add_entmax(
        self,
        num_kv_heads: int,
        alpha: float,
        learnable_alpha: bool,
        rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
        backend: str,
    ) -> None:
        """What this module has and torch's has not."""
        self.num_kv_heads = num_kv_heads
        self.rotary = rotary
        self.backend = backend
        self.alpha_logit = None
        if learnable_alpha:
            like = self.out_proj.weight
            self.alpha_logit = nn.Parameter(torch.empty(self.num_heads, device=like.device, dtype=like.dtype))
        self.alpha = alpha
        # torch's encoder layers ask this before they pass the module by, for a fused softmax attention in eval mode.
        self._qkv_same_embed_dim = False

    def reset_parameters(self) -> None:
        """Draws initial weights as ``torch.nn.MultiheadAttention`` does; those of out_proj are its own to draw.

        A learned alpha goes back to the last one that was set by hand: the constructor's, if none was.
        """
        for weight in (self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for row in (self.bias_k, self.bias_v):
            if row is not None:
                nn.init.xavier_normal_(row)
        if self.alpha_logit is not None:
            self.alpha = float(self._alpha)

    @property
    def alpha(self) -> float | Tensor:
        """What the attention is computed with: a number, or a tensor.

        A learned alpha is a (num_heads,) tensor that gradients flow through; assigning a number sets it for all heads.
        While an ``AlphaSchedule`` moves alpha, it is a () tensor, so that ``torch.compile`` traces it once.
        """
        if self.alpha_logit is None:
            return self._alpha
        # In half precision sigmoid may round to 0 or 1.
        logit = self.alpha_logit.to(torch.promote_types(self.alpha_logit.dtype, torch.float32))
        return 1 + MARGIN + (1 - 2 * MARGIN) * torch.sigmoid(logit)

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._alpha = checked_alpha("alpha", value, learned=self.alpha_logit is not None)
        if self.alpha_logit is not None:
            with torch.no_grad():
                share = (self._alpha - 1 - MARGIN) / (1 - 2 * MARGIN)
                self.alpha_logit.fill_(math.log(share / (1 - share)))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the queries to the keys, between input and output projections.

        Args:
            query: (batch, seqlen_q, embed_dim) with batch_first, else (seqlen_q, batch, embed_dim); or without a batch,
                (seqlen_q, embed_dim).
            key: laid out as query, seqlen_k long and kdim wide.
            value: laid out as query, seqlen_k long and vdim wide.
            key_padding_mask: (batch, seqlen_k), without a batch (seqlen_k,): True, or -inf in a float mask, for the
                keys to ignore; any of them, not just the last. None by default.
            need_weights: whether to return the weights, too, which takes the time and the memory of dense attention;
                False by default.
            attn_mask: the causal mask, (seqlen_q, seqlen_k) or (batch * num_heads, seqlen_q, seqlen_k), True or -inf
                where j - i > seqlen_k - seqlen_q. None by default.
            average_attn_weights: whether the weights are averaged over the heads; True by default.
            is_causal: whether the causal mask is to be applied, with ``attn_mask`` or without; False by default.

        Returns:
            The output, laid out and shaped as query, and the weights or None: (batch, seqlen_q, seqlen_k), or (batch,
            num_heads, seqlen_q, seqlen_k) where they are not averaged, without the batch if there is none. Keys of
            add_bias_kv and of add_zero_attn come last.

        Raises:
            TypeError: a mask that is neither boolean nor floating.
            ValueError: a shape out of place, or a mask that cannot be expressed. Masks are read for this, which on an
                accelerator waits for the device, unless they are boolean key_padding_masks; under ``torch.compile``
                the refusal is a RuntimeError (on CUDA, a device-side assertion).
            UnsupportedError: the named backend cannot serve the call; the message has its reasons.
            NoBackendError: no backend can; the message has the reasons of each.
        """
        self._check_inputs(query, key, value)
        q, k, v = (self._split_heads(x, query.ndim) for x in self._project(query, key, value))
        (batch, _, seqlen_q, _), seqlen_k = q.shape, k.shape[2]
        valid = None
        if key_padding_mask is not None:
            shape = (batch, seqlen_k) if query.ndim == 3 else (seqlen_k,)
            valid = _valid_keys(key_padding_mask, shape).view(batch, seqlen_k)
        if attn_mask is not None:
            _check_causal_mask(attn_mask, (seqlen_q, seqlen_k), batch * self.num_heads)
            is_causal = True
        if self.rotary is not None:
            q, k = self.rotary(q, k)

        k, v = self._with_added_keys(k, v)
        added = k.shape[2] - seqlen_k
        if added and is_causal and seqlen_q > seqlen_k:
            raise ValueError(
                f"is_causal=True with add_bias_kv or add_zero_attn: expected no more queries than keys, got {seqlen_q} "
                f"and {seqlen_k}"
            )
        valid_q = None
        if valid is not None:
            if is_causal:
                # The queries are the last of the keys. A negative pad cuts.
                valid_q = F.pad(valid, (seqlen_q - seqlen_k, 0), value=False)
            valid = F.pad(valid, (added, 0), value=True)
        alpha = self.alpha
        if isinstance(alpha, Tensor):
            alpha = alpha.to(q.device)
        out = self._attend(q, k, v, alpha, is_causal, valid, valid_q)
        weights = self._weights(q, k, alpha, is_causal, valid, valid_q) if need_weights else None

        out = out.transpose(1, 2)
        if query.ndim == 2:
            out = out[0]
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if weights is not None:
            weights = weights.roll(-added, -1)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if query.ndim == 3 else weights[0]
        return self.out_proj(out.flatten(-2)), weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        widths = (self.embed_dim, self.kdim, self.vdim)
        for (name, x), width in zip({"query": query, "key": key, "value": value}.items(), widths, strict=True):
            if x.is_nested:
                raise ValueError(
                    f"{name} is a nested tensor: expected a dense one; torch.nn.TransformerEncoder makes none with "
                    "enable_nested_tensor=False"
                )
            if x.ndim not in (2, 3) or x.ndim != query.ndim or x.shape[-1] != width:
                raise ValueError(
                    f"{name}.shape={tuple(x.shape)}: expected 3 dimensions, or in all of query, key and value 2 without"
                    f" a batch, the last of them {width}"
                )
        if value.shape[:-1] != key.shape[:-1]:
            expected = (*key.shape[:-1], self.vdim)
            raise ValueError(f"value.shape={tuple(value.shape)}: expected {expected}, for key of {tuple(key.shape)}")
        batch_dim = 0 if self.batch_first else 1
        if query.ndim == 3 and key.shape[batch_dim] != query.shape[batch_dim]:
            raise ValueError(
                f"key.shape={tuple(key.shape)}: expected a batch of {query.shape[batch_dim]} in dimension {batch_dim}, "
                f"as in query of {tuple(query.shape)} with batch_first={self.batch_first}"
            )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        kv_dim = self.num_kv_heads * self.head_dim
        sizes = [self.embed_dim, kv_dim, kv_dim]
        weights: tuple[Tensor | None, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            if query is key and key is value:
                qkv: tuple[Tensor, ...] = F.linear(query, self.in_proj_weight, self.in_proj_bias).split(sizes, -1)
                return qkv
            weights = self.in_proj_weight.split(sizes)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
        inputs = (query, key, value)
        return tuple(F.linear(x, cast(Tensor, w), b) for x, w, b in zip(inputs, weights, biases, strict=True))

    def _split_heads(self, x: Tensor, ndim: int) -> Tensor:
        """To (batch, heads, seqlen, head_dim)."""
        if ndim == 2:
            x = x[None]
        elif not self.batch_first:
            x = x.transpose(0, 1)
        heads: Tensor = x.unflatten(-1, (-1, self.head_dim))
        return heads.transpose(1, 2)

    def _with_added_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v behind the learned pair and the pair of zeros, where the causal mask lets all queries see them."""
        batch, heads = k.shape[:2]

        def added(x: Tensor, row: Tensor | None) -> Tensor:
            parts = [x]
            if self.add_zero_attn:
                parts.insert(0, x.new_zeros(batch, heads, 1, self.head_dim))
            if row is not None:
                parts.insert(0, row.view(1, heads, 1, self.head_dim).to(x.dtype).expand(batch, -1, -1, -1))
            return torch.cat(parts, 2) if len(parts) > 1 else x

        return added(k, self.bias_k), added(v, self.bias_v)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alpha: float | Tensor,
        is_causal: bool,
        valid: Tensor | None,
        valid_q: Tensor | None,
    ) -> Tensor:
        """Attention to the valid keys, (batch, seqlen_k), and where given of the valid queries, (batch, seqlen_q).

        What is valid is moved to the front, in its order, for lengths to tell it. The causal mask is then still right:
        in front of a query, all keys that it sees, and no others, are left.
        """
        seqlens_q = seqlens_k = order = None
        if valid is not None:
            keys = _valid_first(valid)
            k, v, seqlens_k = _take(k, keys), _take(v, keys), valid.sum(-1)
        if valid_q is not None:
            order = _valid_first(valid_q)
            q, seqlens_q = _take(q, order), valid_q.sum(-1)
        out: Tensor = attention(
            q,
            k,
            v,
            alpha=alpha,
            is_causal=is_causal,
            seqlens_q=seqlens_q,
            seqlens_k=seqlens_k,
            backend=self.backend,
        )
        return out if order is None else _take(out, order.argsort(-1))

    def _weights(
        self,
        q: Tensor,
        k: Tensor,
        alpha: float | Tensor,
        is_causal: bool,
        valid: Tensor | None,
        valid_q: Tensor | None,
    ) -> Tensor:
        """The weights of ``_attend``, (batch, num_heads, seqlen_q, seqlen_k)."""
        seqlen_q, seqlen_k = q.shape[2], k.shape[2]
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            scores = q.to(dtype) @ k.to(dtype).repeat_interleave(self.num_heads // self.num_kv_heads, dim=1).mT
        visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device)
        if is_causal:
            visible = visible.tril(seqlen_k - seqlen_q)
        if valid is not None:
            visible = visible & valid[:, None, None]
        if valid_q is not None:
            visible = visible & valid_q[:, None, :, None]
        # A row that sees no key is given all, because a distribution over none is NaN, and its result is dropped.
        blind = ~visible.any(-1, keepdim=True)
        scores = (self.head_dim**-0.5 * scores).masked_fill(~(visible | blind), -torch.inf)
        if isinstance(alpha, Tensor) and alpha.ndim:
            alpha = alpha[:, None, None]
        p: Tensor = entmax(scores, alpha, backend=self.backend)
        return p.masked_fill(blind, 0).to(q.dtype)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # So that a softmax checkpoint loads.
        if f"{prefix}alpha_logit" in missing_keys:
            missing_keys.remove(f"{prefix}alpha_logit")

    def extra_repr(self) -> str:
        """The sizes, alpha, and what is not as by default."""
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}"]
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads={self.num_kv_heads}")
        parts.append("alpha=learned per head" if self.alpha_logit is not None else f"alpha={float(self._alpha):.6g}")
        options = {
            "kdim": (self.kdim, self.embed_dim),
            "vdim": (self.vdim, self.embed_dim),
            "bias": (self.in_proj_bias is not None, True),
            "add_bias_kv": (self.bias_k is not None, False),
            "add_zero_attn": (self.add_zero_attn, False),
            "batch_first": (self.batch_first, False),
            "backend": (self.backend, DEFAULT_BACKEND),
        }
        parts += [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
        return ", ".join(parts)


def checked_alpha(name: str, alpha: object, learned: bool = False) -> float:
    """An alpha that was given as a number; one to learn from lies away from both ends.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of its range.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (float, Real)):
        raise TypeError(f"{name}={alpha!r}: expected a number in [1, 2]")
    value = float(alpha)
    if learned and not 1 + MARGIN < value < 2 - MARGIN:
        raise ValueError(f"{name}={alpha!r}: expected more than {1 + MARGIN} and less than {2 - MARGIN}, to learn from")
    if not 1 <= value <= 2:
        raise ValueError(f"{name}={alpha!r}: expected a number in [1, 2]")
    return value


def _valid_keys(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """True at the keys that key_padding_mask leaves."""
    _check_mask("key_padding_mask", mask, (shape,))
    if mask.dtype == torch.bool:
        return ~mask
    valid = mask == 0
    _check_all(
        valid | (mask == -torch.inf), "key_padding_mask has other entries than 0 and -inf: expected no shift of scores"
    )
    return valid


def _check_causal_mask(mask: Tensor, shape: tuple[int, int], heads: int) -> None:
    _check_mask("attn_mask", mask, (shape, (heads, *shape)))
    seqlen_q, seqlen_k = shape
    expected = torch.ones(shape, dtype=torch.bool, device=mask.device).triu(seqlen_k - seqlen_q + 1)
    if mask.dtype != torch.bool:
        expected = torch.zeros(shape, dtype=mask.dtype, device=mask.device).masked_fill(expected, -torch.inf)
    _check_all(
        mask == expected,
        f"attn_mask is not the causal mask: expected True or -inf where j - i > {seqlen_k - seqlen_q}, for {seqlen_q} "
        f"queries and {seqlen_k} keys, and False or 0 elsewhere; padded keys go into key_padding_mask",
    )


def _check_mask(name: str, mask: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name}.dtype={mask.dtype}: expected torch.bool or a floating dtype")
    if mask.shape not in shapes:
        raise ValueError(f"{name}.shape={tuple(mask.shape)}: expected {' or '.join(map(str, shapes))}")


def _check_all(fine: Tensor, message: str) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(fine.all(), message)
    elif not fine.all():
        raise ValueError(message)


def _valid_first(valid: Tensor) -> Tensor:
    """The order that moves what is valid to the front: (batch, n) int64."""
    return torch.argsort((~valid).int(), dim=-1, stable=True)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """The rows of x, (batch, heads, seqlen, head_dim), in another order, (batch, seqlen)."""
    return x.gather(2, order[:, None, :, None].expand_as(x))
