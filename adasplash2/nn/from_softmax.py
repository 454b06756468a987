"""From softmax to entmax: ``convert`` swaps the attention of a model, ``AlphaSchedule`` moves its alpha in training."""

from __future__ import annotations

import sys
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from adasplash2.nn.attention import MARGIN, EntmaxAttention, checked_alpha
from adasplash2.registry import DEFAULT_BACKEND

__all__ = ["AlphaSchedule", "convert"]

_ATTN_IMPLEMENTATION = "adasplash2"

_Model = TypeVar("_Model", bound=nn.Module)


def convert(
    model: _Model,
    alpha: float = 1.5,
    *,
    learnable_alpha: bool = False,
    ignore_dropout: bool = False,
    backend: str = DEFAULT_BACKEND,
) -> _Model:
    """Turns the softmax attention of a model into entmax attention, in place, with the weights that it has.

    Every ``torch.nn.MultiheadAttention`` becomes an ``EntmaxAttention``, also inside of torch's transformer layers,
    whose fused softmax path for inference is then no longer taken. The module object and its parameters stay the same
    ones: optimizers, hooks and other references go on working. A transformers model inside is given the attention that
    ``adasplash2.integrations.transformers.register`` registers as "adasplash2", and alpha as its config's
    ``entmax_alpha``. Attention that calls ``scaled_dot_product_attention`` itself cannot be found.

    With alpha = 1 the model computes what it computed before, and an ``AlphaSchedule`` can raise alpha while the model
    is trained further.

    Args:
        model: any module, itself a ``torch.nn.MultiheadAttention`` or with some inside.
        alpha: a number in [1, 2]; 1.5 by default.
        learnable_alpha: whether each head learns its alpha, from the given one on; False by default. The new parameters
            are unknown to an optimizer that was made before.
        ignore_dropout: whether attention with a dropout of weights is converted, which then has none; False by default:
            it is refused, because training would change without a word. A transformers model refuses such a dropout
            itself, when it is trained.
        backend: as for ``adasplash2.attention``. The transformers models of a process share the last one.

    Returns:
        The model.

    Raises:
        TypeError: alpha of the wrong type, or a subclass of ``torch.nn.MultiheadAttention``, whose own code would be
            lost.
        ValueError: alpha out of its range; no softmax attention was found; a dropout of weights, unless it is to be
            ignored; alpha to be learned in a transformers model. The model is then as it was.
    """
    alpha = checked_alpha("alpha", alpha, learned=learnable_alpha)
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    for name, module in found.items():
        if type(module) is not nn.MultiheadAttention:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise TypeError(f"{name or 'model'} is a {kind}: expected torch.nn.MultiheadAttention itself, no subclass")
        if module.dropout and not ignore_dropout:
            raise ValueError(
                f"{name or 'model'}.dropout={module.dropout}: expected 0, there is no dropout of entmax weights; with "
                "ignore_dropout=True the model is converted and trains without it"
            )
    pretrained = _transformers_models(model)
    if not found and not pretrained:
        there = sum(isinstance(module, EntmaxAttention) for module in model.modules())
        raise ValueError(
            f"model is a {type(model).__qualname__} with {there} entmax attention modules already: expected a "
            "torch.nn.MultiheadAttention or a transformers model inside it"
        )
    if pretrained and learnable_alpha:
        raise ValueError(f"learnable_alpha={learnable_alpha}: expected False, for a transformers model")

    for pretrained_model in pretrained:
        _set_attn_implementation(pretrained_model, alpha, backend)
    for module in found.values():
        entmax = cast(Any, module)
        entmax.__class__ = EntmaxAttention
        entmax.dropout = 0.0
        entmax.add_entmax(entmax.num_heads, alpha, learnable_alpha, rotary=None, backend=backend)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            encoder.use_nested_tensor = False
    return model


def _transformers_models(model: nn.Module) -> list[Any]:
    """The outermost transformers models in a model."""
    # Where transformers was not imported, no module can be one of its models.
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return []
    if isinstance(model, transformers.PreTrainedModel):
        return [model]
    return [found for child in model.children() for found in _transformers_models(child)]


def _served_by_transformers(model: nn.Module) -> list[Any]:
    """The modules whose config says that transformers calls this package: among them, all its attention modules.

    Those that learn an alpha are left out.
    """
    return [
        module
        for module in model.modules()
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == _ATTN_IMPLEMENTATION
        and not isinstance(getattr(module, "entmax_alpha", None), nn.Parameter)
    ]


def _set_attn_implementation(model: Any, alpha: float, backend: str) -> None:
    from adasplash2.integrations.transformers import register

    register(backend=backend, name=_ATTN_IMPLEMENTATION)
    model.set_attn_implementation(_ATTN_IMPLEMENTATION)
    served = _served_by_transformers(model)
    if not served:
        raise ValueError(f"model is a {type(model).__qualname__}, which does not let its attention be chosen")
    for module in served:
        # The module's, which an AlphaSchedule may have left, would come before the config's.
        module.entmax_alpha = None
        module.config.entmax_alpha = alpha


class AlphaSchedule:
    """Moves the alpha of a model's entmax attention from one value to another, over the steps of a training.

    The recipe by which a softmax model becomes sparse: ``convert`` it at alpha = 1, then train it with a schedule from
    1 to the alpha that is wanted. Used as torch's learning rate schedulers are: the first alpha is set when the
    schedule is made, and ``step`` is called after each step of the optimizer. ::

        alpha(n) = start + (target - start) * min(n / steps, 1)

    At alpha = 1 attention is softmax, exactly; below 1.001 it is taken for 1, because the formulas of entmax lose all
    their digits there. Modules that learn their alpha are left alone. In transformers models the ``entmax_alpha`` of
    the config moves, which their checkpoints hold.

    Args:
        model: with at least one ``EntmaxAttention`` whose alpha is not learned, or with a transformers model that was
            given to ``convert``. Its modules are looked up once.
        target: the last alpha, in [1, 2]; 1.5 by default.
        steps: number of steps after which the target is reached, at least 1.
        start: the first alpha, in [1, 2]; 1, softmax, by default.

    Attributes:
        last_step: number of steps done.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a value out of its range, or a model without a module to schedule.
    """

    def __init__(self, model: nn.Module, target: float = 1.5, *, steps: int, start: float = 1.0) -> None:
        self.target = checked_alpha("target", target)
        self.start = checked_alpha("start", start)
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"steps={steps!r}: expected an int")
        if steps < 1:
            raise ValueError(f"steps={steps}: expected at least 1")
        self.steps = steps
        self.last_step = 0
        self._modules = [
            module for module in model.modules() if isinstance(module, EntmaxAttention) and module.alpha_logit is None
        ]
        self._served = _served_by_transformers(model)
        if not self._modules and not self._served:
            raise ValueError(
                f"model is a {type(model).__qualname__} without entmax attention whose alpha is not learned: expected "
                "some; adasplash2.nn.convert(model, alpha=1) makes it of softmax attention"
            )
        self._apply()

    @property
    def alpha(self) -> float:
        """The alpha of the present step."""
        share = min(self.last_step / self.steps, 1.0)
        # Written so that both ends are met exactly.
        alpha = (1 - share) * self.start + share * self.target
        return alpha if alpha >= 1 + MARGIN else 1.0

    def step(self) -> None:
        """Sets the next alpha."""
        self.last_step += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """What ``load_state_dict`` needs to go on from here."""
        return {"target": self.target, "start": self.start, "steps": self.steps, "last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where another schedule was, and sets its alpha.

        Args:
            state_dict: of the other schedule.
        """
        self.target, self.start = state_dict["target"], state_dict["start"]
        self.steps, self.last_step = state_dict["steps"], state_dict["last_step"]
        self._apply()

    def _apply(self) -> None:
        alpha = self.alpha
        # A number is a constant to torch.compile, which would compile again at each step.
        moves = 0 < self.last_step < self.steps and alpha != 1
        for module in self._modules:
            module._alpha = _tensor(alpha, module) if moves else alpha
        for module in self._served:
            module.config.entmax_alpha = alpha
            module.entmax_alpha = _tensor(alpha, module) if moves else None


def _tensor(alpha: float, module: nn.Module) -> Tensor:
    """On the device of a module."""
    device = next((parameter.device for parameter in module.parameters()), None)
    return torch.tensor(alpha, dtype=torch.float32, device=device)
