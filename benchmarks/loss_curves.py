"""Loss curves of one run trained as it is on a GPU and by the plain path: not compiled, not captured, no own kernel.

    qpipe plan study.yaml --write plan/
    python benchmarks/loss_curves.py plan/runs/* --tokens TOKENS --json curves.json

Each RUN (a folder with run.yaml) is trained twice as it is and once plainly. On a GPU sums have no fixed order and a
run is not reproduced to the digit, so the difference between the first two says how much of a difference is noise.
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

import pandas as pd

WAYS: dict[str, dict[str, str]] = {"fast": {}, "fast again": {}, "plain": {"QPIPE_COMPILE": "0", "QPIPE_CAPTURE": "0"}}

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
    parser.add_argument("--at-once", type=int, default=1, metavar="K", help="runs trained at a time (1)")
    parser.add_argument("--json", type=Path, help="write the differences here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="curves-") as name, ThreadPoolExecutor(args.at_once) as pool:
        jobs = [(run, way, Path(name) / run.name / way.replace(" ", "-")) for run in args.runs for way in WAYS]
        curves = dict(
            zip(
                [job[:2] for job in jobs],
                pool.map(lambda job: train(job[0], job[1], job[2], args.tokens), jobs),
                strict=True,
            )
        )
    rows = [compared(run.name, {way: curves[run, way] for way in WAYS}) for run in args.runs]
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


def compared(name: str, curves: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Return final losses, and differences of training losses over the whole curve (nats/token)."""
    row: dict[str, Any] = {"run": name, "steps": int(curves["plain"].index[-1])}
    row |= {f"loss, {way}": float(curve["validation_loss"].iloc[-1]) for way, curve in curves.items()}
    for way in ("fast again", "plain"):
        difference = curves["fast"]["train_loss"] - curves[way]["train_loss"]
        row |= {f"mean, {way}": float(difference.mean()), f"largest, {way}": float(difference.abs().max())}
    return row


if __name__ == "__main__":
    main()
