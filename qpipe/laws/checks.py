"""Does the law hold? Trends of eff with N and D, influence of single runs, hold-outs, information criteria.

All checks start from a finished fit; each returns plain data for FIT.json and for tables.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtr

from qpipe.errors import QpipeError
from qpipe.laws.catalogue import get_law
from qpipe.laws.parameters import Array
from qpipe.laws.prepare import Rows, make_design
from qpipe.laws.profile import covariance, dense_jacobian
from qpipe.laws.search import Fitted, Options, fit_point
from qpipe.laws.solve import minimise

LEFT_OUT_CELLS = 200_000
"""Rows times rows left out one by one; beyond, those with the largest linearised influence (at least 20)."""
POLISHED_HOLD_OUT = 24
FEWEST_VALUES = 3
"""Different sizes (or tokens) that must be left when the largest are held out: an exponent and E need three."""
CAVEAT = (
    "information criteria assume independent, equally noisy runs and no misfit of the law; runs that share "
    "hyper-parameters or data violate both, so prefer the hold-outs"
)


def trends(fitted: Fitted) -> list[dict[str, Any]]:
    """Test whether eff of each representation drifts with N or D (2505.14302 says that it may).

    The log residuals are regressed on the fit's own Jacobian and, one representation at a time, on the two directions
    in which log eff would change with log N and log D: a t test of each drift with the other parameters free.

    Returns
    -------
    One entry per representation and axis: `slope` = d log eff / d log N (or D) with `standard_error`, `p`, and
    `p_adjusted` over all entries (Holm 1979). Representations with fewer than two distinct values are left out.
    """
    model = fitted.model
    if fitted.law.size is None:
        return []
    residual = np.log(fitted.problem.loss / model.predict(fitted.theta[None])[0])
    basis = _orthonormal(dense_jacobian(fitted)[:, [p.fixed is None for p in model.parameters]])
    labels, sensitivity = model.design.labels["representation"], _eff_sensitivity(fitted)
    entries = []
    for label in sorted(set(labels.tolist()) - {"dense"}):
        rows = labels == label
        for axis, coordinate in (("n", model.design.log_n), ("d", model.design.log_d)):
            if np.unique(np.round(coordinate[rows], 6)).size > 1:
                column = np.where(rows, sensitivity * (coordinate - coordinate[rows].mean()), 0.0)
                test = _t_test(basis, column, residual)
                entries.append({"representation": label, "axis": axis, "n_runs": int(rows.sum()), **test})
    return _holm([entry for entry in entries if entry["p"] is not None])


def _orthonormal(matrix: Array) -> Array:
    """Return an orthonormal basis (R, K) of the columns of a matrix (R, P)."""
    scaled = matrix / np.maximum(np.linalg.norm(matrix, axis=0), 1e-150)
    left, singular, _ = np.linalg.svd(scaled, full_matrices=False)
    return np.asarray(left[:, singular > 1e-10 * singular[0]])


def _eff_sensitivity(fitted: Fitted) -> Array:
    """Return d log loss / d log eff (R,) of every row."""
    prediction, jacobian, _ = fitted.model.linearise(fitted.theta[None])
    size_share = jacobian[0, fitted.model.index["A"]] / prediction[0]
    return np.asarray(-np.exp(fitted.theta[fitted.model.index["alpha"]]) * size_share)


def _t_test(basis: Array, column: Array, target: Array) -> dict[str, Any]:
    """Regress the target on the basis and the column; test the column's coefficient (Frisch-Waugh-Lovell)."""
    own = column - basis @ (basis.T @ column)
    rest = target - basis @ (basis.T @ target)
    norm, freedom = float(own @ own), target.size - basis.shape[1] - 1
    if freedom < 2 or norm < 1e-16 * float(column @ column):
        return {"slope": None, "standard_error": None, "p": None}
    slope = float(own @ rest) / norm
    error = float(np.sqrt(np.sum((rest - slope * own) ** 2) / freedom / norm))
    p = 2 * float(stdtr(freedom, -abs(slope) / error)) if error > 0 else None
    return {"slope": slope, "standard_error": error, "p": p}


def _holm(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add p values adjusted for having made all these tests."""
    order = sorted(range(len(entries)), key=lambda i: entries[i]["p"])
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, entries[i]["p"] * (len(entries) - rank)))
        entries[i]["p_adjusted"] = largest
    return entries


def influence(fitted: Fitted, top: int = 10) -> list[dict[str, Any]]:
    """Fit again without each run in turn.

    Returns
    -------
    The `top` most influential runs: `row` of the loss table, n, d, representation, loss, `log_residual`, and the
    `parameter` that moves most with its `change` in standard errors of the full fit.
    """
    model, problem = fitted.model, fitted.problem
    chosen = _candidates(fitted)
    weights = np.repeat(problem.weights[:1], chosen.size, axis=0)
    weights[np.arange(chosen.size), chosen] = 0.0
    solution = minimise(
        replace(problem, weights=weights), np.tile(fitted.theta, (chosen.size, 1)), np.arange(chosen.size)
    )
    errors = np.sqrt(np.diag(covariance(fitted)))
    moved = np.abs(solution.theta - fitted.theta) / np.where(errors > 0, errors, np.inf)
    residual = np.log(model.predict(fitted.theta[None])[0] / problem.loss)
    ranking = np.argsort(-moved.max(axis=1), kind="stable")[:top]
    table = fitted.rows.table
    return [
        {
            **{
                name: table[name].iloc[chosen[i]].item() if name != "representation" else table[name].iloc[chosen[i]]
                for name in ("row", "n", "d", "representation", "loss")
            },
            "log_residual": float(residual[chosen[i]]),
            "parameter": model.names[int(np.argmax(moved[i]))],
            "change": float(moved[i].max()),
        }
        for i in ranking
    ]


def _candidates(fitted: Fitted) -> np.ndarray:
    """Return the rows to leave out; a row that is alone in its representation cannot be."""
    labels = fitted.model.design.labels["representation"]
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(counts[inverse] > 1)
    most = max(20, LEFT_OUT_CELLS // labels.size)
    if rows.size > most:
        jacobian = dense_jacobian(fitted)
        leverage = np.einsum("rp,pq,rq->r", jacobian, covariance(fitted), jacobian)
        strength = np.abs(fitted.residual) * np.sqrt(leverage)
        rows = rows[np.argsort(-strength[rows], kind="stable")[:most]]
    return rows


def information_criteria(fitted: Fitted) -> dict[str, Any]:
    """Return AICc and BIC with the error law that the objective implies (Gaussian, or Laplace for Huber)."""
    residual = fitted.residual
    count = residual.size
    parameters = sum(p.fixed is None for p in fitted.model.parameters) + 1
    if np.isfinite(fitted.problem.objective.threshold):
        deviance = 2 * count * (np.log(2 * max(float(np.mean(np.abs(residual))), 1e-300)) + 1)
    else:
        deviance = count * (np.log(2 * np.pi * max(float(np.mean(residual**2)), 1e-300)) + 1)
    spare = count - parameters - 1
    correction = 2 * parameters * (parameters + 1) / spare if spare > 0 else float("inf")
    return {
        "parameters": parameters,
        "aicc": float(deviance + 2 * parameters + correction),
        "bic": float(deviance + parameters * np.log(count)),
        "caveat": CAVEAT,
    }


def hold_outs(table: pd.DataFrame, laws: Sequence[str], options: Options) -> list[dict[str, Any]]:
    """Fit without the largest size, the most tokens, or one representation, and predict what was left out.

    Parameters
    ----------
    table
        Selected rows, as `select_rows` returns them.
    laws
        Laws to compare; `dense` stands for the compression law with every eff held at 1.
    options
        Objective and held parameters (parameters that a law does not have are ignored for it).

    Returns
    -------
    One entry per law and split: `n_train`, `n_test`, `rms` and `bias` of log(predicted / observed); or `problem` when
    the law cannot be fitted to the rest. Representations are left out only for laws that can predict unseen ones.
    """
    return [
        {"law": name, "held_out": split, **_hold_out(table, mask, name, options)}
        for name in laws
        for split, mask in _splits(table, name)
    ]


def _splits(table: pd.DataFrame, name: str) -> list[tuple[str, np.ndarray]]:
    splits = []
    for axis, title in (("n", "largest n"), ("d", "largest d")):
        values = table[axis].to_numpy(float)
        if np.unique(values).size > 1:
            splits.append((title, values > values.max() * 0.999))
    law = get_law("compression" if name == "dense" else name)
    labels = table["representation"].to_numpy()
    if law.columns and not law.grouped:
        splits += [(f"representation {label}", labels == label) for label in sorted(set(labels) - {"dense"})]
    return splits


def _hold_out(table: pd.DataFrame, mask: np.ndarray, name: str, options: Options) -> dict[str, Any]:
    law = get_law("compression" if name == "dense" else name)
    train, test = table[~mask], table[mask]
    known = set(train["representation"])
    if law.grouped:
        test = test[test["representation"].isin(known | {"dense"})]
    if test.empty or train.empty:
        return {"n_train": len(train), "n_test": len(test), "problem": "nothing left to fit or to predict"}
    few = [axis for axis in ("n", "d") if train[axis].nunique() < min(FEWEST_VALUES, table[axis].nunique())]
    if few:
        problem = f"{train[few[0]].nunique()} different {few[0]} would be left, which do not determine an exponent"
        return {"n_train": len(train), "n_test": len(test), "problem": problem}
    try:
        names = {p.name for p in law.parameters(make_design(train, law))} | {"eff", "L", "F", "C", "k"}
        fixed = {key: value for key, value in (options.fix or {}).items() if key in names}
        if name == "dense":
            fixed["eff"] = 1.0
        fitted = fit_point(Rows(train, []), law, replace(options, fix=fixed, priors=(), bootstrap=0), POLISHED_HOLD_OUT)
    except QpipeError as error:
        return {"n_train": len(train), "n_test": len(test), "problem": error.problems[0]}
    unseen = {p.name for p in law.parameters(make_design(test, law))} - set(fitted.model.names)
    if unseen:
        return {"n_train": len(train), "n_test": len(test), "problem": f"{', '.join(sorted(unseen))} needs these runs"}
    predicted = predict_rows(fitted, test)
    miss = np.log(predicted / test["loss"].to_numpy(float))
    return {
        "n_train": len(train),
        "n_test": len(test),
        "rms": float(np.sqrt(np.mean(miss**2))),
        "bias": float(np.mean(miss)),
    }


def predict_rows(fitted: Fitted, table: pd.DataFrame) -> Array:
    """Return predicted losses (T,) of rows that the fit has not seen."""
    model = type(fitted.model)(fitted.law, make_design(table, fitted.law), fitted.model.parameters, counts=True)
    return model.predict(fitted.model.shift(fitted.theta, to_counts=True)[None])[0]


def comparable_laws(table: pd.DataFrame) -> list[str]:
    """Return the laws that the table's columns allow, the dense law first."""
    compressed = table["representation"] != "dense"
    if not compressed.any():
        return ["chinchilla"]
    names = ["dense", "compression"]
    for name in ("capacity", "sparsity", "precision", "gamma", "qat-gap", "float"):
        columns = get_law(name).columns
        usable = all(c in table and np.isfinite(table.loc[compressed, c].to_numpy(float)).all() for c in columns)
        if usable and (not get_law(name).grouped or (~compressed).any()):
            names.append(name)
    return names
