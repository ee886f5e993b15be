"""Loss tables: reading anyone's CSV or Parquet, and refusing what would silently bend a fit.

One row per finished run; columns `n` (non-embedding parameters, count), `d` (training tokens, count),
`representation` (any text; `dense` is the reference), `loss` (validation cross-entropy, nats/token), and optional ones
(see docs/laws.md). A table whose columns have other names or units is mapped: ``n=params_m*1e6``, ``loss=log(ppl)``.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from qpipe.errors import QpipeError, nearest

REQUIRED = ("n", "d", "loss")
NUMERIC = (
    "n",
    "d",
    "loss",
    "weight",
    "sparsity",
    "gmse",
    "activation_gmse",
    "w_bits",
    "a_bits",
    "kv_bits",
    "ptq_bits",
    "group_size",
    "exponent_bits",
    "mantissa_bits",
    "block_size",
    "bits_per_weight",
    "payload_bits",
    "rho",
    "flops",
)
TEXT = ("representation", "status", "trajectory", "family", "backward")
_MAPPING = re.compile(
    r"(?P<name>[A-Za-z_]\w*)=((?P<log>log)\()?(?P<column>[^*()]+?)(?(log)\))(\*(?P<factor>[0-9.eE+-]+))?"
)
_GUESSES = {
    "n": ("params", "parameters", "model_size", "n", "n_params", "num_params", "non_embedding_params", "size"),
    "d": ("tokens", "d", "n_tokens", "num_tokens", "training_tokens", "token_count"),
    "loss": ("loss", "val_loss", "validation_loss", "final_loss", "eval_loss", "l", "c4_loss", "test_loss"),
    "representation": (
        "representation",
        "format",
        "quantization",
        "quantisation",
        "quantizer",
        "compression",
        "scheme",
    ),
}
_PERPLEXITIES = ("ppl", "perplexity", "val_ppl", "perplexities")
REFERENCES = (
    "dense",
    "bf16",
    "fp16",
    "fp32",
    "bfloat16",
    "float16",
    "float32",
    "baseline",
    "16bit",
    "16-bit",
    "w16a16",
)
"""Names that other people give to the reference, in lower case."""


def read_losses(
    paths: Path | str | Sequence[Path | str], mapping: Sequence[str] = (), reference: str = "dense"
) -> pd.DataFrame:
    """Read one loss table from CSV and Parquet files and folders of Parquet partitions.

    Parameters
    ----------
    paths
        Files ending in .csv or .parquet, or folders of such files (read in sorted order); rows are concatenated.
    mapping
        `name=column`, `name=column*factor` or `name=log(column)` words: where a contract column stands, and in which
        unit.
    reference
        The table's name for the uncompressed representation; it becomes `dense`.

    Returns
    -------
    DataFrame with numeric columns as float64 and text columns as str. Rows without `representation` are dense.

    Raises
    ------
    QpipeError
        Missing files or columns, columns that are not numbers, a mapping that names no column, a reference that no
        run has; all at once.
    """
    files = _files([paths] if isinstance(paths, (str, Path)) else list(paths))
    table = pd.concat([_read(path) for path in files], ignore_index=True)
    table = _apply_mapping(table, mapping)
    missing = [_missing(name, table, files) for name in REQUIRED if name not in table.columns]
    if problems := [*missing, *_unread_representation(table, files)]:
        raise QpipeError(problems)
    if table.empty:
        raise QpipeError(f"{_names(files)}: no rows; a loss table has one row per finished run")
    return _with_reference(_typed(table), reference)


def _with_reference(table: pd.DataFrame, reference: str) -> pd.DataFrame:
    if reference == "dense":
        return table
    names = table["representation"]
    if not (names == reference).any():
        known = sorted(set(names))
        raise QpipeError(f"no run of the reference '{reference}'{nearest(reference, known)}; found {', '.join(known)}")
    if (names == "dense").any():
        raise QpipeError(f"the table has runs of '{reference}' and of 'dense', and only one of them is the reference")
    return table.assign(representation=names.replace(reference, "dense"))


def _names(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _files(paths: Sequence[Path | str]) -> list[Path]:
    files, problems = [], []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(
                p for p in path.rglob("*") if p.suffix in (".parquet", ".csv") and not p.name.startswith(".")
            )
            files += found
            problems += [] if found else [f"{path}: the folder holds no .parquet or .csv file"]
        elif not path.exists():
            problems.append(f"{path}: no such file; give the loss table that `qpipe collect` wrote, or your own")
        else:
            files.append(path)
    if problems or not files:
        raise QpipeError(problems or "no loss table given")
    return files


def _read(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".parquet":
            return pd.read_parquet(path)
        table = pd.read_csv(path, sep=_separator(path), skipinitialspace=True, encoding="utf-8-sig", dtype=_TEXT_TYPES)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise QpipeError(f"{path}: cannot be read as a table: {error}") from error
    return table.rename(columns=lambda name: str(name).strip())


_TEXT_TYPES = dict.fromkeys(TEXT, str)


def _separator(path: Path) -> str:
    """Return the separator that the first line holds most of: comma, semicolon or tab."""
    with path.open(encoding="utf-8-sig") as file:
        head = file.readline()
    return max(",;\t", key=head.count)


def _alike(name: str, table: pd.DataFrame) -> list[str]:
    """Return the columns whose names usually mean `name`."""
    return [str(column) for column in table.columns if str(column).lower() in _GUESSES[name]]


def _missing(name: str, table: pd.DataFrame, files: Sequence[Path]) -> str:
    found = _alike(name, table)
    hint = f"; if it is '{found[0]}', add --map {name}={found[0]}" if found else nearest(name, table.columns)
    ppl = [str(column) for column in table.columns if str(column).lower() in _PERPLEXITIES]
    if name == "loss" and ppl and not found:
        hint = f"; '{ppl[0]}' holds perplexities: add --map loss=log({ppl[0]})"
    return f"{_names(files)}: no column '{name}' among {', '.join(map(str, table.columns))}{hint or '; use --map'}"


def _unread_representation(table: pd.DataFrame, files: Sequence[Path]) -> list[str]:
    """Refuse to take all runs as dense where another column seems to say what they are."""
    if "representation" in table.columns:
        return []
    return [
        f"{_names(files)}: no column 'representation', and '{column}' seems to say what the runs are: add --map "
        f"representation={column}, or drop that column if all runs are dense"
        for column in _alike("representation", table)
        if table[column].nunique() > 1
    ][:1]


def _apply_mapping(table: pd.DataFrame, mapping: Sequence[str]) -> pd.DataFrame:
    problems, columns = [], {}
    for word in (part for item in mapping for part in item.split(",")):
        match = _MAPPING.fullmatch(word.strip())
        if not match:
            problems.append(
                f"mapping '{word}' is not NAME=COLUMN, NAME=COLUMN*FACTOR or NAME=log(COLUMN), as in n=params_m*1e6"
            )
        elif match["column"].strip() not in table.columns:
            column = match["column"].strip()
            problems.append(f"mapping '{word}': no column '{column}'{nearest(column, map(str, table.columns))}")
        else:
            columns[match["name"]] = _converted(table[match["column"].strip()], match)
    if problems:
        raise QpipeError(problems)
    return table.assign(**columns)


def _converted(source: pd.Series, match: re.Match[str]) -> pd.Series:
    if match["log"]:
        number = _number(source)
        source = np.log(number.where(number > 0))
    return source if match["factor"] is None else _number(source) * float(match["factor"])


def _number(column: pd.Series) -> pd.Series:
    return pd.to_numeric(column, errors="coerce").astype(float)


def _typed(table: pd.DataFrame) -> pd.DataFrame:
    problems = []
    typed = table.copy()
    for name in (name for name in NUMERIC if name in table.columns):
        typed[name] = _number(table[name])
        bad = typed[name].isna() & table[name].notna() & ~table[name].astype(str).str.lower().isin(("nan", ""))
        if bad.any():
            problems.append(_not_numbers(name, table[name][bad]))
    if problems:
        raise QpipeError(problems)
    if "representation" not in typed.columns:
        typed["representation"] = "dense"
    for name in (name for name in TEXT if name in typed.columns):
        typed[name] = typed[name].astype(object).where(typed[name].notna(), "").astype(str).str.strip()
    typed["representation"] = typed["representation"].replace("", "dense")
    return typed


def _not_numbers(name: str, values: pd.Series) -> str:
    shown = ", ".join(
        f"row {i + 1}: '{value}'" for i, value in zip(values.index[:3].tolist(), values.iloc[:3], strict=True)
    )
    percent = values.astype(str).str.contains("%").any()
    remedy = "write shares such as 0.5 without a percent sign" if percent else "write plain numbers such as 1.5e9"
    return f"column '{name}' holds text in {len(values)} rows ({shown}); {remedy}"
