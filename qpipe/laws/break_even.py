"""Rounding after training beside training under a representation: which is worth more, and until when.

With a fitted law L = A (N eff)^-alpha + B D^-beta + E, the damage of rounding (`qpipe.laws.damage`) becomes a
multiplier that stands beside those of models trained under a representation:

    eff_rounded(N, D, P) = (1 + damage N^alpha / A)^(-1/alpha)

Rounding is enough as long as eff_rounded is not below eff of a representation of as many bits; solved for D, up to

    D* = [A N^(g_N - alpha) (eff^-alpha - 1) exp(P / gamma_post) / C_T]^(1 / g_D).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from qpipe.errors import QpipeError
from qpipe.laws.damage import NAMES, Array, Damage, interval_of
from qpipe.laws.result import Fit

_NEAR = 0.25
"""Bits by which a comparison may go beyond the bits that were rounded to and still count as measured."""


def worth(damage: Array | float, n: Array | float, parameters: Mapping[str, float]) -> Array:
    """Return eff of models of n parameters whose loss is raised by `damage`, under a law with A and alpha."""
    alpha = parameters["alpha"]
    return np.asarray((1 + np.asarray(damage) * np.asarray(n, float) ** alpha / parameters["A"]) ** (-1 / alpha))


def break_even(values: Array, n: float, bits: float, eff: float, parameters: Mapping[str, float]) -> Array:
    """Return the tokens D* up to which rounding to `bits` is worth at least `eff`, for rows (B, 4) of parameters.

    0 where rounding is never enough (eff at least 1), infinite where damage is small enough and does not grow with D.
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
    limits = interval_of(break_even(damage.draws, n, bits, entry["eff"], fit.parameters) / n, level)
    return {
        "method": damage.method,
        "representation": name,
        "bits_per_weight": bits,
        "n": n,
        "eff": entry["eff"],
        "eff_low": _number(entry.get("low")),
        "eff_high": _number(entry.get("high")),
        "least_d_per_n": least,
        "eff_rounded_least": float(worth(damage.predict(n, least * n, bits), n, fit.parameters)),
        "most_d_per_n": most,
        "eff_rounded_most": float(worth(damage.predict(n, most * n, bits), n, fit.parameters)),
        "enough_until_d_per_n": until,
        "until_low": limits[0] if limits else math.nan,
        "until_high": limits[1] if limits else math.nan,
        "within_runs": bool(
            least <= until <= most and damage.ranges["bits"][0] - _NEAR <= bits <= damage.ranges["bits"][1] + _NEAR
        ),
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def statements(table: pd.DataFrame) -> list[str]:
    """Say, for every row of `compare`, until when rounding is enough."""
    return [_statement(row) for row in table.to_dict("records")]


def _statement(row: Mapping[Any, Any]) -> str:
    worth_of = (
        f"{row[f'eff_rounded_{end}']:.3g} N after {row[f'{end}_d_per_n']:.3g} tokens per parameter"
        for end in ("least", "most")
    )
    head = (
        f"{row['representation']} ({row['bits_per_weight']:.3g} bits) is worth {row['eff']:.3g} N when trained so; "
        f"{row['method']} at the same bits, N = {row['n']:.3g}: {', '.join(worth_of)}."
    )
    until = row["enough_until_d_per_n"]
    span = "" if math.isnan(row["until_low"]) else f" [{row['until_low']:.3g}, {row['until_high']:.3g}]"
    if until == 0:
        return f"{head} Rounding is never enough."
    if not math.isfinite(until):
        return f"{head} Its damage does not grow with tokens: rounding stays enough."
    where = "" if row["within_runs"] else ", which is outside what was measured"
    return f"{head} Rounding is enough up to {until:.3g}{span} tokens per parameter{where}."
