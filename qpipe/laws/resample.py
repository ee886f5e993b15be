"""Resamples of a loss table, as weights on its rows.

Runs are drawn with replacement within each representation, because plain resampling of a table in which a format has
three runs loses that format altogether in one resample of twenty. Rows that share a training trajectory are drawn
together: checkpoints of one run are not independent.
"""

import numpy as np
import pandas as pd

from qpipe.laws.parameters import Array


def case_weights(table: pd.DataFrame, resamples: int, seed: int) -> Array:
    """Return how often each row is drawn, shape (resamples, R); stratified by representation, by trajectory if given.

    A stratum of one unit always keeps it: its representation's multiplier varies only through the shared parameters.
    """
    generator = np.random.default_rng(seed)
    unit = _units(table)
    strata = table["representation"].to_numpy()
    weights = np.zeros((resamples, len(table)))
    for stratum in dict.fromkeys(strata):
        rows = np.flatnonzero(strata == stratum)
        names, inverse = np.unique(unit[rows], return_inverse=True)
        counts = generator.multinomial(names.size, np.full(names.size, 1 / names.size), size=resamples)
        weights[:, rows] = counts[:, inverse]
    return weights


def _units(table: pd.DataFrame) -> np.ndarray:
    """Return the unit of each row that is drawn as a whole: its trajectory, or itself."""
    own = np.array([f"row {i}" for i in range(len(table))])
    if "trajectory" not in table:
        return own
    trajectory = table["trajectory"].to_numpy(dtype=str)
    return np.where(trajectory == "", own, np.char.add("trajectory ", trajectory))
