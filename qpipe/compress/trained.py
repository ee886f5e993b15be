"""Scales that are trained with the weights: LSQ, stretched-elastic quantization and learned clipping.

In units of the scale s, with levels between n and p and y = x / s, the three rules are

| gradient | reaches x where | slope d value / d s |
|---|---|---|
| learned-step (LSQ, 1902.08153) | n <= y <= p | round(y) - y inside, n or p outside |
| clip (PACT, 1805.06085) | n <= y <= p | 0 inside, -1 or 1 outside (s is the clipping point) |
| stretched (SEQ, 2502.02631) | abs(y) <= 0.99 | q(y) - y inside, -t or t outside, t the top level |

SEQ lays n cells evenly over [-s, s], which makes the levels +-1/4, +-3/4 (2 bits) and -2/3, 0, 2/3 (ternary); with one
bit the levels are -s and s, x is reached where abs(y) <= 1 and the slope is the sign. The authors' code uses t = 1 for
ternary although the top level is 2/3: `published_slope` selects theirs.
"""

import math

import torch
from torch import Tensor

from qpipe.compress.gradients import learned_scale
from qpipe.compress.masks import gradient_mask, join_gates
from qpipe.compress.prepare import Prepared
from qpipe.compress.rounding import round_to_grid
from qpipe.compress.scales import absolute_maximum, grouped, mean_magnitude
from qpipe.formats import Grid

SMALLEST_SCALE = 1e-5
"""Floor of trained scales in the forward pass, as ParetoQ's code has it. So an all-zero group whose grid has no zero is
represented by its smallest levels times this, not by exact zeros."""
STRETCHED_CLIP = 0.99
"""Where the stretched rule clips: below 1, so that the row maximum does not round to a level that does not exist."""


def represent_with_trained_scale(
    x: Tensor, prepared: Prepared, scale: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return value, gradient gate and slope of `x`, each of its shape, under the parameter `scale`.

    `scale` is shaped like a group's scale.
    """
    assert prepared.grid is not None
    groups = grouped(x, prepared.part.group)
    unit = _floored(scale) * unit_per_scale(prepared)
    y = groups / unit
    level = round_to_grid(y.clone(), prepared.grid)
    gate, slope = _rules(y, level, prepared)
    value = level * unit
    if keep is not None and prepared.mask is not None:
        kept = keep.reshape(groups.shape)
        value, slope = value * kept, slope * kept
        gate = join_gates(gate, kept, gradient_mask(x, keep, prepared.mask))
    return value.reshape(x.shape), gate.reshape(x.shape), slope.reshape(x.shape)


def with_trained_scale(
    x: Tensor, prepared: Prepared, scale: Tensor, count: int, value: Tensor, gate: Tensor | None, slope: Tensor
) -> Tensor:
    """Return `value` with the gradients of `x` and of `scale`; `count` numbers enter LSQ's factor."""
    assert prepared.grid is not None
    assert gate is not None
    groups = grouped(x, prepared.part.group)
    value, gate, slope = (part.reshape(groups.shape) for part in (value, gate, slope))
    factor = gradient_factor(prepared.grid, count)
    return learned_scale(groups, _floored(scale), value, gate, slope, factor).reshape(x.shape)


def _floored(scale: Tensor) -> Tensor:
    return torch.where(scale > SMALLEST_SCALE, scale, SMALLEST_SCALE)


def unit_per_scale(prepared: Prepared) -> float:
    """Grid units per trained scale: 1 for a step, 1 / top level for a clipping point, 2/n for n stretched cells."""
    assert prepared.grid is not None
    if prepared.part.scale == "learned":
        return 1.0
    if prepared.part.scale == "clip" or prepared.grid.codes == 2:
        return 1 / prepared.high
    return 2 / prepared.grid.codes


def _rules(y: Tensor, level: Tensor, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """Gradient gate and slope (table above) from numbers and levels in grid units."""
    unit = unit_per_scale(prepared)
    if prepared.part.gradient == "stretched":
        return _stretched(y * unit, level * unit, prepared)
    inside = (y >= prepared.low) & (y <= prepared.high)
    residual = level - y if prepared.part.gradient == "learned-step" else torch.zeros_like(y)
    return inside, torch.where(inside, residual, level) * unit


def _stretched(y: Tensor, value: Tensor, prepared: Prepared) -> tuple[Tensor, Tensor]:
    """SEQ's gate and slope, in units of its scale."""
    assert prepared.grid is not None
    if prepared.grid.codes == 2:
        return y.abs() <= 1, value
    inside = y.abs() <= STRETCHED_CLIP
    top = 1.0 if prepared.part.published_slope else 1 - 1 / prepared.grid.codes
    return inside, torch.where(inside, value - y, y.sign() * top)


def gradient_factor(grid: Grid, count: int) -> float:
    """Gradient scale of a trained scale, 1 / sqrt(count Qp) with Qp = max(2^(b-1) - 1, 1) of the integer grid."""
    return 1 / math.sqrt(count * _top_integer(grid))


def _top_integer(grid: Grid) -> int:
    return max(2 ** (math.ceil(math.log2(grid.codes)) - 1) - 1, 1)


def starting_scale(x: Tensor, prepared: Prepared) -> Tensor:
    """First value of a trained scale for groups along the last dimension of `x` (kept as size 1).

    `lsq`: a step of 2 mean|x| / sqrt(Qp); `absmax`, `absmean`: the largest or mean magnitude, divided by Qp where the
    scale is a step.
    """
    assert prepared.grid is not None
    top = _top_integer(prepared.grid)
    if prepared.part.scale_start == "lsq":
        return 2 * mean_magnitude(x) / math.sqrt(top) / unit_per_scale(prepared)
    start = absolute_maximum(x) if prepared.part.scale_start == "absmax" else mean_magnitude(x)
    return start / top if prepared.part.scale == "learned" else start
