"""What rounding a finished model costs, as a function of its size, its tokens and the bits it is rounded to.

    damage = L_rounded - L_dense = C_T D^g_D N^-g_N exp(-P / gamma_post)          (2411.04330, eq. 2)

The term grows with D/N where g_D > 0: the longer a model is trained, the more its rounding costs. It is the
post-training term of the law `precision`, fitted here on its own: dense and rounded loss are of the same weights on the
same tokens, so their difference is free of everything else that moves a loss, and its logarithm is linear in the
logarithms of D and N and in P. One fit per method, by least squares on logs; intervals from resampling dense runs,
each with all its roundings.

With a fitted law L = A (N eff)^-alpha + B D^-beta + E, damage becomes a multiplier that stands beside those of models
trained under a representation:

    eff_rounded(N, D, P) = (1 + damage N^alpha / A)^(-1/alpha)

Rounding is enough as long as eff_rounded is not below eff of a representation of as many bits; solved for D, up to

    D* = [A N^(g_N - alpha) (eff^-alpha - 1) exp(P / gamma_post) / C_T]^(1 / g_D).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qpipe.errors import QpipeError
from qpipe.laws.result import Fit

Array = NDArray[np.float64]
NAMES = ("C_T", "g_D", "g_N", "gamma_post")
COLUMNS = ("n", "d", "loss", "parent", "parent_loss", "ptq_method", "ptq_bits")


@dataclass(frozen=True)
class Damage:
    """The fitted term of one method.

    Attributes
    ----------
    method
        Name of the method.
    parameters
        C_T (nats/token), g_D, g_N, gamma_post (bits).
    draws
        The same from resampled dense runs, shape (B, 4); B = 0 without intervals.
    rms
        Root mean square of the residuals of log damage.
    held
        Exponents that the runs cannot tell, held at 0.
    rows, parents, without_damage
        Rows fitted, dense runs behind them, rows left out because rounding cost nothing or less (no logarithm).
    ranges
        Smallest and largest n, d, d/n and bits of the fitted rows.
    """

    method: str
    parameters: dict[str, float]
    draws: Array
    rms: float
    held: list[str]
    rows: int
    parents: int
    without_damage: int
    ranges: dict[str, tuple[float, float]]

    def predict(self, n: Array | float, d: Array | float, bits: Array | float) -> Array:
        """Return the damage (nats/token)."""
        return _predict(np.array([self.parameters[name] for name in NAMES]), n, d, bits)

    def predict_draws(self, n: float, d: float, bits: float) -> Array:
        """Return the damage of every draw, shape (B,)."""
        return _predict(self.draws.T, n, d, bits)

    def interval(self, name: str, level: float) -> list[float] | None:
        """Return the interval of a parameter, None without draws."""
        return _interval(self.draws[:, NAMES.index(name)], level)

    def to_json(self, level: float) -> dict[str, Any]:
        """Return everything but the draws as plain data."""
        return {
            "method": self.method,
            "parameters": self.parameters,
            "intervals": {name: self.interval(name, level) for name in NAMES},
            "level": level,
            "resamples": len(self.draws),
            "rms_log_residual": self.rms,
            "held_at_zero": self.held,
            "rows": self.rows,
            "dense_runs": self.parents,
            "rows_without_damage": self.without_damage,
            "ranges": {name: list(limits) for name, limits in self.ranges.items()},
        }


def _predict(parameters: Array, n: Array | float, d: Array | float, bits: Array | float) -> Array:
    constant, g_d, g_n, gamma = parameters
    return np.asarray(constant * np.exp(g_d * np.log(d) - g_n * np.log(n) - np.asarray(bits) / gamma))


def rounded_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a loss table that were quantized after training (errors: none, columns missing)."""
    if missing := [name for name in COLUMNS if name not in table]:
        raise QpipeError(
            f"the loss table lacks {', '.join(missing)}: collect results of qpipe ptq, or add the columns (docs/laws.md)"
        )
    rows = table[table["ptq_bits"].notna() & (table["ptq_method"].fillna("") != "")]
    if rows.empty:
        raise QpipeError("no row of the loss table was quantized after training; collect results of qpipe ptq")
    return rows


def fit_damages(table: pd.DataFrame, *, bootstrap: int = 1000, level: float = 0.9, seed: int = 0) -> list[Damage]:
    """Fit every method of a loss table (errors: no such rows, too few of them; of all methods at once)."""
    found, problems = [], []
    for method, rows in rounded_rows(table).groupby("ptq_method", sort=True):
        try:
            found.append(fit_damage(str(method), rows, bootstrap=bootstrap, seed=seed))
        except QpipeError as error:
            problems += error.problems
    if problems:
        raise QpipeError(problems)
    return found


def fit_damage(method: str, rows: pd.DataFrame, *, bootstrap: int = 1000, seed: int = 0) -> Damage:
    """Fit the term to one method's rows.

    Parameters
    ----------
    rows
        Columns n, d, loss, parent, parent_loss, ptq_bits.
    bootstrap, seed
        Resamples of dense runs and their seed.

    Raises
    ------
    QpipeError
        Fewer rows with damage than parameters, or one rate alone.
    """
    damage = (rows["loss"] - rows["parent_loss"]).to_numpy(float)
    kept, log_damage = rows[damage > 0], np.log(damage[damage > 0])
    terms = np.column_stack(
        [np.ones(len(kept)), np.log(kept["d"]), -np.log(kept["n"]), -kept["ptq_bits"].to_numpy(float)]
    )
    free = _identified(terms)
    if len(kept) <= len(free) or 3 not in free:
        raise QpipeError(
            f"{method}: {len(kept)} rounded models with a damage above 0 at {kept['ptq_bits'].nunique()} rates cannot "
            f"tell {len(free)} parameters; round more dense runs, or to more rates"
        )
    solution = _solve(terms, log_damage, free)
    residual = log_damage - terms @ solution
    clusters = [np.flatnonzero(kept["parent"] == parent) for parent in kept["parent"].unique()]
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(bootstrap if len(clusters) > 1 else 0):
        chosen = np.concatenate([clusters[i] for i in generator.integers(0, len(clusters), len(clusters))])
        if len(_identified(terms[chosen])) == len(free):
            draws.append(_natural(_solve(terms[chosen], log_damage[chosen], free)))
    return Damage(
        method=method,
        parameters=dict(zip(NAMES, _natural(solution).tolist(), strict=True)),
        draws=np.array(draws).reshape(-1, len(NAMES)),
        rms=float(np.sqrt(np.mean(residual**2))),
        held=[NAMES[i] for i in range(len(NAMES)) if i not in free],
        rows=len(kept),
        parents=len(clusters),
        without_damage=int((damage <= 0).sum()),
        ranges={
            name: (float(values.min()), float(values.max()))
            for name, values in {**kept[["n", "d"]], "d/n": kept["d"] / kept["n"], "bits": kept["ptq_bits"]}.items()
        },
    )


def _identified(terms: Array) -> list[int]:
    """Return the terms that vary independently: the constant, bits, then D, then N."""
    free: list[int] = []
    for column in (0, 3, 1, 2):
        scaled = terms[:, [*free, column]]
        norms = np.linalg.norm(scaled - scaled.mean(axis=0) * (np.arange(scaled.shape[1]) > 0), axis=0)
        if norms.min() > 0 and np.linalg.matrix_rank(scaled / np.maximum(norms, 1e-300), tol=1e-6) == len(free) + 1:
            free.append(column)
    return sorted(free)


def _solve(terms: Array, values: Array, free: list[int]) -> Array:
    solution = np.zeros(terms.shape[1])
    solution[free] = np.linalg.lstsq(terms[:, free], values, rcond=None)[0]
    return solution


def _natural(solution: Array) -> Array:
    """Return C_T, g_D, g_N, gamma_post; no decay with bits is an infinite gamma."""
    slope = solution[3]
    return np.array([math.exp(solution[0]), solution[1], solution[2], 1 / slope if slope else math.inf])


def _interval(values: Array, level: float) -> list[float] | None:
    if len(values) == 0:
        return None
    return [float(x) for x in np.quantile(values, [(1 - level) / 2, (1 + level) / 2])]


def worth(damage: Array | float, n: Array | float, parameters: Mapping[str, float]) -> Array:
    """Return eff of models of n parameters whose loss is raised by `damage`, under a law with A and alpha."""
    alpha = parameters["alpha"]
    return np.asarray((1 + np.asarray(damage) * np.asarray(n, float) ** alpha / parameters["A"]) ** (-1 / alpha))


def break_even(values: Array, n: float, bits: float, eff: float, parameters: Mapping[str, float]) -> Array:
    """Return the tokens D* up to which rounding to `bits` is worth at least `eff`, for rows (B, 4) of parameters.

    0 where rounding is never enough (eff at least 1), infinite where damage does not grow with D and stays small enough.
    """
    constant, g_d, g_n, gamma = np.atleast_2d(values).T
    alpha = parameters["alpha"]
    allowed = parameters["A"] * n**-alpha * (eff**-alpha - 1)
    if allowed <= 0:
        return np.zeros(len(g_d))
    with np.errstate(divide="ignore", over="ignore"):
        ratio = np.log(allowed) + g_n * np.log(n) + bits / gamma - np.log(constant)
        grows = np.exp(np.minimum(ratio / np.where(g_d > 0, g_d, 1.0), 700.0))
    return np.where(g_d > 0, grows, np.where(ratio >= 0, np.inf, 0.0))


def compare(damages: list[Damage], fit: Fit, table: pd.DataFrame, level: float = 0.9) -> pd.DataFrame:
    """Set rounding beside training under a representation, at equal bits per weight.

    Parameters
    ----------
    damages
        Fitted terms.
    fit
        A law of the form A (N eff)^-alpha + B D^-beta + E with multipliers.
    table
        Loss table: bits of the representations, and whether they leave activations alone.

    Returns
    -------
    One row per method, representation and size (smallest and largest rounded): eff of the representation with its
    interval, eff of rounding at the least and the most tokens per parameter, and the tokens per parameter up to which
    rounding is enough, with an interval (of the damage's parameters; the law's are taken as they are).
    """
    if not {"A", "alpha"} <= set(fit.parameters) or "gamma" in fit.parameters:
        raise QpipeError(f"law {fit.law} has no size term A (N eff)^-alpha; give a fit of the law compression")
    bits = _weight_only_bits(table)
    rows = [
        _compared(damage, fit, name, bits[name], n, level)
        for damage in damages
        for name in sorted(set(fit.multipliers) & set(bits), key=lambda name: bits[name])
        for n in dict.fromkeys(damage.ranges["n"])
        if fit.multipliers[name].get("eff")
    ]
    return pd.DataFrame(rows)


def _weight_only_bits(table: pd.DataFrame) -> dict[str, float]:
    """Return bits/weight of trained representations that leave activations alone."""
    trained = table[(table["representation"] != "dense") & table["bits_per_weight"].notna()]
    if "ptq_bits" in trained:
        trained = trained[trained["ptq_bits"].isna()]
    if "a_bits" in trained:
        trained = trained[trained["a_bits"].fillna(16.0) >= 16]
    return {
        str(name): float(value) for name, value in trained.groupby("representation")["bits_per_weight"].mean().items()
    }


def _compared(damage: Damage, fit: Fit, name: str, bits: float, n: float, level: float) -> dict[str, Any]:
    entry = fit.multipliers[name]
    least, most = damage.ranges["d/n"]
    point = np.array([[damage.parameters[p] for p in NAMES]])
    until = float(break_even(point, n, bits, entry["eff"], fit.parameters)[0]) / n
    limits = _interval(break_even(damage.draws, n, bits, entry["eff"], fit.parameters) / n, level) or [None, None]
    return {
        "method": damage.method,
        "representation": name,
        "bits_per_weight": bits,
        "n": n,
        "eff": entry["eff"],
        "eff_low": entry.get("low"),
        "eff_high": entry.get("high"),
        "least_d_per_n": least,
        "eff_rounded_least": float(worth(damage.predict(n, least * n, bits), n, fit.parameters)),
        "most_d_per_n": most,
        "eff_rounded_most": float(worth(damage.predict(n, most * n, bits), n, fit.parameters)),
        "enough_until_d_per_n": until,
        "until_low": limits[0],
        "until_high": limits[1],
        "within_runs": bool(least <= until <= most and damage.ranges["bits"][0] <= bits <= damage.ranges["bits"][1]),
    }


def statements(table: pd.DataFrame) -> list[str]:
    """Say, for every row of `compare`, until when rounding is enough."""
    return [_statement(row) for row in table.to_dict("records")]


def _statement(row: Mapping[Any, Any]) -> str:
    head = (
        f"{row['representation']} ({row['bits_per_weight']:.3g} bits) is worth {row['eff']:.3g} N when trained so; "
        f"{row['method']} at the same bits, N = {row['n']:.3g}: {row['eff_rounded_least']:.3g} N after "
        f"{row['least_d_per_n']:.3g} tokens per parameter, {row['eff_rounded_most']:.3g} N after {row['most_d_per_n']:.3g}."
    )
    until = row["enough_until_d_per_n"]
    span = "" if row["until_low"] is None else f" [{row['until_low']:.3g}, {row['until_high']:.3g}]"
    if until == 0:
        return f"{head} Rounding is never enough."
    if not math.isfinite(until):
        return f"{head} Its damage does not grow with tokens: rounding stays enough."
    where = "" if row["within_runs"] else ", which is outside what was measured"
    return f"{head} Rounding is enough up to {until:.3g}{span} tokens per parameter{where}."
