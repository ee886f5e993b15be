"""Tables of the page: columns with meanings, cells with a text to read and a value to sort by."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from qpipe.errors import QpipeError
from qpipe.laws import Fit
from qpipe.report.axes import format_number
from qpipe.report.subject import Subject, digits


@dataclass(frozen=True)
class Column:
    """A column: title, what it means (shown on demand), and whether it holds numbers."""

    title: str
    meaning: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval as shares of the widest bar, drawn beside the numbers."""

    value: float
    low: float
    high: float
    color: str


@dataclass(frozen=True)
class Cell:
    """One cell. `sort` is what the column is sorted by; empty cells sort last."""

    text: str
    sort: float | str | None = None
    state: str = ""
    """Name of a state that colours the cell: ok, diverged, missing, ..."""
    interval: Interval | None = None
    swatch: str = ""
    """Colour of a representation, shown before the text."""


@dataclass(frozen=True)
class Table:
    """A table with a caption."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""


def number_cell(value: Any, form: str = "") -> Cell:
    """Return a number's cell; empty for nothing and not-a-number.

    `form` is a format specification, `count` (30M), `full` (30,482,560) or `time` (2 h 05 min, from seconds).
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Cell("")
    number = float(value)
    if math.isinf(number):
        return Cell("∞" if number > 0 else "−∞", 1e308 if number > 0 else -1e308)
    if form == "count":
        return Cell(format_number(number, "count"), number)
    if form == "full":
        return Cell(f"{number:,.0f}", number)
    if form == "time":
        return Cell(duration(number), number)
    return Cell(format(number, form or ".4g").rstrip(".").replace("-", "−"), number)


def duration(seconds: float) -> str:
    """Return seconds as people say them: 48 s, 12 min 05 s, 2 h 05 min, 3 d 04 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


_MULTIPLIER_COLUMNS = {
    "bits_per_weight": ("bits/weight", "#.3g"),
    "iso_memory": ("iso-memory", "#.3g"),
    "iso_compute": ("iso-compute", "#.3g"),
    "equivalent_n": ("equivalent dense N", "count"),
    "rho": ("predicted rho", "#.3g"),
    "rho_deviation": ("(eff − rho)/s.e.", ".2g"),
    "n_runs": ("runs", ".0f"),
}


def read_multipliers(path: Path, fit: Fit) -> tuple[pd.DataFrame, dict[str, str], list[str]]:
    """Read multipliers.parquet; return table, meaning by column, and the notes that belong under it.

    Errors: unreadable, or made from another fit than `fit`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        arrow = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise QpipeError(f"{path}: not a multiplier table ({error}); write one with qpipe multipliers") from error
    table = arrow.to_pandas()
    fitted = {name: entry["eff"] for name, entry in fit.multipliers.items()}
    stated = dict(zip(table.get("representation", []), table.get("eff", []), strict=False))
    if stated.keys() != fitted.keys() or any(not _close(stated[name], fitted[name]) for name in fitted):
        raise QpipeError(
            f"{path}: its multipliers are not those of the {fit.law} fit given with it; "
            "give --fit and --table in the same order, or run qpipe multipliers again"
        )
    meanings = {}
    for field in arrow.schema:
        metadata = field.metadata or {}
        unit, meaning = metadata.get(b"unit", b"").decode(), metadata.get(b"meaning", b"").decode()
        meanings[field.name] = f"{meaning} [{unit}]" if unit not in ("", "1") else meaning
    notes = (arrow.schema.metadata or {}).get(b"notes", b"").decode().splitlines()
    return table, meanings, notes


def _close(a: Any, b: Any) -> bool:
    return (pd.isna(a) and pd.isna(b)) or (not pd.isna(a) and not pd.isna(b) and math.isclose(a, b, rel_tol=1e-6))


def multiplier_page_table(subject: Subject, table: pd.DataFrame, meanings: Mapping[str, str]) -> Table:
    """Return the headline table: eff with its interval as numbers and as a bar, then what else the file holds."""
    level = float(subject.fit.interval["level"])
    if "rho" not in table:
        predicted = {name: subject.capacities[name].rho for name in subject.with_known("rho")}
        table = table.assign(rho=table["representation"].map(predicted).astype(float))
    shown = [name for name in _MULTIPLIER_COLUMNS if name in table and table[name].notna().any()]
    columns = (
        Column("representation", meanings.get("representation", ""), numeric=False),
        Column("eff", meanings.get("eff", "")),
        Column(f"{100 * level:.4g} % interval", "from resampling the runs"),
        Column("", "eff and its interval; the tick is dense = 1", numeric=False),
        *(Column(_MULTIPLIER_COLUMNS[name][0], meanings.get(name, "")) for name in shown),
    )
    widest = max([1.2, *(min(m.high, 2.0) for m in subject.multipliers.values() if m.has_interval)])
    rows = []
    for record in table.to_dict("records"):
        name = str(record["representation"])
        entry, color = subject.multipliers[name], subject.looks[name].color
        low, high = (entry.low, entry.high) if entry.has_interval else (entry.eff, entry.eff)
        value, left, right = (min(v / widest, 1.0) for v in (entry.eff, low, high))
        bar = Interval(value, left, right, color)
        words = f"{digits(low)} to {digits(high)}" if entry.has_interval else ""
        rows.append(
            (
                Cell(name, name, swatch=color),
                number_cell(entry.eff, "#.3g"),
                Cell("" if name == "dense" else words, low),
                Cell("", interval=bar),
                *(number_cell(record[column], _MULTIPLIER_COLUMNS[column][1]) for column in shown),
            )
        )
    return Table(columns, tuple(rows))


def parameter_table(fit: Fit) -> Table:
    """Return the law's parameters with intervals and units."""
    columns = (Column("parameter", numeric=False), Column("value"), Column("interval"), Column("unit", numeric=False))
    rows = []
    for name, value in fit.parameters.items():
        low, high = fit.parameter_intervals.get(name) or (None, None)
        words = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        held = " (held)" if name in fit.held else ""
        rows.append((Cell(name + held), number_cell(value), Cell(words, low), Cell(fit.units.get(name, ""))))
    return Table(columns, tuple(rows))


def plain_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table of texts."""
    columns = tuple(Column(title, numeric=False) for title in titles)
    return Table(columns, tuple(tuple(Cell(text, text) for text in row) for row in rows))
