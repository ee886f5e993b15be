"""What rounding a finished model costs, as a function of its size, its tokens and the bits it is rounded to.

    damage = L_rounded - L_dense = C_T D^g_D N^-g_N exp(-P / gamma_post)          (2411.04330, eq. 2)

The term grows with D/N where g_D > 0: the longer a model is trained, the more its rounding costs. It is the
post-training term of the law `precision`, fitted here on its own: dense and rounded loss are of the same weights on the
same tokens, so their difference is free of everything else that moves a loss, and its logarithm is linear in the
logarithms of D and N and in P. One fit per method, by least squares on logs; intervals from resampling dense runs,
each with all its roundings.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qpipe.errors import QpipeError

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
    rows, parents, without_damage, diverged
        Rows fitted, dense runs behind them, rows left out because rounding cost nothing or less (no logarithm), rows
        left out because the dense run or the quantized model has no finite loss.
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
    diverged: int
    ranges: dict[str, tuple[float, float]]

    def predict(self, n: Array | float, d: Array | float, bits: Array | float) -> Array:
        """Return the damage (nats/token)."""
        return _predict(np.array([self.parameters[name] for name in NAMES]), n, d, bits)

    def predict_draws(self, n: float, d: float, bits: float) -> Array:
        """Return the damage of every draw, shape (B,)."""
        return _predict(self.draws.T, n, d, bits)

    def interval(self, name: str, level: float) -> list[float] | None:
        """Return the interval of a parameter, None without draws."""
        return interval_of(self.draws[:, NAMES.index(name)], level)

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
            "rows_diverged": self.diverged,
            "ranges": {name: list(limits) for name, limits in self.ranges.items()},
        }


def _predict(parameters: Array, n: Array | float, d: Array | float, bits: Array | float) -> Array:
    constant, g_d, g_n, gamma = parameters
    return np.asarray(constant * np.exp(g_d * np.log(d) - g_n * np.log(n) - np.asarray(bits) / gamma))


def rounded_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a loss table that were quantized after training (errors: none, columns missing).

    Rows that diverged are among them, though they may have neither bits nor a loss.
    """
    if missing := [name for name in COLUMNS if name not in table]:
        raise QpipeError(f"the loss table lacks {', '.join(missing)}; collect results of qpipe ptq, or add the columns")
    rows = table[(table["ptq_method"].fillna("") != "") & (table["ptq_bits"].notna() | ~_finished(table))]
    if rows.empty:
        raise QpipeError("no row of the loss table was quantized after training; collect results of qpipe ptq")
    return rows


def _finished(table: pd.DataFrame) -> "pd.Series[bool]":
    """Whether each row's status is ok; a table without the column holds finished runs alone."""
    if "status" not in table:
        return pd.Series(True, index=table.index)
    return table["status"].fillna("ok").str.lower().isin(("ok", ""))


def fit_damages(table: pd.DataFrame, *, bootstrap: int = 1000, seed: int = 0) -> tuple[list[Damage], dict[str, str]]:
    """Return the fits of every method of a loss table, and by method why others have none (errors: no such rows)."""
    found, unfitted = [], {}
    for method, rows in rounded_rows(table).groupby("ptq_method", sort=True):
        try:
            found.append(fit_damage(str(method), rows, bootstrap=bootstrap, seed=seed))
        except QpipeError as error:
            unfitted[str(method)] = str(error)
    return found, unfitted


def fit_damage(method: str, rows: pd.DataFrame, *, bootstrap: int = 1000, seed: int = 0) -> Damage:
    """Fit the term to one method's rows.

    Parameters
    ----------
    rows
        Columns n, d, loss, parent, parent_loss, ptq_bits, and, where some diverged, status.
    bootstrap, seed
        Resamples of dense runs and their seed.

    Raises
    ------
    QpipeError
        Fewer rows with damage than parameters, one rate alone, or none that did not diverge.
    """
    finished = _finished(rows)
    diverged, rows = int((~finished).sum()), rows[finished]
    if rows.empty:
        raise QpipeError(f"all of its {diverged} models diverged; quantize dense runs that did not")
    damage = (rows["loss"] - rows["parent_loss"]).to_numpy(float)
    kept, log_damage = rows[damage > 0], np.log(damage[damage > 0])
    terms = np.column_stack(
        [np.ones(len(kept)), np.log(kept["d"]), -np.log(kept["n"]), -kept["ptq_bits"].to_numpy(float)]
    )
    free = _identified(terms)
    if len(kept) <= len(free) or 3 not in free:
        raise QpipeError(
            f"{len(kept)} rounded models with a damage above 0 at {kept['ptq_bits'].nunique()} rates cannot "
            f"tell {len(free)} parameters ({diverged} diverged, {int((damage <= 0).sum())} cost nothing); round more "
            "dense runs, or to more rates"
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
        diverged=diverged,
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


def interval_of(values: Array, level: float) -> list[float] | None:
    """Return the central interval of draws, None where there are none."""
    if len(values) == 0:
        return None
    return [float(x) for x in np.quantile(values, [(1 - level) / 2, (1 + level) / 2])]
