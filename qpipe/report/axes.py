"""Axes: limits, ticks and number formats, computed here once so that paper and screen show the same ones."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Style = Literal["number", "count", "percent"]
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Axis:
    """One axis: title with unit, limits in data units, ticks as (value, label)."""

    title: str
    limits: tuple[float, float]
    ticks: tuple[tuple[float, str], ...]
    log: bool = False
    grid: bool = True


def format_number(value: float, style: Style = "number") -> str:
    """Format a number for a tick: `count` gives 30M and 2.5B, `percent` adds the sign."""
    if style == "count":
        for scale, suffix in _SUFFIXES:
            if abs(value) >= scale * 0.9995:
                return f"{value / scale:.3g}{suffix}"
    return f"{value:.4g}".replace("-", "−") + (" %" if style == "percent" else "")


def numeric_axis(
    title: str,
    values: Iterable[float],
    *,
    log: bool = False,
    style: Style = "number",
    pad: float = 0.05,
    include: Sequence[float] = (),
    max_ticks: int = 7,
) -> Axis:
    """Return an axis that holds the finite `values` (positive ones when `log`) and `include`, with some air.

    Parameters
    ----------
    pad
        Share of the data's range (in decades when `log`) added at both ends.
    """
    data = np.array([v for v in [*values, *include] if math.isfinite(v) and (v > 0 or not log)], dtype=float)
    if data.size == 0:
        data = np.array([1.0])
    low, high = (np.log10(data.min()), np.log10(data.max())) if log else (data.min(), data.max())
    # A single value still needs an axis around it.
    air = pad * (high - low) or (0.15 if log else max(abs(low) * 0.1, 1e-9))
    limits = (float(low - air), float(high + air))
    if log:
        limits = (10 ** limits[0], 10 ** limits[1])
    ticks = log_ticks(*limits, max_ticks=max_ticks) if log else linear_ticks(*limits, max_ticks=max_ticks)
    return Axis(title, limits, tuple((t, format_number(t, style)) for t in ticks), log)


def linear_ticks(low: float, high: float, max_ticks: int = 7) -> list[float]:
    """Return multiples of 1, 2, 2.5 or 5 times a power of ten within [low, high], as many as fit `max_ticks`."""
    span = high - low
    magnitude = 10 ** math.floor(math.log10(span / max_ticks))
    step = next(s * magnitude for s in (1, 2, 2.5, 5, 10, 20) if span / (s * magnitude) <= max_ticks)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def log_ticks(low: float, high: float, max_ticks: int = 7) -> list[float]:
    """Return round values for a log axis: 1-2-5 or powers of ten, or equal steps over less than a factor of 4."""
    if high / low < 4:
        return linear_ticks(low, high, max_ticks)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{m}e{d}") for d in decades for m in mantissas]
        inside = [t for t in ticks if low * 0.9999 <= t <= high * 1.0001]
        if len(inside) <= max_ticks:
            return inside
    return inside[:: math.ceil(len(inside) / max_ticks)]


def category_axis(names: Sequence[str]) -> Axis:
    """Return an axis with one place per name, the first on top."""
    return Axis("", (len(names) - 0.4, -0.6), tuple((float(i), name) for i, name in enumerate(names)), grid=False)
