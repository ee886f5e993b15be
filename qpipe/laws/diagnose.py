"""How far a fit can be trusted: convergence, bounds, and whether the data tell its parameters apart."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qpipe.laws.parameters import Array

if TYPE_CHECKING:
    from qpipe.laws.search import Fitted

SAME = 1e-6
"""Relative difference of objectives below which two searches count as having found the same optimum."""
EXACT = 1e-20
"""Objective per run below which a fit is exact to rounding, and its digits are noise."""
GRADED = ("alpha", "beta", "E")
"""Parameters of every law that are always profiled and graded."""
RAY_CORRELATION = 0.995
"""Correlation of log N with log D above which the runs lie on one ray of tokens per parameter."""


def same_optimum(values: Array, best: float, runs: int) -> NDArray[np.bool_]:
    """Return which searches (S,) ended at the best objective, or in a fit that is exact to rounding."""
    return np.asarray(values <= best * (1 + SAME) + EXACT * runs)


def at_bound(fitted: "Fitted") -> list[str]:
    """Return the names of fitted parameters that ended at a bound."""
    model, theta = fitted.model, fitted.theta
    tolerance = 1e-9 * (1 + np.abs(theta))
    touching = (theta <= model.lower + tolerance) | (theta >= model.upper - tolerance)
    return [p.name for p, hit in zip(model.parameters, touching, strict=True) if hit and p.fixed is None]


def condition_number(fitted: "Fitted") -> float:
    """Return the condition number of the scaled Gauss-Newton matrix of the shared free parameters off their bounds."""
    model = fitted.model
    bounded = set(at_bound(fitted))
    free = [i for i, p in enumerate(model.parameters[: model.shared]) if p.fixed is None and p.name not in bounded]
    prediction, jacobian, grouped = model.linearise(fitted.theta[None])
    scaled = jacobian[0][free] / prediction[0] * np.sqrt(fitted.problem.weights[0])
    if grouped is not None and model.groups:
        column = grouped[0] / prediction[0] * np.sqrt(fitted.problem.weights[0])
        for member in range(model.groups):
            rows = model.members == member
            norm = max(float(column[rows] @ column[rows]), 1e-300)
            scaled[:, rows] -= np.outer(scaled[:, rows] @ column[rows] / norm, column[rows])
    norms = np.linalg.norm(scaled, axis=1)
    if not free or (norms == 0).any():
        return float("inf") if free else 1.0
    return float(np.linalg.cond((scaled / norms[:, None]).T) ** 2)


def status(fitted: "Fitted", profiles: dict[str, Any]) -> dict[str, Any]:
    """Return the contract's status: converged, at_bound, identified, agreeing_starts, message, and the evidence."""
    polished = fitted.polished
    agreeing = int(same_optimum(polished.value, fitted.value, fitted.problem.loss.size).sum())
    winner = int(np.argmin(polished.value))
    others = polished.value[polished.value > fitted.value * (1 + 1e-4)]
    bounds = at_bound(fitted)
    condition = condition_number(fitted)
    ray = _one_ray(fitted)
    grades = {name: entry["grade"] for name, entry in profiles.items() if not name.startswith("eff")}
    weak = [name for name, grade in grades.items() if grade != "identified" and name not in bounds]
    converged = bool(polished.converged[winner]) and agreeing >= 2
    problems = _messages(converged, agreeing, polished.value.size, bounds, condition, ray, weak)
    return {
        "converged": converged,
        "at_bound": bounds,
        "identified": not (bounds or ray or weak or condition > 1e8),
        "agreeing_starts": agreeing,
        "starts": int(polished.value.size),
        "runner_up": float(others.min() / fitted.value - 1) if others.size and fitted.value > 0 else None,
        "condition": condition,
        "grades": grades,
        "message": "; ".join(problems) or "converged, all parameters identified",
    }


def _one_ray(fitted: "Fitted") -> bool:
    """Whether all fitted runs lie on one ray of tokens per parameter."""
    design = fitted.model.design
    held = {p.name for p in fitted.model.parameters if p.fixed is not None}
    if np.ptp(design.log_n) == 0 or np.ptp(design.log_d) == 0:
        return not {"alpha", "beta"} <= held
    correlation = np.corrcoef(design.log_n, design.log_d)[0, 1]
    return bool(correlation > RAY_CORRELATION and not {"alpha", "beta", "E"} & held)


def _messages(
    converged: bool, agreeing: int, starts: int, bounds: list[str], condition: float, ray: bool, weak: list[str]
) -> list[str]:
    problems = []
    if not converged:
        problems.append(f"not converged: {agreeing} of {starts} starts reached the best objective")
    if bounds:
        problems.append(f"{', '.join(bounds)} at a bound: not identified by these runs")
    if ray:
        problems.append(
            "all runs lie on one ray of tokens per parameter, which cannot separate the size term, the "
            "data term and E: vary D/N"
        )
    if weak:
        problems.append(f"{', '.join(weak)} weakly or not identified: see the profile")
    if condition > 1e8:
        problems.append(
            f"ill-conditioned (condition number {condition:.0e}): trust multipliers and predictions inside "
            "the fitted range, not bare exponents"
        )
    return problems
