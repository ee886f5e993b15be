"""Loss curves of runs trained as they are on a GPU and by the plain path: not compiled, not captured, no own kernel.

    qpipe plan study.yaml --write plan/
    python benchmarks/loss_curves.py plan/runs/* --tokens TOKENS --json curves.json

Each RUN (a folder with run.yaml) is trained several times each way. On a GPU sums have no fixed order and a run is not
reproduced to the digit, so how far equal trainings lie apart says how much of the difference between the ways is noise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

WAYS: dict[str, dict[str, str]] = {"fast": {}, "plain": {"QPIPE_COMPILE": "0", "QPIPE_CAPTURE": "0"}}

SMOOTHED = 20
"""Steps over which training losses are averaged before curves are compared."""

_PLAIN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from training_gpu import leave_out
leave_out()
from qpipe.cli import main
sys.exit(main())
"""


def main() -> None:
    """Train all, print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--tokens", type=Path, required=True, metavar="TOKENS")
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="trainings each way (3)")
    parser.add_argument("--at-once", type=int, default=1, metavar="K", help="runs trained at a time (1)")
    parser.add_argument("--json", type=Path, help="write the differences here")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats: at least 2, since their spread is what differences are compared with")
    with tempfile.TemporaryDirectory(prefix="curves-") as name, ThreadPoolExecutor(args.at_once) as pool:
        jobs = [(run, way, number) for run in args.runs for number in range(args.repeats) for way in WAYS]
        done = pool.map(lambda job: train(*job[:2], Path(name) / job[0].name / f"{job[1]}-{job[2]}", args.tokens), jobs)
        curves = dict(zip(jobs, done, strict=True))
    rows = [
        compared(run.name, {way: [curves[run, way, number] for number in range(args.repeats)] for way in WAYS})
        for run in args.runs
    ]
    print(pd.DataFrame(rows).to_string(index=False), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def train(run: Path, way: str, out: Path, tokens: Path) -> pd.DataFrame:
    """Train a run one way; return its curve."""
    arguments = ["train", str(run / "run.yaml"), str(tokens), str(out)]
    command = [sys.executable, "-m", "qpipe", *arguments]
    if way == "plain":
        command = [sys.executable, "-c", _PLAIN, str(Path(__file__).parent), *arguments]
    out.mkdir(parents=True)
    environment = {**os.environ, "WANDB_MODE": "disabled", **WAYS[way]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{run.name}, {way}: {done.stderr[-3000:]}")
    return pd.read_parquet(out / "curve.parquet").set_index("step")


def compared(name: str, curves: dict[str, list[pd.DataFrame]]) -> dict[str, Any]:
    """Return mean losses each way (nats/token), and their difference with its standard error from equal trainings.

    `validation` is the last validation loss, `training` the training loss averaged over all steps. `largest` is the
    largest distance between the mean curves of both ways, smoothed over `SMOOTHED` steps, in its standard errors there.
    """
    row: dict[str, Any] = {"run": name, "steps": int(curves["plain"][0].index[-1])}
    for what, column in (("validation", "validation_loss"), ("training", "train_loss")):
        ends = {
            way: np.array([c[column].iloc[-1] if what == "validation" else c[column].mean() for c in found])
            for way, found in curves.items()
        }
        row |= {f"{what}, {way}": float(values.mean()) for way, values in ends.items()}
        row |= {f"{what}, difference": float(ends["fast"].mean() - ends["plain"].mean())}
        row |= {f"{what}, error": float(standard_error(*ends.values()))}
    smooth = {
        way: np.stack([c["train_loss"].rolling(SMOOTHED).mean().dropna().to_numpy() for c in found])
        for way, found in curves.items()
    }
    apart = np.abs(smooth["fast"].mean(0) - smooth["plain"].mean(0)) / standard_error(*smooth.values())
    return row | {"largest": float(apart.max()), "beyond two errors": float((apart > 2).mean())}


def standard_error(*groups: np.ndarray) -> np.ndarray:
    """Standard error of the difference of two means, from the spread inside both groups (first axis)."""
    spread = np.mean([group.var(axis=0, ddof=1) for group in groups], axis=0)
    result: np.ndarray = np.sqrt(spread * sum(1 / len(group) for group in groups))
    return result


if __name__ == "__main__":
    main()
