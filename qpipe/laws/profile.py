"""Profile likelihood: how far a parameter can move before the fit gets worse than noise explains.

The parameter is held at points around its optimum and everything else is fitted again, all points in one batch. The
interval is where twice the rise of the objective, in units of the noise, stays below the chi-square quantile with one
degree of freedom. For Huber's objective the unit is E[rho'^2] / E[rho''] (Heritier & Ronchetti 1994). An interval that
never closes before the parameter's bound is *open*: the data do not identify the parameter, whatever its estimate.
"""

import itertools
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from qpipe.errors import QpipeError, nearest
from qpipe.laws.model import Model
from qpipe.laws.parameters import Array, to_natural
from qpipe.laws.solve import Objective, Problem, minimise

if TYPE_CHECKING:
    from qpipe.laws.search import Fitted

STEPS = np.array([0.35, 0.7, 1.05, 1.4, 1.8, 2.2, 2.7, 3.5, 5.0, 8.0, 14.0, 25.0])
"""Distances of the held points from the optimum, in standard errors of the quadratic approximation."""


@dataclass(frozen=True)
class Noise:
    """Mean squared influence E[rho'^2] and mean curvature E[rho''] of the residuals, corrected for lost freedom."""

    influence: float
    curvature: float

    @property
    def scale(self) -> float:
        """Return what turns differences of the objective into differences of log likelihood."""
        return self.influence / self.curvature


def noise_of(residual: Array, objective: Objective, parameters: int) -> Noise:
    """Estimate the noise of a fit's residuals (R,).

    Few residuals lie inside a threshold of 1e-3, so E[rho''] is 2 threshold f(0) with the density f(0) estimated in a
    window as wide as the residuals.
    """
    freedom = residual.size / max(residual.size - parameters, 1)
    threshold = objective.threshold
    spread = float(np.median(np.abs(residual))) / 0.6745 * np.sqrt(freedom)
    if not np.isfinite(threshold) or spread <= threshold / 3:
        return Noise(max(float(np.mean(objective.influence(residual) ** 2)) * freedom, 1e-300), 1.0)
    window = max(threshold, spread)
    inside = max(float(np.mean(np.abs(residual) <= window * np.sqrt(1 / freedom))), 1 / residual.size)
    # a Gaussian density averaged over one standard deviation is 0.8556 of its peak
    curvature = min(1.0, inside * threshold / window / (0.8556 if window > threshold else 1.0))
    return Noise(float(np.mean(objective.influence(residual) ** 2)), curvature)


def dense_jacobian(fitted: "Fitted") -> Array:
    """Return the Jacobian (R, P) of the residuals at the optimum, the grouped family spread over its columns."""
    model = fitted.model
    prediction, jacobian, grouped = model.linearise(fitted.theta[None])
    dense = np.zeros((fitted.problem.loss.size, len(model.names)))
    dense[:, : model.shared] = jacobian[0].T
    if grouped is not None and model.groups:
        rows = np.flatnonzero(model.members >= 0)
        dense[rows, model.shared + model.members[rows]] = grouped[0, rows]
    return dense / prediction[0][:, None] if fitted.problem.objective.logarithmic else dense


def covariance(fitted: "Fitted") -> Array:
    """Return the quadratic approximation's covariance (P, P) on the internal scale; held parameters have zeros."""
    free = np.flatnonzero([p.fixed is None for p in fitted.model.parameters])
    jacobian = dense_jacobian(fitted)[:, free] * np.sqrt(fitted.problem.weights[0])[:, None]
    noise = noise_of(fitted.residual, fitted.problem.objective, free.size)
    scale = np.maximum(np.linalg.norm(jacobian, axis=0), 1e-150)
    inverse = np.linalg.pinv((jacobian / scale).T @ (jacobian / scale), rcond=1e-13, hermitian=True)
    result = np.zeros((len(fitted.model.names),) * 2)
    result[np.ix_(free, free)] = inverse / np.outer(scale, scale) * noise.influence / noise.curvature**2
    return result


def profile(fitted: "Fitted", name: str, level: float) -> dict[str, Any]:
    """Return the profile of one parameter.

    Returns
    -------
    `values` (natural) and `rise` (twice the rise of the objective in units of noise; chi-square with one degree of
    freedom), `low`, `high`, `open_low`, `open_high`, `level`, and a `grade`: identified, weak or none.

    Raises
    ------
    QpipeError
        No such parameter, or it is held.
    """
    model = fitted.model
    if name not in model.index or model.parameters[model.index[name]].fixed is not None:
        known = [p.name for p in model.parameters if p.fixed is None]
        raise QpipeError(f"no fitted parameter '{name}' to profile{nearest(name, known)}; known: {', '.join(known)}")
    position = model.index[name]
    points, rises = _held_fits(fitted, position)
    limit = _chi_square(level)
    low, open_low = _crossing(points, rises, limit, -1)
    high, open_high = _crossing(points, rises, limit, +1)
    single = [model.parameters[position]]
    low, high = (float(to_natural(single, np.array([x]))[0]) for x in (low, high))
    values = to_natural(single * points.size, points).tolist()
    return {
        "values": values,
        "rise": rises.tolist(),
        "low": low,
        "high": high,
        "open_low": open_low,
        "open_high": open_high,
        "level": level,
        "grade": _grade(fitted, name, low, high, open_low or open_high),
    }


def _held_fits(fitted: "Fitted", position: int) -> tuple[Array, Array]:
    """Return held values (K,) on the internal scale in counts, sorted, and the rise of the objective at each (K,)."""
    held, theta = _held_problem(fitted, position)
    direction, error = _direction(fitted, position)
    if held.model.unit_n != fitted.model.unit_n or held.model.unit_d != fitted.model.unit_d:
        direction = np.zeros_like(direction)
    steps = np.concatenate([-STEPS[::-1], [0.0], STEPS]) * error
    starts = theta + steps[:, None] * direction
    starts[:, position] = theta[position] + steps
    starts = np.clip(starts, held.model.lower, held.model.upper)
    starts = starts[np.unique(starts[:, position], return_index=True)[1]]
    value = _settle(held, starts, position)
    parameters = sum(p.fixed is None for p in fitted.model.parameters)
    scale = noise_of(fitted.residual, fitted.problem.objective, parameters).scale
    return starts[:, position], np.maximum(2 * (value - fitted.value) / scale, 0.0)


def _held_problem(fitted: "Fitted", position: int) -> tuple[Problem, Array]:
    """Return the problem with one parameter held, and the optimum in that problem's units."""
    model, problem = fitted.model, fitted.problem
    parameters = [replace(p, fixed=0.0) if i == position else p for i, p in enumerate(model.parameters)]
    counts = model.unit_n == 0.0 and model.unit_d == 0.0
    held = Model(model.law, model.design, parameters, counts=counts)
    theta = held.shift(model.shift(fitted.theta, to_counts=True), to_counts=False)
    return replace(problem, model=held), theta


def _direction(fitted: "Fitted", position: int) -> tuple[Array, float]:
    """Return how the other parameters follow this one near the optimum (P,), and its standard error."""
    matrix = covariance(fitted)
    variance = max(float(matrix[position, position]), 1e-12)
    return matrix[:, position] / variance, min(float(np.sqrt(variance)), 3.0)


def _settle(held: Problem, starts: Array, position: int) -> Array:
    """Return the objective (K,) at every held value, each also tried from its neighbours' solutions."""
    solution = minimise(held, starts)
    value, theta = solution.value, solution.theta
    neighbours = np.concatenate([np.roll(theta, 1, axis=0), np.roll(theta, -1, axis=0)])
    neighbours[:, position] = np.tile(starts[:, position], 2)
    again = minimise(held, neighbours, iterations=100).value.reshape(2, -1)
    return np.minimum(value, again.min(axis=0))


def _crossing(points: Array, rises: Array, limit: float, side: int) -> tuple[float, bool]:
    """Return where the profile first rises above `limit` on one side of its minimum, and whether it never does."""
    root = np.sqrt(rises)
    path = list(range(int(np.argmin(rises)), points.size if side > 0 else -1, side))
    for here, there in itertools.pairwise(path):
        if rises[there] > limit:
            share = (np.sqrt(limit) - root[here]) / max(root[there] - root[here], 1e-300)
            return float(points[here] + share * (points[there] - points[here])), False
    return float(points[path[-1]]), True


def _chi_square(level: float) -> float:
    """Return the quantile of chi-square with one degree of freedom."""
    return NormalDist().inv_cdf(0.5 + level / 2) ** 2


def _grade(fitted: "Fitted", name: str, low: float, high: float, is_open: bool) -> str:
    """Grade: none = the interval does not close; weak = wider than half the value (half the lowest loss for E)."""
    if is_open:
        return "none"
    scale = float(fitted.problem.loss.min()) if name == "E" else (low + high) / 2
    return "weak" if high - low > 0.5 * scale else "identified"
