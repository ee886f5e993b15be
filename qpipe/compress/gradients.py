"""Gradient estimators: what the backward pass believes about rounding and pruning.

Rounding has derivative zero almost everywhere, so training needs a rule. All rules here have one shape: the forward
value is exactly the compressed value, and the gradient of the dense number is the incoming gradient, kept or dropped
number by number. Only the keep mask (one byte per number) is saved.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


class _Gate(Function):
    """Forward: `value`. Backward: gradient passes to `x` where `keep`, everywhere if `keep` is None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
        ctx.save_for_backward(*(() if keep is None else (keep,)))
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        return (gradient * ctx.saved_tensors[0] if ctx.saved_tensors else gradient), None, None


def straight_through(x: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
    """Return `value` with the gradient routed to `x` where `keep` (bool, shape of `x`) allows; None lets all pass."""
    if keep is not None and keep.shape != x.shape:
        keep = keep.expand_as(x)
    result: Tensor = _Gate.apply(x, value.to(x.dtype), keep)
    return result


class _LearnedScale(Function):
    """Forward: `value`. Backward: gated gradient to `x`, and to `scale` the sum over its group of gradient * slope."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, value: Tensor, keep: Tensor, slope: Tensor, factor: float
    ) -> Tensor:
        ctx.save_for_backward(keep, slope)
        ctx.factor, ctx.shape = factor, scale.shape
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (gradient,) = gradients
        keep, slope = ctx.saved_tensors
        to_scale = (gradient * slope).sum_to_size(ctx.shape) * ctx.factor
        return gradient * keep, to_scale, None, None, None, None


def learned_scale(x: Tensor, scale: Tensor, value: Tensor, keep: Tensor, slope: Tensor, factor: float) -> Tensor:
    """Return `value`; `x` gets the gated gradient, `scale` gets factor * sum(gradient * slope) over each group.

    `slope` is d value / d scale number by number; `factor` the gradient scale of LSQ (1902.08153), 1/sqrt(count Qp).
    """
    result: Tensor = _LearnedScale.apply(x, scale, value.to(x.dtype), keep, slope, factor)
    return result


def power(stored: Tensor, exponent: float) -> Tensor:
    """Powerpropagation (2110.00296): sign(v) |v|^exponent, differentiated exactly."""
    return stored if exponent == 1 else stored * stored.abs().pow(exponent - 1)


@torch.no_grad()
def power_inverse(weight: Tensor, exponent: float) -> Tensor:
    """Stored v whose `power` is `weight`."""
    return weight.sign() * weight.abs().pow(1 / exponent)
