"""Fit what quantization after training costs, and say until when it is enough.

The loss increase of quantized dense runs is fitted, for each method, as C_T D^g_D N^-g_N exp(-P / gamma_post)
(2411.04330). With --fit (a law with multipliers, such as compression) quantized models stand beside models trained
under a representation, at equal bits per weight: what each is worth, and the tokens per parameter up to which
quantizing a finished model is worth as much. Writes damage.json, comparison.csv and figures to --out.

LOSSES holds dense, compressed and quantized runs: what qpipe collect wrote from records and ptq.json files, or any
table with the columns n, d, loss, ptq_method, ptq_bits, parent and parent_loss.

example:
  qpipe damage results/demo/losses --fit results/demo/fits/compression.json --out damage/
"""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qpipe damage`."""
    parser.add_argument("losses", nargs="+", type=Path, metavar="LOSSES", help="loss tables, or folders of them")
    parser.add_argument("--fit", type=Path, metavar="FIT.json", help="law whose multipliers are compared with")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for results and figures")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="B", help="resamples (default: 1000)")
    parser.add_argument("--level", type=float, default=0.9, help="level of the intervals (default: 0.9)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Fit, write, print."""
    from qpipe.laws import Fit, read_losses
    from qpipe.report.damage import write_damage

    fit = Fit.from_json(args.fit) if args.fit else None
    table = read_losses(args.losses)
    content = write_damage(table, fit, args.out, bootstrap=args.bootstrap, level=args.level, seed=args.seed)
    if args.json:
        print(
            json.dumps({name: content[name] for name in ("damages", "unfitted", "comparison", "statements")}, indent=1)
        )
        return 0
    for entry in content["damages"]:
        values = ", ".join(f"{name} {value:.4g}" for name, value in entry["parameters"].items())
        left_out = f"; {entry['rows_diverged']} diverged and are left out" if entry["rows_diverged"] else ""
        print(f"{entry['method']}: {values} ({entry['rows']} models of {entry['dense_runs']} dense runs{left_out})")
    for method, reason in content["unfitted"].items():
        print(f"{method}: not fitted: {reason}")
    print("\n".join(content["statements"]))
    return 0
