"""Levels of the scalar grids.

Every grid is given in its own unit: one step for integer grids, the standard's values for floating point, one standard
deviation for Gaussian-optimal grids. A scale rule (`qpipe.compress.scales`) maps data into that unit.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from qpipe.compress.codebooks import lloyd_max, normal_float
from qpipe.errors import QpipeError
from qpipe.formats import Grid, parse_grid

SCALAR_FAMILIES = ("rise", "tread", "narrow", "float", "normal", "gauss")
"""Grid families with one list of levels for single numbers."""


@lru_cache
def levels(word: str) -> NDArray[np.float64]:
    """Sorted levels of a scalar grid, shape (codes,), float64, read-only."""
    grid = parse_grid(word)
    if grid.uniform:
        values = np.arange(grid.codes) + lowest_level(grid)
    elif grid.family == "float":
        values = _float_levels(grid.exponent, grid.mantissa)
    elif grid.family == "normal":
        values = normal_float()
    elif grid.family == "gauss":
        values = lloyd_max(grid.codes)
    else:
        raise QpipeError(f"grid '{word}' has no fixed list of scalar levels")
    result: NDArray[np.float64] = values.astype(np.float64)
    result.setflags(write=False)
    return result


def lowest_level(grid: Grid) -> float:
    """Lowest level of an integer grid in steps: -(n-1)/2 when symmetric, -n/2 for two's complement."""
    return -grid.codes / 2 if grid.family == "tread" else -(grid.codes - 1) / 2


def exponent_range(exponent: int, mantissa: int) -> tuple[int, float]:
    """Smallest normal exponent and largest value of a floating-point grid.

    Bias 2^(e-1) - 1 and all codes finite, except E4M3 (448) and E5M2 (57344), whose
    standards keep codes for NaN and infinities.
    """
    bias = 2 ** (exponent - 1) - 1
    smallest = 1 - bias
    if (exponent, mantissa) == (5, 2):
        return smallest, 57344.0
    top = 2.0 ** (2**exponent - 1 - bias) * (2 - 2.0**-mantissa)
    return smallest, 448.0 if (exponent, mantissa) == (4, 3) else top


def _float_levels(exponent: int, mantissa: int) -> NDArray[np.float64]:
    """All values of sign + exponent + mantissa bits; +0 and -0 are one level."""
    smallest, top = exponent_range(exponent, mantissa)
    fraction = np.arange(2**mantissa) / 2**mantissa
    subnormal = fraction * 2.0**smallest
    normal = [(1 + fraction) * 2.0 ** (smallest + k) for k in range(2**exponent - 1)]
    positive = np.concatenate([subnormal, *normal])
    positive = positive[positive <= top]
    return np.unique(np.concatenate([-positive, positive])) + 0.0


@lru_cache
def half_gap(word: str) -> float:
    """Half of the largest gap between neighbouring levels: the trust radius in the grid's unit (2502.05003)."""
    return 0.5 if parse_grid(word).uniform else float(np.diff(levels(word)).max() / 2)
