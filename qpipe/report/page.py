"""The report: one HTML file with everything in it, which loads nothing and opens anywhere.

The page is a template filled with tables and figure specifications. Whatever comes from a study, a table or a run is
escaped by the template; figure specifications stand in a JSON block in which no markup can occur. A content security
policy with the digests of the page's two scripts forbids every other script and every request.
"""

import base64
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qpipe import __version__
from qpipe.errors import QpipeError
from qpipe.files import write_text
from qpipe.laws import Fit, read_losses
from qpipe.report.axes import format_number
from qpipe.report.check_tables import check_tables
from qpipe.report.damage import RESULT, comparison_table, damage_table, read_damage
from qpipe.report.inputs import file_digest, inside, read_capacities, read_json
from qpipe.report.interactive import specification
from qpipe.report.palette import INK
from qpipe.report.run_tables import RunRow, curves_chart, gather_runs, runs_table, timing_table, versions_of
from qpipe.report.static import render
from qpipe.report.subject import Capacity, Subject
from qpipe.report.tables import (
    Cell,
    Column,
    Table,
    duration,
    multiplier_page_table,
    number_cell,
    parameter_table,
    plain_table,
    read_multipliers,
)
from qpipe.report.verdict import verdict
from qpipe.yaml_files import read_yaml

Json = dict[str, Any]


@dataclass(frozen=True)
class Sources:
    """Files that a report is made from; all but the fits may be left out."""

    fits: Sequence[Path]
    study: Path | None = None
    plan: Path | None = None
    tables: Sequence[Path] = ()
    """multipliers.parquet in the fits' order: of each fit, or of each that has multipliers, or none at all."""
    figures: Sequence[Path] = ()
    """figures.json of each fit, in any order."""
    damage: Path | None = None
    """Folder that qpipe damage wrote."""
    losses: Sequence[Path] = ()
    runs: Path | None = None
    """Holds a folder per run."""
    capacity: Sequence[Path] = ()
    steps: Mapping[str, Path] = field(default_factory=dict)
    """Benchmark file of each step of the workflow, or a folder with one per job."""


@dataclass
class _Figures:
    """Figure specifications of the page, in the order in which they stand there."""

    specifications: list[Json] = field(default_factory=list)

    def add(self, specification: Json, svg: bytes, anchor: str) -> Json:
        """Keep a specification; return what the template needs to place it."""
        self.specifications.append(specification)
        return {
            **specification["layout"]["meta"],
            "index": len(self.specifications) - 1,
            "height": specification["layout"]["height"],
            "svg": base64.b64encode(svg).decode(),
            "anchor": anchor,
        }


def write_report(sources: Sources, out: Path) -> Path:
    """Write the page (errors: files missing or defective, tables or figures that belong to other fits)."""
    write_text(out, build(sources))
    return out


def build(sources: Sources) -> str:
    """Return the page as HTML."""
    figures = _Figures()
    capacities = read_capacities(sources.capacity)
    fits = _fit_sections(sources, capacities, figures)
    losses = read_losses(list(sources.losses)) if sources.losses else None
    rows = gather_runs(sources.plan, losses, sources.runs)
    curves = curves_chart(rows)
    study = read_yaml(sources.study) if sources.study else {}
    content = {
        "title": str(study.get("name", "Report")),
        "description": str(study.get("description", "")),
        "summary": _summary(rows, fits),
        "problems": _problems(rows),
        "fits": fits,
        "damage": None if sources.damage is None else _damage_section(sources.damage, figures),
        "runs": runs_table(rows) if rows else None,
        "runs_summary": _runs_summary(rows),
        "curves": figures.add(specification(curves), render(curves, "svg"), "curves") if curves else None,
        "timing": timing_table(sources.steps, rows),
        "capacity": _capacity_table(capacities) if capacities else None,
        "study": sources.study.read_text(encoding="utf-8") if sources.study else "",
        "study_path": str(sources.study or ""),
        "versions": plain_table(["what", "versions and device", "runs"], _versions(rows)),
        "digests": plain_table(["file", "SHA-256"], _digests(sources)),
    }
    return _fill(content, figures)


def _fill(content: Json, figures: _Figures) -> str:
    from plotly.offline import get_plotlyjs

    plotly, script = get_plotlyjs(), _asset("page.js")
    sections = [(fit["anchor"], fit["title"]) for fit in content["fits"]]
    sections += [("damage", "Rounding or training")] if content["damage"] else []
    sections += [("runs", "Runs")] if content["runs"] else []
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_asset("page.html")).render(
        **content,
        ink=INK,
        version=__version__,
        sections=[*sections, ("provenance", "Where it comes from")],
        policy=_policy([plotly, script]),
        style=Markup(_asset("page.css")),
        figures_json=Markup(script_json(figures.specifications)),
        plotly=Markup(plotly),
        script=Markup(script),
    )


def _asset(name: str) -> str:
    return resources.files("qpipe.report").joinpath("assets", name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Return a content security policy: the page's own scripts by digest, its styles and images, nothing else."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def script_json(content: Any) -> str:
    """Return JSON that may stand inside a script element: nothing in it can be taken for markup."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _fit_sections(sources: Sources, capacities: dict[str, Capacity], figures: _Figures) -> list[Json]:
    subjects = [Subject(Fit.from_json(path), capacities) for path in sources.fits]
    tables = _tables_of(subjects, inside(sources.tables, "multipliers.parquet"))
    drawn = _figures_by_fit(inside(sources.figures, "figures.json"))
    sections = [
        _fit_section(subject, table, drawn.pop(file_digest(path), None), figures, f"fit-{position}")
        for position, (path, subject, table) in enumerate(zip(sources.fits, subjects, tables, strict=True), start=1)
    ]
    if drawn:
        foreign = [folder for folder, _ in drawn.values()]
        raise QpipeError(
            [f"{folder}: drawn from another fit than those given; run qpipe figures" for folder in foreign]
        )
    # What people came for stands first.
    return sorted(sections, key=lambda section: section["multipliers"] is None)


def _tables_of(subjects: Sequence[Subject], tables: Sequence[Path]) -> list[Path | None]:
    """Return the table of each fit, None for laws without multipliers (error: another number of tables)."""
    having = [subject for subject in subjects if subject.multipliers]
    if not tables:
        return [None] * len(subjects)
    if len(tables) == len(subjects):
        return [table if subject.multipliers else None for subject, table in zip(subjects, tables, strict=True)]
    if len(tables) != len(having):
        raise QpipeError(
            f"{len(having)} of the fits have multipliers and {len(tables)} tables are given; "
            "give one --table per such --fit, or per --fit, in the same order"
        )
    order = iter(tables)
    return [next(order) if subject.multipliers else None for subject in subjects]


def _figures_by_fit(paths: Sequence[Path]) -> dict[str, tuple[Path, Json]]:
    """Return (folder, content) of figures.json by the digest of the fit that was drawn."""
    found = {}
    for path in paths:
        content = read_json(path)
        if not isinstance(content, dict) or not {"fit_digest", "figures", "omitted"} <= set(content):
            raise QpipeError(f"{path}: not written by qpipe figures")
        found[str(content["fit_digest"])] = (path.parent, content)
    return found


def _fit_section(
    subject: Subject, table: Path | None, drawn: tuple[Path, Json] | None, figures: _Figures, anchor: str
) -> Json:
    section: Json = {
        "anchor": anchor,
        "law": subject.fit.law,
        "title": f"The {subject.fit.law} law",
        "formula": subject.fit.formula,
        "source": subject.fit.source,
        "verdict": verdict(subject),
        "parameters": parameter_table(subject.fit),
        "checks": check_tables(subject.fit),
        "multipliers": None,
        "notes": [],
        "figures": [],
        "omitted": {},
    }
    if table is not None and subject.multipliers:
        frame, meanings, notes = read_multipliers(table, subject.fit)
        section |= {"multipliers": multiplier_page_table(subject, frame, meanings), "notes": notes}
    if drawn is not None:
        folder, content = drawn
        section["omitted"] = content["omitted"]
        for one in content["figures"]:
            name = one["layout"]["meta"]["name"]
            section["figures"].append(figures.add(one, _svg(folder / f"{name}.svg"), f"{anchor}-{name}"))
    return section


def _damage_section(folder: Path, figures: _Figures) -> Json:
    content = read_damage(folder)
    return {
        "statements": [
            *(f"{method}: not fitted: {reason}" for method, reason in content["unfitted"].items()),
            *content["statements"],
        ],
        "terms": damage_table(content),
        "comparison": comparison_table(content),
        "figures": [
            figures.add(one, _svg(folder / f"{one['layout']['meta']['name']}.svg"), one["layout"]["meta"]["name"])
            for one in content["figures"]
        ],
    }


def _svg(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise QpipeError(f"{path}: a figure that figures.json names is gone; run qpipe figures again") from error


def _summary(rows: Sequence[RunRow], fits: Sequence[Json]) -> str:
    words = [f"{len(fits)} fitted law{'s' * (len(fits) != 1)}"]
    if rows:
        done = sum(row.state == "ok" for row in rows)
        words.insert(0, f"{done} of {len(rows)} runs finished")
        tokens = sum(float(row.values.get("d", 0)) for row in rows if row.state == "ok")
        words.append(f"{format_number(tokens, 'count')} tokens of training")
    spent = sum(float(row.values.get("wall_seconds", 0)) for row in rows)
    return " · ".join(words + ([f"{duration(spent)} of computing"] if spent else []))


def _problems(rows: Sequence[RunRow]) -> list[str]:
    """Name every run that is not in the fits, and why."""
    diverged = [
        f"{row.id}: diverged{': ' + row.message if row.message else ''}" for row in rows if row.state == "diverged"
    ]
    absent = [f"{row.id}: {row.state}" for row in rows if row.state not in ("ok", "diverged")]
    return diverged + absent


def _runs_summary(rows: Sequence[RunRow]) -> str:
    states = pd.Series([row.state for row in rows], dtype=str).value_counts()
    return ", ".join(f"{count} {state}" for state, count in states.items()) + "."


def _capacity_table(capacities: dict[str, Capacity]) -> Table:
    columns = (
        Column("representation", numeric=False),
        Column("bits/weight", "stored, scales and masks included"),
        Column("GMSE", "mean squared error of the representation on N(0, 1) data"),
        Column("predicted rho", "multiplier that theory predicts from the error"),
    )
    return Table(
        columns,
        tuple(
            (Cell(name, name), number_cell(c.bits_per_weight), number_cell(c.gmse), number_cell(c.rho))
            for name, c in capacities.items()
        ),
    )


def _versions(rows: Sequence[RunRow]) -> list[tuple[str, str, str]]:
    packages = ", ".join(f"{name} {version(name)}" for name in ("numpy", "scipy", "matplotlib", "plotly"))
    here = ("this page", f"qpipe {__version__}, python {platform.python_version()}, {packages}", "")
    return [here, *(("training", place, count) for place, count in versions_of(rows))]


def _digests(sources: Sources) -> list[tuple[str, str]]:
    files = [*sources.fits, *inside(sources.tables, "multipliers.parquet"), *inside(sources.figures, "figures.json")]
    files += [path for path in (sources.study, sources.plan) if path is not None]
    files += [] if sources.damage is None else [sources.damage / RESULT]
    files += [*sources.capacity, *(path for path in sources.losses if path.is_file())]
    return [(str(path), file_digest(path)) for path in files]
