"""Grids that are solutions of an optimisation: Lloyd-Max levels, Gaussian code books, the E8 ball, NF4.

A code book is part of what a format means, so the vector code books of the catalogue are shipped as numbers
(`codebooks.npz`, made by `build_shipped` below); any other size is computed on demand by the same seeded code and kept
in the user's cache folder.
"""

import itertools
import os
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_banded
from scipy.special import ndtr, ndtri

Array = NDArray[np.float64]

SHIPPED = Path(__file__).with_name("codebooks.npz")
SHIPPED_SIZES = ((2, 16), (2, 64), (2, 256), (4, 16), (4, 256), (8, 256))
"""(dimension, codes) of the shipped code books: 2, 3, 4, 1, 2 and 1 bits per number."""
SAMPLES = 2**19
SWEEPS = 200
POLISH = 30


@lru_cache
def lloyd_max(count: int) -> Array:
    """The `count` levels of least mean squared error for N(0, 1), shape (count,).

    Each level must be the mean of its cell (Lloyd 1957, Max 1960). Newton's method on those equations, whose Jacobian
    is tridiagonal, from the asymptotic density of levels (proportional to the cube root of the normal density).
    """
    levels = np.sqrt(3.0) * ndtri((np.arange(count) + 0.5) / count)
    for _ in range(200):
        residual, jacobian = _centroid_equations(levels)
        step = solve_banded((1, 1), jacobian, residual)
        gaps = np.diff(levels)
        worst = np.max(-np.diff(-step) / gaps, initial=0.0)  # keep the levels in order
        levels = levels - step * min(1.0, 0.5 / worst if worst > 0 else 1.0)
        if np.abs(step).max() < 1e-14 * np.abs(levels).max():
            break
    return (levels - levels[::-1]) / 2


def _centroid_equations(levels: Array) -> tuple[Array, Array]:
    """Level minus mean of its cell, and the banded Jacobian, rows (above, on, below the diagonal)."""
    borders = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    density = np.exp(-(borders**2) / 2) / np.sqrt(2 * np.pi)
    # Probabilities from the lower tail on both halves, where they do not cancel.
    tail = ndtr(-np.abs(borders))
    low, high = borders[:-1], borders[1:]
    crossing = (low < 0) & (high > 0)
    probability = np.where(crossing, 1 - tail[:-1] - tail[1:], np.abs(tail[1:] - tail[:-1]))
    mean = (density[:-1] - density[1:]) / probability
    finite = np.where(np.isfinite(borders), borders, 0.0)
    by_low = np.where(np.isfinite(low), density[:-1] * (mean - finite[:-1]) / probability, 0.0)
    by_high = np.where(np.isfinite(high), density[1:] * (finite[1:] - mean) / probability, 0.0)
    above, below = np.zeros_like(levels), np.zeros_like(levels)
    above[1:], below[:-1] = -by_high[:-1] / 2, -by_low[1:] / 2
    return levels - mean, np.stack([above, 1 - (by_low + by_high) / 2, below])


@lru_cache
def normal_float() -> Array:
    """NF4: quantiles of N(0, 1) scaled to [-1, 1], 8 positive and 7 negative ones and zero (QLoRA, 2305.14314)."""
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    positive = ndtri(np.linspace(offset, 0.5, 9)[:-1])
    negative = -ndtri(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, negative, [0.0]]))
    return np.asarray(values / values.max(), dtype=np.float64)


@lru_cache
def code_book(dimension: int, count: int) -> NDArray[np.float32]:
    """`count` code vectors for N(0, I), shape (count, dimension): shipped, cached, or computed now."""
    if (dimension, count) in SHIPPED_SIZES:
        with np.load(SHIPPED, allow_pickle=False) as shipped:
            return np.asarray(shipped[f"vq{dimension}x{count}"], dtype=np.float32)
    cached = _cache_folder() / f"vq{dimension}x{count}-1.npy"
    if cached.exists():
        return np.asarray(np.load(cached, allow_pickle=False), dtype=np.float32)
    book = train_code_book(dimension, count)
    _save(cached, book)
    return book


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "qpipe"


def _save(path: Path, book: NDArray[np.float32]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
        np.save(file, book)
        file.flush()
        os.fsync(file.fileno())
    Path(file.name).replace(path)


def gaussian_points(dimension: int, count: int, seed: int) -> NDArray[np.float32]:
    """`count` (a power of two) evenly spread N(0, I) points: a scrambled Sobol sequence through the normal quantile."""
    from scipy.stats import qmc  # takes a third of a second to import, and books are shipped

    uniform = qmc.Sobol(dimension, seed=seed).random(count)
    return np.asarray(ndtri(np.clip(uniform, 1e-12, 1 - 1e-12)), dtype=np.float32)


def train_code_book(dimension: int, count: int, *, samples: int = SAMPLES, starts: int = 8) -> NDArray[np.float32]:
    """Best of `starts` seeded searches for the code book of least mean squared error, shape (count, dimension)."""
    points = gaussian_points(dimension, samples, seed=1)
    books = [_search(points, count, seed) for seed in range(starts)]
    best = min(books, key=lambda book: float(assign(points, book)[1].mean()))
    for _ in range(POLISH):
        best = _centroids(points, best)
    return best[np.lexsort(best.T[::-1])]


def _search(points: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    """Generalised Lloyd iteration for N(0, I) with cooling noise, which steps over poor local minima.

    Every sweep draws a fresh share of the points. Cells that empty are restarted beside the cell with most error.
    """
    samples, dimension = points.shape
    generator = np.random.default_rng(seed)
    if (dimension, count) == (8, 256):
        book, spread = _lattice_start(seed), 0.03
    else:
        book = gaussian_points(dimension, 2 ** max(int(np.ceil(np.log2(count))), 1), seed)[:count].copy()
        book *= np.sqrt((dimension + 2) / dimension)  # asymptotic density of optimal points: f^(d / (d + 2))
        spread = 0.8 * count ** (-1 / dimension)
    for sweep in range(SWEEPS):
        batch = points[generator.integers(0, samples, samples // 16)]
        noise = spread * max(0.0, 1 - 1.2 * sweep / SWEEPS) ** 2
        book = _centroids(batch, book) + noise * generator.standard_normal(book.shape).astype(np.float32)
    return book


def _lattice_start(seed: int) -> NDArray[np.float32]:
    """The 240 shortest vectors of E8 around 16 inner points: 1.5 % less error than what random starts find."""
    pairs = [
        [a * (k == i) + b * (k == j) for k in range(8)]
        for i, j in itertools.combinations(range(8), 2)
        for a, b in itertools.product((1, -1), repeat=2)
    ]
    halves = [signs for signs in itertools.product((0.5, -0.5), repeat=8) if sum(s < 0 for s in signs) % 2 == 0]
    shell = np.array([*pairs, *halves], dtype=np.float32) / np.sqrt(2) * 2.33
    return np.concatenate([shell, 0.4 * gaussian_points(8, 16, seed)]).astype(np.float32)


def _centroids(points: NDArray[np.float32], book: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean of the points nearest to each code vector."""
    count, dimension = book.shape
    nearest, error = assign(points, book)
    size = np.bincount(nearest, minlength=count)
    sums = np.stack([np.bincount(nearest, weights=points[:, k], minlength=count) for k in range(dimension)], axis=1)
    result = np.where(size[:, None] > 0, sums / np.maximum(size, 1)[:, None], 0.0)
    empty = np.flatnonzero(size == 0)
    if len(empty):
        cell_error = np.bincount(nearest, weights=error, minlength=count)
        result[empty] = result[np.argsort(cell_error)[-len(empty) :]] * 1.01 + 1e-3
    return result.astype(np.float32)


def assign(points: NDArray[np.float32], book: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Index of the nearest code vector and squared distance, for points of shape (n, dimension)."""
    nearest = np.empty(len(points), dtype=np.int64)
    half_norm = (book**2).sum(1) / 2
    for start in range(0, len(points), 16384):
        chunk = points[start : start + 16384]
        nearest[start : start + 16384] = (chunk @ book.T - half_norm).argmax(1)
    return nearest, ((points - book[nearest]) ** 2).sum(1)


def build_shipped() -> None:
    """Recompute `codebooks.npz`."""
    books = {
        f"vq{d}x{n}": train_code_book(d, n, samples=2 * SAMPLES, starts=1 if d == 8 else 16 if n < 256 else 3)
        for d, n in SHIPPED_SIZES
    }
    with tempfile.NamedTemporaryFile(dir=SHIPPED.parent, suffix=".npz", delete=False) as file:
        np.savez_compressed(file, **books)  # type: ignore[arg-type]
    Path(file.name).replace(SHIPPED)


@lru_cache
def e8_magnitudes() -> NDArray[np.float32]:
    """256 magnitude patterns of half-integer vectors, shape (256, 8): the shell structure of an E8 ball (2402.04396).

    E8 is (Z + 1/2)^8 with even coordinate sum, and that set shifted by 1/2. All 227 patterns of squared norm up to 10
    and the first 29 of norm 12 in lexicographic order; 7 free signs and a shift by +-1/4 make 2^16 code vectors.
    """
    patterns = [
        (sum(v * v for v in p), p) for p in itertools.product((0.5, 1.5, 2.5), repeat=8) if sum(v * v for v in p) <= 12
    ]
    return np.array([p for _, p in sorted(patterns)[:256]], dtype=np.float32)
