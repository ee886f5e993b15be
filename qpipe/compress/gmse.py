"""GMSE: the mean squared error a representation makes on N(0, 1) data, per number.

Two ways, and each result says which it is. *Closed form*: one scale per long row, which for Gaussian data is a
constant, so the error is a sum over the grid's cells; and keep-largest sparsity, which is an integral over one
threshold. *Monte Carlo*: everything else is measured by sending finite Gaussian rows through the very code that
training uses, in chunks, with the standard error over rows.
"""

import math
from typing import NamedTuple

import torch
from scipy.special import ndtri
from torch import Tensor

from qpipe.compress.gaussian import cell_error, gaussian_multiplier
from qpipe.compress.grids import SCALAR_FAMILIES, levels
from qpipe.compress.prepare import Prepared, prepare
from qpipe.compress.quantize import compress
from qpipe.compress.rotation import rotate
from qpipe.compress.trained import unit_per_scale
from qpipe.formats import TensorFormat
from qpipe.formats.spec import TRAINED_SCALES

CHUNK = 2**20
"""Numbers per Monte Carlo chunk: bounds memory whatever the sample count."""


class Gmse(NamedTuple):
    """A mean squared error per number of N(0, 1) data."""

    value: float
    standard_error: float | None
    """None for closed forms."""


def gmse(part: TensorFormat | None, *, width: int = 4096, samples: int = 2**22, seed: int = 0, block: int = 1) -> Gmse:
    """GMSE of one side of a representation; `None` (16 bits) has 0 by convention.

    Parameters
    ----------
    width : numbers per row, for what depends on it (Monte Carlo only; closed forms are the limit of long rows)
    samples : numbers drawn by Monte Carlo, rounded up to whole chunks
    block : Hadamard block applied before (it leaves N(0, 1) data N(0, 1), so it only matters for exactness)
    """
    if part is None:
        return Gmse(0.0, None)
    exact = closed_form(part)
    return (
        Gmse(exact, None)
        if exact is not None
        else monte_carlo(part, width=width, samples=samples, seed=seed, block=block)
    )


def closed_form(part: TensorFormat) -> float | None:
    """Long-row limit where one exists in closed form, else None."""
    grid, mask = part.parsed_grid, part.mask
    if grid is None:
        return sparsity_error(mask.share) if mask is not None and mask.n is None else None
    if mask is not None:
        return None
    if grid.family == "noise":
        return 4.0**-grid.bits
    scalar = grid.family in SCALAR_FAMILIES and part.scale_format in ("float16", "float32")
    if scalar and part.scale == "gaussian" and not isinstance(part.group, int):
        return cell_error(levels(grid.word) * gaussian_multiplier(grid.word))
    return None


def sparsity_error(share: float) -> float:
    """Error of zeroing the smallest `share` of N(0, 1) numbers: s - 2 t phi(t) with t = ppf(0.5 + s/2)."""
    t = float(ndtri(0.5 + share / 2))
    return share - 2 * t * math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


@torch.no_grad()
def monte_carlo(part: TensorFormat, *, width: int, samples: int, seed: int, block: int = 1) -> Gmse:
    """Measured error with its standard error over rows; trained scales are started from their own data."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(CHUNK // width, 2)
    errors: list[Tensor] = []
    prepared = prepare(part)
    with torch.random.fork_rng(devices=[]):  # noise formats draw from the global generator
        torch.manual_seed(seed)
        for _ in range(math.ceil(samples / (rows * width))):
            x = rotate(torch.randn(rows, width, generator=generator), block)
            value = compress(x, prepared, scale=_fitted_scale(prepared), per_token=True)
            errors.append((value - x).double().square().mean(dim=-1))
    per_row = torch.cat(errors)
    return Gmse(float(per_row.mean()), float(per_row.std() / math.sqrt(len(per_row))))


def _fitted_scale(prepared: Prepared) -> Tensor | None:
    """A trained scale is put at the least error on N(0, 1): what training would find for such data."""
    if prepared.grid is None or prepared.part.scale not in TRAINED_SCALES:
        return None
    return torch.full((1, 1), gaussian_multiplier(prepared.grid.word) / unit_per_scale(prepared))
