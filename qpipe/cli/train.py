"""Train one run: from run.yaml and a token store to a record, weights and curves.

Writes to OUT: record.json (the result), model.safetensors (final weights), curve.parquet (losses, learning rate,
gradient norm over the steps), runtime.json (how long it took and where), run.yaml. A finished run is left as it is; a
killed one resumes from its last checkpoint; SIGTERM and SIGUSR1 make it write one and stop (in a Slurm job SIGUSR1 also
requeues the job). On a CPU both end with the same record to the last bit.

environment:
  QPIPE_SCRATCH             folder for checkpoints (default: OUT/scratch)
  QPIPE_CHECKPOINT_SECONDS  time between checkpoints (default: 600)
  QPIPE_ACCELERATOR         cpu, gpu or auto (default: auto)
  QPIPE_COMPILE             0 or 1: compile what has no kernel of our own (default: 1 on GPUs; CPUs: docs/training.md)
  QPIPE_CAPTURE             0 or 1: replay the step as one graph (default: on single GPUs)
  QPIPE_WANDB_MODE          online, offline or disabled; QPIPE_WANDB_PROJECT, _ENTITY, _GROUP
  QPIPE_DEVICES             devices that train the run together, a process each (default: 1)
  QPIPE_NODES               nodes with so many devices each, if srun starts the processes; MASTER_ADDR, MASTER_PORT
  QPIPE_SHARD               0 or 1: each of several devices holds a part of the model instead of all of it (default: 0)
  QPIPE_RUNS_PER_GPU        wait for a free place on a GPU, so many runs sharing one (machines without a scheduler)
  QPIPE_WARM                1: let a process that has everything loaded train this run (many short runs)
  OMP_NUM_THREADS           CPU threads

example:
  qpipe train out/run.yaml results/tokens/1f3a9c2e5b7d/ out/
  qpipe train n100k-d20x-w4-s0-1f3a9c2e results/tokens/1f3a9c2e5b7d/ out/ --study config/demo.yaml
"""

import argparse
import sys
from pathlib import Path

from qpipe import warm
from qpipe.cli.logs import logged_to_stderr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN.yaml", help="the resolved run; with --study the id of a run of that study")
    parser.add_argument("tokens", type=Path, metavar="TOKENS", help="token store: its folder or its manifest.json")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument(
        "--parent", type=Path, metavar="DIR", help="results of the run it starts from (default: beside OUT)"
    )
    parser.add_argument("--study", type=Path, metavar="STUDY.yaml", help="write OUT/run.yaml from this study first")


def run(args: argparse.Namespace) -> int:
    """Train; a run that diverges is a result and ends with 0 as well, one stopped by a signal with 1."""
    run_file = _planned_run(args.study, args.run, args.out) if args.study else Path(args.run)
    if warm.asked_for():
        parent = ["--parent", str(args.parent)] if args.parent else []
        return warm.run_in_worker(["train", str(run_file), str(args.tokens), str(args.out), *parent])
    with logged_to_stderr("qpipe.train"):
        from qpipe.leases import leased_gpu
        from qpipe.train.pretrain import train_run
        from qpipe.train.stop import Stopped

        try:
            with leased_gpu():
                train_run(run_file, args.tokens, args.out, args.parent)
        except Stopped as stopped:
            print(stopped, file=sys.stderr)
            return 1
    return 0


def _planned_run(study: Path, run_id: str, out: Path) -> Path:
    """Write the run.yaml of one of a study's runs; return its path (error: the study plans no such run)."""
    from qpipe.errors import QpipeError, nearest
    from qpipe.study import load_study, plan

    runs = {run.id: run for run in plan(load_study(study))}
    if run_id not in runs:
        raise QpipeError(f"{study} plans no run {run_id}{nearest(run_id, runs)}; see qpipe plan {study}")
    runs[run_id].write(out / "run.yaml")
    return out / "run.yaml"
