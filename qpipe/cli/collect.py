"""Collect the records of finished runs and quantizations into a loss table (Parquet), one row each.

Units and conventions stand in the metadata of each column. Diverged runs are rows without a loss.

example:
  qpipe collect results/demo/runs/*/record.json --out losses.parquet
  qpipe collect @records.txt --out losses.parquet      (one path per line)
"""

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qpipe collect`."""
    parser.add_argument(
        "records", nargs="+", metavar="RECORD", help="record.json and ptq.json files, or @FILE that lists them"
    )
    parser.add_argument(
        "--capacity", nargs="*", default=[], type=Path, metavar="CAPACITY.json", help="output of qpipe capacity --json"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="LOSSES.parquet", help="table to write")


def run(args: argparse.Namespace) -> int:
    """Collect the records."""
    import pyarrow.parquet as pq

    from qpipe.errors import QpipeError
    from qpipe.files import replacing
    from qpipe.record import table_of_rows

    paths = [Path(line) for record in args.records for line in _listed(record)]
    capacities = {name: entry for path in args.capacity for name, entry in _capacities(path).items()}
    rows, problems = [], []
    for path in paths:
        try:
            rows.append(_row(path, capacities))
        except QpipeError as error:
            problems += error.problems
    if problems:
        raise QpipeError(problems)
    table = table_of_rows(rows)
    with replacing(args.out) as temporary:
        pq.write_table(table, temporary)
    print(f"{table.num_rows} runs -> {args.out}")
    return 0


def _row(path: Path, capacities: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from qpipe.ptq.result import RESULT, load_result
    from qpipe.record import load_record, loss_row

    if path.name == RESULT:
        return load_result(path).loss_row()
    record = load_record(path)
    return loss_row(record, capacities.get(record.run.representation_name))


def _listed(argument: str) -> list[str]:
    from qpipe.errors import QpipeError

    if not argument.startswith("@"):
        return [argument]
    try:
        return [line for line in Path(argument[1:]).read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise QpipeError(f"{argument[1:]}: the list of records cannot be read: {error.strerror}") from error


def _capacities(path: Path) -> dict[str, dict[str, Any]]:
    from qpipe.errors import QpipeError

    try:
        return {entry["representation"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise QpipeError(f"{path}: not the output of qpipe capacity --json ({error!r})") from error
