"""Log a multiplier table to Weights & Biases as a table and an artifact.

Where and how follows the environment as in training: WANDB_MODE or QPIPE_WANDB_MODE (online, offline, disabled, auto),
QPIPE_WANDB_PROJECT, QPIPE_WANDB_ENTITY. W&B failing is a warning, never an error.

example:
  qpipe track results/demo/tables/compression --study demo --law compression --out results/demo/wandb
"""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qpipe track`."""
    parser.add_argument("tables", type=Path, metavar="DIR", help="folder that qpipe multipliers wrote")
    parser.add_argument("--study", required=True, help="name of the study: the W&B group")
    parser.add_argument("--law", required=True, help="name of the fitted law")
    parser.add_argument("--plan", type=Path, metavar="PLAN.json", help="the study's runs, whose summaries get eff")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for W&B's own files")


def run(args: argparse.Namespace) -> int:
    """Log the table."""
    from qpipe.errors import QpipeError
    from qpipe.report.tracking import track_multipliers

    table = args.tables / "multipliers.parquet"
    if not table.exists():
        raise QpipeError(f"{table}: no such table; write it with qpipe multipliers FIT.json --out {args.tables}")
    runs = json.loads(args.plan.read_text(encoding="utf-8")) if args.plan else []
    outcome = track_multipliers(
        args.study,
        args.law,
        table,
        sorted(args.tables.glob("multipliers.*")),
        {run["id"]: run["representation"] for run in runs},
        args.out,
    )
    print(f"W&B: {outcome}")
    return 0
