"""The folder of `qpipe damage`: fitted terms, comparison, figures; and its section of the report."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from qpipe.errors import QpipeError
from qpipe.files import write_text
from qpipe.laws import Fit
from qpipe.laws.break_even import compare, statements
from qpipe.laws.damage import NAMES, fit_damages, rounded_rows
from qpipe.report.damage_figures import damage_chart, worth_chart
from qpipe.report.inputs import read_json
from qpipe.report.interactive import specification
from qpipe.report.static import save
from qpipe.report.tables import Cell, Column, Table, number_cell

RESULT = "damage.json"
_COMPARED: dict[str, tuple[str, str, str]] = {
    "bits_per_weight": ("bits/weight", "stored, everything counted", "#.3g"),
    "n": ("N", "size that is compared: the smallest and the largest that was rounded", "count"),
    "eff": ("eff, trained so", "multiplier of models trained in the representation", "#.3g"),
    "eff_low": ("low", "lower end of its interval", "#.3g"),
    "eff_high": ("high", "upper end of its interval", "#.3g"),
    "eff_rounded_least": ("eff, rounded, least D/N", "after the fewest tokens per parameter of the runs", "#.3g"),
    "eff_rounded_most": ("eff, rounded, most D/N", "after the most tokens per parameter of the runs", "#.3g"),
    "enough_until_d_per_n": ("enough until D/N", "tokens per parameter up to which rounding is worth as much", "#.3g"),
    "until_low": ("low", "lower end of its interval, from resampling dense runs", "#.3g"),
    "until_high": ("high", "upper end of its interval", "#.3g"),
}


def write_damage(
    table: pd.DataFrame, fit: Fit | None, folder: Path, *, bootstrap: int, level: float, seed: int
) -> dict[str, Any]:
    """Fit damage, set it beside a fit's multipliers, write everything into a folder; return what damage.json holds.

    A method whose damage cannot be fitted is named with the reason.
    damage.json is written last: where it stands, comparison.csv and the figures of the same rows stand beside it.

    Parameters
    ----------
    table
        Loss table with trained and rounded models.
    fit
        Law with multipliers to compare with; None for damage alone.
    bootstrap, level, seed
        Resamples of dense runs, level of intervals, seed.
    """
    damages, unfitted = fit_damages(table, bootstrap=bootstrap, seed=seed)
    comparison = pd.DataFrame() if fit is None else compare(damages, fit, table, level)
    charts = [damage_chart(damages, rounded_rows(table))] if damages else []
    if fit is not None and not comparison.empty:
        charts.append(worth_chart(damages, fit, comparison))
    for chart in charts:
        save(chart, folder)
    write_text(folder / "comparison.csv", comparison.to_csv(index=False) if len(comparison) else "")
    content = {
        "unfitted": unfitted,
        "damages": [damage.to_json(level) for damage in damages],
        "comparison": json.loads(comparison.to_json(orient="records", double_precision=15)),
        "statements": statements(comparison),
        "figures": [specification(chart) for chart in charts],
    }
    write_text(folder / RESULT, json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    return content


def read_damage(folder: Path) -> dict[str, Any]:
    """Read damage.json (errors: missing, not ours)."""
    content = read_json(folder / RESULT)
    if not isinstance(content, dict) or not {"damages", "unfitted", "comparison", "statements", "figures"} <= set(
        content
    ):
        raise QpipeError(f"{folder / RESULT}: not written by qpipe damage")
    return content


def damage_table(content: dict[str, Any]) -> Table:
    """Return the fitted terms, a row per method."""
    columns = (
        Column("method", numeric=False),
        *(Column(name, "interval in brackets") for name in NAMES),
        Column("rms of log damage", "root mean square residual"),
        Column("models", "quantizations fitted"),
        Column("dense runs"),
        Column("diverged", "quantizations left out: the dense run, or what became of it, has no finite loss"),
    )
    rows = []
    for entry in content["damages"]:
        cells = [Cell(entry["method"], entry["method"])]
        for name in NAMES:
            value, limits = entry["parameters"][name], entry["intervals"][name]
            words = "held at 0" if name in entry["held_at_zero"] else f"{value:.3g}"
            cells.append(Cell(words + (f" [{limits[0]:.3g}, {limits[1]:.3g}]" if limits else ""), value))
        cells += [number_cell(entry["rms_log_residual"], ".2g"), number_cell(entry["rows"], ".0f")]
        rows.append(
            (*cells, number_cell(entry["dense_runs"], ".0f"), number_cell(entry.get("rows_diverged", 0), ".0f"))
        )
    return Table(columns, tuple(rows), caption="L rounded - L = C_T D^g_D N^-g_N exp(-P / gamma_post)")


def comparison_table(content: dict[str, Any]) -> Table | None:
    """Return rounding beside training in a representation at equal bits, None where there is nothing to compare."""
    if not content["comparison"]:
        return None
    columns = (
        Column("representation", numeric=False),
        Column("rounded by", numeric=False),
        *(Column(title, meaning) for title, meaning, _ in _COMPARED.values()),
    )
    rows = [
        (
            Cell(entry["representation"], entry["representation"]),
            Cell(entry["method"], entry["method"]),
            *(number_cell(entry[name], form) for name, (_, _, form) in _COMPARED.items()),
        )
        for entry in content["comparison"]
    ]
    return Table(columns, tuple(rows))
