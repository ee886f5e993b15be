"""A `TensorFormat` with its constants worked out once, so that a forward pass only does tensor arithmetic."""

from dataclasses import dataclass
from functools import lru_cache

from qpipe.compress.gaussian import gaussian_multiplier
from qpipe.compress.grids import SCALAR_FAMILIES, half_gap, levels
from qpipe.compress.vectors import E8_UNIT
from qpipe.formats import Grid, Mask, TensorFormat


@dataclass(frozen=True)
class Prepared:
    """What compressing a tensor needs to know. Grid values are in the grid's own unit."""

    part: TensorFormat
    grid: Grid | None
    low: float = 0.0
    """Lowest level of a scalar grid."""
    high: float = 0.0
    """Highest level of a scalar grid."""
    radius: float = 0.0
    """Half the largest gap between neighbouring levels: the trust radius."""
    multiplier: float = 1.0
    """Grid unit in standard deviations for the `gaussian` scale rule."""

    @property
    def mask(self) -> Mask | None:
        """The part's mask."""
        return self.part.mask


@lru_cache
def prepare(part: TensorFormat) -> Prepared:
    """Work out the constants of `part`."""
    grid = part.parsed_grid
    if grid is not None and grid.family == "lattice":
        return Prepared(part, grid, multiplier=E8_UNIT)
    if grid is None or grid.family not in SCALAR_FAMILIES:
        return Prepared(part, grid)
    values = levels(grid.word)
    multiplier = gaussian_multiplier(grid.word) if part.scale == "gaussian" else 1.0
    return Prepared(part, grid, float(values[0]), float(values[-1]), half_gap(grid.word), multiplier)
