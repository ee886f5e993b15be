"""From a loss table to the rows of a fit: exclusions in order, then checks that name the rows at fault."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from qpipe.errors import QpipeError
from qpipe.identity import digest
from qpipe.laws.expressions import matching_rows
from qpipe.laws.model import Law
from qpipe.laws.parts import Design
from qpipe.laws.table import REFERENCES

BITS_OF_DENSE = 16.0
MAX_LOSS = 14.0
"""Above the entropy of a uniform guess over any vocabulary in use (ln 262,144 = 12.5): perplexities, not losses."""
MAX_MEDIAN_LOSS = 9.0
"""Half of all runs that learned next to nothing are not a study: perplexities of good models."""
FEWEST = 1000.0
"""Fewer parameters or tokens are counts in millions or billions."""
LEAST_RATIO, MOST_RATIO = 1e-3, 1e6
"""Tokens per parameter beyond which one of the two is in another unit."""


@dataclass
class Rows:
    """The rows that are fitted, what was left out and why."""

    table: pd.DataFrame
    excluded: list[dict[str, Any]]
    """`rule` and number of `rows` it removed, in the order applied."""

    @property
    def weight(self) -> np.ndarray:
        """Weights (R,) of the rows in the objective."""
        if "weight" not in self.table:
            return np.ones(len(self.table))
        return self.table["weight"].to_numpy(float)

    def digest(self) -> str:
        """Return a digest of everything in the rows that can influence a fit."""
        plain = self.table.astype(object).where(self.table.notna(), None)
        return digest({str(name): plain[name].tolist() for name in plain}, length=16)


def select_rows(table: pd.DataFrame, law: Law, exclude: Sequence[str] = ()) -> Rows:
    """Apply exclusions and checks (errors: see `_problems`; nothing left; no dense reference)."""
    excluded: list[dict[str, Any]] = []
    kept = table if "representation" in table else table.assign(representation="dense")
    for rule in exclude:
        kept = _drop(kept, matching_rows(kept, rule), rule, excluded)
    if "status" in kept:
        status = kept["status"].fillna("").astype(str)
        bad = ~status.str.lower().isin(("ok", "")).to_numpy()
        if bad.all() and bad.size:
            found = ", ".join(f"'{name}'" for name in sorted(set(status)))
            raise QpipeError(f"no run has the status ok, found {found}; only runs whose status is ok are fitted")
        kept = _drop(kept, bad, "status is not ok", excluded)
    if law.dense_only:
        kept = _drop(kept, (kept["representation"] != "dense").to_numpy(), "representation is not dense", excluded)
    if kept.empty:
        raise QpipeError(f"no rows are left to fit {law.name} to: {_listing(excluded) or 'the table is empty'}")
    if problems := [*_problems(kept), *_column_problems(kept, law)]:
        raise QpipeError(problems)
    columns = ["n", "d", "representation", "loss", *(c for c in _EXTRA if c in kept), *law.columns, *law.optional]
    present = [c for c in dict.fromkeys(columns) if c in kept]
    return Rows(kept[present].reset_index(names="row"), excluded)


_EXTRA = ("seed", "trajectory", "weight", "bits_per_weight", "payload_bits", "rho", "flops")


def _listing(excluded: list[dict[str, Any]]) -> str:
    return "; ".join(f"{entry['rule']} removed {entry['rows']}" for entry in excluded)


def _drop(table: pd.DataFrame, rows: np.ndarray, rule: str, excluded: list[dict[str, Any]]) -> pd.DataFrame:
    if rows.any():
        excluded.append({"rule": rule, "rows": int(rows.sum())})
    elif rule != "status is not ok" and rule != "representation is not dense":
        excluded.append({"rule": rule, "rows": 0})
    return table[~rows]


def _where(table: pd.DataFrame, rows: pd.Series) -> str:
    numbers = [str(i + 1) for i in table.index[rows]]
    return f"{'row' if len(numbers) == 1 else 'rows'} {', '.join(numbers[:5])}{', ...' if len(numbers) > 5 else ''}"


def _problems(table: pd.DataFrame) -> list[str]:
    """Name values that no run can have, and units that are not the contract's."""
    problems = []
    for name in ("n", "d", "loss"):
        column = table[name]
        if (bad := ~np.isfinite(column)).any():
            problems.append(
                f"{_where(table, bad)}: {name} is missing or not finite; exclude the run or give it a "
                "`status` other than ok"
            )
        if (bad := column <= 0).any():
            problems.append(f"{_where(table, bad)}: {name} is {column[bad].iloc[0]:g}; it must be positive")
    problems += _unit_problems(table)
    if "weight" in table and (bad := ~(table["weight"] > 0)).any():
        problems.append(f"{_where(table, bad)}: weight must be positive; to leave a run out, use --exclude")
    identity = [c for c in ("n", "d", "representation", "loss", "seed", "trajectory", "backward") if c in table]
    if (bad := table.duplicated(identity, keep=False)).any():
        problems.append(
            f"{_where(table, bad)}: the same run stands there more than once; drop the copies (replicates "
            "differ in loss or seed)"
        )
    return problems


def _unit_problems(table: pd.DataFrame) -> list[str]:
    problems = []
    loss = table["loss"]
    if (bad := (loss > MAX_LOSS) & np.isfinite(loss)).any() or loss.median() > MAX_MEDIAN_LOSS:
        bad = bad if bad.any() else loss > MAX_MEDIAN_LOSS
        problems.append(
            f"{_where(table, bad)}: loss up to {loss[bad].max():g} is not a cross-entropy in nats/token; take the "
            "logarithm of perplexities (--map loss=log(loss)), divide per-sequence sums, or exclude diverged runs"
        )
    for name, what in (("n", "parameters"), ("d", "tokens")):
        if (small := (table[name] > 0) & (table[name] < FEWEST)).any():
            problems.append(
                f"{_where(table, small)}: {name} is {table[name][small].iloc[0]:g}, but a count of {what} is expected; "
                f"if it is in millions or billions, add --map {name}={name}*1e6 or --map {name}={name}*1e9"
            )
    ratio = float((table["d"] / table["n"].where(table["n"] > 0)).median())
    if not problems and np.isfinite(ratio) and not LEAST_RATIO <= ratio <= MOST_RATIO:
        problems.append(
            f"a median of {ratio:.2g} tokens per parameter: n and d seem to be in different units; both are counts, "
            "as in --map d=d*1e9"
        )
    return problems


def _column_problems(table: pd.DataFrame, law: Law) -> list[str]:
    """Name what the law needs and the table lacks."""
    problems = []
    compressed = table["representation"] != "dense"
    if law.grouped and compressed.all():
        alike = [name for name in dict.fromkeys(table["representation"]) if name.lower() in REFERENCES]
        remedy = f"if '{alike[0]}' is it, add --reference {alike[0]}" if alike else "name it with --reference NAME"
        problems.append(
            f"law {law.name} needs dense rows as its reference (eff = 1) and the table has none; {remedy}, or add "
            "dense runs"
        )
    for name in law.columns:
        if name not in table:
            problems.append(f"law {law.name} needs a column '{name}'; add it, or name one with --map {name}=COLUMN")
        elif (bad := compressed & ~np.isfinite(table[name])).any():
            problems.append(
                f"{_where(table, bad)}: {name} is missing, and law {law.name} needs it for every compressed run"
            )
    return problems + _range_problems(table)


def _range_problems(table: pd.DataFrame) -> list[str]:
    problems = []
    for name, low, high, hint in (
        ("sparsity", 0.0, 1.0, "a share of zeros below 1; percent must be divided by 100"),
        ("gmse", 0.0, 1.0, "the mean squared error of unit-variance data, between 0 and 1"),
        ("activation_gmse", 0.0, 1.0, "the mean squared error of unit-variance data, between 0 and 1"),
    ):
        if name in table and (bad := (table[name] < low) | (table[name] >= high)).any():
            problems.append(f"{_where(table, bad)}: {name} is {table[name][bad].iloc[0]:g}; expected {hint}")
    return problems


def make_design(table: pd.DataFrame, law: Law) -> Design:
    """Return the arrays that a law needs; a dense run has no error, no zeros and 16 bits."""
    dense = (table["representation"] == "dense").to_numpy()
    labels = {"representation": table["representation"].to_numpy(dtype=str)}
    numbers = {}
    for name in (*law.columns, *law.optional):
        if name not in table:
            continue
        if name in ("family", "backward"):
            labels[name] = table[name].to_numpy(dtype=str)
            continue
        neutral = BITS_OF_DENSE if name in ("w_bits", "a_bits", "kv_bits") else 0.0
        column = table[name].to_numpy(float)
        numbers[name] = np.where(np.isfinite(column) & ~(dense & (name not in ("ptq_bits",))), column, neutral)
    if "backward" in law.optional:
        labels["backward"] = np.where(
            labels.get("backward", labels["representation"]) == "",
            "dense",
            labels.get("backward", labels["representation"]),
        )
    log_n, log_d = (np.log(table[name].to_numpy(float)) for name in ("n", "d"))
    return Design(log_n, log_d, labels, numbers)
