"""Rounding numbers onto any grid, and the codes that name the rounded values.

Ties: integer mid-tread grids round half to even; mid-rise grids take the upper level; floating-point grids round half
to the even code; tables of levels take the lower level.
"""

import torch
from torch import Tensor

from qpipe.compress.grids import exponent_range, lowest_level
from qpipe.compress.tables import level_table
from qpipe.compress.vectors import decode_vectors, nearest_codes
from qpipe.formats import Grid


def round_to_grid(y: Tensor, grid: Grid) -> Tensor:
    """Nearest grid value of `y`, shape (..., width), in the grid's unit; integer grids overwrite `y`."""
    if grid.uniform:
        return _round_uniform(y, grid)
    if grid.family == "float":
        return _round_float(y, grid)
    if grid.dimension > 1:
        return decode_vectors(nearest_codes(y, grid), grid, y)
    table = level_table(grid, y)
    return table[torch.bucketize(y, (table[1:] + table[:-1]) / 2)]


def encode(values: Tensor, grid: Grid) -> Tensor:
    """Codes of numbers that lie on a scalar grid (rounded before), int64; floats by their rank among the levels."""
    if grid.uniform:
        return (values - lowest_level(grid)).round().long()
    table = level_table(grid, values)
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2)


def decode(codes: Tensor, grid: Grid, like: Tensor) -> Tensor:
    """Grid values of codes, in the grid's unit, on the device and in the dtype of `like`."""
    if grid.uniform:
        return codes.to(like.dtype) + lowest_level(grid)
    return level_table(grid, like)[codes]


def _round_uniform(y: Tensor, grid: Grid) -> Tensor:
    """Integer grids; `y` is in steps."""
    low = lowest_level(grid)
    high = low + grid.codes - 1
    if grid.family == "rise":
        return y.floor_().clamp_(low - 0.5, high - 0.5).add_(0.5)
    return y.round_().clamp_(low, high)


def _round_float(y: Tensor, grid: Grid) -> Tensor:
    """Floating-point grids; saturates at the largest value."""
    smallest, top = exponent_range(grid.exponent, grid.mantissa)
    step = _power_of_two_below(y).clamp_(min=2.0**smallest).mul_(2.0**-grid.mantissa)
    return y.div(step).round_().mul_(step).clamp_(-top, top)


def _power_of_two_below(y: Tensor) -> Tensor:
    """2^floor(log2|y|), and something not larger than 2^-126 below that (zeros, subnormals)."""
    if y.dtype == torch.float32:  # the exponent field alone is that number
        return (y.view(torch.int32) & 0x7F800000).view(torch.float32)
    return torch.ldexp(torch.ones_like(y), torch.frexp(y).exponent - 1)
