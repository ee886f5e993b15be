"""Fitting: the point estimate from many starts, the bootstrap, and a status that can be trusted.

The default objective is the field's: Huber's function of log residuals, threshold 1e-3, summed (2203.15556; never
averaged, which stops optimizers early). A fit is judged by its objective: how many of the best starts end at the same
value, whether a parameter sits at its bound, and whether the data tell the parameters apart at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from qpipe import __version__
from qpipe.errors import QpipeError
from qpipe.laws import diagnose
from qpipe.laws.catalogue import get_law
from qpipe.laws.model import Law, Model
from qpipe.laws.parameters import Array, Prior, to_natural, with_fixed, with_free
from qpipe.laws.prepare import Rows, make_design, select_rows
from qpipe.laws.resample import case_weights
from qpipe.laws.result import Fit
from qpipe.laws.solve import Objective, ObjectiveName, Problem, Solution, minimise
from qpipe.laws.starts import grid_starts
from qpipe.laws.threads import single_blas_thread

POLISHED = 64
"""Starts that are polished after screening; three quarters the best, the rest spread over the ranking."""
SAME = 1e-6
"""Relative difference of objectives below which two searches count as having found the same optimum."""


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


def fit(
    table: pd.DataFrame,
    law: str = "compression",
    *,
    exclude: Sequence[str] = (),
    bootstrap: int = 1000,
    seed: int = 0,
    level: float = 0.9,
    objective: ObjectiveName = "log-huber",
    delta: float = 1e-3,
    fix: Mapping[str, float] | None = None,
    free: Sequence[str] = (),
    priors: Sequence[Prior] = (),
) -> Fit:
    """Fit a law to a loss table.

    Parameters
    ----------
    table
        What `read_losses` returned: one row per finished run.
    law
        Name of a law in `qpipe.laws.LAWS`.
    exclude
        Rules for rows to leave out, e.g. ``loss > 5``; kept in the result.
    bootstrap, seed, level
        Resamples (0 for none), their seed, and the level of all intervals.
    objective, delta
        `log-huber` (default), `log-l2`, `huber` or `l2` (raw loss), and Huber's threshold.
    fix, free
        Parameters or families held at natural values; parameters to release that the law holds by default.
    priors
        Gaussian beliefs about parameters.

    Raises
    ------
    QpipeError
        Rows at fault, columns missing, unknown names, fewer rows than parameters.
    """
    options = Options(objective, delta, fix, free, priors, bootstrap, seed, level)
    with single_blas_thread():
        fitted = fit_point(select_rows(table, get_law(law), exclude), get_law(law), options)
        draws = resample(fitted)
        return _result(fitted, draws)


def fit_point(rows: Rows, law: Law, options: Options) -> Fitted:
    """Return the best of many starts (errors: more free parameters than rows)."""
    problem = _problem(rows, law, options)
    _check_degrees(problem)
    fitted = _search(rows, law, options, problem)
    if not options.priors:
        return fitted
    problem.prior_mean, problem.prior_precision = _prior_arrays(fitted, options.priors)
    return _search(rows, law, options, problem)


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
    if problem.loss.size <= len(free):
        raise QpipeError(
            f"{problem.loss.size} rows cannot determine {len(free)} free parameters ({', '.join(free)}); add runs, or "
            "hold parameters with --fix, as in --fix alpha=0.34"
        )


def _search(rows: Rows, law: Law, options: Options, problem: Problem) -> Fitted:
    starts = grid_starts(problem, problem.weights[0])
    values = problem.values(starts, np.zeros(len(starts), dtype=np.int64))
    ranking = np.argsort(values, kind="stable")
    best = ranking[: POLISHED * 3 // 4]
    spread = (
        ranking[np.linspace(best.size, ranking.size - 1, POLISHED // 4).astype(int)]
        if len(starts) > POLISHED
        else ranking[best.size :]
    )
    polished = minimise(problem, starts[np.concatenate([best, spread])])
    winner = int(np.argmin(polished.value))
    if not np.isfinite(polished.value[winner]):
        raise QpipeError(f"law {law.name}: no start gives a finite objective; check the units of n, d and loss")
    return Fitted(law, rows, problem, polished.theta[winner], float(polished.value[winner]), polished, options)


def _prior_arrays(fitted: Fitted, priors: Sequence[Prior]) -> tuple[Array, Array]:
    """Return centres and precisions on the internal scale, in the objective's units of one observation."""
    model = fitted.model
    mean, precision = np.zeros(len(model.names)), np.zeros(len(model.names))
    noise = diagnose.noise_scale(fitted.residual, fitted.problem.objective, len(model.names))
    for prior in priors:
        for position, parameter in enumerate(model.parameters):
            if prior.name in (parameter.name, parameter.family):
                sd = prior.sd / prior.value if parameter.transform == "log" else prior.sd
                mean[position], precision[position] = parameter.to_internal(prior.value), noise / sd**2
    return mean, precision


def resample(fitted: Fitted) -> Array | None:
    """Return the bootstrap's parameter vectors (B, P), internal scale, or None without bootstrap."""
    options = fitted.options
    if not options.bootstrap:
        return None
    weights = case_weights(fitted.rows.table, options.bootstrap, options.seed) * fitted.rows.weight
    starts = _resample_starts(fitted)
    problem = fitted.problem
    batch = Problem(
        problem.model, problem.loss, weights, problem.objective, problem.prior_mean, problem.prior_precision
    )
    theta = np.tile(starts, (options.bootstrap, 1))
    index = np.repeat(np.arange(options.bootstrap), len(starts))
    solution = minimise(batch, theta, index, tolerance=1e-6)
    best = np.argmin(solution.value.reshape(options.bootstrap, -1), axis=1)
    return solution.theta.reshape(options.bootstrap, len(starts), -1)[np.arange(options.bootstrap), best]


def _resample_starts(fitted: Fitted) -> Array:
    """Return the starts of every resample: the optimum and the two best other basins, or points off the optimum."""
    polished = fitted.polished
    ranking = np.argsort(polished.value, kind="stable")
    chosen = [fitted.theta]
    values = [fitted.value]
    for i in ranking:
        if len(chosen) < 3 and np.isfinite(polished.value[i]) and polished.value[i] > values[-1] * 1.001:
            chosen.append(polished.theta[i])
            values.append(float(polished.value[i]))
    return np.stack(chosen)


def _result(fitted: Fitted, draws: Array | None) -> Fit:
    model, options = fitted.model, fitted.options
    names = model.names
    vector = dict(zip(names, fitted.natural(fitted.theta).tolist(), strict=True))
    natural_draws = None if draws is None else fitted.natural(draws)
    intervals = _intervals(names, natural_draws, options.level)
    fitted_loss = model.predict(fitted.theta[None])[0]
    log_residual = np.log(fitted_loss / fitted.problem.loss)
    table = fitted.rows.table
    return Fit(
        law=fitted.law.name,
        formula=fitted.law.formula,
        source=fitted.law.source,
        parameters=_named(vector),
        units={p.name: p.unit for p in model.parameters if p.family != "eff"},
        parameter_intervals={k: v for k, v in intervals.items() if not k.startswith("eff[")},
        multipliers=_multipliers(fitted, draws),
        interval={
            "level": options.level,
            "method": "stratified case bootstrap, percentile" if draws is not None else "none",
            "resamples": options.bootstrap,
            "seed": options.seed,
        },
        objective={
            "name": options.objective,
            "delta": options.delta if "huber" in options.objective else None,
            "value": fitted.value,
        },
        rms_log_residual=float(np.sqrt(np.mean(log_residual**2))),
        status=diagnose.status(fitted, draws),
        n_rows=len(table),
        excluded=fitted.rows.excluded,
        held={p.name: p.fixed for p in model.parameters if p.fixed is not None},
        priors=[{"name": p.name, "value": p.value, "sd": p.sd} for p in options.priors],
        data_digest=fitted.rows.digest(),
        package_version=__version__,
        ranges={name: [float(table[name].min()), float(table[name].max())] for name in ("n", "d")},
        rows={
            **{str(c): table[c].tolist() for c in table},
            "fitted": fitted_loss.tolist(),
            "log_residual": log_residual.tolist(),
        },
        draws=_draws(names, natural_draws),
        vector=vector,
    )


def _named(vector: dict[str, float]) -> dict[str, float]:
    """Return the parameters of FIT.json: all but eff, and the names that the law's paper uses."""
    parameters = {name: value for name, value in vector.items() if not name.startswith("eff[")}
    if "floor" in parameters:
        parameters |= {
            "a_S": vector["A"] * (1 - vector["floor"]),
            "c_S": vector["A"] * vector["floor"],
            "b_N": vector["alpha"],
            "b_D": vector["beta"],
            "a_D": vector["B"] ** (1 / vector["beta"]),
            "c": vector["E"],
        }
    return parameters


def _intervals(names: list[str], draws: Array | None, level: float) -> dict[str, list[float]]:
    if draws is None:
        return {}
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return {name: [float(a), float(b)] for name, a, b in zip(names, low, high, strict=True)}


def _draws(names: list[str], draws: Array | None) -> dict[str, Any]:
    """Return draws with seven significant digits: far below their own scatter, and half the file."""
    if draws is None:
        return {"names": names, "values": []}
    return {"names": names, "values": [[float(f"{x:.7g}") for x in row] for row in draws]}


def _multipliers(fitted: Fitted, draws: Array | None) -> dict[str, dict[str, Any]]:
    """Return eff by representation, with interval and number of runs; laws without eff have none."""
    if fitted.law.size is None:
        return {}
    labels = fitted.model.design.labels["representation"]
    eff = fitted.model.size_multiplier(fitted.theta[None])[0]
    spread = None if draws is None else fitted.model.size_multiplier(draws)
    result = {}
    for label in ["dense", *sorted(set(labels.tolist()) - {"dense"})]:
        rows = np.flatnonzero(labels == label)
        if rows.size:
            result[label] = _multiplier(
                eff[rows[0]], None if spread is None else spread[:, rows[0]], rows.size, fitted.options.level
            )
    return result


def _multiplier(eff: float, draws: Array | None, runs: int, level: float) -> dict[str, Any]:
    low = high = error = None
    if draws is not None:
        low, high = (float(q) for q in np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))
        error = float(np.std(draws, ddof=1))
    return {"eff": float(eff), "low": low, "high": high, "n_runs": int(runs), "standard_error": error}
