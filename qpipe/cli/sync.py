"""Upload to Weights & Biases what a study logged offline, for example on nodes without internet.

Run it where there is internet, as often as you like: what has been uploaded is not uploaded again, and runs that are
still training are left for later. A run that was stopped and resumed has logged in several pieces; they end up on its
one page, in order. The API key is wandb's own (WANDB_API_KEY or `wandb login`).

example:
  qpipe sync config/demo.yaml
"""

import argparse
import subprocess
import sys
from pathlib import Path

_AT_ONCE = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qpipe sync`."""
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="study file")
    parser.add_argument("--results", type=Path, help="folder of the study's results (default: results/<study name>)")


def run(args: argparse.Namespace) -> int:
    """Hand finished pieces to `wandb sync`."""
    from qpipe.offline_log import drop_incomplete_end
    from qpipe.progress import run_state
    from qpipe.study import load_study, plan

    study = load_study(args.study)
    results = args.results or Path("results") / study.name
    training = {one.id for one in plan(study) if run_state(results / "runs" / one.id, one.id) == "running"}
    pieces = [*results.glob("runs/*/wandb/offline-run-*"), *results.glob("wandb/wandb/offline-run-*")]
    # Pieces of a run follow each other: wandb uploads them in the order in which they were begun.
    finished = sorted(str(piece) for piece in pieces if piece.parents[1].name not in training)
    later = f"; {len(training)} runs are still training, sync again later" if training else ""
    print(f"{len(finished)} offline logs of study {study.name} below {results}{later}", flush=True)
    for log in (log for piece in finished for log in Path(piece).glob("*.wandb")):
        if cut := drop_incomplete_end(log):
            print(f"{log}: left out an incomplete record at the end ({cut:,} bytes), its run was killed", flush=True)
    for first in range(0, len(finished), _AT_ONCE):
        command = [sys.executable, "-m", "wandb", "sync", "--yes", *finished[first : first + _AT_ONCE]]
        if subprocess.run(command).returncode:
            print("qpipe sync: wandb could not upload all of them; see above, then run it again", file=sys.stderr)
            return 1
    return 0
