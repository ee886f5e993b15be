"""Figures of finetuned runs: loss against the dense share of the budget, and how far weights moved."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qpipe.report.axes import category_axis, format_number, numeric_axis
from qpipe.report.chart import Bars, Chart, Line, Mark, Panel, Points
from qpipe.report.law_figures import floats
from qpipe.report.palette import looks
from qpipe.splits import Curve

_SPLIT_CAPTION = (
    "Each point spends the same total number of tokens, the share on the axis dense and the rest under the "
    "representation: at 0 % from scratch, at 100 % a dense model that is rounded. A bar that reaches zero cannot be "
    "told from the best split."
)
_AIR = 2.0
"""Points are off the axis beyond so many times the largest excess of a split that trains at all."""
_LENGTH_CAPTION = (
    "Each point finetunes the same dense model for the number of tokens on the axis. A bar that reaches zero cannot be "
    "told from the best length: from there on finetuning has saturated."
)


def split_charts(curves: Sequence[Curve], noise: float) -> list[Chart]:
    """Return one chart per mode: excess loss over the best split against the share, a panel per size and budget."""
    kinds = {(c.mode, c.axis): None for c in curves}
    return [
        _split_chart([c for c in curves if (c.mode, c.axis) == (mode, axis)], mode, axis == "share", noise)
        for mode, axis in kinds
    ]


def _split_chart(curves: list[Curve], mode: str, split: bool, noise: float) -> Chart:
    shown = {curve.representation: None for curve in curves}
    colours = {name: look for name, look in looks(shown).items() if name in shown}
    budgets = list({(curve.n, curve.d): None for curve in curves})
    unit = 100.0 if split else 1.0
    y = numeric_axis("excess over the best (nats/token)", _shown(curves), include=(0.0,))
    panels = []
    for n, d in budgets:
        marks: list[Mark] = []
        for curve in (c for c in curves if (c.n, c.d) == (n, d)):
            look, excess = colours[curve.representation], curve.loss - curve.loss.min()
            low, high = _ends(curve)
            hover = tuple(
                f"{curve.representation}: {f'{at:.1%} dense' if split else f'{at:,.0f} tokens'}, loss {loss:.4f}, "
                f"{runs} runs"
                for at, loss, runs in zip(curve.at, curve.loss, curve.runs, strict=True)
            )
            marks += [
                Line(curve.representation, floats(unit * curve.at), floats(excess), look.color),
                Points(
                    curve.representation,
                    floats(unit * curve.at),
                    floats(excess),
                    look,
                    hover,
                    floats(low),
                    floats(high),
                ),
            ]
        x = numeric_axis("tokens trained dense (%)", [0, 100])
        if not split:
            lengths = [float(at) for curve in curves for at in curve.at]
            x = numeric_axis("tokens of finetuning", lengths, log=min(lengths) > 0, style="count")
        title = f"N {format_number(n, 'count')}, D {format_number(d, 'count')}"
        panels.append(Panel(x, y, tuple(marks), title))
    known = "one seed: noise not known, no intervals"
    if noise == noise:
        known = f"noise {noise:.2g} nats/token; bars: 90 % intervals"
    return Chart(
        name=f"{'splits' if split else 'saturation'}-{mode}",
        title=f"How to split a budget between dense training and finetuning ({mode})"
        if split
        else f"How many tokens finetuning needs ({mode})",
        subtitle=f"{sum(int(c.runs.sum()) for c in curves)} runs; {known}{_beyond(curves, y.limits[1])}",
        caption=_SPLIT_CAPTION if split else _LENGTH_CAPTION,
        panels=tuple(panels),
        looks=colours,
    )


def _shown(curves: list[Curve]) -> list[float]:
    """Return what the axis must hold: all points, but not how far a low-bit model that is only rounded falls behind."""
    trained = [float(v) for c in curves for ends in _ends(c) for v, at in zip(ends, c.at, strict=True) if at < 1]
    every = [float(v) for c in curves for ends in _ends(c) for v in ends]
    return [v for v in every if v <= _AIR * max(trained)] if trained and curves[0].axis == "share" else every


def _beyond(curves: list[Curve], top: float) -> str:
    names = {c.representation: None for c in curves if float((c.loss - c.loss.min()).max()) > top}
    return f"; off the axis: {', '.join(names)} only rounded" if names else ""


def _ends(curve: Curve) -> tuple[Any, Any]:
    """Return the ends of the error bars, the points themselves where the noise is not known."""
    excess = curve.loss - curve.loss.min()
    return np.where(np.isnan(curve.low), excess, curve.low), np.where(np.isnan(curve.high), excess, curve.high)


def change_chart(rows: Sequence[Mapping[str, Any]]) -> Chart:
    """Return the chart of weight changes: per representation the median over matrices, from the least to the largest.

    Parameters
    ----------
    rows
        Per run `representation` and `matrices`, name -> (latent, quantized, rounding); runs of one representation
        are pooled.
    """
    names = list({str(row["representation"]): None for row in rows})
    colours = looks(names)
    pooled = {
        name: list(zip(*(v for r in rows if r["representation"] == name for v in r["matrices"].values()), strict=True))
        for name in names
    }
    titles = ("latent weights", "quantized weights", "rounding alone")
    largest = max(max(column) for columns in pooled.values() for column in columns)
    panels = []
    for place, title in enumerate(titles):
        columns = [floats(pooled[name][place]) for name in names]
        middle = tuple(statistics.median(column) for column in columns)
        low, high = tuple(min(column) for column in columns), tuple(max(column) for column in columns)
        texts = tuple(f"{value:.3f}" for value in middle)
        bars = Bars(middle, low, high, tuple(colours[name].color for name in names), texts, high, texts)
        axis = numeric_axis("relative L1 change", [0, 1.15 * largest], pad=0.0)
        panels.append(Panel(axis, category_axis(names), (bars,), title))
    return Chart(
        name="weight-changes",
        title="How far finetuning moves the weights",
        subtitle=f"{len(rows)} runs; median over matrices, bars from the least to the largest",
        caption="Relative L1 change of each weight matrix of the blocks from the dense weights that finetuning began "
        "with: of the latent weights that are trained, of the quantized weights that the model computes with, and of "
        "rounding without training.",
        panels=tuple(panels),
        legend="none",
        height=0.9 + 0.35 * len(names),
    )
