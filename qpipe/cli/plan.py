"""List the runs of a study: id, N, D, representation, bits/weight, FLOPs, estimated device hours and memory, state.

N counts non-embedding parameters, D training tokens. Hours are FLOPs over a sustained rate (--tflops), which small
models do not reach: read them as a lower bound below 100M. GiB is what a training step needs on a GPU.

example:
  qpipe plan config/demo.yaml
  qpipe plan config/quest-c4.yaml --tflops 400 --json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `qpipe plan`."""
    parser.add_argument("study", metavar="STUDY.yaml", help="study file, or - for standard input")
    parser.add_argument("--results", type=Path, help="folder of the study's results (default: results/<study name>)")
    parser.add_argument("--tflops", type=float, default=300.0, help="sustained TFLOP/s per device (default: 300)")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write study.yaml, plan.json and every run.yaml here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """List the runs, or write them with --write."""
    from qpipe.ptq_config import ptq_jobs, ptq_states, ptq_summary
    from qpipe.study import load_study, plan, read_study

    stdin = args.study == "-"
    study = read_study(sys.stdin.read(), "standard input") if stdin else load_study(Path(args.study))
    runs = plan(study)
    if args.write:
        _write(args.write, study, runs)
        print(f"{len(runs)} runs written to {args.write}")
        return 0
    folder = args.results or Path("results") / study.name
    rows = [_row(one, folder / "runs" / one.id, args.tflops) for one in runs]
    _share_trunks(rows, runs, args.tflops)
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(_table(rows, args.tflops))
    if words := ptq_summary(ptq_states(ptq_jobs(study.ptq, runs), folder)):
        print(words)
    return 0


def _row(run: Any, folder: Path, tflops: float) -> dict[str, Any]:
    from qpipe.memory import step_memory
    from qpipe.progress import run_state

    payload, total = run.bits_per_weight()
    return {
        "id": run.id,
        "n": run.parameters.non_embedding,
        "d": run.total_tokens,
        "representation": run.representation_name,
        "seed": run.seed,
        "flops": run.flops,
        "bits_per_weight": total,
        "payload_bits": payload,
        "device_hours": run.flops / (tflops * 1e12) / 3600,
        "gpu_gib": step_memory(run).gib,
        "state": run_state(folder, run.id),
    }


def _share_trunks(rows: list[dict[str, Any]], runs: list[Any], tflops: float) -> None:
    """Count of a trunk that goes on from a shorter one only the steps that are missing."""
    from qpipe.runs import starts_from

    by_id = {run.id: run for run in runs}
    before = starts_from(by_id)
    for row in rows:
        if by_id[row["id"]].parent is None and row["id"] in before:
            row["flops"] -= by_id[before[row["id"]]].flops
            row["device_hours"] = row["flops"] / (tflops * 1e12) / 3600


def _table(rows: list[dict[str, Any]], tflops: float) -> str:
    width = max(len(row["id"]) for row in rows)
    lines = [f"{'run':<{width}}  {'N':>13} {'D':>15} {'bits/weight':>11} {'FLOPs':>9} {'hours':>8} {'GiB':>6}  state"]
    lines += [
        f"{row['id']:<{width}}  {row['n']:>13,} {row['d']:>15,} {row['bits_per_weight']:>11.3f} {row['flops']:>9.2e} "
        f"{row['device_hours']:>8.3g} {row['gpu_gib']:>6.1f}  {row['state']}"
        for row in rows
    ]
    states = {state: sum(row["state"] == state for row in rows) for state in sorted({row["state"] for row in rows})}
    summary = ", ".join(f"{count} {state}" for state, count in states.items())
    hours = sum(row["device_hours"] for row in rows)
    flops = sum(row["flops"] for row in rows)
    lines.append(f"{len(rows)} runs ({summary}); {flops:.2e} FLOPs, {hours:.3g} device hours at {tflops:g} TFLOP/s")
    return "\n".join(lines)


def _write(folder: Path, study: Any, runs: list[Any]) -> None:
    from qpipe.files import write_text
    from qpipe.yaml_files import dump_yaml

    for one in runs:
        one.write(folder / "runs" / one.id / "run.yaml")
    described = [{key: value for key, value in _row(r, folder, 1.0).items() if key not in _CHANGING} for r in runs]
    write_text(folder / "plan.json", json.dumps(described, indent=1) + "\n")
    write_text(folder / "study.yaml", dump_yaml(study.model_dump(mode="json")))


_CHANGING = ("state", "device_hours", "gpu_gib")
"""Not written: what changes with time, or with how well qpipe estimates."""
