"""GMSE: the mean squared error a representation makes on N(0, 1) data, per number.

Two ways, and each result says which it is. *Integration* where one number's error depends on little else: a scale that
is constant for long rows, a group divided by its own RMS, a scale that follows the largest of a group, keep-largest
sparsity. *Monte Carlo* for everything else (vectors, n:m, two-level scales, compositions): finite Gaussian rows go
through the very code that training uses, in chunks, and the standard error over rows is stated.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from scipy.special import ndtri
from torch import Tensor

from qpipe.compress.gaussian import cell_error, gaussian_multiplier, maximum_error, sphere_error
from qpipe.compress.grids import SCALAR_FAMILIES, levels
from qpipe.compress.prepare import Prepared, prepare
from qpipe.compress.quantize import compress
from qpipe.compress.trained import unit_per_scale
from qpipe.formats import Grid, TensorFormat
from qpipe.formats.spec import TRAINED_SCALES

CHUNK = 2**20
"""Numbers per Monte Carlo chunk: bounds memory whatever the sample count."""


class Gmse(NamedTuple):
    """A mean squared error per number of N(0, 1) data."""

    value: float
    standard_error: float | None
    """None for closed forms."""


@lru_cache(maxsize=4096)
def gmse(part: TensorFormat | None, *, width: int = 4096, samples: int = 2**20, seed: int = 0) -> Gmse:
    """GMSE of one side of a representation; `None` (16 bits) has 0 by convention.

    Parameters
    ----------
    width : numbers per row: matters for absolute-maximum scales, whose error grows with it, and for Monte Carlo
    samples : numbers drawn by Monte Carlo, rounded up to whole chunks
    """
    if part is None:
        return Gmse(0.0, None)
    exact = closed_form(part, width)
    return Gmse(exact, None) if exact is not None else monte_carlo(part, width=width, samples=samples, seed=seed)


def closed_form(part: TensorFormat, width: int) -> float | None:
    """Error by integration where the format allows it, else None.

    Scales that converge for long rows (RMS, mean magnitude, trained) are taken at their limit when they serve a row or
    a tensor, and at the true group size otherwise; absolute-maximum scales always at the true size.
    """
    grid, mask = part.parsed_grid, part.mask
    if grid is None:
        return sparsity_error(mask.share) if mask is not None and mask.n is None else None
    if mask is not None:
        return None
    if grid.family == "noise":
        return 4.0**-grid.bits
    return _scalar_error(part, grid, width) if grid.family in SCALAR_FAMILIES else None


def _scalar_error(part: TensorFormat, grid: Grid, width: int) -> float | None:
    values, grouped, ideal = levels(grid.word), isinstance(part.group, int), part.scale_format in ("float16", "float32")
    if part.scale == "absmax" and part.scale_format != "e4m3" and part.group != "tensor":
        return maximum_error(values, int(part.group) if grouped else width, _scale_of_maximum(part, float(values[-1])))
    if part.scale == "gaussian" and ideal and grouped:
        return sphere_error(values * gaussian_multiplier(grid.word), int(part.group))
    if grouped or not ideal:
        return None
    if part.scale == "absmean":
        return cell_error(values * math.sqrt(2 / math.pi) / values[-1])
    if part.scale in ("gaussian", *TRAINED_SCALES):
        return cell_error(values * gaussian_multiplier(grid.word))
    return None


def _scale_of_maximum(part: TensorFormat, top: float) -> Callable[[float], float]:
    if part.scale_format == "e8m0":
        emax = math.floor(math.log2(top))
        return lambda m: 2.0 ** (math.floor(math.log2(m)) - emax)
    return lambda m: m / top


def sparsity_error(share: float) -> float:
    """Error of zeroing the smallest `share` of N(0, 1) numbers: s - 2 t phi(t) with t = ppf(0.5 + s/2)."""
    t = float(ndtri(0.5 + share / 2))
    return share - 2 * t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


@torch.no_grad()
def monte_carlo(part: TensorFormat, *, width: int, samples: int, seed: int) -> Gmse:
    """Measured error with its standard error over rows; a trained scale is put where it would end for such data."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(CHUNK // width, 2)
    prepared = prepare(part)
    scale = _converged_scale(prepared)
    errors: list[Tensor] = []
    with torch.random.fork_rng(devices=[]):  # noise formats draw from the global generator
        torch.manual_seed(seed)
        for _ in range(math.ceil(samples / (rows * width))):
            x = torch.randn(rows, width, generator=generator)
            errors.append((compress(x, prepared, scale=scale) - x).double().square().mean(dim=-1))
    per_row = torch.cat(errors)
    return Gmse(float(per_row.mean()), float(per_row.std() / math.sqrt(len(per_row))))


def _converged_scale(prepared: Prepared) -> Tensor | None:
    """A trained scale at the least error on N(0, 1), shape (1, 1)."""
    if prepared.grid is None or prepared.part.scale not in TRAINED_SCALES:
        return None
    return torch.full((1, 1), gaussian_multiplier(prepared.grid.word) / unit_per_scale(prepared))
