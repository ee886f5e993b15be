"""Show how a study is getting on: runs done, running, queued, failed; tokens/s; time left; last words of failed runs.

Reads what the runs leave on disk and, on a Slurm cluster, the queue; start it in the folder the workflow runs in, as
often as you like. The time left assumes that as many runs go on at once as do now. To watch:

  watch -n 30 qpipe status config/demo.yaml

example:
  qpipe status config/demo.yaml
  qpipe status config/demo.yaml --json
"""

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qpipe status`."""
    parser.add_argument("study", type=Path, metavar="STUDY.yaml", help="study file")
    parser.add_argument("--results", type=Path, help="folder of the study's results (default: results/<study name>)")
    parser.add_argument("--logs", type=Path, default=Path("logs"), help="folder of the workflow's logs (default: logs)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the status."""
    from qpipe.ptq_config import ptq_jobs, ptq_states, ptq_summary
    from qpipe.status import STAGES, queued_jobs, study_status
    from qpipe.study import load_study, plan

    study = load_study(args.study)
    runs, results = plan(study), args.results or Path("results") / study.name
    status = study_status(runs, results, args.logs, queued_jobs())
    quantized = ptq_states(ptq_jobs(study.ptq, runs), results)
    counts = {stage: status.count(stage) for stage in STAGES}
    if args.json:
        rows = [vars(one) for one in status.runs]
        found = {"study": study.name, "seconds_left": status.seconds_left, "ptq": quantized, "runs": rows}
        print(json.dumps(found | dict(counts), indent=1))
    else:
        print(_table(study.name, status, {stage: count for stage, count in counts.items() if count}))
        if words := ptq_summary(quantized):
            print(words)
    return 0


def _table(name: str, status: Any, counts: dict[str, int]) -> str:
    width = max(len(one.id) for one in status.runs)
    lines = [f"{'run':<{width}}  {'stage':<8} {'steps':>15} {'tokens/s':>10} {'left':>8} {'loss':>7}  job"]
    for one in status.runs:
        steps = f"{one.step:,}/{one.steps:,}"
        speed = "" if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}"
        left = "" if one.stage in ("done", "diverged") else _duration(one.seconds_left)
        loss = "" if one.loss is None else f"{one.loss:.4f}"
        line = f"{one.id:<{width}}  {one.stage:<8} {steps:>15} {speed:>10} {left:>8} {loss:>7}  {one.job or ''}"
        lines.append(line.rstrip())
    lines += [f"failed  {one.id}: {one.error}" for one in status.runs if one.stage == "failed"]
    summary = ", ".join(f"{count} {stage}" for stage, count in counts.items())
    return "\n".join(
        [*lines, f"{name}: {summary} of {len(status.runs)} runs; time left {_duration(status.seconds_left)}"]
    )


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d}"
