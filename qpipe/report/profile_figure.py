"""The profile of weak parameters: how much worse the fit gets when one of them is held elsewhere.

A parameter that the runs determine has a narrow valley; one that they do not has a floor that runs on to its bound. The
picture tells the two apart at a glance, where an estimate with a standard error can not.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np

from qpipe.report.axes import numeric_axis
from qpipe.report.chart import Chart, Line, Mark, Panel, Rule
from qpipe.report.law_figures import floats
from qpipe.report.palette import INK, WARN
from qpipe.report.subject import Subject

_MAX_PANELS = 6


def profiles(subject: Subject) -> Chart:
    """Return one panel per profiled parameter: rise of the objective against the held value."""
    found: Mapping[str, Mapping[str, Any]] = subject.fit.checks["profiles"]
    shown = dict(list(found.items())[:_MAX_PANELS])
    left_out = [name for name in found if name not in shown]
    return Chart(
        name="profiles",
        title=subject.title("How well the parameters are known"),
        subtitle=subject.subtitle,
        warning=subject.warning,
        caption="Each curve holds one parameter at the value below and fits all others again. Where the curve lies "
        "under the dashed line the runs allow the value: between the orange lines is the interval. A curve that stays "
        "flat up to the edge means that the runs do not determine the parameter."
        + (f" Not shown: {', '.join(left_out)}." if left_out else ""),
        panels=tuple(_panel(subject, name, profile) for name, profile in shown.items()),
        legend="none",
        height=3.2,
    )


def _panel(subject: Subject, name: str, profile: Mapping[str, Any]) -> Panel:
    limit = NormalDist().inv_cdf((1 + float(profile["level"])) / 2) ** 2
    values, rise = np.array(profile["values"], float), np.array(profile["rise"], float)
    near = _near(rise, 3.5 * limit)
    values, rise = values[near], rise[near]
    ends = [float(v) for v in (profile["low"], profile["high"]) if v is not None and math.isfinite(float(v))]
    log = bool((values > 0).all()) and values.max() / values.min() > 10
    unit = subject.fit.units.get(name, "")
    title = f"{name} ({unit})" if unit not in ("", "1") else name
    marks: list[Mark] = [
        Rule(limit, "y", f"{100 * float(profile['level']):g} %"),
        Line(name, floats(values), floats(rise), INK),
    ]
    marks += [Rule(end, "x", color=WARN, dash="dot") for end in ends]
    open_sides = " and ".join(side for side in ("low", "high") if profile[f"open_{side}"])
    grade = str(profile["grade"])
    words = ("not identified" if grade == "none" else grade) + (f", open at the {open_sides} end" if open_sides else "")
    return Panel(
        numeric_axis(title, values, log=log, include=ends, max_ticks=5),
        numeric_axis("rise of the objective (χ² units)", [0.0, 3.5 * limit], pad=0.02),
        tuple(marks),
        title=f"{name}: {words}",
    )


def _near(rise: Sequence[float] | np.ndarray, ceiling: float) -> slice:
    """Return the stretch of points up to the first one above the ceiling on either side of the lowest."""
    above = np.asarray(rise) > ceiling
    lowest = int(np.argmin(rise))
    left = max((i for i in range(lowest) if above[i]), default=0)
    right = min((i for i in range(lowest, above.size) if above[i]), default=above.size - 1)
    return slice(left, right + 1)
