"""Signals that ask a trainer to stop: a checkpoint, an orderly end, and the same result after resuming."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_cases import make_store, small_run

ROOT = Path(__file__).parents[1]
RESULTS = ("record.json", "curve.parquet", "model.safetensors")


@pytest.fixture
def start(tmp_path):
    run = small_run("w4", steps=800)
    run.write(tmp_path / "run.yaml")
    make_store(tmp_path / "tokens")

    def train(out: str, **environment: str) -> subprocess.Popen:
        paths = [str(tmp_path / name) for name in ("run.yaml", "tokens", out)]
        settings = {"WANDB_MODE": "disabled", "QPIPE_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "-m", "qpipe", "train", *paths]
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **settings}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    return train


def wait_for(path: Path) -> None:
    end = time.monotonic() + 90
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_stopped_run_resumes_at_the_very_step_and_ends_bit_identical(start, tmp_path):
    first = start("stopped")
    wait_for(tmp_path / "stopped/scratch/heartbeat.json")  # training has begun; no checkpoint is due for ten minutes
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 1
    last = said.splitlines()[-1]
    assert last.startswith("SIGTERM: stopped after step ")
    step = int(last.split("after step ")[1].split(";")[0])
    assert [path.name for path in (tmp_path / "stopped/scratch").glob("*.ckpt")] == [f"step-{step:08d}.ckpt"]
    second = start("stopped")
    _, said = second.communicate(timeout=120)
    assert f"resumes from step-{step:08d}.ckpt" in said
    assert start("undisturbed").wait(120) == 0
    for name in RESULTS:
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_in_a_slurm_job_the_job_is_requeued_once_the_checkpoint_is_written(start, tmp_path):
    """`scontrol` is a stand-in that notes how it was called and which checkpoints lay there."""
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin/scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" $(ls {tmp_path}/out/scratch | grep ckpt) >> {tmp_path}/called\n')
    scontrol.chmod(0o755)
    for number, expected in ((signal.SIGTERM, 0), (signal.SIGUSR1, 1)):
        one = start("out", SLURM_JOB_ID="4711", PATH=f"{tmp_path}/bin:{os.environ['PATH']}")
        wait_for(tmp_path / "out/scratch/heartbeat.json")
        one.send_signal(number)
        one.communicate(timeout=60)
        (tmp_path / "out/scratch/heartbeat.json").unlink()
        called = (tmp_path / "called").read_text().splitlines() if (tmp_path / "called").exists() else []
        assert len(called) == expected
    assert called[0].startswith("requeue 4711 step-0")
