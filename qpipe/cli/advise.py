"""Advise what to train: the size, tokens and representation that minimise predicted loss under a budget.

With --memory (bytes of weights), --flops (training, 6 N D) or both, and perhaps --tokens, lists every representation's
best model, best first, with the share of bootstrap draws in which it wins. --cross names two representations and finds
the memory at which they tie. --next names a representation (or parameter) and ranks the runs that would shrink its
interval most per FLOP, over the fitted grid or the runs of --candidates (CSV, Parquet or `qpipe plan --json`).

example:
  qpipe advise fit.json --memory 4e9 --flops 1e22 --bits w4=4.25 --next w4
"""

import argparse
import json
from pathlib import Path
from typing import Any

from qpipe.errors import QpipeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("fit", metavar="FIT.json", help="what qpipe fit wrote")
    parser.add_argument("--memory", type=float, metavar="BYTES", help="budget for the stored weights")
    parser.add_argument("--flops", type=float, metavar="FLOP", help="budget for training, counted as 6 N D")
    parser.add_argument("--tokens", type=float, metavar="D", help="training tokens, count")
    parser.add_argument("--bits", action="append", default=[], metavar="R=BITS", help="bits/weight of a representation")
    parser.add_argument("--capacity", metavar="CAPACITY.json", help="output of qpipe capacity --json, for bits/weight")
    parser.add_argument("--cross", nargs=2, metavar="R", help="two representations whose tie is looked for")
    parser.add_argument("--next", metavar="R", help="representation or parameter whose interval should shrink")
    parser.add_argument("--candidates", metavar="FILE", help="possible next runs: n, d, representation (and flops)")
    parser.add_argument("--json", action="store_true", help="print data")


def run(args: argparse.Namespace) -> int:
    """Answer every question asked."""
    from qpipe.laws import Fit
    from qpipe.laws.advice import Budget, advise, crossovers

    fit = Fit.from_json(args.fit)
    asked = args.memory is not None or args.flops is not None
    if not (asked or args.cross or args.next):
        raise QpipeError("nothing asked: give --memory or --flops, --cross R R, or --next R; see qpipe advise --help")
    answer: dict[str, Any] = {"law": fit.law, "status": fit.status["message"]}
    if asked:
        table = advise(fit, Budget(args.memory, args.flops, args.tokens), _bits(args, fit))
        answer["best"] = json.loads(table.to_json(orient="records"))
    if args.cross:
        answer["crossovers"] = crossovers(fit, args.cross[0], args.cross[1], _bits(args, fit), args.flops, args.tokens)
    if args.next:
        answer["next"] = _next(args, fit)
    print(json.dumps(answer, indent=1) if args.json else _words(answer, args))
    return 0


def _bits(args: argparse.Namespace, fit: Any) -> dict[str, float]:
    from qpipe.cli.multipliers import column_of, read_capacity
    from qpipe.laws import parse_settings
    from qpipe.laws.advice import bits_of

    capacity = read_capacity(Path(args.capacity)) if args.capacity else {}
    return bits_of(fit, {**column_of(capacity, "bits_per_weight"), **parse_settings(args.bits, "--bits")})


def _next(args: argparse.Namespace, fit: Any) -> list[dict[str, Any]]:
    from qpipe.laws.advice import candidate_grid, next_runs

    candidates = _candidates(Path(args.candidates)) if args.candidates else candidate_grid(fit)
    return list(json.loads(next_runs(fit, args.next, candidates).to_json(orient="records")))


def _candidates(path: Path) -> Any:
    """Read candidate runs (errors: missing file or columns)."""
    import pandas as pd

    try:
        if path.suffix == ".json":
            table = pd.DataFrame(json.loads(path.read_text(encoding="utf-8")))
        else:
            table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise QpipeError(f"{path}: cannot be read as a list of runs: {error}") from error
    if missing := [name for name in ("n", "d", "representation") if name not in table]:
        raise QpipeError(f"{path}: candidates need columns n, d, representation; {', '.join(missing)} missing")
    return table


def _words(answer: dict[str, Any], args: argparse.Namespace) -> str:
    lines = []
    for row in answer.get("best", []):
        spread = (
            "" if row["low"] is None else f" [{row['low']:.4f}, {row['high']:.4f}], best in {row['best_share']:.0%}"
        )
        lines.append(
            f"{row['representation']:<24} loss {row['loss']:.4f}{spread}  N {row['n']:.3g}  D {row['d']:.3g}  "
            f"{row['memory']:.3g} bytes"
        )
        lines += [f"    extrapolates: {row['extrapolates']}"] if row["extrapolates"] else []
    if args.cross:
        ties = answer["crossovers"]
        lines.append(
            f"{args.cross[0]} and {args.cross[1]} tie at: "
            + (", ".join(f"{tie['memory']:.3g} bytes" for tie in ties) if ties else "no memory budget in range")
        )
    if args.next:
        lines.append(f"runs that shrink the interval of {args.next} most per FLOP:")
        lines += [
            f"  {row['representation']:<24} N {row['n']:.3g}  D {row['d']:.3g}  {row['flops']:.2e} FLOP  "
            f"interval -{row['shrink']:.1%}"
            for row in answer["next"]
        ]
    return "\n".join(
        [
            *lines,
            f"law {answer['law']}: {answer['status']}",
            "memory = N bits/8 without embeddings; training = 6 N D FLOPs",
        ]
    )
