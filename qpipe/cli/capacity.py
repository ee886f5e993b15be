"""Bits per weight, Gaussian error and predicted multiplier of representations, before any training.

Columns: stored bits per weight and payload bits (codes alone); GMSE of weights and activations, the mean squared
error on N(0, 1) data; effective bits, log_{1/4} of the weights' GMSE, which no format of b bits can bring above b;
rho, the predicted multiplier. Numbers after +- are Monte Carlo standard errors.

example:
  qpipe capacity w4 w4a4-quest 2:4 s50+w4
  qpipe capacity --study config/demo.yaml
"""

import argparse
import json
from typing import TYPE_CHECKING, Any

from qpipe.errors import QpipeError

if TYPE_CHECKING:
    from qpipe.formats import Representation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument(
        "representations",
        nargs="*",
        metavar="REPRESENTATION",
        help="names, e.g. w4a4-quest mxfp4 2:4, or compositions as JSON",
    )
    parser.add_argument("--study", metavar="STUDY.yaml", help="look names up in a study; alone: all of its own")
    parser.add_argument("--all", action="store_true", help="the whole catalogue, sorted by effective bits")
    parser.add_argument("--width", type=int, default=4096, help="matrix width for scale overhead and rows (4096)")
    parser.add_argument("--samples", type=int, default=2**20, help="numbers drawn where the error is sampled (1048576)")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampled errors (0)")
    parser.add_argument("--figure", metavar="FILE", help="also draw effective bits against stored bits (png, svg, pdf)")
    parser.add_argument("--json", action="store_true", help="a JSON list instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print one line per representation."""
    from qpipe.compress import capacity

    if bool(args.representations or args.study) == args.all:
        raise QpipeError("name representations or a study, or give --all for the whole catalogue")
    if args.width < 1 or args.samples < 1:
        raise QpipeError(f"--width {args.width} and --samples {args.samples} must be positive")
    chosen = _chosen(args)
    rows = [capacity(item, width=args.width, samples=args.samples, seed=args.seed) for item in chosen]
    if args.all:
        rows.sort(key=lambda row: -1.0 if row["effective_bits"] is None else row["effective_bits"])
    if args.figure:
        draw(rows, args.figure)
    print(json.dumps(rows, indent=2) if args.json else table(rows) + "\n\n" + basis(rows))
    return 0


def _chosen(args: argparse.Namespace) -> "list[Representation]":
    """Return the representations asked for, by name, as JSON or from a study."""
    from pathlib import Path

    from qpipe.formats import catalogue_names, resolve
    from qpipe.study import load_study
    from qpipe.yaml_files import parse_yaml

    if args.all:
        return [resolve(name) for name in catalogue_names()]
    own = load_study(Path(args.study)).resolved_representations() if args.study else {}
    chosen = []
    for name in args.representations or own:
        inline = parse_yaml(name, "the composition given") if name.startswith("{") else name
        chosen.append(own[name] if name in own else resolve(inline))
    return chosen


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


def basis(rows: list[dict[str, Any]]) -> str:
    """What the predictions in `rows` rest on, each curve once."""
    lines = dict.fromkeys(line for row in rows for line in row["rho_basis"])
    text = "rho is a prior, not a measurement: L tanh(F log_{1/4} GMSE)^C (2506.01863, eq. 3) per part."
    return "\n".join([text, *(f"- {line}" for line in lines)])


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Effective bits against stored bits per weight, with the bound that no format can pass; writes `path`.

    One colour per method; presets without a method are named in the plot. Injected noise stores nothing: left out.
    """
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["effective_bits"] is not None and not row["representation"].startswith("noise")]
    methods = _by_method(shown)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    top = max((row["effective_bits"] for row in shown), default=1.0) + 0.5
    axes.plot([0, top], [0, top], color="black", linewidth=1, label="rate-distortion bound, error 4^-b")
    for place, (method, members) in enumerate(methods.items()):
        points = [row["bits_per_weight"] for row in members], [row["effective_bits"] for row in members]
        marker = "o^svD"[place % 5]
        axes.plot(*points, marker, color=f"C{place % 10}", markersize=4, label=method or "presets (named)")
    for row in methods.get("", []):
        at = (row["bits_per_weight"], row["effective_bits"])
        axes.annotate(row["representation"], at, (4, -4), textcoords="offset points", fontsize=6)
    axes.set(xlabel="stored bits per weight", ylabel="effective bits, log_{1/4} of the error on N(0, 1)")
    axes.legend(loc="lower right", fontsize=7)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise QpipeError(f"cannot draw to '{path}': {error}; give a writable .png, .svg or .pdf file") from None


def _by_method(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by the method in their names, rows of equal weights once."""
    from qpipe.formats import catalogue

    methods: dict[str, list[dict[str, Any]]] = {}
    seen: set[tuple[str, float, float]] = set()
    for row in rows:
        method = row["representation"].rpartition("-")[2]
        method = method if method in catalogue().methods else ""
        key = (method, row["bits_per_weight"], row["gmse"])
        if key not in seen:
            seen.add(key)
            methods.setdefault(method, []).append(row)
    return methods


def _error(row: dict[str, Any], field: str) -> str:
    if not row[field]:
        return "-"
    spread = row.get(f"{field}_standard_error")
    return f"{row[field]:.5g}" + (f" +- {spread:.1g}" if spread is not None else "")
