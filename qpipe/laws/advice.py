"""From a fit to decisions: predictions with intervals, the best model for a budget, crossovers, the next runs.

Budgets follow two conventions, both stated in every answer: stored bytes of the compressed weights are N bits / 8
(embeddings and head are not counted, as in N), and training costs 6 N D FLOPs (2001.08361), whatever the format,
because training runs in high precision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from qpipe.errors import QpipeError
from qpipe.laws.model import Model
from qpipe.laws.multipliers import DENSE_BITS
from qpipe.laws.parameters import Array
from qpipe.laws.result import Fit

FLOPS_PER_PARAMETER_TOKEN = 6.0
GRID, SMALLEST = 4000, 1e3
"""Sizes that are tried for a compute budget, evenly in log N, and the fewest parameters and tokens among them."""


def predict_with_interval(
    fit: Fit, n: float, d: float, representation: str, covariates: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Predict one loss.

    Returns
    -------
    `loss` (nats/token); `low` and `high`, the interval of the law's value; `run_low` and `run_high`, the interval of a
    single new run, with the scatter of the fitted runs added; `eff`; `extrapolates`, a list of what lies outside.
    """
    extra = dict(covariates or {})
    loss = float(fit.predict(n, d, representation, extra))
    result: dict[str, Any] = {
        "n": n,
        "d": d,
        "representation": representation,
        "loss": loss,
        "level": fit.interval["level"],
    }
    result |= {"low": None, "high": None, "run_low": None, "run_high": None}
    if fit.draws.get("values"):
        draws = fit.predict_draws(n, d, representation, extra)
        result["low"], result["high"] = _quantiles(fit, draws)
        result["run_low"], result["run_high"] = _quantiles(fit, _with_scatter(fit, draws))
    if fit.multipliers:
        result["eff"] = fit.effective_multiplier(representation, extra)
    result["extrapolates"] = extrapolation(fit, n, d, representation)
    return result


def _quantiles(fit: Fit, draws: Array) -> tuple[float, float]:
    level = fit.interval["level"]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _with_scatter(fit: Fit, draws: Array) -> Array:
    """Multiply draws (B,) by residuals of the fit, stretched for the parameters that the fit spent."""
    residuals = np.array(fit.rows["log_residual"])
    free = len(fit.vector) - len(fit.held)
    stretch = np.sqrt(residuals.size / max(residuals.size - free, 1))
    generator = np.random.default_rng(fit.interval["seed"])
    return draws * np.exp(-stretch * generator.choice(residuals, size=draws.size))


def extrapolation(fit: Fit, n: float, d: float, representation: str) -> list[str]:
    """Return in words how a point lies outside the fitted runs (empty: inside)."""
    notes = []
    for name, value in (("n", n), ("d", d)):
        low, high = fit.ranges[name]
        if value > high * 1.001:
            notes.append(f"{name} = {value:.3g} is {value / high:.3g} times the largest fitted {name} ({high:.3g})")
        if value < low / 1.001:
            notes.append(
                f"{name} = {value:.3g} is {low / value:.3g} times below the smallest fitted {name} ({low:.3g})"
            )
    rows = fit.table()
    ratio = rows["d"] / rows["n"]
    if not ratio.min() / 1.01 <= d / n <= ratio.max() * 1.01:
        notes.append(f"d/n = {d / n:.3g} lies outside the fitted {ratio.min():.3g} to {ratio.max():.3g}")
    own = rows[rows["representation"] == representation]
    if own.empty:
        notes.append(f"no run of {representation} was fitted")
    elif n > own["n"].max() * 1.001 and n <= fit.ranges["n"][1]:
        notes.append(f"the largest run of {representation} has n = {own['n'].max():.3g}")
    return notes


@dataclass(frozen=True)
class Budget:
    """What may be spent: at least one of memory (bytes of weights) and FLOPs; tokens fix D."""

    memory: float | None = None
    flops: float | None = None
    tokens: float | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be positive, not {value:g}"
            for name, value in (("memory", self.memory), ("flops", self.flops), ("tokens", self.tokens))
            if value is not None and not value > 0
        ]
        if self.memory is None and self.flops is None:
            problems.append(
                "a budget needs --memory (bytes of weights) or --flops (training); tokens alone bound no size"
            )
        if problems:
            raise QpipeError(problems)

    def sizes(self, bits: float, fit: Fit) -> tuple[Array, Array]:
        """Return candidate sizes and tokens (K,) for a format of `bits` per weight."""
        largest = np.inf if self.memory is None else 8 * self.memory / bits
        if self.flops is None:
            return np.array([largest]), np.array([self.tokens or fit.ranges["d"][1]])
        spend = self.flops / FLOPS_PER_PARAMETER_TOKEN
        if self.tokens is not None:
            return np.array([min(largest, spend / self.tokens)]), np.array([self.tokens])
        top = min(largest, spend / SMALLEST)
        n = np.geomspace(min(SMALLEST, top), top, GRID)
        return n, spend / n


def bits_of(fit: Fit, given: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return bits/weight by representation from the fitted rows and `given` (errors: unknown for some)."""
    rows = fit.table()
    known = rows.groupby("representation")["bits_per_weight"].mean().to_dict() if "bits_per_weight" in rows else {}
    bits = {"dense": DENSE_BITS, **{str(k): float(v) for k, v in known.items() if np.isfinite(v)}, **(given or {})}
    names = sorted(set(rows["representation"]))
    if missing := [name for name in names if name not in bits]:
        raise QpipeError(
            f"bits/weight of {', '.join(missing)} are unknown; add a bits_per_weight column to the loss table, or give "
            f"--bits {missing[0]}=4.25 (or --capacity CAPACITY.json)"
        )
    return {name: bits[name] for name in dict.fromkeys(["dense", *names])}


def advise(fit: Fit, budget: Budget, bits: Mapping[str, float]) -> pd.DataFrame:
    """Return the best N and D of every representation under a budget, best predicted loss first.

    Columns: representation, bits_per_weight, n, d, memory (bytes), flops, loss, low, high, `best_share` (share of
    bootstrap draws in which this representation is the best), `extrapolates`.
    """
    rows, draws = [], []
    for name, width in bits.items():
        n, d = budget.sizes(width, fit)
        losses = fit.predict(n, d, name)
        best = int(np.argmin(losses))
        row = {
            "representation": name,
            "bits_per_weight": width,
            "n": float(n[best]),
            "d": float(d[best]),
            "memory": float(n[best] * width / 8),
            "flops": float(FLOPS_PER_PARAMETER_TOKEN * n[best] * d[best]),
            "loss": float(losses[best]),
            "low": None,
            "high": None,
            "best_share": None,
            "extrapolates": "; ".join(extrapolation(fit, float(n[best]), float(d[best]), name)),
        }
        if fit.draws.get("values"):
            draws.append(fit.predict_draws(n[best], d[best], name))
            row["low"], row["high"] = _quantiles(fit, draws[-1])
        rows.append(row)
    table = pd.DataFrame(rows)
    if draws:
        winners = np.argmin(np.stack(draws), axis=0)
        table["best_share"] = [float(np.mean(winners == i)) for i in range(len(rows))]
    return table.sort_values("loss", kind="stable", ignore_index=True)


def crossovers(
    fit: Fit,
    first: str,
    second: str,
    bits: Mapping[str, float],
    flops: float | None = None,
    tokens: float | None = None,
) -> list[dict[str, float]]:
    """Return the memory budgets (bytes) at which two representations are predicted equally good.

    Looked for from a hundredth of the smallest fitted model to a thousand times the largest, with training FLOPs or
    tokens held (tokens: the most fitted ones when neither is given).
    """
    if unknown := [name for name in (first, second) if name not in bits]:
        raise QpipeError(f"no bits/weight for {', '.join(unknown)}; known: {', '.join(bits)}")
    memory = np.geomspace(fit.ranges["n"][0] / 100, fit.ranges["n"][1] * 1000, 2000)
    gap = _gap(fit, first, second, bits, memory, flops, tokens)
    signs = np.flatnonzero(np.diff(np.sign(gap)) != 0)
    found = []
    for i in signs:
        share = gap[i] / (gap[i] - gap[i + 1])
        at = float(np.exp(np.log(memory[i]) + share * np.log(memory[i + 1] / memory[i])))
        found.append({"memory": at, "n_first": 8 * at / bits[first], "n_second": 8 * at / bits[second]})
    return found


def _gap(
    fit: Fit,
    first: str,
    second: str,
    bits: Mapping[str, float],
    memory: Array,
    flops: float | None,
    tokens: float | None,
) -> Array:
    """Return loss(first) - loss(second) at equal memory (K,)."""
    losses = []
    for name in (first, second):
        n = 8 * memory / bits[name]
        d = np.full_like(n, tokens or fit.ranges["d"][1]) if flops is None else flops / (FLOPS_PER_PARAMETER_TOKEN * n)
        losses.append(fit.predict(n, d, name))
    return losses[0] - losses[1]


def next_runs(fit: Fit, target: str, candidates: pd.DataFrame, top: int = 10) -> pd.DataFrame:
    """Rank candidate runs by how much they shrink the interval of one multiplier or parameter per training FLOP.

    The fit is linearised: with information matrix H of the fitted runs, a run with sensitivity j lowers the variance of
    c by (c' H^-1 j)^2 / (1 + j' H^-1 j) (c-optimal design, one run at a time, in units of the residual variance).

    Parameters
    ----------
    fit
        The fit.
    target
        A representation (its eff) or a parameter such as `alpha`.
    candidates
        Columns n, d, representation and perhaps flops.

    Returns
    -------
    The `top` candidates, best first: n, d, representation, flops, `shrink` (1 - new width / old width) and
    `shrink_per_exaflop`.
    """
    fitted_model, _ = fit.bind(fit.rows["n"], fit.rows["d"], fit.rows["representation"])
    names = fitted_model.names
    name = f"eff[{target}]" if f"eff[{target}]" in names else target
    if name not in names or name in fit.held:
        raise QpipeError(f"'{target}' is not fitted; choose among {', '.join(n for n in names if n not in fit.held)}")
    free = np.array([n not in fit.held for n in names])
    theta = np.array([[fit.vector[n] for n in names]])
    jacobian = _sensitivities(fit, fitted_model, theta)[:, free]
    scale = np.maximum(np.linalg.norm(jacobian, axis=0), 1e-150)
    inverse = np.linalg.pinv((jacobian / scale).T @ (jacobian / scale), rcond=1e-12, hermitian=True)
    column = inverse[np.flatnonzero(free).tolist().index(names.index(name))]
    model, _ = fit.bind(candidates["n"], candidates["d"], candidates["representation"])
    new = _sensitivities(fit, model, theta)[:, free] / scale
    before = float(column[np.flatnonzero(free).tolist().index(names.index(name))])
    gain = (new @ column) ** 2 / (1 + np.einsum("rp,pq,rq->r", new, inverse, new))
    table = candidates[["n", "d", "representation"]].copy()
    flops = candidates["flops"] if "flops" in candidates else FLOPS_PER_PARAMETER_TOKEN * table["n"] * table["d"]
    table["flops"] = flops
    table["shrink"] = 1 - np.sqrt(np.maximum(1 - gain / before, 0.0))
    table["shrink_per_exaflop"] = table["shrink"] / (table["flops"] / 1e18)
    return table.sort_values("shrink_per_exaflop", ascending=False, kind="stable", ignore_index=True).head(top)


def _sensitivities(fit: Fit, model: Model, natural: Array) -> Array:
    """Return d log loss / d internal parameter (R, P) at the fit's parameters."""
    internal = fit.to_internal(model, natural)
    prediction, jacobian, grouped = model.linearise(internal)
    dense = np.zeros((prediction.shape[1], len(model.names)))
    dense[:, : model.shared] = jacobian[0].T
    if grouped is not None and model.groups:
        rows = np.flatnonzero(model.members >= 0)
        dense[rows, model.shared + model.members[rows]] = grouped[0, rows]
    return dense / prediction[0][:, None]


def candidate_grid(fit: Fit, representations: Sequence[str] = ()) -> pd.DataFrame:
    """Return the grid of fitted sizes x tokens per parameter x representations as candidates for the next runs."""
    rows = fit.table()
    ratios = np.unique(np.round(np.log2(rows["d"] / rows["n"]) * 2) / 2)
    grid = [
        (n, n * 2.0**ratio, name)
        for name in (representations or dict.fromkeys(["dense", *rows["representation"]]))
        for n in np.unique(rows["n"])
        for ratio in np.union1d(ratios, [ratios.min() - 1, ratios.max() + 1])
    ]
    return pd.DataFrame(grid, columns=["n", "d", "representation"])
