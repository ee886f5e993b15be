"""Figures of rounding after training: what it costs against bits, and until when it is worth more than training."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from qpipe.laws import Fit
from qpipe.laws.break_even import worth
from qpipe.laws.damage import Damage
from qpipe.report.axes import format_number, numeric_axis
from qpipe.report.chart import Band, Chart, Line, Mark, Panel, Points
from qpipe.report.law_figures import floats
from qpipe.report.palette import Look, looks

_MAX_PANELS = 6
_CURVE_POINTS = 40


def damage_chart(damages: Sequence[Damage], rows: pd.DataFrame) -> Chart:
    """Loss increase against bits per weight: a panel per method, a colour per size, a line per dense run."""
    cost = rows["loss"] - rows["parent_loss"]
    rows = rows.assign(cost=cost)[cost > 0]
    names = {n: f"N = {format_number(n, 'count')}" for n in sorted(rows["n"].unique())}
    colors = dict(zip(names.values(), _size_looks(len(names)), strict=True))
    x = numeric_axis("bits/weight, everything counted", rows["ptq_bits"])
    y = numeric_axis("loss increase (nats/token)", rows["cost"], log=True)
    return Chart(
        name="damage",
        title="What rounding after training costs",
        subtitle=f"{len(rows)} quantizations of {rows['parent'].nunique()} dense runs",
        caption="Each marker is a finished dense run, quantized without further training, against the loss it had. "
        "Lines are the fitted term C_T D^g_D N^-g_N exp(-P/gamma_post) for each run's N and D: within a colour the "
        "upper ones were trained on more tokens where damage grows with tokens.",
        panels=tuple(
            Panel(x, y, _damage_marks(one, rows[rows["ptq_method"] == one.method], names, colors), title=one.method)
            for one in damages[:_MAX_PANELS]
        ),
        looks=colors,
    )


def _size_looks(count: int) -> list[Look]:
    return list(looks(f"s{rank}" for rank in range(count)).values())[1:]


def _damage_marks(
    damage: Damage, rows: pd.DataFrame, names: dict[float, str], colors: dict[str, Look]
) -> tuple[Mark, ...]:
    marks: list[Mark] = []
    for _, part in rows.groupby(["n", "d"]):
        n, d = float(part["n"].iloc[0]), float(part["d"].iloc[0])
        look = colors[names[n]]
        bits = np.linspace(part["ptq_bits"].min(), part["ptq_bits"].max(), _CURVE_POINTS)
        curve = floats(damage.predict(n, d, bits))
        marks.append(Line(f"D/N = {d / n:.3g}", floats(bits), curve, look.color, width=0.9))
        hover = tuple(
            f"{row['representation']}\n{row['parent']}\nloss {row['loss']:.4f} ({row['cost']:+.4f})"
            for row in part.to_dict("records")
        )
        marks.append(Points(names[n], floats(part["ptq_bits"]), floats(part["cost"]), look, hover))
    return tuple(marks)


def worth_chart(damages: Sequence[Damage], fit: Fit, comparison: pd.DataFrame) -> Chart:
    """Worth against tokens per parameter at equal bits: a panel per representation, a line per method."""
    n = float(comparison["n"].max())
    shown = comparison[comparison["n"] == n]
    names = list(dict.fromkeys(shown["representation"]))[:_MAX_PANELS]
    methods = looks(damage.method for damage in damages)
    least, most = shown["least_d_per_n"].min(), shown["most_d_per_n"].max()
    ratios = np.geomspace(least / 2, most * 4, _CURVE_POINTS)
    curves = {
        (name, damage.method): worth(
            damage.predict(n, ratios * n, _of(shown, name, "bits_per_weight")), n, fit.parameters
        )
        for name in names
        for damage in damages
    }
    x = numeric_axis("tokens per parameter (D/N)", ratios, log=True, pad=0.0)
    high = [_of(shown, name, "eff") for name in names]
    y = numeric_axis("worth (multiplier of N)", [value for curve in curves.values() for value in curve], include=high)
    return Chart(
        name="rounding-or-training",
        title="Rounding a finished model, or training a compressed one",
        subtitle=f"N = {format_number(n, 'count')}, equal bits per weight, everything counted",
        caption="The level line is what the representation is worth when models are trained in it, with its interval; "
        "the curves are dense models rounded to as many bits. Where a curve lies above the line rounding is "
        f"enough. Dense runs were rounded from {least:.3g} to {most:.3g} tokens per parameter; curves go beyond.",
        panels=tuple(
            Panel(x, y, _worth_marks(shown, name, ratios, curves, methods), title=_panel_title(shown, name))
            for name in names
        ),
        looks={damage.method: methods[damage.method] for damage in damages},
    )


def _of(table: pd.DataFrame, name: str, column: str) -> float:
    return float(table.loc[table["representation"] == name, column].iloc[0])


def _panel_title(table: pd.DataFrame, name: str) -> str:
    return f"{name}, {_of(table, name, 'bits_per_weight'):.3g} bits"


def _worth_marks(
    table: pd.DataFrame, name: str, ratios: np.ndarray, curves: dict[tuple[str, str], Any], methods: dict[str, Look]
) -> tuple[Mark, ...]:
    ends = (float(ratios[0]), float(ratios[-1]))
    eff, low, high = (_of(table, name, column) for column in ("eff", "eff_low", "eff_high"))
    marks: list[Mark] = []
    if np.isfinite([low, high]).all():
        marks.append(Band("interval", ends, (low, low), (high, high)))
    marks.append(Line("trained in it", ends, (eff, eff), dash="dash", legend=True))
    for method, curve in ((method, curve) for (shown, method), curve in curves.items() if shown == name):
        marks.append(Line(method, floats(ratios), floats(curve), methods[method].color, legend=True))
    return tuple(marks)
