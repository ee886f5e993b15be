"""Reload a trained run and reproduce its validation loss.

Checks that the weights are those of the record and the tokens those it was trained on, computes the loss over the
whole validation split again and compares. Exit code 1 when the two differ by more than rounding.

example:
  qpipe evaluate results/demo/runs/100k-d20x-w4-s0-1f3a9c2e/ results/demo/tokens/ --json
"""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder of qpipe train")
    parser.add_argument("tokens", type=Path, metavar="TOKENS", help="token store: its folder or its manifest.json")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate and compare."""
    from qpipe.train.evaluate import evaluate_run

    result = evaluate_run(args.out, args.tokens)
    if args.json:
        print(json.dumps(result.as_dict(), indent=1))
    else:
        recorded = "none (diverged)" if result.recorded is None else f"{result.recorded!r} nats/token"
        print(f"{result.id}: {result.validation_tokens:,} validation tokens")
        print(f"  recorded {recorded}")
        print(f"  found    {result.found!r} nats/token")
        print("  reproduced" if result.reproduced else f"  NOT reproduced: more than {result.tolerance:g} apart")
    return 0 if result.reproduced else 1
