"""Loss against the share of tokens trained dense, or against the tokens of finetuning: the best, and how flat it is.

For each representation, mode, size and total budget: mean loss over seeds at each split, its excess over the best one
with a 90 % interval, and the probability that a split is the best. Intervals need two seeds or more.

example:
  qpipe splits results/budget-split/losses --out splits/
"""

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("losses", nargs="+", type=Path, metavar="LOSSES", help="loss tables (Parquet, CSV or folders)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write splits.json and figures here")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (0)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the curves."""
    from qpipe.files import write_text
    from qpipe.laws.table import read_losses
    from qpipe.splits import split_curves

    curves, noise, freedom = split_curves(read_losses(args.losses), seed=args.seed)
    result = {
        "noise": noise if freedom else None,
        "freedom": freedom,
        "curves": [curve.as_dict() for curve in curves],
    }
    if args.out:
        from qpipe.report.finetune_figures import split_charts
        from qpipe.report.static import save

        write_text(args.out / "splits.json", json.dumps(result, indent=1) + "\n")
        for chart in split_charts(curves, noise):
            save(chart, args.out)
    print(json.dumps(result, indent=1) if args.json else _text(result))
    return 0


def _text(result: dict[str, Any]) -> str:
    lines = []
    for curve in result["curves"]:
        show = "{:>7.1%} dense".format if "share" in curve else "{:>15,.0f} tokens".format
        lines.append(f"{curve['representation']}, {curve['mode']}: N {curve['n']:,.0f}, D {curve['d']:,.0f}")
        for place, at in enumerate(curve.get("share") or curve["qat_tokens"]):
            low, high, best = (curve[key][place] for key in ("low", "high", "best_share"))
            sure = "" if best is None else f"  excess {low:+.4f} to {high:+.4f}, best in {best:.0%} of the draws"
            lines.append(f"  {show(at)}  loss {curve['loss'][place]:.4f} ({curve['runs'][place]} runs){sure}")
        flat = ", ".join(show(at).strip() for at in curve["as_good"])
        lines.append(f"  best {show(curve['optimum']).strip()}" + (f"; as good at 90 %: {flat}" if flat else ""))
    noise = "not known (one seed)" if result["noise"] is None else f"{result['noise']:.2g} nats/token"
    return "\n".join([*lines, f"noise {noise}, {result['freedom']} degrees of freedom"])
