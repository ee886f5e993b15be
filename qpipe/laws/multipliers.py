"""The table of efficiency multipliers, and its four formats.

Columns: `representation`; `eff` with `low` and `high`; `standard_error`; `n_runs`; `bits_per_weight` where known;
`iso_memory` = eff 16 / bits, the dense 16-bit parameters that one byte holds relative to a dense model's, with overhead
of scales and masks, and `iso_memory_payload` without; `iso_compute`, the same per unit of arithmetic under a named cost
model; `equivalent_n`, the dense size that performs like a given compressed one; `rho` as theory predicts it and
`rho_deviation` = (eff - rho) / standard error.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from qpipe.errors import QpipeError
from qpipe.files import replacing, write_text
from qpipe.laws.result import Fit

DENSE_BITS = 16.0
MEANING: dict[str, tuple[str, str]] = {
    "representation": ("", "compressed representation; dense = 16-bit reference"),
    "eff": ("1", "effective parameter multiplier: N of it is worth N eff dense parameters"),
    "low": ("1", "lower end of the interval of eff"),
    "high": ("1", "upper end of the interval of eff"),
    "standard_error": ("1", "bootstrap standard error of eff"),
    "n_runs": ("count", "fitted runs"),
    "bits_per_weight": ("bit", "stored bits per weight with scales and masks"),
    "payload_bits": ("bit", "stored bits per weight, codes alone"),
    "iso_memory": ("1", "eff 16 / bits_per_weight"),
    "iso_memory_low": ("1", "lower end of the interval of iso_memory"),
    "iso_memory_high": ("1", "upper end of the interval of iso_memory"),
    "iso_memory_payload": ("1", "eff 16 / payload_bits"),
    "iso_compute": ("1", "eff per unit of arithmetic relative to dense, under the cost model of the table"),
    "equivalent_n": ("count", "dense parameters worth one model of `at_n` parameters"),
    "rho": ("1", "multiplier predicted from the Gaussian error, before training"),
    "rho_deviation": ("1", "(eff - rho) / standard_error"),
}
COST_MODELS: dict[str, str] = {
    "bits": "cost of a multiplication proportional to the wider of its operands' bits",
    "bit-product": "cost of a multiplication proportional to weight bits times activation bits",
    "none": "all formats cost what dense costs",
}


def multiplier_table(
    fit: Fit,
    at_n: float | None = None,
    bits: Mapping[str, float] | None = None,
    rho: Mapping[str, float] | None = None,
    cost_model: str = "bits",
) -> pd.DataFrame:
    """Return the multiplier table of a fit, best iso-memory first where bits are known, else highest eff first.

    Parameters
    ----------
    fit
        A fit of a law that has multipliers.
    at_n
        Size (count) for `equivalent_n`; the largest fitted one when left out.
    bits, rho
        Bits/weight and predicted multipliers by representation, beside those of the fitted rows.
    cost_model
        Name in `COST_MODELS`.

    Raises
    ------
    QpipeError
        The law has no multipliers; unknown cost model.
    """
    if not fit.multipliers:
        raise QpipeError(
            f"law {fit.law} has no efficiency multipliers; fit compression, capacity, sparsity, precision or gamma"
        )
    if cost_model not in COST_MODELS:
        raise QpipeError(f"no cost model '{cost_model}'; known: {', '.join(COST_MODELS)}")
    table = pd.DataFrame([{"representation": name, **values} for name, values in fit.multipliers.items()])
    for column, given in (("bits_per_weight", bits), ("payload_bits", None), ("rho", rho)):
        values = _per_representation(fit, table["representation"], column, given)
        if values.notna().any():
            table[column] = values
    _add_memory(table)
    _add_compute(fit, table, cost_model)
    table["equivalent_n"] = table["eff"] * (at_n or fit.ranges["n"][1])
    if "rho" in table:
        error = table["standard_error"].astype(float)
        table["rho_deviation"] = (table["eff"] - table["rho"]) / error.where(error > 0)
    columns = [name for name in MEANING if name in table]
    extra = [name for name in table if name not in columns]
    return table[columns + extra].sort_values("eff", ascending=False, kind="stable", ignore_index=True)


def _per_representation(fit: Fit, names: pd.Series, column: str, given: Mapping[str, float] | None) -> pd.Series:
    """Return a column's mean over each representation's runs, or the given value."""
    rows = fit.table()
    known = rows.groupby("representation")[column].mean().to_dict() if column in rows else {}
    if column != "rho" and known:
        known.setdefault("dense", DENSE_BITS)
    return names.map({**{str(k): float(v) for k, v in known.items()}, **(given or {})}).astype(float)


def _add_memory(table: pd.DataFrame) -> None:
    if "bits_per_weight" in table:
        for source, target in (("eff", "iso_memory"), ("low", "iso_memory_low"), ("high", "iso_memory_high")):
            table[target] = table[source].astype(float) * DENSE_BITS / table["bits_per_weight"]
    if "payload_bits" in table:
        table["iso_memory_payload"] = table["eff"] * DENSE_BITS / table["payload_bits"]


def _add_compute(fit: Fit, table: pd.DataFrame, cost_model: str) -> None:
    weights = _per_representation(fit, table["representation"], "w_bits", None)
    activations = _per_representation(fit, table["representation"], "a_bits", None)
    if cost_model == "none" or weights.isna().all() or activations.isna().all():
        return
    if cost_model == "bits":
        cost = np.maximum(weights, activations) / DENSE_BITS
    else:
        cost = weights * activations / DENSE_BITS**2
    table["iso_compute"] = table["eff"] / cost


def footnotes(fit: Fit, missing: Sequence[str] = ()) -> list[str]:
    """Return what must stand under every table of this fit: law, data, objective, exclusions, status.

    Parameters
    ----------
    fit
        The fit.
    missing
        Planned runs that are not finished.
    """
    level = f"{100 * fit.interval['level']:g}% intervals: {fit.interval['method']}"
    if fit.interval["resamples"]:
        level += f", {fit.interval['resamples']} resamples, seed {fit.interval['seed']}"
    base = ", ".join(f"{name} = {fit.parameters[name]:.4g}" for name in ("A", "alpha", "B", "beta", "E"))
    delta = "" if fit.objective["delta"] is None else f", delta {fit.objective['delta']:g}"
    notes = [
        f"Law {fit.law}: {fit.formula} ({fit.source}); {base}.",
        f"{fit.n_rows} runs; objective {fit.objective['name']}{delta}; rms log residual {fit.rms_log_residual:.2g}. "
        f"{level}.",
        "Excluded: " + ("; ".join(f"{e['rule']} ({e['rows']} rows)" for e in fit.excluded) or "nothing") + ".",
    ]
    if fit.held:
        notes.append("Held: " + ", ".join(f"{name} = {value:g}" for name, value in fit.held.items()) + ".")
    if fit.priors:
        notes.append("Priors: " + ", ".join(f"{p['name']} = {p['value']:g} +- {p['sd']:g}" for p in fit.priors) + ".")
    if missing:
        notes.append(f"Planned runs that are missing ({len(missing)}): {', '.join(missing)}.")
    notes.append(f"Status: {fit.status['message']}.")
    return notes


def write_multipliers(fit: Fit, table: pd.DataFrame, folder: Path | str, missing: Sequence[str] = ()) -> list[Path]:
    """Write multipliers.parquet, .csv, .md and .tex into a folder; return their paths. `missing` as in `footnotes`."""
    folder = Path(folder)
    notes = footnotes(fit, missing)
    paths = [folder / f"multipliers.{ending}" for ending in ("parquet", "csv", "md", "tex")]
    with replacing(paths[0]) as temporary:
        pq.write_table(_arrow(table, notes), temporary)
    write_text(paths[1], table.to_csv(index=False, float_format="%.10g", lineterminator="\n"))
    write_text(paths[2], to_markdown(table) + "\n" + "\n".join(f"- {note}" for note in notes) + "\n")
    write_text(paths[3], to_latex(table, notes))
    return paths


def _arrow(table: pd.DataFrame, notes: list[str]) -> pa.Table:
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    fields = [
        field.with_metadata({"unit": MEANING[field.name][0], "meaning": MEANING[field.name][1]})
        if field.name in MEANING
        else field
        for field in arrow.schema
    ]
    return arrow.cast(pa.schema(fields, metadata={"notes": "\n".join(notes)}))


SHOWN = (
    "representation",
    "eff",
    "interval",
    "n_runs",
    "bits_per_weight",
    "iso_memory",
    "iso_memory_payload",
    "iso_compute",
    "equivalent_n",
    "rho",
    "rho_deviation",
)
TITLES = {
    "representation": "representation",
    "eff": "eff",
    "interval": "interval",
    "n_runs": "runs",
    "bits_per_weight": "bits/weight",
    "iso_memory": "iso-memory",
    "iso_memory_payload": "iso-memory (payload)",
    "iso_compute": "iso-compute",
    "equivalent_n": "equivalent dense N",
    "rho": "predicted rho",
    "rho_deviation": "(eff - rho)/s.e.",
}


def _cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table as text, interval in one column, empty where unknown."""
    shown = table.assign(
        interval=[
            "" if _missing(low) else f"{low:#.3g} to {high:#.3g}"
            for low, high in zip(table["low"], table["high"], strict=True)
        ]
    )
    columns = [name for name in SHOWN if name in shown]
    return pd.DataFrame({name: [_text(name, value) for value in shown[name]] for name in columns})


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not np.isfinite(value))


def _text(name: str, value: Any) -> str:
    if _missing(value):
        return ""
    if isinstance(value, str):
        return value
    if name == "n_runs":
        return str(int(value))
    return f"{value:.2f}" if name == "rho_deviation" else f"{value:#.3g}".rstrip(".")


def to_markdown(table: pd.DataFrame) -> str:
    """Return the table as Markdown, columns aligned."""
    cells = _cells(table)
    header = [TITLES[str(name)] for name in cells]
    rows = [[value.replace("|", "\\|") for value in row] for row in cells.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in padded) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "_": r"\_",
    "%": r"\%",
    "&": r"\&",
    "#": r"\#",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    '"': r"\texttt{\char34}",
    "[": "{[}",
    "*": "{*}",
}
_LATIN = 0x17F


def _escape(text: str) -> str:
    """Return text for LaTeX on one line.

    Hyphens that TeX would join into a dash stay apart, `[` and `*` are kept from the line break before them, and
    letters that LaTeX has no font for are written as their code points.
    """
    letters = (_LATEX.get(x, x) if ord(x) <= _LATIN else f"\\texttt{{U+{ord(x):04X}}}" for x in " ".join(text.split()))
    return re.sub("-(?=-)", "-{}", "".join(letters))


def to_latex(table: pd.DataFrame, notes: list[str]) -> str:
    """Return a booktabs table with its notes underneath, for \\input into a document that loads booktabs."""
    cells = _cells(table)
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{tabular}{l" + "r" * (cells.shape[1] - 1) + "}",
        "\\toprule",
        " & ".join(_escape(TITLES[str(name)]) for name in cells) + " \\\\",
        "\\midrule",
        *(" & ".join(_escape(value) for value in row) + " \\\\" for row in cells.to_numpy().tolist()),
        "\\bottomrule",
        "\\end{tabular}",
        "",
        "\\par\\medskip",
        "{\\footnotesize\\raggedright",
        *(_escape(note) + "\\par" for note in notes),
        "}",
    ]
    return "\n".join(lines) + "\n"
