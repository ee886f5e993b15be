"""Predict the loss of a model that was never trained, with interval, from a fit.

The interval is that of the law's value; the second one adds the scatter of single runs. Points outside the fitted
sizes, tokens or ratios are flagged: the law is an interpolation first.

example:
  qpipe predict fit.json --n 7e9 --d 1.4e11 --representation w4a4
"""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("fit", metavar="FIT.json", help="what qpipe fit wrote")
    parser.add_argument("--n", type=float, required=True, help="non-embedding parameters, count")
    parser.add_argument("--d", type=float, required=True, help="training tokens, count")
    parser.add_argument("--representation", default="dense", metavar="R", help="default: dense")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="COLUMN=VALUE",
        help="value of a column that the law needs, e.g. gmse=0.0115, for representations not fitted",
    )
    parser.add_argument("--json", action="store_true", help="print data")


def run(args: argparse.Namespace) -> int:
    """Predict and print."""
    from qpipe.laws import Fit, parse_settings
    from qpipe.laws.advice import predict_with_interval

    fit = Fit.from_json(args.fit)
    answer = predict_with_interval(fit, args.n, args.d, args.representation, parse_settings(args.set, "--set"))
    answer |= {"law": fit.law, "status": fit.status["message"]}
    if args.json:
        print(json.dumps(answer, indent=1))
        return 0
    print(f"{answer['representation']}, N = {args.n:.4g}, D = {args.d:.4g}: loss {answer['loss']:.4f} nats/token")
    if answer["low"] is not None:
        level = f"{100 * answer['level']:g}%"
        print(f"  {level} interval of the law's value  {answer['low']:.4f} to {answer['high']:.4f}")
        print(f"  {level} interval of a single run     {answer['run_low']:.4f} to {answer['run_high']:.4f}")
    if "eff" in answer:
        print(f"  eff {answer['eff']:.3f}: worth {answer['eff'] * args.n:.3g} dense parameters")
    for note in answer["extrapolates"]:
        print(f"  extrapolates: {note}")
    print(f"  law {fit.law}: {answer['status']}")
    return 0
