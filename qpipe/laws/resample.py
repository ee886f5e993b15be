"""Resamples of a loss table, as weights on its rows.

Runs are drawn with replacement within each representation, because plain resampling of a table in which a format has
three runs loses that format altogether in one resample of twenty. Rows that share a training trajectory are drawn
together: checkpoints of one run are not independent.
"""

import numpy as np
import pandas as pd

from qpipe.laws.parameters import Array


def row_weights(table: pd.DataFrame, resamples: int, seed: int, smooth: bool) -> Array:
    """Return weights of rows, shape (resamples, R); stratified by representation, by trajectory if given.

    Parameters
    ----------
    table
        Rows with `representation` and perhaps `trajectory`.
    resamples, seed
        How many, and the seed of numpy's generator.
    smooth
        Draw weights from a flat Dirichlet distribution (the Bayesian bootstrap, Rubin 1981) instead of counting cases
        drawn with replacement. Huber's objective with a small threshold behaves like a median, whose plain bootstrap
        is known to spread too far in small samples; smooth weights do not. A stratum of one unit always keeps it: its
        multiplier varies only through the shared parameters.
    """
    generator = np.random.default_rng(seed)
    unit = _units(table)
    strata = table["representation"].to_numpy()
    weights = np.zeros((resamples, len(table)))
    for stratum in dict.fromkeys(strata):
        rows = np.flatnonzero(strata == stratum)
        names, inverse = np.unique(unit[rows], return_inverse=True)
        if smooth:
            drawn = generator.dirichlet(np.ones(names.size), size=resamples) * names.size
        else:
            drawn = generator.multinomial(names.size, np.full(names.size, 1 / names.size), size=resamples).astype(float)
        weights[:, rows] = drawn[:, inverse]
    return weights


def _units(table: pd.DataFrame) -> np.ndarray:
    """Return the unit of each row that is drawn as a whole: its trajectory, or itself."""
    own = np.array([f"row {i}" for i in range(len(table))])
    if "trajectory" not in table:
        return own
    trajectory = table["trajectory"].to_numpy(dtype=str)
    return np.where(trajectory == "", own, np.char.add("trajectory ", trajectory))
