"""What a workflow needs to live well with Slurm: repairs of the executor plugin, and care for jobs left behind.

The executor plugin (snakemake-executor-plugin-slurm 2.8) submits one Slurm job per run and asks `squeue` how it is
getting on. What it lacks, `start` adds before the first job is submitted:

names
    The plugin gives all jobs of a workflow one random name. Here a job is called after its run, so that `squeue` can
    be read; jobs are then found by their ids instead of by that name.
ends
    A job in state PREEMPTED (preemption that cancels) or NODE_FAIL is waited for, for ever, as if Slurm would start it
    again; where Slurm does, the state is PENDING. Here a job seen twice in a row in such a state has failed, and the
    profile's `retries` start it again, from its checkpoint.
submission
    When the controller restarts, `sbatch` fails for some seconds, and all retries of a run are spent within one. Here
    `sbatch` is called again, within a minute, for the errors that pass.
pace
    The plugin asks less and less often while nothing ends, down to every three minutes. Here it asks at the profile's
    pace, `slurm-init-seconds-before-status-checks`: one `squeue` for all jobs at once is little to ask.
memory
    Slurm forgets a finished job after MinJobAge. A job that is gone when it is next asked for (the controller was
    away for long) would be waited for, for ever; here its output files decide.
cancelling
    On Ctrl-C the plugin cancels the jobs it has on its list. While it asks for their states the list is empty, and jobs
    that wait to be submitted are submitted afterwards. Here nothing more is submitted, and Slurm itself is asked which
    jobs there are to cancel.
orphans
    A Snakemake that was killed leaves its jobs running, and the next one would submit them a second time. Here it
    refuses to start while jobs of this folder are alive, and says which.

`shield` makes Snakemake deaf to SIGUSR1, by which Slurm announces the time limit to the trainer (`--signal` in the
profile); the processes between Slurm and the trainer must survive it.

No imports of Snakemake at the top: `qpipe` can be used without it.
"""

import importlib
import os
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qpipe.errors import QpipeError

_ENDED_UNLESS_REQUEUED = {"PREEMPTED", "NODE_FAIL", "REVOKED", "SPECIAL_EXIT", "REQUEUE_HOLD"}
_GONE = "UNKNOWN"  # the plugin's word for: let the output files decide
_ALIVE = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "SUSPENDED",
    "STOPPED",
    "RESIZING",
    "SIGNALING",
    "REQUEUED",
    "REQUEUE_FED",
}

_SUBMIT = """bash -c '
for pause in 5 15 40 0; do
  problem=$({ sbatch "$@" >&3; } 2>&1) && exit
  case $problem in
    *controller*|*"imed out"*|*temporarily*|*refused*|*standby*) sleep $pause;;
    *"not available"*) test $pause = 5 || break; sleep $pause;;
    *) break;;
  esac
done 3>&1
echo "$problem" >&2; exit 1' """
"""Calls sbatch with the arguments that follow, again after errors that pass (nodes register after a restart)."""


def shield() -> None:
    """Ignore SIGUSR1 in this process and in what it starts; a trainer sets its own handler."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def start(workflow: Any) -> None:
    """Make Snakemake ready to submit to Slurm; does nothing for other executors.

    Parameters
    ----------
    workflow
        Snakemake's workflow object, once it holds the lock of its folder (`onstart`).

    Raises
    ------
    QpipeError
        Jobs of an earlier Snakemake are still alive in this folder.
    """
    if not workflow.is_main_process or "slurm" not in str(workflow.executor_plugin.executor.__module__):
        return
    folder = Path(workflow.workdir_init)
    refuse_orphans(wait_for_ends(folder))
    repair(importlib.import_module("snakemake_executor_plugin_slurm"), folder)


@dataclass(frozen=True)
class Job:
    """A job as `squeue` shows it."""

    id: str
    state: str
    """Slurm's long state name, e.g. RUNNING"""
    name: str
    folder: str
    """working folder"""
    comment: str = ""
    """the plugin's jobs say their rule; a shell that was started in the same folder does not"""


def wait_for_ends(folder: Path) -> list[Job]:
    """Return Snakemake's jobs that were submitted from a folder and have not ended, waiting for those about to end."""
    while True:
        jobs = jobs_of_folder(folder)
        if not any(job.state == "COMPLETING" for job in jobs):
            return jobs
        time.sleep(1)


def jobs_of_folder(folder: Path) -> list[Job]:
    """Return this user's jobs that Snakemake submitted from a folder and that are alive or about to end."""
    return [
        job
        for job in list_jobs()
        if Path(job.folder) in (folder, folder.resolve())
        and job.comment.startswith("rule_")
        and job.state in {*_ALIVE, "COMPLETING"}
    ]


def list_jobs() -> list[Job]:
    """Return this user's jobs (errors: no squeue, no answer)."""
    command = ["squeue", "--noheader", "--user", str(os.getuid()), "--format", "%i\t%T\t%j\t%Z\t%k"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QpipeError(f"squeue does not answer ({error}); is this a login node of a Slurm cluster?") from error
    if done.returncode:
        raise QpipeError(f"squeue does not answer: {done.stderr.strip()}; try again when Slurm's controller is back")
    return [Job(*line.split("\t", 4)) for line in done.stdout.splitlines() if line]


def refuse_orphans(jobs: list[Job]) -> None:
    """Raise if jobs are alive that another Snakemake has submitted."""
    if jobs:
        ids, names = " ".join(job.id for job in jobs), ", ".join(job.name for job in jobs[:5])
        raise QpipeError(
            f"{len(jobs)} Slurm jobs of an earlier Snakemake are still alive in this folder ({names}"
            f"{', ...' if len(jobs) > 5 else ''}); wait until they have ended, their results will be used, "
            f"or cancel them and resume from their checkpoints: scancel {ids}"
        )


def repair(plugin: Any, folder: Path) -> None:
    """Give the plugin's module better names for jobs, a better idea of when a job has ended, and a thorough end.

    Parameters
    ----------
    plugin
        The module `snakemake_executor_plugin_slurm`. Its functions of these names are replaced by ones that call them.
    folder
        Where its jobs are submitted from.
    """
    watch = Watch(plugin.query_job_status)
    plugin.get_submit_command = naming(plugin.get_submit_command)
    plugin.query_job_status_squeue = by_user(plugin.query_job_status_squeue)
    plugin.query_job_status_sacct = by_user(plugin.query_job_status_sacct)
    plugin.query_job_status = watch.query
    plugin.Executor.cancel_jobs = cancelling(plugin.Executor.cancel_jobs, folder)
    plugin.Executor.check_active_jobs = watch.watching(plugin.Executor.check_active_jobs)


def naming(submit_command: Callable[..., str]) -> Callable[..., str]:
    """Wrap the plugin's builder of sbatch calls: named after the run, or rule and wildcards, and called patiently."""

    def named(job: Any, params: dict[str, Any], *args: Any, **kwargs: Any) -> str:
        wildcards = {} if job.is_group() else dict(job.wildcards_dict)
        return _SUBMIT + submit_command(job, {**params, "run_uuid": job_name(job.name, wildcards)}, *args, **kwargs)

    return named


def cancelling(cancel_jobs: Callable[[Any, list[Any]], None], folder: Path) -> Callable[[Any, list[Any]], None]:
    """Wrap the plugin's cancelling: it gets the jobs of the folder that Slurm knows, and no more are submitted."""

    def cancelled(executor: Any, active_jobs: list[Any]) -> None:
        executor._job_submission_executor.shutdown(cancel_futures=True)
        try:
            alive = [job.id for job in jobs_of_folder(folder) if job.state in _ALIVE]
        except QpipeError:  # no answer: the plugin's list is better than nothing
            alive = [job.external_jobid for job in active_jobs]
        cancel_jobs(executor, [SimpleNamespace(external_jobid=job) for job in alive])

    return cancelled


def by_user(status_command: Callable[[str], str]) -> Callable[[str], str]:
    """Wrap a builder of status commands so that it asks for all jobs of the user: their names differ now."""
    return lambda run_uuid: status_command(run_uuid).replace(f"--name {run_uuid}", f"--user {os.getuid()}")


def job_name(rule: str, wildcards: dict[str, str]) -> str:
    """Return the name of a job: the run id for training, else rule and wildcards."""
    words = [wildcards["run"]] if rule == "train" and "run" in wildcards else [rule, *wildcards.values()]
    return re.sub(r"[^\w.+-]", "_", "-".join(words))


class Watch:
    """Decides about jobs that Slurm no longer speaks of clearly.

    Parameters
    ----------
    query
        The plugin's function that runs a status command and returns (state by job id, seconds).
    """

    def __init__(self, query: Callable[..., Any]) -> None:
        self._query = query
        self._awaited: set[str] = set()
        self._doubtful: set[str] = set()

    def watching(self, check: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        """Wrap the plugin's check of active jobs so that the awaited ids are known to `query`."""

        async def checked(executor: Any, active_jobs: list[Any]) -> AsyncIterator[Any]:
            self._awaited = {job.external_jobid for job in active_jobs}
            async for job in check(executor, active_jobs):
                yield job
            pace = executor.workflow.executor_settings.init_seconds_before_status_checks
            executor.next_seconds_between_status_checks = pace

        return checked

    async def query(self, command: str, logger: Any) -> tuple[dict[str, str] | None, float | None]:
        """Ask Slurm and return states by job id, with those that will not change any more made clear."""
        states, seconds = await self._query(command, logger)
        if states is not None:
            # Slurm's controller knows all jobs at once; the accounting database may hear of them minutes late.
            states = self.decide(states, self._awaited if command.startswith("squeue") else self._awaited & set(states))
        return states, seconds

    def decide(self, states: dict[str, str], awaited: Iterable[str]) -> dict[str, str]:
        """Return states in which a job that was doubtful at the last look, and still is, has ended.

        Parameters
        ----------
        states
            Slurm's states by job id.
        awaited
            Ids of the jobs that are waited for.
        """
        doubtful = {job for job in awaited if states.get(job, _GONE) in {*_ENDED_UNLESS_REQUEUED, _GONE}}
        ended = doubtful & self._doubtful
        self._doubtful = doubtful
        return {**states, **{job: "FAILED" if job in states else _GONE for job in ended}}
