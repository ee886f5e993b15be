"""The runs behind the fits: what was planned, what came of it, how long it took, and how training went.

Planned runs, the loss table and the runs' own files are joined by run id. A run that was planned and has left neither
a row nor a record is missing, and is shown as such.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from qpipe.errors import QpipeError
from qpipe.report.axes import numeric_axis
from qpipe.report.chart import Chart, Line, Mark, Panel
from qpipe.report.inputs import read_json
from qpipe.report.law_figures import floats
from qpipe.report.palette import looks
from qpipe.report.tables import Cell, Column, Table, number_cell

_CURVE_BUDGET = 30_000
"""Points that all training curves of a page may have together."""
_COLUMNS: dict[str, tuple[Column, str]] = {
    "n": (Column("N", "non-embedding parameters (count)"), "full"),
    "d": (Column("D", "training tokens (count)"), "full"),
    "bits_per_weight": (Column("bits/weight", "stored, scales and masks included"), ".4g"),
    "seed": (Column("seed"), ".0f"),
    "loss": (Column("loss", "validation cross-entropy (nats/token)"), ".4f"),
    "bits_per_byte": (Column("bits/byte", "validation loss per byte of text"), ".4f"),
    "wall_seconds": (Column("wall time", "training and validation of the last attempt"), "time"),
    "tokens_per_second": (Column("tokens/s", "training throughput"), "full"),
    "mfu": (Column("MFU", "model FLOPs per second over the device's peak"), ".1%"),
}


@dataclass
class RunRow:
    """One run: what is known of it, from whichever file."""

    id: str
    representation: str
    state: str
    values: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    folder: Path | None = None


def gather_runs(plan: Path | None, losses: pd.DataFrame | None, folder: Path | None) -> list[RunRow]:
    """Return planned and finished runs, in the plan's order, then in that of the loss table.

    Parameters
    ----------
    plan
        plan.json as `qpipe plan --json` prints it.
    losses
        Loss table; rows without a run id are numbered.
    folder
        Holds one folder per run, named by its id, with record.json and runtime.json.
    """
    rows: dict[str, RunRow] = {}
    for entry in _planned(plan) if plan else []:
        rows[entry["id"]] = RunRow(entry["id"], str(entry["representation"]), "missing", dict(entry))
    finished: list[dict[Any, Any]] = [] if losses is None else losses.to_dict("records")
    for position, entry in enumerate(finished):
        name = str(entry.get("run") or f"row {position + 1}")
        row = rows.setdefault(name, RunRow(name, str(entry["representation"]), ""))
        row.values |= {str(key): value for key, value in entry.items() if not _absent(value)}
        row.state = str(entry.get("status") or "ok")
    if folder is not None:
        for row in rows.values():
            _add_files(row, folder / row.id)
    return list(rows.values())


def _planned(path: Path) -> list[dict[str, Any]]:
    content = read_json(path)
    if not isinstance(content, list) or not all(
        isinstance(e, dict) and {"id", "representation"} <= set(e) for e in content
    ):
        raise QpipeError(f"{path}: not a plan; write one with qpipe plan STUDY.yaml --json")
    return content


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _add_files(row: RunRow, folder: Path) -> None:
    if not folder.is_dir():
        return
    row.folder = folder
    if (folder / "runtime.json").exists():
        runtime = read_json(folder / "runtime.json")
        row.values |= {key: value for key, value in runtime.items() if not _absent(value)}
    if row.state not in ("ok", "") and (folder / "record.json").exists():
        row.message = str(read_json(folder / "record.json").get("message") or "")


def runs_table(rows: Sequence[RunRow]) -> Table:
    """Return all runs with their losses; columns that no run has a value for are left out."""
    shown = [name for name in _COLUMNS if any(not _absent(row.values.get(name)) for row in rows)]
    columns = (Column("run", numeric=False), Column("representation", numeric=False), Column("status", numeric=False))
    colors = looks(row.representation for row in rows)
    body = []
    for row in rows:
        cells = [
            Cell(row.id, row.id),
            Cell(row.representation, row.representation, swatch=colors[row.representation].color),
        ]
        cells.append(Cell(row.state, row.state, state=row.state))
        cells += [number_cell(row.values.get(name), _COLUMNS[name][1]) for name in shown]
        body.append(tuple(cells))
    return Table((*columns, *(_COLUMNS[name][0] for name in shown)), tuple(body))


def curves_chart(rows: Sequence[RunRow]) -> Chart | None:
    """Return training loss against tokens of all runs that left a curve, or None."""
    curves = {
        row.id: (row, _curve(row.folder)) for row in rows if row.folder and (row.folder / "curve.parquet").exists()
    }
    if not curves:
        return None
    colors = looks(row.representation for row, _ in curves.values())
    most = max(10, _CURVE_BUDGET // len(curves))
    marks: list[Mark] = []
    for run_id, (row, curve) in curves.items():
        # The last point is always kept: it is the one that the eye compares.
        step = math.ceil(len(curve) / most)
        thin = curve.iloc[::-1].iloc[::step].iloc[::-1] if step > 1 else curve
        color = colors[row.representation].color
        marks.append(
            Line(run_id, floats(thin["tokens"]), floats(thin["train_loss"]), color, width=1.0, group=row.representation)
        )
    lines = [mark for mark in marks if isinstance(mark, Line)]
    across = numeric_axis("tokens seen", [v for line in lines for v in line.x], log=True, style="count", pad=0.02)
    up = numeric_axis("training loss (nats/token)", [v for line in lines for v in line.y], log=True, pad=0.03)
    return Chart(
        name="curves",
        title="Training curves",
        subtitle=f"{len(curves)} runs",
        caption="Training loss against tokens, one line per run, coloured by representation; each point is the mean "
        "since the point before. Rest on a line for its run.",
        panels=(Panel(across, up, tuple(marks)),),
        looks={name: colors[name] for name in sorted({row.representation for row, _ in curves.values()})},
    )


def _curve(folder: Path) -> pd.DataFrame:
    try:
        curve = pd.read_parquet(folder / "curve.parquet", columns=["tokens", "train_loss"])
    except (OSError, ValueError) as error:
        raise QpipeError(f"{folder / 'curve.parquet'}: not a training curve ({error})") from error
    return curve[curve["train_loss"].notna() & (curve["train_loss"] > 0)]


def timing_table(steps: Mapping[str, Path], rows: Sequence[RunRow]) -> Table | None:
    """Return wall times from Snakemake's benchmark files and the runs' own clocks, or None without either.

    Parameters
    ----------
    steps
        For each step of the workflow a benchmark file, or a folder with one per job. A step whose path does not exist
        is shown as not recorded.
    """
    columns = (
        Column("step", numeric=False),
        Column("jobs"),
        Column("all together", "sum of wall times; jobs may have run at the same time"),
        Column("median"),
        Column("longest"),
        Column("peak memory (MB)", "largest resident set of a job"),
    )
    body = [_timing_row(step, *_benchmarks(path)) for step, path in steps.items()]
    trained = [float(row.values["wall_seconds"]) for row in rows if not _absent(row.values.get("wall_seconds"))]
    if trained:
        body.append(_timing_row("runs, by their own clocks", trained, []))
    return Table(columns, tuple(body)) if body else None


def _timing_row(step: str, seconds: Sequence[float], memory: Sequence[float]) -> tuple[Cell, ...]:
    if not seconds:
        return (Cell(step, step), Cell("not recorded"), *[Cell("")] * 4)
    times = pd.Series(seconds, dtype=float)
    cells = [number_cell(float(value), "time") for value in (times.sum(), times.median(), times.max())]
    return (Cell(step, step), number_cell(len(times), ".0f"), *cells, number_cell(max(memory, default=None), ".0f"))


def _benchmarks(path: Path) -> tuple[list[float], list[float]]:
    """Return wall seconds and peak resident sets (MB) of the jobs."""
    files = sorted(path.rglob("*.tsv")) if path.is_dir() else [path] if path.exists() else []
    seconds: list[float] = []
    memory: list[float] = []
    for file in files:
        table = pd.read_csv(file, sep="\t", na_values=["-"])
        if "s" not in table:
            raise QpipeError(f"{file}: not a benchmark of a workflow step; it lacks the column s")
        seconds += table["s"].dropna().tolist()
        memory += table["max_rss"].dropna().tolist() if "max_rss" in table else []
    return seconds, memory


def versions_of(rows: Sequence[RunRow]) -> list[tuple[str, str]]:
    """Return (software versions and device, number of runs) for every combination that trained runs."""
    counts: dict[str, int] = {}
    for row in rows:
        if versions := row.values.get("versions"):
            words = ", ".join(f"{name} {number}" for name, number in dict(versions).items())
            place = f"{words}; {row.values.get('devices', 1)} × {row.values.get('device', 'unknown device')}"
            counts[place] = counts.get(place, 0) + 1
    return [(place, str(count)) for place, count in counts.items()]
