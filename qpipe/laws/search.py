"""The point estimate: many starts, screened by their objective, the best of them polished in one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qpipe.errors import QpipeError
from qpipe.laws.model import Law, Model
from qpipe.laws.parameters import Array, Prior, to_natural, with_fixed, with_free
from qpipe.laws.prepare import Rows, make_design
from qpipe.laws.profile import noise_of
from qpipe.laws.solve import Objective, ObjectiveName, Problem, Solution, minimise
from qpipe.laws.starts import grid_starts

POLISHED = 64
"""Starts that are polished after screening; three quarters the best, the rest spread over the ranking."""


@dataclass(frozen=True)
class Options:
    """How a law is fitted."""

    objective: ObjectiveName = "log-huber"
    delta: float = 1e-3
    fix: Mapping[str, float] | None = None
    free: Sequence[str] = ()
    priors: Sequence[Prior] = ()
    bootstrap: int = 1000
    seed: int = 0
    level: float = 0.9

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.level < 1:
            problems.append(f"level {self.level:g} must lie between 0 and 1, as in 0.9")
        if self.delta <= 0:
            problems.append(f"delta {self.delta:g} must be positive, as in 1e-3")
        if self.bootstrap < 0 or 0 < self.bootstrap < 20:
            problems.append(f"bootstrap {self.bootstrap}: 0 (none) or at least 20 resamples; 1000 is usual")
        if problems:
            raise QpipeError(problems)


@dataclass
class Fitted:
    """A fit in the solver's terms: the rows, the problem, the point and the polished starts."""

    law: Law
    rows: Rows
    problem: Problem
    theta: Array
    value: float
    polished: Solution
    screened: Array
    """All starts (S, P) of the search, best first."""
    options: Options

    @property
    def model(self) -> Model:
        """The law on the fitted rows."""
        return self.problem.model

    @property
    def residual(self) -> Array:
        """Residuals (R,) of the objective's kind."""
        return self.problem.residual(self.model.predict(self.theta[None]))[0]

    def natural(self, theta: Array) -> Array:
        """Return natural values (..., P), coefficients for counts."""
        return to_natural(self.model.parameters, self.model.shift(theta, to_counts=True))


def fit_point(rows: Rows, law: Law, options: Options, polished: int = POLISHED) -> Fitted:
    """Return the best of many starts, `polished` of them (errors: more free parameters than rows)."""
    problem = _problem(rows, law, options)
    _check_degrees(problem)
    fitted = _search(rows, law, options, problem, polished)
    if not options.priors:
        return fitted
    problem.prior_mean, problem.prior_precision = _prior_arrays(fitted, options.priors)
    return _search(rows, law, options, problem, polished)


def _problem(rows: Rows, law: Law, options: Options) -> Problem:
    design = make_design(rows.table, law)
    parameters = with_fixed(with_free(law.parameters(design), options.free), dict(options.fix or {}))
    if options.priors:
        with_fixed(parameters, {p.name: p.value for p in options.priors})
        held = {p.name for p in options.priors}
        model = Model(law, design, parameters, counts=any(p.shifts and p.name in held for p in parameters))
    else:
        model = Model(law, design, parameters)
    zeros = np.zeros(len(parameters))
    kind = Objective(options.objective, options.delta)
    return Problem(model, rows.table["loss"].to_numpy(float), rows.weight[None, :], kind, zeros, zeros)


def _check_degrees(problem: Problem) -> None:
    free = [p.name for p in problem.model.parameters if p.fixed is None]
    if not free:
        raise QpipeError("every parameter is held, so there is nothing to fit; leave one --fix out")
    if problem.loss.size <= len(free):
        raise QpipeError(
            f"{problem.loss.size} rows cannot determine {len(free)} free parameters ({', '.join(free)}); add runs, or "
            "hold parameters with --fix, as in --fix alpha=0.34"
        )


def _search(rows: Rows, law: Law, options: Options, problem: Problem, count: int) -> Fitted:
    starts = grid_starts(problem, problem.weights[0])
    values = problem.values(starts, np.zeros(len(starts), dtype=np.int64))
    ranking = np.argsort(values, kind="stable")
    solution = minimise(problem, starts[_spread(ranking, count)])
    winner = int(np.argmin(solution.value))
    if not np.isfinite(solution.value[winner]):
        raise QpipeError(f"law {law.name}: no start gives a finite objective; check the units of n, d and loss")
    best_theta, best_value = solution.theta[winner], float(solution.value[winner])
    return Fitted(law, rows, problem, best_theta, best_value, solution, starts[ranking], options)


def _spread(ranking: np.ndarray, count: int) -> np.ndarray:
    """Return `count` of the ranked starts: three quarters the best, the rest evenly over the remaining ranks."""
    best = ranking[: count * 3 // 4]
    rest = ranking[best.size :]
    keep = min(rest.size, count - best.size)
    return np.concatenate([best, rest[np.linspace(0, max(rest.size - 1, 0), keep).astype(int)]])


def _prior_arrays(fitted: Fitted, priors: Sequence[Prior]) -> tuple[Array, Array]:
    """Return centres and precisions on the internal scale, in the objective's units of one observation."""
    model = fitted.model
    mean, precision = np.zeros(len(model.names)), np.zeros(len(model.names))
    noise = noise_of(fitted.residual, fitted.problem.objective, len(model.names)).scale
    for prior in priors:
        for position, parameter in enumerate(model.parameters):
            if prior.name in (parameter.name, parameter.family):
                sd = prior.sd / prior.value if parameter.transform == "log" else prior.sd
                mean[position], precision[position] = parameter.to_internal(prior.value), noise / sd**2
    return mean, precision
