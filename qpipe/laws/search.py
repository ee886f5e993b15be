"""The point estimate: many starts, screened by their objective, the best of them polished in one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qpipe.errors import QpipeError
from qpipe.laws.diagnose import same_optimum
from qpipe.laws.model import Law, Model
from qpipe.laws.parameters import Array, Prior, to_natural, with_fixed, with_free
from qpipe.laws.prepare import Rows, make_design
from qpipe.laws.profile import noise_of
from qpipe.laws.solve import Objective, ObjectiveName, Problem, Solution, minimise
from qpipe.laws.starts import grid_starts

POLISHED = 64
"""Starts that are polished after screening; three quarters the best, the rest spread over the ranking."""
ESCAPES, BASINS = 6, 8
"""Most rounds of escape from optima that few starts agree on, and how many different ones each round starts from."""


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
    solution = _escape(problem, minimise(problem, starts[_spread(ranking, count)]), count)
    winner = int(np.argmin(solution.value))
    if not np.isfinite(solution.value[winner]):
        raise QpipeError(f"law {law.name}: no start gives a finite objective; check the units of n, d and loss")
    best_theta, best_value = solution.theta[winner], float(solution.value[winner])
    return Fitted(law, rows, problem, best_theta, best_value, solution, starts[ranking], options)


def _escape(problem: Problem, found: Solution, count: int) -> Solution:
    """Look around the best optima while few searches agree on one or runs are few; return all searches.

    With few runs to spare Huber's objective has many optima, as a median has many kinks. `count` searches first follow
    the problem with random row weights, which shifts the kinks, and then the true one (iterated local search). Rounds
    end when one finds nothing better.
    """
    runs = problem.loss.size
    scarce = runs < 3 * sum(p.fixed is None for p in problem.model.parameters)
    generator = np.random.default_rng(0)
    for _ in range(ESCAPES):
        best = float(found.value.min())
        agreed = 2 * same_optimum(found.value, best, runs).sum() >= found.value.size
        if not np.isfinite(best) or (agreed and not scarce):
            break
        basins = _basins(found)
        shaken = replace(problem, weights=problem.weights[0] * generator.standard_exponential((count, runs)))
        moved = minimise(shaken, basins[np.arange(count) % len(basins)], np.arange(count), 60, 1e-4)
        again = minimise(problem, moved.theta)
        found = found.joined(again)
        if same_optimum(np.array([best]), float(found.value.min()), runs).all():
            break
    return found


def _basins(found: Solution) -> Array:
    """Return the best different optima (1 to `BASINS`, P) among searches."""
    chosen: list[int] = []
    for i in np.argsort(found.value, kind="stable"):
        if len(chosen) < BASINS and (not chosen or found.value[i] > found.value[chosen[-1]] * (1 + 1e-4)):
            chosen.append(int(i))
    return found.theta[chosen]


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
