"""Levels of a depth and the distortion they cause: D(B) by exact integration.

A code book of depth B has 2^B levels for numbers with mean 0 and standard deviation 1, and the borders of their cells.
A group of weights with scale s and offset m is represented by m + s * level.

Companders (Panter and Dite 1951) map numbers through F, cut (0, 1) evenly, and map back:

    border_k = F^-1(k 2^-B),   level_k = F^-1((k + 1/2) 2^-B)

With F the distribution function of the normalised cube root of the density the error is the least possible as
B grows: for a Laplace density that is a Laplace distribution three times as wide, for a Gaussian one a Gaussian
sqrt(3) times as wide. CVXQ (2409.02026, eq. 8) uses the first. At the depths that matter (1 to 4 bits) neither is
optimal, so each scale is searched, and two more families are offered: evenly spaced levels with the step of least error
on N(0, 1), and Lloyd-Max levels of N(0, 1).

Distortion is in units of the group's variance: D(0) = 1, an ideal quantizer of a Gaussian has D(B) = 4^-B.
"""

import math
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from qpipe.compress.codebooks import lloyd_max
from qpipe.compress.gaussian import optimal_multiplier
from qpipe.compress.grids import levels as grid_levels
from qpipe.ptq_methods import Kind

Array = NDArray[np.float64]

KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_DEPTH = 8
"""Deepest code in bits."""
SEARCH: Array = 2.0 ** np.linspace(-2, 2, 33)
"""Multipliers of the scale that CVXQ's search tries: 2^-2 ... 2^2 in steps of 2^(1/8)."""


class CodeBook(NamedTuple):
    """Levels and cell borders for numbers of mean 0 and variance 1."""

    levels: Array
    """sorted, shape (2^B,)"""
    borders: Array
    """between neighbouring levels, shape (2^B - 1,)"""


@lru_cache
def code_book(kind: Kind, depth: int) -> CodeBook:
    """Return the code book of `depth` bits, 0 to 8; depth 0 is the single level 0."""
    if depth == 0:
        return CodeBook(np.zeros(1), np.empty(0))
    count = 2**depth
    if kind in ("laplace", "gauss"):
        inverse = _laplace_quantile if kind == "laplace" else _gauss_quantile
        return CodeBook(inverse((np.arange(count) + 0.5) / count), inverse(np.arange(1, count) / count))
    if kind == "uniform":
        word = f"int{depth}"
        values = grid_levels(word) * optimal_multiplier(word)
    else:
        values = lloyd_max(count)
    return CodeBook(values, (values[1:] + values[:-1]) / 2)


def _laplace_quantile(share: Array) -> Array:
    """Inverse of 1/2 [1 + sgn t (1 - exp(-sqrt2 |t| / 3))]."""
    return np.asarray(np.sign(0.5 - share) * 3 / math.sqrt(2) * np.log(2 * np.minimum(share, 1 - share)))


def _gauss_quantile(share: Array) -> Array:
    return np.asarray(math.sqrt(3) * ndtri(share))


def distortion(book: CodeBook, density: Literal["gauss", "laplace"], multiplier: float = 1.0) -> float:
    """Return E[(x - q(x))^2] for x of the density with variance 1, levels and borders times `multiplier`.

    Summed over cells from the closed forms of the density's partial moments of order 0, 1 and 2.
    """
    borders = np.concatenate([[-np.inf], book.borders * multiplier, [np.inf]])
    level = book.levels * multiplier
    zeroth, first, second = (np.diff(m) for m in (_gauss_moments if density == "gauss" else _laplace_moments)(borders))
    return float(np.sum(second - 2 * level * first + level**2 * zeroth))


def searched_distortion(
    book: CodeBook, density: Literal["gauss", "laplace"], search: Array = SEARCH
) -> tuple[float, float]:
    """Return the least distortion over the multipliers tried, and the multiplier that has it."""
    return min((distortion(book, density, float(c)), float(c)) for c in search)


def _gauss_moments(x: Array) -> tuple[Array, Array, Array]:
    """Integrals of 1, t and t^2 times the normal density from minus infinity to x."""
    finite = np.where(np.isfinite(x), x, 0.0)
    density = np.where(np.isfinite(x), np.exp(-(finite**2) / 2) / math.sqrt(2 * math.pi), 0.0)
    return ndtr(x), -density, ndtr(x) - finite * density


def _laplace_moments(x: Array) -> tuple[Array, Array, Array]:
    """The same for the Laplace density of variance 1, exp(-a |t|) a / 2 with a = sqrt2."""
    a = math.sqrt(2)
    t = np.where(np.isfinite(x), np.abs(x), 0.0)
    tail = np.where(np.isfinite(x), np.exp(-a * t) / 2, 0.0)
    # Of |t| beyond |x|: tail, (|x| + 1/a) tail, (x^2 + 2 |x| / a + 2 / a^2) tail.
    low = (tail, -(t + 1 / a) * tail, (t**2 + 2 * t / a + 2 / a**2) * tail)
    high = (1 - low[0], low[1], 1 - low[2])
    return tuple(np.where(x < 0, below, above) for below, above in zip(low, high, strict=True))  # type: ignore[return-value]
