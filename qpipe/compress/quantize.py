"""One side of a layer: a `TensorFormat` applied to a tensor, forward exactly and backward by its estimator.

The order is fixed: (rotate,) prune, find the scale of the dense numbers, round, zero the pruned ones, attach the
gradient rule. So a sparse and quantized weight is pruned first and its scale is that of the dense row (2502.05003).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qpipe.compress.binary import binary_codes, binary_scales, binary_values
from qpipe.compress.gradients import straight_through
from qpipe.compress.masks import gradient_mask, join_gates, select, select_per_token
from qpipe.compress.prepare import Prepared
from qpipe.compress.rounding import round_to_grid
from qpipe.compress.scales import find_scale, grouped, reciprocal
from qpipe.compress.trained import represent_with_trained_scale, with_trained_scale
from qpipe.compress.vectors import outer_radius


class Represented(NamedTuple):
    """What stands for a tensor, and what differentiating it needs; all of the tensor's shape."""

    value: Tensor
    """compressed numbers"""
    gate: Tensor | None
    """where gradient passes (bool); None: everywhere"""
    slope: Tensor | None = None
    """d value / d scale, where the scale is trained"""


def compress(
    x: Tensor,
    prepared: Prepared,
    *,
    scale: Tensor | None = None,
    scale_count: int = 1,
    kept_share: Tensor | None = None,
    per_token: bool = False,
    training: bool = False,
    by: Callable[..., Represented] | None = None,
) -> Tensor:
    """Represent `x`, shape (..., width), and differentiate by the format's own rule.

    Parameters
    ----------
    scale : the trained scale, where the scale rule has one
    scale_count : numbers that LSQ counts in the gradient scale: the matrix's (weights) or one token's (activations)
    kept_share : share kept at this point of a mask schedule (0-dim tensor); None for the final mask
    per_token : choose masks per last-dimension row (activations) instead of over the whole tensor (weights)
    training : enables what differs in training only: Quant-Noise shares and uniform noise
    by : `represent`, or that compiled
    """
    grid = prepared.grid
    if grid is None and prepared.mask is None:
        return x
    if grid is not None and grid.family == "noise":
        return add_noise(x, grid.bits, _choose(x, prepared, kept_share, per_token))
    by = represent if by is None else by  # not `or`: torch 2.11's compiler breaks off there and loses gradients
    with torch.no_grad():
        value, gate, slope = by(x, prepared, scale, kept_share, per_token, training)
    if slope is None:
        return straight_through(x, value, gate)
    assert scale is not None
    return with_trained_scale(x, prepared, scale, scale_count, value, gate, slope)


def represent(
    x: Tensor,
    prepared: Prepared,
    scale: Tensor | None,
    kept_share: Tensor | None,
    per_token: bool,
    training: bool,
) -> Represented:
    """Do all of `compress` but attach the gradient rule: arithmetic that is not differentiated itself."""
    keep = _choose(x, prepared, kept_share, per_token)
    if prepared.grid is None:
        assert keep is not None
        assert prepared.mask is not None
        return Represented(x * keep, gradient_mask(x, keep, prepared.mask))
    if scale is not None:
        value, gate, slope = represent_with_trained_scale(x, prepared, scale, keep)
        return Represented(value.to(x.dtype), gate, slope)
    rounded, passes = _represent(x, prepared, keep, training=training)
    if training and prepared.part.share < 1:
        rounded, passes = _leave_some_exact(x, rounded, passes, prepared.part.share, keep)
    return Represented(rounded.to(x.dtype), passes)


def _choose(x: Tensor, prepared: Prepared, kept_share: Tensor | None, per_token: bool) -> Tensor | None:
    if prepared.mask is None:
        return None
    with torch.no_grad():
        return select_per_token(x, prepared.mask) if per_token else select(x, prepared.mask, kept_share)


def _represent(x: Tensor, prepared: Prepared, keep: Tensor | None, *, training: bool) -> tuple[Tensor, Tensor | None]:
    """Compressed value of `x`, and where its gradient passes (None: everywhere), both of the shape of `x`."""
    assert prepared.grid is not None
    groups = grouped(x, prepared.part.group)
    if prepared.grid.family == "binary":
        return _represent_by_signs(x, groups, prepared, keep)
    scale = find_scale(groups, prepared)
    y = groups * reciprocal(scale)
    # Uniform grids round in place, so what the gate needs of y is worked out before.
    level = None if prepared.grid.uniform else round_to_grid(y, prepared.grid)
    gate = _trusted(y, level, prepared)
    if keep is not None and prepared.mask is not None:
        gate = _gate_of_pruned(x, y, keep, gate, prepared)
    if prepared.part.gradient == "uniform-noise" and training:
        value = (y + torch.rand_like(y) - 0.5).mul_(scale)
    else:
        value = (round_to_grid(y, prepared.grid) if level is None else level).mul_(scale)
    if keep is not None:
        value = value * keep.reshape(value.shape)
    return value.reshape(x.shape), None if gate is None else gate.reshape(x.shape)


def _represent_by_signs(
    x: Tensor, groups: Tensor, prepared: Prepared, keep: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Sums of signs bring their own scales; with gradient clip numbers beyond the largest sum get no gradient."""
    assert prepared.grid is not None
    scales = binary_scales(groups, prepared.grid)
    value = binary_values(binary_codes(groups, scales), scales).reshape(x.shape)
    gate = None
    if prepared.part.gradient == "clip":
        gate = (groups.abs() <= scales.sum(-1, keepdim=True)).reshape(x.shape)
    if keep is not None:
        value = value * keep
        gate = _gate_of_pruned(x, x, keep, gate, prepared)
    return value, gate


def _trusted(y: Tensor, level: Tensor | None, prepared: Prepared) -> Tensor | None:
    """Where the estimator passes gradient, from numbers and their levels in grid units; None for everywhere.

    On an integer grid the error is at most half a step exactly on the grid's own range widened by half a step, so
    the trust mask needs one comparison and no rounded value.
    """
    assert prepared.grid is not None
    gradient, grid = prepared.part.gradient, prepared.grid
    if gradient in ("ste", "uniform-noise"):
        return None
    if grid.dimension > 1:
        norm = y.unflatten(-1, (-1, grid.dimension)).norm(dim=-1, keepdim=True)
        return (norm <= outer_radius(grid, y)).expand(*norm.shape[:-1], grid.dimension).reshape(y.shape)
    if gradient == "trust" and level is not None:
        return (level - y).abs() <= prepared.radius
    if gradient == "trust" and prepared.part.outer is not None:
        return y.abs() <= prepared.part.outer * prepared.high
    low, high = prepared.low, prepared.high
    if gradient == "trust":
        low, high = low - prepared.radius, high + prepared.radius
    return y.abs() <= high if low == -high else (y >= low) & (y <= high)


def _gate_of_pruned(x: Tensor, y: Tensor, keep: Tensor, trusted: Tensor | None, prepared: Prepared) -> Tensor | None:
    """Gate of shape `y` under a mask; with backward `trust` a pruned number is trusted where 0 is near enough to it."""
    assert prepared.mask is not None
    if prepared.mask.backward == "trust" and trusted is not None:
        return torch.where(keep.reshape(y.shape), trusted, y.abs() <= prepared.radius)
    return join_gates(trusted, keep.reshape(y.shape), gradient_mask(x, keep, prepared.mask))


def _leave_some_exact(
    x: Tensor, value: Tensor, gate: Tensor | None, share: float, keep: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Quant-Noise: a random 1 - share of the numbers stays exact in this step, and its gradient with it."""
    exact = torch.rand_like(x) >= share
    if keep is not None:
        exact = exact & keep
    return torch.where(exact, x, value), None if gate is None else gate | exact


def add_noise(x: Tensor, bits: float, keep: Tensor | None = None) -> Tensor:
    """Gaussian noise of relative variance 4^-bits in place of a quantizer, in training and evaluation alike.

    No quantizer of this rate has a smaller error (rate-distortion bound of the Gaussian). The noise is scaled by the
    standard deviation of the last dimension and fresh in every call; the gradient flows through all of it.
    """
    noisy = x + torch.randn_like(x) * x.std(dim=-1, keepdim=True, correction=0) * 2.0**-bits
    return noisy if keep is None else noisy * keep
