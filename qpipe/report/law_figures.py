"""Figures that show how well a law describes the losses it was fitted to."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qpipe.report.axes import format_number, numeric_axis
from qpipe.report.chart import Band, Chart, Floats, Line, Mark, Panel, Points, Rule
from qpipe.report.palette import INK
from qpipe.report.subject import Subject

MAX_PANELS = 6
"""More token budgets than this are drawn in four bins of tokens per parameter."""
_SAME = 1.15
"""Budgets within this factor are drawn as one: batches round D, and sizes are named after rounded N."""
_CURVE_POINTS = 60
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Budget:
    """Runs that share a token budget: a ratio D/N, or a number of tokens D."""

    label: str
    rows: pd.DataFrame
    ratio: float | None
    tokens: float | None

    def d(self, n: Array) -> Array:
        """Return D (tokens) of the budget at sizes `n`."""
        return n * self.ratio if self.ratio is not None else np.full_like(n, self.tokens)


def budgets(rows: pd.DataFrame) -> list[Budget]:
    """Group runs by D/N or by D, whichever needs fewer groups; by four bins of D/N when both need more than six."""
    ratio, tokens = rows["d"] / rows["n"], rows["d"].astype(float)
    by_ratio, by_tokens = _clusters(ratio), _clusters(tokens)
    if min(by_ratio.nunique(), by_tokens.nunique()) > MAX_PANELS:
        bins = pd.qcut(ratio, 4, labels=False, duplicates="drop")
        return [_ratio_budget(part, binned=True) for _, part in rows.groupby(bins)]
    if by_ratio.nunique() <= by_tokens.nunique():
        return [_ratio_budget(part, binned=False) for _, part in rows.groupby(by_ratio)]
    medians = [(part, float(part["d"].median())) for _, part in rows.groupby(by_tokens)]
    return [Budget(f"D ≈ {format_number(d, 'count')} tokens", part, None, d) for part, d in medians]


def _clusters(values: pd.Series) -> pd.Series:
    """Number groups of values in ascending order; a group spans at most a factor `_SAME`."""
    group, start, numbers = -1, 0.0, {}
    for value in sorted(set(values)):
        if group < 0 or value > start * _SAME:
            group, start = group + 1, value
        numbers[value] = group
    return values.map(numbers)


def _ratio_budget(rows: pd.DataFrame, *, binned: bool) -> Budget:
    ratio = rows["d"] / rows["n"]
    middle = float(ratio.median())
    span = f" ({ratio.min():.3g} to {ratio.max():.3g})" if binned else ""
    return Budget(f"D/N ≈ {middle:.3g}{span}", rows, middle, None)


def loss_vs_n(subject: Subject) -> Chart:
    """Loss against N per representation with the fitted law, one panel per token budget."""
    groups = budgets(subject.rows)
    last = set(groups[-1].rows["representation"])
    # Names stand at the line ends when every representation is in the last panel, else in a legend.
    direct = last == set(subject.representations)
    x = numeric_axis("N (non-embedding parameters)", subject.rows["n"], log=True, style="count", pad=0.06, max_ticks=5)
    panels_marks = [
        _loss_marks(subject, group, x.limits[1] if direct and group is groups[-1] else None) for group in groups
    ]
    ys = [y for marks in panels_marks for mark in marks if isinstance(mark, Points | Line) for y in mark.y]
    y = numeric_axis("validation loss (nats/token)", ys, log=True, pad=0.04)
    return Chart(
        name="loss-vs-n",
        title=subject.title("Loss against size"),
        subtitle=subject.subtitle,
        warning=subject.warning,
        caption="Each marker is a run; lines are the fitted law at the panel's token budget D, "
        "dotted beyond the runs. Dense is black. "
        "A line that runs to the right of dense by a factor f needs f times the parameters for the same loss: "
        "eff = 1/f.",
        panels=tuple(Panel(x, y, m, title=g.label) for g, m in zip(groups, panels_marks, strict=True)),
        looks=subject.legend,
        legend="none" if direct else "side",
        height=max(4.2, 0.15 * len(last)),
    )


def _loss_marks(subject: Subject, group: Budget, margin: float | None) -> tuple[Mark, ...]:
    """Return runs and law of one budget; lines are continued, dotted, to N = `margin` and named there."""
    marks: list[Mark] = []
    for name in reversed(subject.representations):
        rows = group.rows[group.rows["representation"] == name]
        if len(rows) == 0:
            continue
        look, high = subject.looks[name], rows["n"].max()
        width = 1.8 if name == "dense" else 1.2
        n = np.geomspace(rows["n"].min() / 1.07, high * 1.07, _CURVE_POINTS)
        marks.append(Line(name, floats(n), _law(subject, group, name, n), look.color, width=width))
        if margin is not None:
            n = np.geomspace(high, max(margin, high), 12)
            curve = _law(subject, group, name, n)
            marks.append(Line(name, floats(n), curve, look.color, "dot", 0.8, label="margin"))
        marks.append(Points(name, floats(rows["n"]), floats(rows["loss"]), look, hovers(rows)))
    return tuple(marks)


def _law(subject: Subject, group: Budget, name: str, n: Array) -> Floats:
    return floats(subject.fit.predict(n, group.d(n), name))


def floats(values: Sequence[float] | Array | pd.Series) -> Floats:
    """Return plain Python floats with 8 significant digits: what a figure can show, and no more bytes than that."""
    return tuple(float(f"{value:.8g}") for value in np.asarray(values, float))


def hovers(rows: pd.DataFrame) -> tuple[str, ...]:
    """Return what the page shows when the pointer rests on a run."""
    return tuple(
        f"{row['representation']}\nN {row['n']:,.0f} · D {row['d']:,.0f}\nloss {row['loss']:.4f} nats/token"
        f" · {100 * row['deviation']:+.2f} % from the law"
        for row in rows.to_dict("records")
    )


def no_collapse(subject: Subject) -> str:
    """Return why a fit has no collapse plot, or an empty string: it needs L - B D^-beta = A (N eff)^-alpha + E."""
    base = {"A", "alpha", "B", "beta", "E"}
    fit = subject.fit
    if fit.law not in ("chinchilla", "compression", "capacity"):
        return f"the {fit.law} law is not a function of N x eff alone at fixed D"
    if not base <= set(fit.parameters):
        return "the fit lacks " + ", ".join(sorted(base - set(fit.parameters)))
    if len(subject.representations) == 1:
        return "one representation has nothing to collapse with"
    lost = sorted(set(subject.rows["representation"]) - set(subject.multipliers) - {"dense"})
    return f"no multiplier of {', '.join(lost)}" if lost else ""


def collapse(subject: Subject) -> Chart:
    """Loss without its data term against N eff: if eff is all that a representation changes, runs fall on one line."""
    fit = subject.fit
    p, rows = fit.parameters, subject.rows
    eff = rows["representation"].map(lambda name: subject.multipliers[name].eff if name in subject.multipliers else 1.0)
    x, y = rows["n"] * eff, rows["loss"] - p["B"] * rows["d"] ** -p["beta"]
    marks: list[Mark] = []
    n = np.geomspace(x.min() * 0.8, x.max() * 1.25, _CURVE_POINTS)
    marks.append(Line("fitted law", floats(n), floats(p["A"] * n ** -p["alpha"] + p["E"]), INK, legend=True))
    for name in subject.legend:
        mine = (rows["representation"] == name).to_numpy()
        marks.append(Points(name, floats(x[mine]), floats(y[mine]), subject.looks[name], hovers(rows[mine])))
    return Chart(
        name="collapse",
        title=subject.title("Collapse on one line"),
        subtitle=subject.subtitle,
        warning=subject.warning,
        caption="Loss minus the fitted data term B D^-beta against effective size N x eff. The law says that all "
        "representations lie on one line; a representation that crosses it slantwise has no constant eff.",
        panels=(
            Panel(
                numeric_axis("N × eff (effective parameters)", n, log=True, style="count", pad=0.02),
                numeric_axis("loss − B·D⁻ᵝ (nats/token)", y, log=bool((y > 0).all()), pad=0.06),
                tuple(marks),
            ),
        ),
        looks=subject.legend,
    )


def residuals(subject: Subject) -> Chart:
    """Log residuals against N, against D, and against GMSE where it is known."""
    fit, rows = subject.fit, subject.rows
    columns = {"n": "N (parameters)", "d": "D (tokens)"}
    known = {name: c.gmse for name, c in subject.capacities.items() if c.gmse > 0}
    gmse = rows["representation"].map(known).astype(float)
    if gmse.notna().sum() > 1:
        rows, columns = rows.assign(gmse=gmse), columns | {"gmse": "GMSE of the representation"}
    rms = 100 * fit.rms_log_residual
    worst = float(100 * rows["deviation"].abs().max())
    y = numeric_axis("measured − fitted (% of loss)", [-worst, worst], pad=0.08)
    panels = []
    for column, title in columns.items():
        known_rows = rows[rows[column].notna()]
        style = "number" if column == "gmse" else "count"
        x = numeric_axis(title, known_rows[column], log=True, style=style, max_ticks=5, pad=0.08)  # type: ignore[arg-type]
        panels.append(Panel(x, y, _residual_marks(subject, known_rows, column, rms, x.limits)))
    return Chart(
        name="residuals",
        title=subject.title("Residuals"),
        subtitle=subject.subtitle,
        warning=subject.warning,
        caption="How far each run lies from the law, as 100 times the difference of log losses (about percent). The "
        "grey band is one root mean square. A trend within a representation means that its eff changes with N or D.",
        panels=tuple(panels),
        looks=subject.legend,
        height=max(3.8, 0.23 * len(subject.legend)),
    )


def _residual_marks(
    subject: Subject, rows: pd.DataFrame, column: str, rms: float, limits: tuple[float, float]
) -> tuple[Mark, ...]:
    marks: list[Mark] = [Band("rms", limits, (-rms, -rms), (rms, rms)), Rule(0.0, "y", color=INK, dash="solid")]
    for name in subject.legend:
        mine = rows[rows["representation"] == name]
        if len(mine):
            values = floats(100 * mine["deviation"])
            marks.append(Points(name, floats(mine[column]), values, subject.looks[name], hovers(mine)))
    return tuple(marks)
