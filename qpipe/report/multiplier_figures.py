"""Figures of efficiency multipliers: how much of its parameters a representation is worth."""

import numpy as np

from qpipe.report.axes import Axis, category_axis, format_number, linear_ticks, numeric_axis
from qpipe.report.chart import Bars, Chart, Line, Mark, Panel, Points, Rule
from qpipe.report.law_figures import floats
from qpipe.report.palette import GREY, INK, Look
from qpipe.report.subject import Multiplier, Subject

_OPEN_INTERVAL = 1.6
"""Bars end here (in eff) when intervals reach further; the text beside the bar gives the number."""


def bounds(entry: Multiplier) -> tuple[float, float]:
    """Return the interval's ends, the estimate itself where there is no interval."""
    return (entry.low, entry.high) if entry.has_interval else (entry.eff, entry.eff)


def multiplier_bars(subject: Subject) -> Chart:
    """Return eff of every representation as bars with intervals, the best on top."""
    entries = {name: subject.multipliers[name] for name in subject.ranked}
    ends = [bounds(entry) for entry in entries.values()]
    widest = max(1.0, *(entry.eff for entry in entries.values()), *(min(high, _OPEN_INTERVAL) for _, high in ends))
    # A third of the width is kept free for the numbers at the bars' ends.
    ticks = tuple((t, format_number(t)) for t in linear_ticks(0, widest * 1.02, 6))
    x = Axis("eff (share of its parameters that a representation is worth)", (0.0, widest * 1.04), ticks)
    predicted = {name: subject.capacities[name].rho for name in subject.with_known("rho") if name != "dense"}
    bars = Bars(
        values=floats([entry.eff for entry in entries.values()]),
        low=floats([low for low, _ in ends]),
        high=floats([min(high, 1e9) for _, high in ends]),
        colors=tuple(subject.looks[name].color for name in entries),
        texts=tuple("1 (the reference)" if name == "dense" else str(e) for name, e in entries.items()),
        text_from=floats(
            [max(m.eff, high, predicted.get(r, 0)) for (r, m), (_, high) in zip(entries.items(), ends, strict=True)]
        ),
        hover=tuple(f"{name}: {e}\n{e.n_runs} runs" for name, e in entries.items()),
    )
    marks: list[Mark] = [Rule(1.0, "x", "dense"), bars]
    if predicted:
        rows = floats([list(entries).index(name) for name in predicted])
        hover = tuple(f"{name}: predicted rho {rho:.3g}" for name, rho in predicted.items())
        rho = floats(list(predicted.values()))
        marks.append(Points("predicted rho", rho, rows, Look(INK, "diamond"), hover, open=True))
    return Chart(
        name="multipliers",
        title=subject.title("What each representation is worth"),
        subtitle=subject.subtitle,
        warning=subject.warning,
        caption="eff = 0.7 means: a model of N parameters in this representation reaches the loss of a dense model of "
        "0.7 N. Whiskers are intervals; an arrow marks one that goes on beyond the axis."
        + (" Open diamonds are predictions from the representation's Gaussian error alone." if predicted else ""),
        panels=(Panel(x, category_axis(list(entries)), tuple(marks)),),
        looks={"predicted rho": Look(INK, "diamond")} if predicted else {},
        legend="corner",
        height=max(2.2, 0.27 * len(entries) + 0.6),
    )


def eff_vs_bits(subject: Subject) -> Chart:
    """Return eff against stored bits/weight, with lines of equal memory."""
    names = subject.with_known("bits_per_weight")
    bits = [subject.capacities[name].bits_per_weight for name in names]
    highest = max(min(bounds(subject.multipliers[name])[1], _OPEN_INTERVAL) for name in names)
    x = numeric_axis("stored bits/weight (scales and masks included)", bits, log=True, include=[1, 16], pad=0.05)
    usual = [b for b in (0.25, 0.5, 1, 2, 3, 4, 6, 8, 16, 32) if x.limits[0] <= b <= x.limits[1]]
    x = Axis(x.title, x.limits, tuple((float(b), format_number(b)) for b in usual), log=True)
    y = numeric_axis("eff (fitted multiplier)", [0, highest], include=[1.0])
    marks = _equal_memory(x.limits, y.limits[1]) + [
        _eff_point(subject, name, bit, y.limits[1]) for name, bit in zip(names, bits, strict=True)
    ]
    return Chart(
        name="eff-vs-bits",
        title=subject.title("Worth against memory"),
        subtitle=subject.subtitle,
        warning=subject.warning,
        caption="Higher and further left is better. Grey lines join representations that are worth the same per "
        "stored bit: on the line marked 2× a model of a given memory is worth twice as much as dense at 16 bits.",
        panels=(Panel(x, y, tuple(marks)),),
        looks={name: subject.looks[name] for name in names},
    )


def _eff_point(subject: Subject, name: str, x: float, top: float) -> Points:
    entry = subject.multipliers[name]
    low, high = bounds(entry)
    hover = f"{name}: eff {entry}\n{x:.3g}"
    return Points(
        name, (x,), floats([entry.eff]), subject.looks[name], (hover,), (low,), (min(high, 2 * top),), labels=True
    )


def _equal_memory(limits: tuple[float, float], top: float) -> list[Mark]:
    lines: list[Mark] = []
    for gain in (1, 2, 4, 8):
        bits = np.geomspace(limits[0], min(limits[1], 16 * top / gain), 40)
        if bits[-1] > bits[0]:
            lines.append(Line(f"{gain}×", floats(bits), floats(gain * bits / 16), GREY, "dot", 1.0, label="end"))
    return lines


def rho_vs_eff(subject: Subject) -> Chart:
    """Return fitted eff against the capacity rho that theory predicts before any training."""
    names = subject.with_known("rho")
    rho = [subject.capacities[name].rho for name in names]
    highest = max(min(bounds(subject.multipliers[name])[1], _OPEN_INTERVAL) for name in names)
    x = numeric_axis("rho (predicted from Gaussian error)", [0, *rho], include=[1.0])
    y = numeric_axis("eff (fitted multiplier)", [0, highest], include=[1.0])
    end = min(x.limits[1], y.limits[1])
    marks: list[Mark] = [Line("eff = rho", (0.0, end), (0.0, end), INK, "dash", 1.0, legend=True)]
    marks += [_eff_point(subject, name, value, y.limits[1]) for name, value in zip(names, rho, strict=True)]
    return Chart(
        name="rho-vs-eff",
        title=subject.title("Measured against predicted worth"),
        subtitle=subject.subtitle,
        warning=subject.warning,
        caption="On the dashed line training confirms what theory predicts from the representation's error on "
        "Gaussian data. Above it training makes more of the representation, below it less.",
        panels=(Panel(x, y, tuple(marks)),),
        looks={name: subject.looks[name] for name in names},
    )
