"""Tables of the checks that a fit carries: hold-outs, drifts of eff, influential runs, information criteria."""

from collections.abc import Mapping, Sequence
from typing import Any

from qpipe.laws import Fit
from qpipe.report.tables import Cell, Column, Table, number_cell

Field = tuple[str, str, str, str]
"""Key of an entry, title of its column, meaning, format of `number_cell` (empty for text)."""

_HOLD_OUTS: tuple[Field, ...] = (
    ("law", "law", "", ""),
    ("held_out", "held out", "what the law was fitted without, and then asked to predict", ""),
    ("n_train", "fitted runs", "", ".0f"),
    ("n_test", "predicted runs", "", ".0f"),
    ("rms", "rms error", "root mean square of log(predicted / observed loss)", ".2%"),
    ("bias", "bias", "mean of log(predicted / observed loss)", "+.2%"),
    ("problem", "problem", "", ""),
)
_TRENDS: tuple[Field, ...] = (
    ("representation", "representation", "", ""),
    ("axis", "with", "n: parameters, d: tokens", ""),
    ("slope", "drift of eff", "d log eff / d log N (or D); 0 when eff is a constant", "+.3f"),
    ("standard_error", "s.e.", "standard error of the drift", ".3f"),
    ("p_adjusted", "p", "of no drift, adjusted for the number of tests (Holm 1979)", ".2g"),
    ("n_runs", "runs", "", ".0f"),
)
_INFLUENCE: tuple[Field, ...] = (
    ("representation", "representation", "", ""),
    ("n", "N", "non-embedding parameters", "full"),
    ("d", "D", "training tokens", "full"),
    ("loss", "loss", "nats/token", ".4f"),
    ("parameter", "moves most", "parameter that moves most when the run is left out", ""),
    ("change", "by (s.e.)", "in standard errors of the full fit", ".2f"),
)


def check_tables(fit: Fit) -> list[Table]:
    """Return the tables of the checks that the fit has; a check without entries gives none."""
    checks = fit.checks
    tables = [
        _table(checks.get("hold_outs"), _HOLD_OUTS, "Held-out error: how well the law predicts what it has not seen"),
        _table(checks.get("trends"), _TRENDS, "Is eff a constant? Its drift with size and with tokens"),
        _table(checks.get("influence"), _INFLUENCE, "The runs that the fit depends on most"),
    ]
    return [table for table in tables if table is not None]


def _table(entries: Sequence[Mapping[str, Any]] | None, fields: Sequence[Field], caption: str) -> Table | None:
    if not entries:
        return None
    shown = [field for field in fields if any(entry.get(field[0]) not in (None, "") for entry in entries)]
    columns = tuple(Column(title, meaning, numeric=bool(form)) for _, title, meaning, form in shown)
    rows = tuple(tuple(_cell(entry.get(key), form) for key, _, _, form in shown) for entry in entries)
    return Table(columns, rows, caption)


def _cell(value: Any, form: str) -> Cell:
    if value is None:
        return Cell("")
    return number_cell(value, form) if form else Cell(str(value), str(value))
