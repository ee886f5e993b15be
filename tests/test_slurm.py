"""Decisions about jobs and what runs ask for; that they hold on a real Slurm is tested in tests/slurm."""

import os
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from training_cases import make_store, small_run

from qpipe.errors import QpipeError
from qpipe.resources import Site
from qpipe.slurm import Job, Watch, cancelling, job_name, jobs_of_folder, naming, refuse_orphans
from qpipe.study import load_study, plan

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def runs():
    return {run.size: run for run in plan(load_study(ROOT / "config/quest-c4.yaml"), ROOT)}


def test_job_names_say_the_run():
    assert job_name("train", {"run": "n30m-d10x-2-4-s0-1f3a9c2e"}) == "n30m-d10x-2-4-s0-1f3a9c2e"
    assert job_name("fit", {"law": "compression"}) == "fit-compression"
    assert job_name("tokenize", {}) == "tokenize"


def test_preempted_jobs_are_given_up_only_if_slurm_does_not_requeue_them():
    watch = Watch(None)
    assert watch.decide({"1": "PREEMPTED", "2": "PREEMPTED"}, ["1", "2"]) == {"1": "PREEMPTED", "2": "PREEMPTED"}
    assert watch.decide({"1": "PREEMPTED", "2": "PENDING"}, ["1", "2"]) == {"1": "FAILED", "2": "PENDING"}
    assert watch.decide({"2": "PREEMPTED"}, ["2"]) == {"2": "PREEMPTED"}  # a second preemption is a new doubt


def test_forgotten_jobs_are_left_to_their_files():
    watch = Watch(None)
    assert watch.decide({}, ["1"]) == {}
    assert watch.decide({"9": "RUNNING"}, ["1"]) == {"9": "RUNNING", "1": "UNKNOWN"}


def test_jobs_that_are_alive_are_refused_with_the_way_out():
    refuse_orphans([])
    with pytest.raises(QpipeError, match=r"2 Slurm jobs .*n1m, n3m.*scancel 7 8"):
        refuse_orphans([Job("7", "RUNNING", "n1m", "/"), Job("8", "PENDING", "n3m", "/")])


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """A stand-in for `squeue` that prints what stands in a file."""
    (tmp_path / "squeue").write_text(f"#!/bin/sh\ncat {tmp_path}/queue\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def show(*jobs: tuple[str, str, str, str, str]) -> None:
        (tmp_path / "queue").write_text("".join("\t".join(job) + "\n" for job in jobs))

    return show


def test_only_snakemakes_own_jobs_of_a_folder_count(squeue, tmp_path):
    squeue(
        ("1", "RUNNING", "n1m", str(tmp_path), "rule_train_wildcards_n1m"),
        ("2", "RUNNING", "bash", str(tmp_path), "(null)"),  # the shell in which Snakemake is started
        ("3", "RUNNING", "n3m", "/elsewhere", "rule_train_wildcards_n3m"),
        ("4", "COMPLETED", "n4m", str(tmp_path), "rule_train_wildcards_n4m"),
        ("5", "PENDING", "tokenize", str(tmp_path), "rule_tokenize"),
    )
    assert [job.id for job in jobs_of_folder(tmp_path)] == ["1", "5"]


def test_cancelling_reaches_jobs_that_the_plugin_has_lost_sight_of_and_submits_no_more(squeue, tmp_path):
    """On Ctrl-C during a status check the plugin's list is empty, and its submissions wait in a pool of threads."""
    squeue(
        ("1", "RUNNING", "n1m", str(tmp_path), "rule_train_wildcards_n1m"),
        ("2", "COMPLETING", "n2m", str(tmp_path), "rule_train_wildcards_n2m"),
    )
    submitted, cancelled = [], []
    with ThreadPoolExecutor(1) as pool:
        begun, go_on = threading.Event(), threading.Timer(0.5, lambda: submitted.append("in flight"))
        pool.submit(lambda: (begun.set(), go_on.start(), go_on.join()))
        pool.submit(submitted.append, "too late")
        begun.wait()
        cancel = cancelling(lambda _, jobs: cancelled.extend([*submitted, *jobs]), tmp_path)
        cancel(types.SimpleNamespace(_job_submission_executor=pool), [])
    assert submitted == ["in flight"]
    assert cancelled[0] == "in flight"  # what was being submitted is known to Slurm before it is asked
    assert [job.external_jobid for job in cancelled[1:]] == ["1"]


@pytest.mark.parametrize(
    ("error", "calls", "code"),
    [
        ("sbatch: error: Unable to contact slurm controller (connect failure)", 2, 0),
        ("sbatch: error: invalid partition specified: gpu", 1, 1),
    ],
)
def test_sbatch_is_called_again_for_errors_that_pass(tmp_path, error, calls, code):
    """`sbatch` is a stand-in that fails once; it is given the plugin's kind of arguments, quotes and all."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n'
        f'test $(wc -l < {tmp_path}/calls) = 1 && {{ echo "{error}" >&2; exit 1; }}\necho 4711\n'
    )
    sbatch.chmod(0o755)
    wildcards = {"run": "n1m-w4"}
    job = types.SimpleNamespace(name="train", wildcards_dict=wildcards, is_group=lambda: False)
    call = naming(lambda job, params: f"sbatch --job-name {params['run_uuid']}")(job, {"run_uuid": "x"})
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(call + " --wrap=\"echo 'a b'\"", shell=True, env=environment, capture_output=True, text=True)
    assert (tmp_path / "calls").read_text().splitlines() == ["--job-name n1m-w4 --wrap=echo 'a b'"] * calls
    assert (done.returncode, done.stdout) == (code, "" if code else "4711\n")
    assert error in done.stderr or not code


def test_larger_and_longer_runs_ask_for_more_and_retries_for_more_still(runs):
    site = Site(gpu=True, tflops=100, longest=100_000)
    small, large = runs["30M"], runs["430M"]
    assert site.memory_mb(large, 1) > site.memory_mb(small, 1) > 4000
    assert site.minutes(large, 1) > site.minutes(small, 1)
    assert site.memory_mb(small, 3) == pytest.approx(3 * site.memory_mb(small, 1), abs=2)
    # 6 N D FLOPs at 100 TFLOP/s, twice over: the estimate may not be shorter than the arithmetic.
    least = 2 * 6 * large.parameters.non_embedding * large.tokens / 100e12 / 60
    assert least < site.minutes(large, 1) < 2 * least + 60
    assert Site(gpu=True, tflops=1e-3).minutes(large, 2) == 1440


def test_compressed_runs_ask_for_more_time():
    """Steps of w4 and w4a4 were measured at up to 1.11 and 1.40 times the dense ones."""
    site = Site(tflops=1e-8, longest=10**9)
    dense, weights, both = (site.minutes(small_run(name), 1) for name in ("dense", "w4", "w4a4"))
    assert 1.11 < weights / dense < 1.3
    assert 1.4 < both / dense < 1.8


def test_profile_says_what_trains(runs):
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    site = Site.from_profile(profile["set-resources"]["train"])
    assert (site.gpu, site.longest) == (True, 1440)
    assert site.gres(next(iter(runs.values()))) == "gpu:1"
    assert not Site.from_profile({}).gpu
    with pytest.raises(QpipeError, match="tflops: expected a number above 0, found 'fast'"):
        Site.from_profile({"tflops": "fast"})


def test_large_sizes_get_several_devices_of_one_node(runs):
    site = Site.from_profile({"gpu_type": "'gpu:h100'", "devices": "'430M:4 800M:2x8'", "tflops": 100})
    small, large = runs["30M"], runs["430M"]
    assert (site.gres(small), site.gres(large)) == ("gpu:h100:1", "gpu:h100:4")
    assert site.environment(large, 32) == "OMP_NUM_THREADS=8 QPIPE_DEVICES=4 QPIPE_NODES=1"
    alone = Site.from_profile({"gpu_type": "gpu", "tflops": 100, "longest": 10**6})
    together = Site.from_profile({"gpu_type": "gpu", "tflops": 100, "longest": 10**6, "devices": "430M:4"})
    assert together.minutes(large, 1) < 0.3 * alone.minutes(large, 1)
    assert together.memory_mb(large, 1) == pytest.approx(4 * alone.memory_mb(large, 1), abs=4)
    with pytest.raises(QpipeError, match=r"430M:3: run .* has 512 sequences per step"):
        Site.from_profile({"devices": "430M:3"}).devices(large)
    sharded = Site.from_profile({"gpu_type": "gpu", "devices": "430M:4", "sharded": "'430M 800M'"})
    assert sharded.environment(large, 32) == "OMP_NUM_THREADS=8 QPIPE_DEVICES=4 QPIPE_NODES=1 QPIPE_SHARD=1"
    assert "SHARD" not in sharded.environment(small, 32)
    with pytest.raises(QpipeError, match="sharded: 430M: trains on one device"):
        Site.from_profile({"sharded": "430M"}).environment(large, 8)
    for wrong in ("800M=8", "800M:0", "800M:2x", "800M:0x2"):
        with pytest.raises(QpipeError, match=rf"expected size:devices or size:nodesxdevices.*found \['{wrong}'\]"):
            Site.from_profile({"devices": f"430M:4 {wrong}"})


def test_runs_on_several_nodes_are_started_by_srun_with_a_task_per_device(runs):
    site = Site.from_profile({"gpu_type": "gpu", "devices": "30M:2 50M:2x1 100M:2x8"})
    assert site.parallel(runs["430M"], 16) == {"launch": ""}
    assert Site.from_profile({"devices": "30M:2"}).parallel(runs["30M"], 16) == {"launch": ""}  # no Slurm, no srun
    several = site.parallel(runs["100M"], 32)
    assert several["launch"].split() == [
        *("srun", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=4", "--gres=gpu:8"),
        "--kill-on-bad-exit=1",
    ]
    assert (several["nodes"], several["tasks_per_node"], several["cpus_per_task"]) == (2, 8, 4)
    # The plugin wants more than one task per node and reads `tasks` as tasks per GPU, unless that is given.
    one_each = site.parallel(runs["50M"], 32)
    assert (one_each["tasks"], one_each["tasks_per_gpu"]) == (2, 0)
    assert "tasks_per_node" not in one_each


def test_profile_avoids_the_traps():
    profile = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text())
    assert profile["slurm-status-command"] == "squeue"
    assert profile["retries"] >= 2
    assert not any(name.startswith("slurm-array") or name.startswith("group") for name in profile)
    for rules in (ROOT / "workflow/rules").glob("*.smk"):
        assert "retries:" not in rules.read_text(), "a rule's retries run inside the allocation, with its old memory"


def test_trainer_fits_into_the_memory_it_asks_for(tmp_path):
    """Peak resident memory of a real trainer of the widest size meant for CPUs, plus the two Snakemakes around it."""
    shape = {"layers": 5, "width": 256, "heads": 4, "kv_heads": 4, "feed_forward": 704, "context": 128}
    run = small_run(steps=2, batch_sequences=16, **shape)
    run.write(tmp_path / "run.yaml")
    make_store(tmp_path / "tokens")
    command = [sys.executable, "-m", "qpipe", "train", tmp_path / "run.yaml", tmp_path / "tokens", tmp_path / "out"]
    measured = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    environment = {**os.environ, "WANDB_MODE": "disabled", "QPIPE_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", measured, *map(str, command)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.splitlines()[-1]) / 1024 + 2 * 150
    asked = Site().memory_mb(run, 1)
    assert 0.3 * asked < peak < asked
