"""Write the efficiency-multiplier table of a fit as Parquet, CSV, Markdown and LaTeX, and print it.

How to read it: a model of N parameters in a representation is worth N eff dense parameters; iso-memory is what its
bytes are worth (1 = 16-bit dense); rho is what theory predicts for eff before any training.

example:
  qpipe multipliers fit.json --out tables/ --capacity capacity.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

from qpipe.errors import QpipeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("fit", metavar="FIT.json", help="what qpipe fit wrote")
    parser.add_argument("--out", metavar="DIR", help="folder for multipliers.parquet, .csv, .md and .tex")
    parser.add_argument("--capacity", metavar="CAPACITY.json", help="output of qpipe capacity --json: bits and rho")
    parser.add_argument("--at-n", type=float, metavar="N", help="size for the equivalent dense N (default: largest)")
    parser.add_argument("--cost-model", default="bits", help="bits (default), bit-product or none, for iso-compute")
    parser.add_argument(
        "--missing", nargs="+", default=[], metavar="RUN", help="planned runs that the fit lacks: named"
    )
    parser.add_argument("--json", action="store_true", help="print the table as JSON")


def run(args: argparse.Namespace) -> int:
    """Make the table, write it, print it."""
    from qpipe.laws import Fit, multiplier_table, write_multipliers
    from qpipe.laws.multipliers import footnotes, to_markdown

    fit = Fit.from_json(args.fit)
    capacity = read_capacity(Path(args.capacity)) if args.capacity else {}
    table = multiplier_table(
        fit,
        at_n=args.at_n,
        cost_model=args.cost_model,
        bits=column_of(capacity, "bits_per_weight"),
        rho=column_of(capacity, "rho"),
    )
    if args.out:
        write_multipliers(fit, table, args.out, args.missing)
    if args.json:
        print(table.to_json(orient="records", indent=1))
    else:
        print(to_markdown(table) + "\n" + "\n".join(footnotes(fit, args.missing)))
    return 0


def read_capacity(path: Path) -> dict[str, dict[str, Any]]:
    """Read what `qpipe capacity --json` printed (errors: missing, not such a list)."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {entry["representation"]: entry for entry in entries}
    except FileNotFoundError as error:
        raise QpipeError(f"{path}: no such file; write it with qpipe capacity ... --json") from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise QpipeError(f"{path}: not the output of qpipe capacity --json ({error!r})") from error


def column_of(capacity: dict[str, dict[str, Any]], name: str) -> dict[str, float]:
    """Return one number by representation, of those that have it."""
    return {key: float(entry[name]) for key, entry in capacity.items() if entry.get(name) is not None}
