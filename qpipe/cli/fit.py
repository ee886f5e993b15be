"""Fit a scaling law to a loss table, ours or anyone's.

The table (CSV or Parquet, or folders of them) has one row per finished run with columns n (non-embedding parameters),
d (training tokens), representation (`dense` is the reference) and loss (nats/token); other names and units are mapped
with --map. Prints the law, its intervals, the multipliers and a status; --out writes everything as FIT.json.

example:
  qpipe fit losses.csv --law compression --map n=params_m*1e6,d=tokens --exclude "loss > 5" --out fit.json
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from qpipe.errors import QpipeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("losses", nargs="+", metavar="LOSSES", help="loss tables: .csv, .parquet, or folders of them")
    parser.add_argument(
        "--law", required=True, help="chinchilla, compression, capacity, sparsity, precision, gamma, qat-gap or float"
    )
    parser.add_argument("--out", metavar="FIT.json", help="where to write the fit")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="B", help="resamples, 0 for none (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resamples (default 0)")
    parser.add_argument("--level", type=float, default=0.9, help="level of the intervals (default 0.9)")
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="EXPR",
        help='rows to leave out, e.g. "loss > 5"; may be repeated; kept in the result',
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="NAME=COLUMN[*FACTOR]",
        help="where a column stands and in which unit, e.g. n=params_m*1e6,d=tokens,loss=log(perplexity)",
    )
    parser.add_argument(
        "--reference", default="dense", metavar="R", help="the table's name of the uncompressed reference (dense)"
    )
    parser.add_argument(
        "--objective",
        default="log-huber",
        choices=["log-huber", "log-l2", "huber", "l2"],
        help="residuals of log loss or of loss, Huber or least squares (default log-huber)",
    )
    parser.add_argument("--delta", type=float, default=1e-3, help="Huber's threshold (default 1e-3)")
    parser.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="hold a parameter or a family, e.g. E=1.69 or eff[w4]=0.9; may be repeated",
    )
    parser.add_argument(
        "--free",
        action="append",
        default=[],
        metavar="NAME",
        help="release a parameter that the law holds by default, e.g. L; may be repeated",
    )
    parser.add_argument(
        "--prior",
        action="append",
        default=[],
        metavar="NAME=VALUE+-SD",
        help="Gaussian prior, e.g. E=1.7+-0.2; may be repeated; always reported",
    )
    parser.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="NAME",
        help="profile likelihood of a parameter or multiplier, e.g. eff[w4]; may be repeated",
    )
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="LAW",
        help="law whose held-out errors stand beside this one's; `dense`, or `all`; may be repeated",
    )
    parser.add_argument(
        "--capacity",
        metavar="CAPACITY.json",
        help="law capacity without a gmse column: output of qpipe "
        "capacity --json (default: computed for representations that are presets)",
    )
    parser.add_argument("--json", action="store_true", help="print FIT.json instead of a summary")


def run(args: argparse.Namespace) -> int:
    """Fit, write, print."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from qpipe.laws import fit, parse_priors, parse_settings, read_losses

    table = read_losses(args.losses, args.map, args.reference)
    if args.law == "capacity" and "gmse" not in table:
        table = with_errors(table, args.capacity)
    result = fit(
        table,
        args.law,
        exclude=args.exclude,
        bootstrap=args.bootstrap,
        seed=args.seed,
        level=args.level,
        objective=args.objective,
        delta=args.delta,
        fix=parse_settings(args.fix, "--fix"),
        free=args.free,
        priors=parse_priors(args.prior),
        profiles=args.profile,
        compare=args.compare,
    )
    if args.out:
        result.to_json(args.out)
    print(json.dumps(result.to_dict(), indent=1) if args.json else summary(result))
    return 0


def with_errors(table: Any, capacity: str | None) -> Any:
    """Add columns gmse, activation_gmse and family from CAPACITY.json or from the presets.

    Raises
    ------
    QpipeError
        Representations that are in neither; all at once.
    """
    from qpipe.cli.multipliers import read_capacity

    names = sorted(set(table["representation"]) - {"dense"})
    entries = read_capacity(Path(capacity)) if capacity else {}
    problems = []
    for name in (name for name in names if name not in entries):
        try:
            entries[name] = _preset_errors(name)
        except QpipeError as error:
            problems.append(
                f"no error of '{name}' for law capacity: add a column gmse to the losses or give --capacity "
                f"({error.problems[0]})"
            )
    if problems:
        raise QpipeError(problems)
    columns = {
        column: table["representation"].map({name: entries[name].get(column) for name in names}).astype(float)
        for column in ("gmse", "activation_gmse")
    }
    families = {name: entries[name].get("family", "all") for name in names}
    return table.assign(**columns, family=table["representation"].map(families).fillna(""))


def _preset_errors(name: str) -> dict[str, Any]:
    """Return the Gaussian errors of a preset, and the family whose curve its weights follow."""
    from qpipe.compress import capacity
    from qpipe.formats import resolve

    representation = resolve(name)
    weights = representation.weights
    grid = None if weights is None else weights.parsed_grid
    family = "scalar" if grid is None or grid.dimension == 1 else "vector"
    if weights is not None and weights.mask is not None:
        family = "sparse"
    return {**capacity(representation), "family": family}


def summary(result: Any) -> str:
    """Return the fit in words and tables."""
    from qpipe.laws.multipliers import footnotes, multiplier_table, to_markdown

    lines = [f"{result.law}: {result.formula}", ""]
    for name, value in result.parameters.items():
        interval = result.parameter_intervals.get(name)
        held = "  (held)" if name in result.held else ""
        spread = f"  [{interval[0]:.4g}, {interval[1]:.4g}]" if interval and not held else ""
        lines.append(f"  {name:<12} {value:>12.6g}{spread}{held}  {result.units.get(name, '')}".rstrip())
    if result.multipliers:
        lines += ["", to_markdown(multiplier_table(result)).rstrip()]
    return "\n".join([*lines, "", *_check_lines(result.checks), *footnotes(result)])


def _check_lines(checks: dict[str, Any]) -> list[str]:
    """Return profiles, hold-outs, significant trends and the most influential run in words."""
    lines = []
    for name, entry in checks.get("profiles", {}).items():
        low = "open" if entry["open_low"] else f"{entry['low']:.4g}"
        high = "open" if entry["open_high"] else f"{entry['high']:.4g}"
        lines.append(f"Profile of {name}: {low} to {high} ({entry['grade']}).")
    for entry in checks.get("hold_outs", []):
        error = entry.get("problem") or f"rms {entry['rms']:.2%}, bias {entry['bias']:+.2%} in {entry['n_test']} runs"
        lines.append(f"Held out {entry['held_out']}, law {entry['law']}: {error}.")
    lines += [_trend_line(entry) for entry in checks.get("trends", []) if entry["p_adjusted"] < 0.05]
    if checks.get("influence"):
        top = checks["influence"][0]
        lines.append(
            f"Most influential run: row {top['row'] + 1} ({top['representation']}, n {top['n']:.3g}) moves "
            f"{top['parameter']} by {top['change']:.1f} standard errors."
        )
    return lines


def _trend_line(entry: dict[str, Any]) -> str:
    return (
        f"eff of {entry['representation']} drifts with {entry['axis']}: d log eff / d log {entry['axis']} = "
        f"{entry['slope']:+.3f} +- {entry['standard_error']:.3f} (p {entry['p_adjusted']:.2g} after Holm): one "
        "multiplier does not describe it."
    )
