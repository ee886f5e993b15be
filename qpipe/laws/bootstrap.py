"""The bootstrap: every resample is fitted from several starts, all resamples in one batch."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qpipe.laws.model import Model
from qpipe.laws.parameters import Array
from qpipe.laws.profile import covariance
from qpipe.laws.resample import row_weights
from qpipe.laws.search import Fitted
from qpipe.laws.solve import Problem, minimise

LOOSE, TIGHT = 1e-4, 3e-6
"""Tolerances of searches that only look for a better basin, and of those that are kept: an objective this close to its
lowest moves a parameter by a few hundredths of its standard error."""

RIVAL = 1.5
"""Basins whose objective is within this factor of the best can win a resample and are searched in each."""
LOOSE_ITERATIONS, ITERATIONS = 60, 100
"""Most steps of a search with either tolerance."""
PILOT = 64
"""Resamples on which every start is tried; a start that wins none of them by `GAIN` is not tried on the rest."""
GAIN = 1e-3


def resample(fitted: Fitted) -> Array | None:
    """Return the bootstrap's parameter vectors (B, P), internal scale, or None without bootstrap.

    Residuals of a fit of R runs with P parameters are smaller than the noise, so draws are stretched about the optimum
    by a power of R / (R - P): the square root for least squares, where it is exact, and the fourth root for Huber's
    objective, which fits a part of the runs exactly and leaves the others at their distance (calibrated by simulation).
    """
    options = fitted.options
    if not options.bootstrap:
        return None
    smooth = bool(np.isfinite(fitted.problem.objective.threshold))
    weights = row_weights(fitted.rows.table, options.bootstrap, options.seed, smooth) * fitted.rows.weight
    batch = replace(fitted.problem, weights=weights)
    draws = _best_of_starts(batch, _starts(fitted), options.bootstrap)
    free = sum(p.fixed is None for p in fitted.model.parameters)
    runs = fitted.problem.loss.size
    stretch = (runs / (runs - free)) ** (0.25 if smooth else 0.5)
    return np.clip(fitted.theta + stretch * (draws - fitted.theta), fitted.model.lower, fitted.model.upper)


def _best_of_starts(batch: Problem, starts: Array, count: int) -> Array:
    """Fit every resample from the optimum, then look from the other starts for anything better."""
    everyone = np.arange(count)
    solution = minimise(batch, np.tile(starts[0], (count, 1)), everyone, ITERATIONS, TIGHT)
    theta, value = solution.theta, solution.value
    pilot, rest = everyone[:PILOT], everyone[PILOT:]
    for start in starts[1:]:
        if _improve(batch, start, pilot, theta, value) and rest.size:
            _improve(batch, start, rest, theta, value)
    return theta


def _improve(batch: Problem, start: Array, chosen: NDArray[np.int64], theta: Array, value: Array) -> bool:
    """Fit the chosen resamples from another start, keep what is better (in place); whether any is by `GAIN`."""
    found = minimise(batch, np.tile(start, (chosen.size, 1)), chosen, LOOSE_ITERATIONS, LOOSE)
    before = value[chosen]
    winners = chosen[found.value < before * (1 - 1e-7)]
    if winners.size:
        finished = minimise(batch, found.theta[np.isin(chosen, winners)], winners, ITERATIONS, TIGHT)
        theta[winners], value[winners] = finished.theta, finished.value
    return bool((value[chosen] < before * (1 - GAIN)).any())


def _starts(fitted: Fitted) -> Array:
    """Return the starts of every resample (3 to 7, P).

    The optimum; up to two rival basins that the search found; the best points without irreducible loss and with much
    of it when they are rivals too, because E switches between its bound and the inside more often than anything else;
    and two points two standard errors away along the least determined direction.
    """
    polished = fitted.polished
    chosen, values = [fitted.theta], [fitted.value]
    for i in np.argsort(polished.value, kind="stable"):
        if len(chosen) < 3 and values[-1] * 1.001 < polished.value[i] < fitted.value * RIVAL:
            chosen.append(polished.theta[i])
            values.append(float(polished.value[i]))
    return np.concatenate([np.stack(chosen), _with_irreducible(fitted), _along_valley(fitted)])


def _along_valley(fitted: Fitted) -> Array:
    """Return the points (2, P) two standard errors off the optimum along the least determined direction."""
    values, vectors = np.linalg.eigh(covariance(fitted))
    step = 2.0 * np.sqrt(max(values[-1], 0.0)) * vectors[:, -1]
    step *= min(1.0, 1.0 / max(float(np.abs(step).max()), 1e-300))
    return np.clip(fitted.theta + np.stack([step, -step]), fitted.model.lower, fitted.model.upper)


def _with_irreducible(fitted: Fitted) -> Array:
    """Return the full sample's optima (0 to 2, P) with E at 0 and at three quarters of the lowest loss, if rivals."""
    model, position = fitted.model, fitted.model.index["E"]
    if model.parameters[position].fixed is not None:
        return np.empty((0, len(model.names)))
    parameters = [replace(p, fixed=0.0) if p.name == "E" else p for p in model.parameters]
    held = Model(model.law, model.design, parameters, counts=model.unit_n == 0.0)
    levels = np.array([0.0, 0.75 * fitted.problem.loss.min()])
    near = np.abs(fitted.screened[:, position] - levels[:, None]).argmin(axis=1)
    starts = np.tile(np.concatenate([fitted.theta[None], fitted.screened[near]]), (2, 1))
    starts[:, position] = np.repeat(levels, 3)
    solution = minimise(replace(fitted.problem, model=held), starts, iterations=100, tolerance=1e-6)
    best = solution.value.reshape(2, 3).argmin(axis=1) + np.array([0, 3])
    return solution.theta[best[solution.value[best] < RIVAL * fitted.value]]
