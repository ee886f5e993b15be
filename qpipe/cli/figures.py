"""Draw the figures of a fitted law.

Writes each figure as SVG and PNG, and figures.json, from which `qpipe report` builds the interactive page: loss
against N with the law, multipliers with intervals, eff against bits/weight, predicted against measured worth, the
collapse on one line, residuals. A figure that the fit has no data for is left out, and figures.json says why.

example:
  qpipe figures results/demo/fits/compression.json --out figures/
  qpipe figures FIT.json --capacity capacity/w4.json capacity/w4a4.json --out figures/
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qpipe figures`."""
    parser.add_argument("fit", type=Path, metavar="FIT.json", help="what qpipe fit wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the figures")
    parser.add_argument(
        "--capacity",
        type=Path,
        nargs="*",
        default=[],
        metavar="CAPACITY.json",
        help="what qpipe capacity --json printed: adds bits/weight and predicted multipliers",
    )


def run(args: argparse.Namespace) -> int:
    """Draw all figures that the fit has data for."""
    from qpipe.report.figures import write_figures

    drawn, omitted = write_figures(args.fit, args.capacity, args.out)
    print(f"{len(drawn)} figures in {args.out}: {', '.join(drawn)}")
    for name, reason in omitted.items():
        print(f"not drawn: {name}: {reason}")
    return 0
