"""How a study is getting on, read from what its runs leave on disk and, where there is one, from Slurm's queue.

Nothing has to run for this and nothing is asked of the trainers: a finished run has a record, a running one rewrites
its heartbeat every few seconds, a failed one has left its last words in a log.
"""

import json
import shutil
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qpipe.errors import QpipeError
from qpipe.progress import read_heartbeat, run_state, scratch_folder
from qpipe.record import read_runtime
from qpipe.runs import Run
from qpipe.slurm import list_jobs

Stage = Literal["done", "diverged", "running", "queued", "failed", "waiting"]
STAGES: tuple[Stage, ...] = ("done", "diverged", "running", "queued", "failed", "waiting")

_SLURM_WORDS = ("slurmstepd", "exceeded memory", "DUE TO TIME LIMIT", "CANCELLED", "Killed", "Out Of Memory")
_ORDERLY = ("SIGUSR1:", "SIGTERM:")


@dataclass(frozen=True)
class RunStatus:
    """Where one run stands."""

    id: str
    stage: Stage
    """done, diverged, running, queued (in Slurm's queue), failed (ended without a result) or waiting (not begun)"""
    step: int
    """optimizer steps done"""
    steps: int
    """optimizer steps in all"""
    tokens_per_second: float | None
    """of the running attempt, else of the one that finished"""
    seconds_left: float | None
    """estimate for this run alone on its device, None where nothing is known yet"""
    loss: float | None
    """final loss, or the training loss so far (nats/token)"""
    job: str | None
    """Slurm job id"""
    error: str | None
    """last words of a run that failed"""


@dataclass(frozen=True)
class StudyStatus:
    """Where a study stands."""

    runs: list[RunStatus]
    seconds_left: float | None
    """until the last run is trained, if as many run at once as run now (at least one)"""

    def count(self, stage: Stage) -> int:
        """Return the number of runs in a stage."""
        return sum(run.stage == stage for run in self.runs)


def study_status(runs: Iterable[Run], results: Path, logs: Path, jobs: Mapping[str, str] | None = None) -> StudyStatus:
    """Return the status of a study's runs.

    Parameters
    ----------
    runs
        The planned runs.
    results
        The study's folder of results; runs lie in `runs/<id>` below it.
    logs
        The folder of logs; `train/<study>/<id>.log` and, under Slurm, `slurm/rule_train/<id>/<job>.log`.
    jobs
        Slurm job by run id (`queued_jobs`).
    """
    planned = list(runs)
    found = [_status(run, results, logs, (jobs or {}).get(run.id)) for run in planned]
    pace = _seconds_per_flop(planned, results, found)
    timed = [_timed(run, one, pace) for run, one in zip(planned, found, strict=True)]
    left = [one.seconds_left for one in timed if one.stage not in ("done", "diverged")]
    known = [seconds for seconds in left if seconds is not None]
    at_once = max(1, sum(one.stage == "running" for one in timed))
    total = None if len(known) < len(left) else max([sum(known) / at_once, *known], default=0.0)
    return StudyStatus(timed, total)


def queued_jobs() -> dict[str, str]:
    """Return this user's Slurm jobs by name (training jobs are named after their run); none where there is no Slurm."""
    if shutil.which("squeue") is None:
        return {}
    try:
        return {job.name: job.id for job in list_jobs() if job.state != "COMPLETING"}
    except QpipeError:  # a client without a controller: what lies on disk is still true
        return {}


def _status(run: Run, results: Path, logs: Path, job: str | None) -> RunStatus:
    folder = results / "runs" / run.id
    state = run_state(folder, run.id)
    if state in ("done", "diverged"):
        return _finished(run, folder, state)
    beat = read_heartbeat(scratch_folder(folder, run.id)) or {}
    error = None if state == "running" or job else last_words(run.id, results.name, logs)
    stage: Stage = "running" if state == "running" else "queued" if job else "failed" if error else "waiting"
    step = int(beat.get("step", 0))
    speed = beat.get("tokens_per_second") if stage == "running" else None
    return RunStatus(run.id, stage, step, run.steps, speed, None, beat.get("loss"), job, error)


def _finished(run: Run, folder: Path, state: Any) -> RunStatus:
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    speed = _runtime(folder).get("tokens_per_second")
    return RunStatus(run.id, state, int(record["steps"]), run.steps, speed, 0.0, record["loss"], None, None)


def _runtime(folder: Path) -> dict[str, Any]:
    try:
        return read_runtime(folder / "runtime.json")
    except (OSError, ValueError):
        return {}


def _seconds_per_flop(runs: list[Run], results: Path, found: list[RunStatus]) -> float | None:
    """Return the median wall time per FLOP of finished runs and, while there are none, of running ones."""
    done, running = [], []
    for run, one in zip(runs, found, strict=True):
        if not run.steps:  # rounded, not trained: its seconds say nothing about others
            continue
        if one.stage == "done" and (seconds := _runtime(results / "runs" / run.id).get("wall_seconds")):
            done.append(seconds / run.flops)
        elif one.stage == "running" and one.tokens_per_second:
            running.append(run.tokens / one.tokens_per_second / run.flops)
    return statistics.median(done or running) if done or running else None


def _timed(run: Run, one: RunStatus, pace: float | None) -> RunStatus:
    if one.stage in ("done", "diverged"):
        return one
    share = 1 - one.step / max(run.steps, 1)
    if one.tokens_per_second:
        left: float | None = share * run.tokens / one.tokens_per_second
    else:
        left = None if pace is None else share * run.flops * pace
    return RunStatus(**{**vars(one), "seconds_left": left})


def last_words(run_id: str, study: str, logs: Path) -> str | None:
    """Return why a run's last attempt ended, or None if it never began or stopped in order.

    Slurm's own reasons (memory, time limit, cancelled) come before what the trainer said, which had no time to speak.
    """
    own = logs / "train" / study / f"{run_id}.log"
    slurm = sorted((logs / "slurm" / "rule_train" / run_id).glob("*.log"), key=lambda path: path.stat().st_mtime)
    lines = _lines(own)
    reasons = [line for line in _lines(slurm[-1]) if any(word in line for word in _SLURM_WORDS)] if slurm else []
    if reasons:
        return reasons[0]
    if not lines or lines[-1].startswith(_ORDERLY):
        return None
    messages = [number for number, line in enumerate(lines) if line.startswith("qpipe train:")]
    return " ".join(lines[messages[-1] :]) if messages else lines[-1]


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]
