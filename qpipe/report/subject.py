"""The fit that a set of figures is about, with the words, looks and capacities that all of them share."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from qpipe.laws import Fit
from qpipe.report.palette import Look, looks


@dataclass(frozen=True)
class Multiplier:
    """Fitted eff of one representation; limits are NaN without a bootstrap, infinite where an interval is open."""

    eff: float
    low: float
    high: float
    n_runs: int

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval."""
        return not (math.isnan(self.low) and math.isnan(self.high))

    def __str__(self) -> str:
        """Return `0.692 [0.671, 0.715]`, the interval where there is one."""
        if not self.has_interval:
            return digits(self.eff)
        return f"{digits(self.eff)} [{digits(self.low)}, {digits(self.high)}]"


def digits(value: float) -> str:
    """Return a number with three significant digits, trailing zeros kept; ∞ for infinity."""
    return f"{value:#.3g}".rstrip(".").replace("inf", "∞")


@dataclass(frozen=True)
class Capacity:
    """What is known of a representation before any training; NaN where it is not."""

    bits_per_weight: float = math.nan
    rho: float = math.nan
    gmse: float = math.nan


class Subject:
    """A fit and what its figures need beside it.

    Parameters
    ----------
    capacities
        By representation. Those missing are taken from the fitted rows, where the loss table had such columns.
    """

    def __init__(self, fit: Fit, capacities: Mapping[str, Capacity]) -> None:
        self.fit = fit
        self.rows: pd.DataFrame = _with_residuals(fit.table())
        self.multipliers = {name: _multiplier(entry) for name, entry in fit.multipliers.items()}
        self.capacities = {**_row_capacities(self.rows), **capacities}
        self.looks: dict[str, Look] = looks({*self.rows["representation"], *self.multipliers})

    @cached_property
    def representations(self) -> list[str]:
        """Fitted representations: dense first, then by eff downwards, then by name."""
        eff = {name: entry.eff for name, entry in self.multipliers.items()}
        return sorted(set(self.rows["representation"]), key=lambda r: (r != "dense", -eff.get(r, -1.0), r))

    @cached_property
    def ranked(self) -> list[str]:
        """Representations with a multiplier, the largest first."""
        return sorted(self.multipliers, key=lambda name: (-self.multipliers[name].eff, name != "dense", name))

    @property
    def legend(self) -> dict[str, Look]:
        """Looks in the order of `representations`."""
        return {name: self.looks[name] for name in self.representations}

    def with_known(self, quantity: str) -> list[str]:
        """Return ranked representations whose capacity knows `bits_per_weight`, `rho` or `gmse`."""
        known = self.capacities
        return [r for r in self.ranked if r in known and math.isfinite(getattr(known[r], quantity))]

    def title(self, what: str) -> str:
        """Return `what: <law> law`."""
        return f"{what}: {self.fit.law} law"

    @property
    def subtitle(self) -> str:
        """Number of runs, misfit, interval level, exclusions."""
        count, kinds = len(self.rows), len(self.representations)
        words = [
            f"{count} run{'s' * (count != 1)} of {kinds} representation{'s' * (kinds != 1)}",
            f"rms log residual {100 * self.fit.rms_log_residual:.2g} %",
            interval_words(self.fit.interval),
        ]
        excluded = sum(int(entry["rows"]) for entry in self.fit.excluded)
        return " · ".join(words + ([f"{excluded} rows excluded"] if excluded else []))

    @property
    def settled(self) -> bool:
        """Whether the fit may be read at face value: converged, identified, no parameter at a bound."""
        status = self.fit.status
        return bool(status["converged"]) and bool(status["identified"]) and not status["at_bound"]

    @property
    def warning(self) -> str:
        """What a reader must know before trusting a figure; empty for a settled fit."""
        return "" if self.settled else f"Not a settled fit: {self.fit.status.get('message') or 'see its status'}"


def interval_words(interval: Mapping[str, Any]) -> str:
    """Return `90 % intervals from 1000 resamples`, or that there are none."""
    if not interval.get("resamples"):
        return "no intervals"
    return f"{100 * float(interval['level']):.4g} % intervals from {interval['resamples']} resamples"


def _with_residuals(rows: pd.DataFrame) -> pd.DataFrame:
    """Add `deviation` = log loss - log fitted loss: positive where a run is worse than the law says."""
    return rows.assign(deviation=np.log(rows["loss"].to_numpy(float) / rows["fitted"].to_numpy(float)))


def _multiplier(entry: Mapping[str, Any]) -> Multiplier:
    limits = [entry.get("low"), entry.get("high")]
    if limits == [None, None]:
        low, high = math.nan, math.nan
    else:  # FIT.json writes an infinite number as null
        low, high = (
            (0.0 if limits[0] is None else float(limits[0])),
            (math.inf if limits[1] is None else float(limits[1])),
        )
    eff = math.nan if entry["eff"] is None else float(entry["eff"])
    return Multiplier(eff, low, high, int(entry.get("n_runs") or 0))


def _row_capacities(rows: pd.DataFrame) -> dict[str, Capacity]:
    columns = [name for name in ("bits_per_weight", "rho", "gmse") if name in rows]
    if not columns:
        return {}
    means = rows.groupby("representation")[columns].mean()
    return {str(name): Capacity(**{c: float(row[c]) for c in columns}) for name, row in means.iterrows()}


def capacities_from(entries: Sequence[Mapping[str, Any]]) -> dict[str, Capacity]:
    """Return capacities by representation from the objects that `qpipe capacity --json` prints."""

    def known(value: Any) -> float:
        return math.nan if value is None else float(value)

    return {
        str(entry["representation"]): Capacity(
            known(entry.get("bits_per_weight")), known(entry.get("rho")), known(entry.get("gmse"))
        )
        for entry in entries
    }
