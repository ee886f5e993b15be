"""Many small runs in one Slurm job: Snakemake inside the job shares out its GPUs, warm workers train the runs."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import lab as slurm
import pytest
from clones import Clone, assert_as_in_peace, attempts, heartbeat, runtime, slow_down

pytestmark = [pytest.mark.slurm, pytest.mark.workflow, pytest.mark.slow]


@pytest.fixture
def packed(study):
    """Three runs in one job with two (simulated) GPUs."""
    clone = study(3)
    clone.edit_profile({"train": 1}, part="set-threads", profile="gpu-box")
    slow_down(clone, 0.01)
    clone.extra["QPIPE_CHECKPOINT_SECONDS"] = "600"  # no checkpoints but those that a signal asks for
    path = f"{Path(sys.executable).parent}:{clone.environment['PATH']}"
    script = ["profiles/gpu-box/slurm-job.sh", "study.yaml", "runs"]
    done = subprocess.run(
        ["sbatch", "--parsable", "--partition=main", "--account=lab", "--gres=gpu:2", "--time=30", *script],
        cwd=clone.folder,
        env={**clone.environment, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return clone, done.stdout.strip()


def training(clone: Clone) -> list[str]:
    return [run for run in clone.runs() if heartbeat(clone, run).get("step")]


def wait_for_two(clone: Clone) -> list[str]:
    slurm.wait_until(lambda: len(training(clone)) == 2, 240)
    return training(clone)


def wait_for_end(clone: Clone, job: str) -> None:
    slurm.wait_until(lambda: not slurm.squeue("--states", "running,completing,pending"), 400)
    said = (clone.folder / f"slurm-{job}.out").read_text()
    assert "JobState=COMPLETED" in slurm.run("scontrol", "show", "job", job), said[-3000:] + clone.logs()


def assert_no_gpu_was_shared(clone: Clone) -> None:
    """Each GPU trained one run at a time: the last attempts of any two runs on it do not overlap."""
    spans = []
    for run in clone.runs():
        end = (clone.results / "runs" / run / "runtime.json").stat().st_mtime
        spans.append((runtime(clone, run)["visible_devices"], end - runtime(clone, run)["wall_seconds"], end))
    assert {gpu for gpu, _, _ in spans} == {"0", "1"}
    for one, other in itertools.combinations(spans, 2):
        assert one[0] != other[0] or one[2] <= other[1] or other[2] <= one[1]


def test_runs_share_a_job_and_a_killed_one_is_retried_alone(packed, peaceful):
    clone, job = packed
    killed, other = wait_for_two(clone)
    os.kill(heartbeat(clone, killed)["pid"], signal.SIGKILL)
    wait_for_end(clone, job)
    assert_as_in_peace(clone, peaceful)
    third = next(run for run in clone.runs() if run not in (killed, other))
    assert [attempts(clone, run) for run in (killed, other, third)] == [2, 1, 1]
    assert_no_gpu_was_shared(clone)
    for run in clone.runs():
        assert f"run {run} finished" in (clone.folder / f"logs/train/smoke/{run}.log").read_text()


def test_job_goes_back_into_the_queue_before_its_time_limit(packed, peaceful):
    clone, job = packed
    first, second = wait_for_two(clone)
    steps = {run: heartbeat(clone, run)["step"] for run in (first, second)}
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.wait_until(lambda: "Restarts=1" in slurm.run("scontrol", "show", "job", job), 60)
    wait_for_end(clone, job)
    assert_as_in_peace(clone, peaceful)
    assert [attempts(clone, run) for run in (first, second)] == [2, 2]
    for run, step in steps.items():
        resumed = re.search(r"step-(\d+)", json.dumps(runtime(clone, run)["resumed_from"]))
        assert int(resumed[1]) >= step
