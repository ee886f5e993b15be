"""Bits per weight, Gaussian error and predicted multiplier of representations, before any training.

Columns: stored bits per weight and payload bits (codes alone); GMSE of weights and activations, the mean squared
error on N(0, 1) data; effective bits, log_{1/4} of the weights' GMSE, which no format of b bits can bring above b;
rho, the predicted multiplier. Numbers after +- are Monte Carlo standard errors.

example:
  qpipe capacity w4 w4a4-quest 2:4 s50+w4
"""

import argparse
import json
from typing import Any

from qpipe.errors import QpipeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "representations",
        nargs="*",
        metavar="REPRESENTATION",
        help="names, e.g. w4a4-quest mxfp4 2:4, or compositions as JSON",
    )
    parser.add_argument("--all", action="store_true", help="the whole catalogue, sorted by effective bits")
    parser.add_argument("--width", type=int, default=4096, help="matrix width for scale overhead and rows (4096)")
    parser.add_argument("--samples", type=int, default=2**20, help="numbers drawn where the error is sampled (1048576)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampled errors (0)")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print one line per representation."""
    from qpipe.compress import capacity
    from qpipe.formats import catalogue_names, resolve
    from qpipe.yaml_files import parse_yaml

    if bool(args.representations) == args.all:
        raise QpipeError("name representations, or give --all for the whole catalogue")
    if args.width < 1 or args.samples < 1:
        raise QpipeError(f"--width {args.width} and --samples {args.samples} must be positive")
    names = catalogue_names() if args.all else args.representations
    chosen = [resolve(parse_yaml(name, "the composition given") if name.startswith("{") else name) for name in names]
    rows = [capacity(item, width=args.width, samples=args.samples, seed=args.seed) for item in chosen]
    if args.all:
        rows.sort(key=lambda row: -1.0 if row["effective_bits"] is None else row["effective_bits"])
    print(json.dumps(rows, indent=2) if args.json else table(rows))
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of `qpipe.compress.capacity` as an aligned text table."""
    header = ["representation", "bits/weight", "payload", "GMSE", "activation GMSE", "effective bits", "rho"]
    cells = [header] + [
        [
            row["representation"],
            f"{row['bits_per_weight']:.4g}",
            f"{row['payload_bits']:.4g}",
            _error(row, "gmse"),
            _error(row, "activation_gmse"),
            "-" if row["effective_bits"] is None else f"{row['effective_bits']:.3f}",
            f"{row['rho']:.3f}",
        ]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _error(row: dict[str, Any], field: str) -> str:
    if not row[field]:
        return "-"
    spread = row.get(f"{field}_standard_error")
    return f"{row[field]:.5g}" + (f" +- {spread:.1g}" if spread is not None else "")
