"""Everything that befalls jobs on a cluster, on real jobs: the results equal the undisturbed ones to the last bit.

A fault strikes while a run is training; the run resumes from its checkpoint, and record, curve and weights are
compared with those of the same runs trained in peace on this machine.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import lab as slurm
import pytest
from clones import (
    assert_as_in_peace,
    attempts,
    finish,
    heartbeat,
    job_of,
    runtime,
    slow_down,
    wait_for_training,
)

pytestmark = [pytest.mark.slurm, pytest.mark.workflow]


def test_killed_cancelled_and_told_to_stop_while_the_controller_restarts(lab, study, peaceful):
    clone = study(3)
    process = clone.start("runs")
    killed, cancelled, told = wait_for_training(clone)
    os.kill(heartbeat(clone, killed)["pid"], signal.SIGKILL)
    slurm.run("scancel", job_of(cancelled))
    slurm.run("scancel", "--signal=USR1", job_of(told))
    time.sleep(1)
    lab.stop_controller()
    time.sleep(5)
    lab.start_controller()
    said = finish(process, clone)
    assert_as_in_peace(clone, peaceful)
    assert [attempts(clone, run) for run in (killed, cancelled, told)] == [2, 2, 2]
    # The first two were resubmitted by Snakemake, the third went back into the queue under its own number.
    assert said.count("has been submitted") == 5


@pytest.mark.slow
def test_memory_grows_on_retry(study, peaceful):
    clone = study(1)
    resources = clone.folder / "qpipe/resources.py"
    resources.write_text(resources.read_text().replace("GPU_PROCESS_MB = 4000", "GPU_PROCESS_MB = 450"))
    said = finish(clone.start("runs"), clone)
    assert "failed" in said
    log = next((clone.folder / "logs/slurm/rule_train").rglob("*.log"))
    assert any("exceeded" in path.read_text() for path in log.parent.glob("*.log"))
    assert_as_in_peace(clone, peaceful)


@pytest.mark.parametrize("partition", ["cancel", pytest.param("requeue", marks=pytest.mark.slow)])
def test_preempted(partition, study, peaceful):
    clone = study(1, slurm_partition=partition)
    process = clone.start("runs")
    run = wait_for_training(clone)[0]
    node = slurm.squeue("--name", run, form="%N")[0]
    slurm.run("sbatch", "--partition=main", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    finish(process, clone)
    assert_as_in_peace(clone, peaceful)
    assert attempts(clone, run) == 2


@pytest.mark.slow
def test_lost_node_leaves_an_orphan_that_publishes_nothing(lab, study, peaceful):
    clone = study(1)
    process = clone.start("runs")
    run = wait_for_training(clone)[0]
    orphan, node = heartbeat(clone, run)["pid"], slurm.squeue("--name", run, form="%N")[0]
    os.kill(orphan, signal.SIGSTOP)  # the node hangs; its processes wake up after the newer attempt has begun
    lab.kill_node(node)
    try:
        slurm.wait_until(lambda: heartbeat(clone, run).get("attempt") == 2, 120)
        os.kill(orphan, signal.SIGCONT)
        finish(process, clone)
        slurm.wait_until(lambda: slurm.gone(orphan), 60)
    finally:
        lab.start_node(node)
        lab.wait_idle()
    assert_as_in_peace(clone, peaceful)
    assert attempts(clone, run) == 2


@pytest.mark.slow
def test_interrupted_snakemake_cancels_its_jobs_and_the_next_one_resumes(study, peaceful):
    clone = study(1)
    clone.delay("squeue", 5)  # so that the signal comes while Snakemake asks how its jobs are getting on
    process = clone.start("runs")
    run = wait_for_training(clone)[0]
    process.send_signal(signal.SIGINT)
    slurm.wait_until(lambda: not slurm.squeue("--states", "running,pending"), 60)
    process.wait(60)
    assert heartbeat(clone, run)["step"] < 768  # the job did not end by itself
    finish(clone.start("runs"), clone)
    assert_as_in_peace(clone, peaceful)
    assert attempts(clone, run) == 2


@pytest.mark.slow
def test_interrupted_while_it_submits_snakemake_leaves_no_job_behind(study):
    clone = study(6)
    clone.delay("sbatch", 4)  # two at a time: the third pair would come after the signal
    process = clone.start("runs")
    slurm.wait_until(lambda: "has been submitted" in clone.said(), 120)
    process.send_signal(signal.SIGINT)
    process.wait(120)
    time.sleep(10)
    assert not slurm.squeue("--states", "running,pending")
    assert clone.said().count("has been submitted") < 6


@pytest.mark.slow
def test_killed_snakemake_leaves_jobs_that_the_next_one_refuses_to_double(study, peaceful):
    clone = study(1)
    process = clone.start("runs")
    trainer = heartbeat(clone, wait_for_training(clone)[0])["pid"]
    os.kill(trainer, signal.SIGSTOP)  # it must outlive all that follows, however slow this machine is
    second = clone.snakemake("runs", check=False)  # two Snakemakes in one folder
    assert "lock" in second.lower()
    process.kill()
    process.wait()
    job = job_of(clone.runs()[0])
    clone.snakemake("runs", "--unlock")
    refused = clone.snakemake("runs", check=False)
    assert f"scancel {job}" in refused
    assert "still alive in this folder" in refused
    assert len(slurm.squeue("--states", "running,pending")) == 1
    os.kill(trainer, signal.SIGCONT)
    slurm.wait_until(lambda: not slurm.squeue("--states", "running,completing"), 120)
    before = {path: path.stat().st_mtime_ns for path in clone.results.glob("runs/*/record.json")}
    assert before
    clone.snakemake("runs")
    assert {path: path.stat().st_mtime_ns for path in before} == before  # the orphaned job's result is used
    assert_as_in_peace(clone, peaceful)


@pytest.mark.slow
def test_snakemake_that_is_a_job_itself_is_not_taken_for_one_of_its_jobs(study, peaceful):
    clone = study(1)
    command = ["sbatch", "--parsable", "--wait", "--mem=2000", "--time=20", "--wrap", shlex.join(clone.command("runs"))]
    done = subprocess.run(command, cwd=clone.folder, env=clone.environment, capture_output=True, text=True)
    assert done.returncode == 0, (clone.folder / f"slurm-{done.stdout.strip()}.out").read_text()[-3000:] + clone.logs()
    assert_as_in_peace(clone, peaceful)


@pytest.mark.slow
def test_results_that_a_shared_disk_shows_late_are_waited_for(study, peaceful):
    clone = study(1)
    rules = clone.folder / "workflow/rules/runs.smk"
    late = "mv {output.record} {output.record}.late; setsid sh -c 'sleep 5; mv {output.record}.late {output.record}' &"
    before = rules.read_text()
    rules.write_text(before.replace('>> {log} 2>&1"', f'>> {{log}} 2>&1 && ({late})"'))
    assert rules.read_text() != before
    # The job itself sees its own files; only the machine that asks for them sees them late.
    clone.snakemake("runs")
    assert_as_in_peace(clone, peaceful)


def test_failing_run_does_not_block_others_and_is_named(study):
    clone = study(2, retries=0)
    broken, whole = clone.runs()
    (clone.results / "runs" / broken).mkdir(parents=True)
    (clone.results / "runs" / broken / "scratch").write_text("a file where a folder should be")
    said = clone.snakemake("runs", check=False)
    assert broken in said
    assert [(clone.results / "runs" / run / "record.json").exists() for run in (broken, whole)] == [False, True]
    environment = {**clone.environment, "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "qpipe", "status", "study.yaml", "--json"]
    status = json.loads(subprocess.run(command, cwd=clone.folder, env=environment, capture_output=True).stdout)
    assert (status["failed"], status["done"]) == (1, 1)
    assert next(run for run in status["runs"] if run["id"] == broken)["error"].startswith("qpipe train: scratch folder")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_time_limit_is_announced_and_a_slow_checkpoint_still_gets_written(study, peaceful):
    """Three-minute jobs, told 90 s before their end (Slurm is up to a minute early); a checkpoint takes 12 s."""
    clone = study(1, longest=3, slurm_extra="--signal=USR1@90 --open-mode=append")
    code = clone.folder / "qpipe/train/checkpoint.py"
    slow = "            torch.save(checkpoint, temporary)\n"
    assert slow in code.read_text()
    code.write_text(code.read_text().replace(slow, slow + "            time.sleep(12)\n"))
    slow_down(clone, 0.12)
    clone.extra["QPIPE_CHECKPOINT_SECONDS"] = "600"
    said = finish(clone.start("runs"), clone, 800)
    assert_as_in_peace(clone, peaceful)
    job = slurm.run("scontrol", "show", "job", re.search(r"SLURM jobid (\d+)", said)[1])
    assert int(re.search(r"Restarts=(\d+)", job)[1]) >= 1  # requeued, not submitted again
    assert attempts(clone, clone.runs()[0]) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "sharded"), [("2", False), ("2x1", False), ("2x1", True)])
def test_two_devices_train_one_run_and_stop_together(devices, sharded, study, peaceful):
    """Two (simulated) GPUs of one node or of two, told to stop once: a process per device, the loss of one process."""
    clone = study(1)
    profile = clone.folder / "profiles/slurm/config.yaml"
    commented = "# devices: \"'430M:4 800M:2x8'\""
    assert commented in profile.read_text()
    settings = [f"devices: \"'10k:{devices}'\"", *(["sharded: \"'10k'\""] if sharded else [])]
    profile.write_text(profile.read_text().replace(commented, "\n    ".join(settings)))
    slow_down(clone, 0.02)
    process = clone.start("runs")
    run = wait_for_training(clone)[0]
    job = job_of(run)
    shown = slurm.run("scontrol", "show", "job", job)
    assert ("NumNodes=2" in shown, "gpu:2" in shown) == ((True, False) if devices == "2x1" else (False, True))
    slurm.run("scancel", "--signal=USR1", job)
    finish(process, clone)
    assert attempts(clone, run) == 2
    assert runtime(clone, run)["devices"] == 2
    said = (clone.folder / f"logs/train/smoke/{run}.log").read_text()
    assert ("this process holds" in said) == sharded
    alone, together = (
        json.loads((one.results / "runs" / run / "record.json").read_text())["loss"] for one in (peaceful, clone)
    )
    assert together == pytest.approx(alone, rel=2e-3)  # 768 steps of float32 sums in another order
