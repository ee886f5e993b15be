"""Mean squared error of a scalar grid on N(0, 1) data, in closed form, and the scale that makes it least.

For sorted values v_1 < ... < v_n with cell borders b_i half-way between neighbours,

    E[(x - q(x))^2] = 1 + sum_i [ v_i^2 P_i - 2 v_i M_i ],   P_i = Phi(b_i+1) - Phi(b_i),  M_i = phi(b_i) - phi(b_i+1),

because the integral of x phi(x) over a cell is M_i. No sampling, no quadrature.
"""

import itertools
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from qpipe.compress.grids import levels
from qpipe.formats import parse_grid

Array = NDArray[np.float64]

QUEST_CLIP: dict[str, float] = {
    "int1": 0.79788456,
    "ternary": 1.22400895,
    "int2": 1.49353462,
    "int3": 2.05106835,
    "int4": 2.51393058,
    "int5": 2.91609388,
    "int6": 3.27659728,
    "int7": 3.60104972,
    "int8": 3.88493868,
}
"""Top level in standard deviations as the QuEST authors' code has it. At 7 and 8 bits it lies slightly off the flat
optimum (3.6111, 3.9222; error 0.15 % higher at 8 bits) and is kept for fidelity."""


def cell_error(values: Array, limit: float = np.inf) -> float:
    """Integral of (x - q(x))^2 phi(x) over |x| < limit, q rounding to the nearest of the sorted `values`, shape (n,).

    With no limit this is the mean squared error on N(0, 1). Summed cell by cell, the upper half mirrored into the lower
    tail, which keeps full relative precision for fine grids.
    """
    low, high = _cells(values, limit)
    inside = high > low
    return float(_cell_integrals(low[inside], high[inside], values[inside]).sum())


def _cells(values: Array, limit: float) -> tuple[Array, Array]:
    borders = np.clip(np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]]), -limit, limit)
    return borders[:-1], borders[1:]


def sphere_error(values: Array, count: int) -> float:
    """Mean squared error of `values` on a group of `count` Gaussian numbers divided by the group's own RMS.

    Such a group is uniform on the sphere of radius sqrt(count) whatever its RMS, so a number has the density
    (1 - t^2/count)^((count - 3)/2) up to a constant, and E[RMS^2] = 1 restores the unit. The substitution
    t = sqrt(count) sin(u) leaves the smooth weight cos(u)^(count - 2), integrated cell by cell.
    """
    low, high = _cells(values, math.sqrt(count))
    nodes, weights = np.polynomial.legendre.leggauss(200)
    u = np.arcsin(np.clip(np.stack([low, high]) / math.sqrt(count), -1, 1))
    half = (u[1] - u[0])[:, None] / 2
    angle = (u[0] + u[1])[:, None] / 2 + half * nodes
    density = np.exp((count - 2) * np.log(np.cos(angle))) * half * weights
    error = (math.sqrt(count) * np.sin(angle) - values[:, None]) ** 2
    constant = math.exp(math.lgamma(count / 2) - math.lgamma((count - 1) / 2)) / math.sqrt(math.pi)
    return float((error * density).sum() * constant)


def maximum_error(values: Array, count: int, scale_of: Callable[[float], float]) -> float:
    """Mean squared error of a group of `count` N(0, 1) numbers whose scale is a function of its largest magnitude.

    Given the maximum m, the other numbers are N(0, 1) cut to |x| < m. Integrated over the density of the maximum,
    2 count phi(m) (2 Phi(m) - 1)^(count - 1), octave by octave because power-of-two scales jump there.
    """
    edges = np.array([2.0**k for k in range(-12, 4)])
    nodes, weights = np.polynomial.legendre.leggauss(160)
    total = 0.0
    for low, high in itertools.pairwise(edges):
        for m, w in zip((low + high) / 2 + (high - low) / 2 * nodes, weights * (high - low) / 2, strict=True):
            total += w * _error_given_maximum(values * scale_of(m), count, m)
    return total / count


def _error_given_maximum(values: Array, count: int, m: float) -> float:
    """Squared error of the whole group at maximum m, times the maximum's density."""
    inside = 2 * ndtr(m) - 1
    density = 2 * count * math.exp(-m * m / 2) / math.sqrt(2 * math.pi)
    if density * inside ** (count - 1) < 1e-18:
        return 0.0
    largest = float(np.min((values - m) ** 2))
    rest = cell_error(values, m) * inside ** (count - 2) * (count - 1)
    return density * (largest * inside ** (count - 1) + rest)


def _cell_integrals(low: Array, high: Array, v: Array) -> Array:
    """Integral of (x - v)^2 phi(x) over (low, high): (1 + v^2) P - [ (x - 2v) phi(x) ] at the ends."""
    # Cells of the upper half are mirrored down, where ndtr differences do not cancel.
    flip = low + high > 0
    low, high, v = np.where(flip, -high, low), np.where(flip, -low, high), np.where(flip, -v, v)
    probability = ndtr(high) - ndtr(low)
    return (1 + v**2) * probability - (_edge(high, v) - _edge(low, v))


def _edge(x: Array, v: Array) -> Array:
    finite = np.where(np.isfinite(x), x, 0.0)
    return np.where(np.isfinite(x), (finite - 2 * v) * np.exp(-(finite**2) / 2) / np.sqrt(2 * np.pi), 0.0)


@lru_cache
def optimal_multiplier(word: str) -> float:
    """Grid unit in standard deviations that minimises the error on N(0, 1): x is represented by scale * level.

    Floating-point grids repeat themselves from octave to octave, so the error has many minima; of those within 1e-6
    of the best the smallest unit is taken, which does not hang on the last digits of a machine's arithmetic.
    """
    from scipy.optimize import minimize_scalar  # slow to import, and the published grids need none of it

    grid = levels(word)
    found = [
        minimize_scalar(
            lambda s: cell_error(grid * np.exp(s)), bounds=(lo, lo + 0.5), method="bounded", options={"xatol": 1e-10}
        )
        for lo in np.log(6.0 / grid[-1]) + np.arange(-4.0, 4.0, 0.5)
    ]
    best = min(minimum.fun for minimum in found)
    return float(np.exp(next(minimum.x for minimum in found if minimum.fun <= best * (1 + 1e-6))))


def gaussian_multiplier(word: str) -> float:
    """Multiplier of the `gaussian` scale rule: QuEST's constants where they exist, else the optimum."""
    if word in QUEST_CLIP:
        return QUEST_CLIP[word] / float(levels(word)[-1])
    return 1.0 if parse_grid(word).dimension > 1 else optimal_multiplier(word)
