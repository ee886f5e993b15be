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
from typing import Any


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
        help="where a column stands and in which unit, e.g. n=params_m*1e6,d=tokens",
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
    parser.add_argument("--json", action="store_true", help="print FIT.json instead of a summary")


def run(args: argparse.Namespace) -> int:
    """Fit, write, print."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from qpipe.laws import fit, parse_priors, parse_settings, read_losses

    result = fit(
        read_losses(args.losses, args.map),
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
