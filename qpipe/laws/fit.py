"""Fitting: the point estimate from many starts, the bootstrap, and a status that can be trusted.

The default objective is the field's: Huber's function of log residuals, threshold 1e-3, summed (2203.15556; never
averaged, which stops optimizers early). A fit is judged by its objective: how many of the best starts end at the same
value, whether a parameter sits at its bound, and whether the data tell the parameters apart at all.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from qpipe import __version__
from qpipe.laws import checks, diagnose
from qpipe.laws.bootstrap import resample
from qpipe.laws.catalogue import get_law
from qpipe.laws.parameters import Array, Prior
from qpipe.laws.prepare import select_rows
from qpipe.laws.profile import covariance, profile
from qpipe.laws.result import Fit
from qpipe.laws.search import Fitted, Options, fit_point
from qpipe.laws.solve import ObjectiveName
from qpipe.laws.threads import single_blas_thread

OWN_PROFILES = 3
"""Most parameters of a law's own that are profiled without being asked for."""


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
    profiles: Sequence[str] = (),
    compare: Sequence[str] = (),
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
    profiles
        Parameters or multipliers (`eff[w4]`) to profile, beside alpha, beta, E and the law's weakest own.
    compare
        Laws whose held-out errors are put beside this law's; `dense` is the law with every eff at 1, `all` every law
        that the table's columns allow.

    Raises
    ------
    QpipeError
        Rows at fault, columns missing, unknown names, fewer rows than parameters.
    """
    options = Options(objective, delta, fix, free, priors, bootstrap, seed, level)
    with single_blas_thread():
        rows = select_rows(table, get_law(law), exclude)
        fitted = fit_point(rows, get_law(law), options)
        found = {name: profile(fitted, name, level) for name in dict.fromkeys([*_weak(fitted), *profiles])}
        result = _result(fitted, resample(fitted), found)
        result.checks = _checks(fitted, found, _compared(rows.table, law, compare))
        return result


def _weak(fitted: Fitted) -> list[str]:
    """Return the parameters that are always profiled: alpha, beta, E, and the law's own with the largest errors.

    Coefficients are left out (they follow their exponents), and so are multipliers, whose intervals stand in the table.
    """
    shared = [p for p in fitted.model.parameters[: fitted.model.shared] if p.fixed is None]
    errors = np.sqrt(np.diag(covariance(fitted)))
    own = [p.name for p in shared if not p.shifts and p.name not in diagnose.GRADED and p.family != "eff_D"]
    own.sort(key=lambda name: -float(errors[fitted.model.index[name]]))
    return [p.name for p in shared if p.name in diagnose.GRADED] + own[:OWN_PROFILES]


def _compared(table: pd.DataFrame, law: str, compare: Sequence[str]) -> list[str]:
    """Return the laws whose hold-outs are reported, this law first."""
    others = checks.comparable_laws(table) if "all" in compare else list(compare)
    for name in others:
        get_law("compression" if name == "dense" else name)
    return list(dict.fromkeys([law, *others]))


def _checks(fitted: Fitted, profiles: dict[str, Any], laws: list[str]) -> dict[str, Any]:
    return {
        "profiles": profiles,
        "trends": checks.trends(fitted),
        "influence": checks.influence(fitted),
        "information": checks.information_criteria(fitted),
        "hold_outs": checks.hold_outs(fitted.rows.table, laws, fitted.options),
    }


def _result(fitted: Fitted, draws: Array | None, profiles: dict[str, Any]) -> Fit:
    model, options = fitted.model, fitted.options
    names = model.names
    vector = dict(zip(names, fitted.natural(fitted.theta).tolist(), strict=True))
    natural_draws = None if draws is None else fitted.natural(draws)
    status = diagnose.status(fitted, profiles)
    intervals = _intervals(names, natural_draws, options.level)
    # a bootstrap piles up at a bound and would call the parameter exactly known; its profile does not
    profiled = [name for name in status["at_bound"] if name in profiles and name in intervals]
    intervals |= {name: [profiles[name]["low"], profiles[name]["high"]] for name in profiled}
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
            "method": _method(fitted, profiled) if draws is not None else "none",
            "resamples": options.bootstrap,
            "seed": options.seed,
        },
        objective={
            "name": options.objective,
            "delta": options.delta if "huber" in options.objective else None,
            "value": fitted.value,
        },
        rms_log_residual=float(np.sqrt(np.mean(log_residual**2))),
        status=status,
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


def _method(fitted: Fitted, profiled: list[str]) -> str:
    unit = "trajectory" if "trajectory" in fitted.rows.table else "run"
    kind = "Bayesian bootstrap" if np.isfinite(fitted.problem.objective.threshold) else "case bootstrap"
    bounded = f"; profile of {', '.join(profiled)}, at a bound" if profiled else ""
    return f"{kind} by {unit}, stratified by representation, percentile{bounded}"


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
