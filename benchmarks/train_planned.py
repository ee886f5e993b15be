"""Train all runs of a plan on one machine without Snakemake, parents before their children.

    qpipe plan config/budget-split.yaml --write plan/          # where the corpus is
    python benchmarks/train_planned.py plan/ TOKENS --at-once 8

PLAN is the folder that `qpipe plan --write` made, TOKENS a token store of the same corpus. Results are written beside
each run.yaml. Runs that are finished are left alone, killed ones resume, so the command can be repeated until all is
done; with --minutes no run is started after that time. A run that fails is reported at the end and blocks its children
alone. QPIPE_WARM=1 keeps as many processes as run at once and spares each run its start.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from qpipe.progress import run_state
from qpipe.runs import load_run, starts_from


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, metavar="PLAN")
    parser.add_argument("tokens", type=Path, metavar="TOKENS")
    parser.add_argument("--at-once", type=int, default=1, metavar="K", help="runs trained at a time (1)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs whose id holds this, and what they need")
    args = parser.parse_args()
    folder = args.plan / "runs"
    runs = {run.id: run for run in map(load_run, sorted(folder.glob("*/run.yaml")))}
    before = starts_from(runs)
    wanted = {name for name in runs if args.only in name}
    while more := {before[name] for name in wanted if name in before} - wanted:
        wanted |= more
    finished = {name for name in wanted if run_state(folder / name, name) in ("done", "diverged")}
    waiting = sorted(wanted - finished, key=lambda name: (runs[name].first_step + runs[name].steps, name))
    print(f"{len(wanted)} runs, {len(finished)} finished", flush=True)
    begin, failed = time.monotonic(), []
    with ThreadPoolExecutor(args.at_once) as pool:
        going: dict[Future[int], str] = {}
        while waiting or going:
            late = time.monotonic() - begin > 60 * args.minutes
            ready = [name for name in waiting if before.get(name, "") in {"", *finished}]
            for name in [] if late else ready[: args.at_once - len(going)]:
                waiting.remove(name)
                going[pool.submit(train, folder / name, args.tokens)] = name
            if not going:
                break
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                name = going.pop(future)
                (finished.add if future.result() == 0 else failed.append)(name)
                print(f"{time.monotonic() - begin:7.0f} s  {len(finished)}/{len(wanted)}  {name}", flush=True)
    for name in failed:
        print(f"failed: {name}, see {folder / name}/train.log", flush=True)
    print(f"{len(waiting)} runs not started" if waiting else "all runs were started", flush=True)
    return 1 if failed or waiting else 0


def train(run: Path, tokens: Path) -> int:
    command = [sys.executable, "-m", "qpipe", "train", str(run / "run.yaml"), str(tokens), str(run)]
    with (run / "train.log").open("ab") as log:
        return subprocess.run(command, stdout=log, stderr=log, env=os.environ).returncode


if __name__ == "__main__":
    sys.exit(main())
