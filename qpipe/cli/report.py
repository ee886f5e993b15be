"""Write the report: one self-contained HTML page with tables, interactive figures, runs and provenance.

The page opens in any browser without a network, works in light and dark, and prints. Only a fit is needed; the more is
given, the more the page holds. --table takes the files or folders of `qpipe multipliers`, in the order of those fits
that have multipliers; --figures those of `qpipe figures`, in any order.

example:
  qpipe report --fit FIT.json --table tables/ --figures figures/ --losses losses.csv --out report.html
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qpipe report`."""
    parser.add_argument("--fit", type=Path, nargs="+", required=True, metavar="FIT.json", help="fitted laws")
    parser.add_argument("--out", type=Path, required=True, metavar="report.html", help="page to write")
    parser.add_argument("--table", type=Path, nargs="*", default=[], metavar="DIR", help="multiplier tables")
    parser.add_argument("--figures", type=Path, nargs="*", default=[], metavar="DIR", help="figures of the fits")
    parser.add_argument("--damage", type=Path, metavar="DIR", help="what qpipe damage wrote")
    parser.add_argument("--study", type=Path, metavar="STUDY.yaml", help="the study, resolved")
    parser.add_argument("--plan", type=Path, metavar="PLAN.json", help="its runs: names those that are missing")
    parser.add_argument("--losses", type=Path, nargs="*", default=[], metavar="LOSSES", help="loss tables")
    parser.add_argument("--runs", type=Path, metavar="DIR", help="folder that holds one folder per run")
    parser.add_argument("--capacity", type=Path, nargs="*", default=[], metavar="CAPACITY.json", help="capacities")
    parser.add_argument(
        "--step", type=_step, nargs="*", default=[], metavar="STEP=PATH", help="Snakemake benchmarks, e.g. fit=fit.tsv"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page and print its path."""
    from qpipe.report.page import Sources, write_report

    sources = Sources(
        fits=args.fit,
        study=args.study,
        plan=args.plan,
        tables=args.table,
        figures=args.figures,
        damage=args.damage,
        losses=args.losses,
        runs=args.runs,
        capacity=args.capacity,
        steps=dict(args.step),
    )
    print(write_report(sources, args.out))
    return 0


def _step(word: str) -> tuple[str, Path]:
    """Split `train=benchmarks/train/demo` into the step's name and its benchmark file or folder."""
    name, equals, path = word.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"'{word}' is not STEP=PATH, as in train=benchmarks/train/demo")
    return name, Path(path)
