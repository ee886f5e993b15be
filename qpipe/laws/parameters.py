"""Parameters of a law: names, units, bounds, and the scale on which the solver moves them.

A scaling law's parameters differ by ten orders of magnitude and most must stay positive, so the solver works on an
*internal* scale: the logarithm of a positive parameter, the plain value of one that may be exactly zero (the
irreducible loss E). Users only ever see *natural* values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qpipe.errors import QpipeError, nearest

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Parameter:
    """One number of a law, in natural units."""

    name: str
    """As in formulas and in FIT.json; members of a family carry the instance, `eff[w4a4]`."""
    unit: str
    meaning: str
    lower: float
    upper: float
    starts: tuple[float, ...] = (1.0,)
    """Natural values from which searches start."""
    transform: Literal["log", "identity"] = "log"
    fixed: float | None = None
    """Value at which the parameter is held, or None when it is fitted."""
    shifts: tuple[tuple[str, str, float], ...] = ()
    """(exponent, `n` or `d`, sign): coefficients of powers of N or D. The solver measures N and D in units of their
    geometric means, where a coefficient c becomes c' with log c = log c' + sum of sign * exponent * log(unit)."""

    @property
    def family(self) -> str:
        """Name without the instance: `eff` for `eff[w4a4]`."""
        return self.name.split("[", 1)[0]

    def to_internal(self, value: float) -> float:
        """Return the internal value of a natural one (a zero on a log scale becomes the lower bound)."""
        return float(np.log(max(value, self.lower))) if self.transform == "log" else float(value)


@dataclass(frozen=True)
class Prior:
    """A Gaussian belief about a parameter on its internal scale, worth one observation of that precision."""

    name: str
    value: float
    """Centre, natural units."""
    sd: float
    """Standard deviation, natural units; for parameters on a log scale `sd / value` is the relative one."""


def internal_bounds(parameters: Sequence[Parameter]) -> tuple[Array, Array]:
    """Return lower and upper bounds on the internal scale, each of shape (P,)."""
    lower = np.array([p.to_internal(p.lower) for p in parameters])
    upper = np.array([p.to_internal(p.upper) for p in parameters])
    return lower, upper


def to_natural(parameters: Sequence[Parameter], internal: Array) -> Array:
    """Map internal values (..., P) to natural ones."""
    logarithmic = np.array([p.transform == "log" for p in parameters])
    return np.where(logarithmic, np.exp(np.where(logarithmic, internal, 0.0)), internal)


def parse_settings(settings: Sequence[str], what: str) -> dict[str, float]:
    """Parse `name=value` words (errors: not of that form, not a number, a name twice)."""
    problems, result = [], {}
    for word in settings:
        name, _, text = word.rpartition("=")
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not name or not np.isfinite(value):
            problems.append(f"{what} '{word}' is not NAME=NUMBER, as in alpha=0.13")
        elif name in result:
            problems.append(f"{what} {name} is given twice")
        result[name] = value
    if problems:
        raise QpipeError(problems)
    return result


def parse_priors(settings: Sequence[str]) -> list[Prior]:
    """Parse `name=value+-sd` words (errors: not of that form, sd not positive)."""
    problems, result = [], []
    for word in settings:
        name, _, text = word.rpartition("=")
        value, _, sd = text.replace("±", "+-").partition("+-")
        try:
            result.append(Prior(name, float(value), float(sd)))
        except ValueError:
            problems.append(f"prior '{word}' is not NAME=VALUE+-SD, as in E=1.7+-0.2")
    problems += [f"prior on {p.name}: the standard deviation {p.sd:g} must be positive" for p in result if p.sd <= 0]
    if problems:
        raise QpipeError(problems)
    return result


def with_fixed(parameters: Sequence[Parameter], fixed: dict[str, float]) -> list[Parameter]:
    """Hold parameters, or whole families, at given values (errors: unknown name, value outside the bounds)."""
    known = {p.name for p in parameters} | {p.family for p in parameters}
    problems = [
        f"the law has no parameter '{name}'{nearest(name, known)}; it has {', '.join(p.name for p in parameters)}"
        for name in fixed
        if name not in known
    ]
    result = []
    for parameter in parameters:
        value = fixed.get(parameter.name, fixed.get(parameter.family, parameter.fixed))
        if value is not None and not parameter.lower <= value <= parameter.upper:
            problems.append(
                f"{parameter.name} = {value:g} lies outside its bounds {parameter.lower:g} to {parameter.upper:g}"
            )
        result.append(replace(parameter, fixed=value))
    if problems:
        raise QpipeError(problems)
    return result


def with_free(parameters: Sequence[Parameter], free: Sequence[str]) -> list[Parameter]:
    """Release parameters that the law holds by default (errors: unknown name)."""
    known = {p.name for p in parameters} | {p.family for p in parameters}
    if unknown := [name for name in free if name not in known]:
        raise QpipeError([f"the law has no parameter '{name}'{nearest(name, known)}" for name in unknown])
    return [replace(p, fixed=None) if {p.name, p.family} & set(free) else p for p in parameters]
