"""Runs trained back to back in one process: the same records, separate logs, and no harm from a death."""

import json
import os
import shutil
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
    make_store(tmp_path / "tokens")
    (tmp_path / "t").mkdir()
    # A copy: workers of other code are never used, and somebody may be editing this one.
    shutil.copytree(ROOT / "qpipe", tmp_path / "qpipe", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "config", tmp_path / "config")
    begun: list[subprocess.Popen] = []

    def train(run, out: str, warm: bool = True) -> subprocess.Popen:
        run.write(tmp_path / f"{out}.yaml")
        command = [sys.executable, "-m", "qpipe", "train", f"{out}.yaml", "tokens", out]
        settings = {
            "WANDB_MODE": "disabled",
            "QPIPE_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(tmp_path),
        }
        settings |= {"QPIPE_WARM": "1" if warm else "0", "TMPDIR": str(tmp_path / "t"), "QPIPE_CHECKPOINT_SECONDS": "1"}
        begun.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env={**os.environ, **settings},
                stderr=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return begun[-1]

    yield train
    for one in begun:
        one.kill()
        one.communicate()


def results(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in RESULTS]


def workers(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "t").glob("qpipe-warm-*/*.socket"))


def heartbeat(folder: Path) -> dict:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        try:
            return json.loads((folder / "scratch/heartbeat.json").read_text())
        except (OSError, ValueError):
            time.sleep(0.1)
    raise TimeoutError


def test_one_worker_trains_one_run_after_another_with_unchanged_results(start, tmp_path):
    kinds = [small_run("w4", seed=0), small_run("dense", steps=40, seed=1), small_run("w4", seed=0)]
    for number, run in enumerate(kinds):
        _, said = start(run, f"warm{number}").communicate(timeout=120)
        assert f"run {run.id} finished" in said  # its own log, nobody else's
        assert sum("finished in" in line for line in said.splitlines()) == 1
    assert len(workers(tmp_path)) == 1
    for number in (0, 1):
        assert start(kinds[number], f"plain{number}", warm=False).wait(120) == 0
        assert results(tmp_path / f"warm{number}") == results(tmp_path / f"plain{number}")
    assert results(tmp_path / "warm2") == results(tmp_path / "warm0")


def test_wrong_input_keeps_its_exit_code_and_message(start, tmp_path):
    wrong = small_run(vocab_size=100)
    client = start(wrong, "wrong")
    _, said = client.communicate(timeout=120)
    assert client.returncode == 2
    assert "embedding of 100 rows" in said


def test_a_client_that_goes_away_stops_its_run_and_a_dead_worker_fails_its_client(start, tmp_path):
    run = small_run(steps=40_000)
    first = start(run, "long")
    worker = heartbeat(tmp_path / "long")["pid"]
    first.kill()
    second = start(
        small_run(steps=5), "short"
    )  # the place is free, the worker stops the orphaned run and takes this one
    assert second.wait(120) == 0
    assert list((tmp_path / "long/scratch").glob("step-*.ckpt"))
    third = start(run, "long")
    deadline = time.monotonic() + 60
    while heartbeat(tmp_path / "long").get("attempt") != 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert heartbeat(tmp_path / "long")["pid"] == worker
    os.kill(worker, signal.SIGKILL)
    _, said = third.communicate(timeout=60)
    assert third.returncode == 1
    assert f"warm worker {worker} died" in said
    assert start(small_run(steps=5, seed=3), "after").wait(120) == 0
