"""Killing trainings: whatever happens, the record, the curve and the weights are those of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_cases import make_store, small_run

from qpipe.runs import Run

RESULTS = ("record.json", "curve.parquet", "model.safetensors")
STEPS = 250


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "QPIPE_WANDB_MODE": "disabled", "WANDB_MODE": "", "OMP_NUM_THREADS": "1", **changes}


def start(run: Path, tokens: Path, out: Path, **changes: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qpipe", "train", str(run), str(tokens), str(out)]
    return subprocess.Popen(command, env=environment(**changes), stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def newest_step(scratch: Path) -> int:
    return max((int(path.stem.removeprefix("step-")) for path in scratch.glob("step-*.ckpt")), default=0)


def kill_after_step(process: subprocess.Popen[str], scratch: Path, step: int) -> None:
    """Wait for a checkpoint at or after `step`, then kill -9."""
    deadline = time.monotonic() + 120
    while newest_step(scratch) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert process.stderr is not None
    process.stderr.close()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tokens"
    make_store(folder)
    return folder


def run_file(folder: Path, run: Run) -> Path:
    run.write(folder / "run.yaml")
    return folder / "run.yaml"


def bytes_of(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in RESULTS}


def test_killed_twice_ends_bit_identical(tmp_path: Path, tokens: Path) -> None:
    run = small_run("noise4", steps=STEPS)  # draws random numbers in every step
    file = run_file(tmp_path, run)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start(file, tokens, undisturbed))

    often = {"QPIPE_CHECKPOINT_SECONDS": "0.2", "QPIPE_SCRATCH": str(tmp_path / "scratch")}
    scratch = tmp_path / "scratch" / run.id
    kill_after_step(start(file, tokens, killed, **often), scratch, 30)
    first = newest_step(scratch)
    kill_after_step(start(file, tokens, killed, **often), scratch, first + 50)
    assert not any((killed / name).exists() for name in RESULTS)
    # The third attempt finds its newest checkpoint damaged and takes the one before.
    newest = scratch / f"step-{newest_step(scratch):08d}.ckpt"
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    newest.write_bytes(damaged)
    log = finish(start(file, tokens / "manifest.json", killed, **often))

    assert f"{newest} is not usable" in log
    assert "resumes from step-" in log
    assert bytes_of(killed) == bytes_of(undisturbed)
    runtime = json.loads((killed / "runtime.json").read_text())
    assert runtime["attempts"] == 3
    assert 0 < int(runtime["resumed_from"][5:13]) < STEPS
    assert not scratch.exists()
    assert sorted(path.name for path in killed.iterdir()) == sorted([*RESULTS, "run.yaml", "runtime.json"])


def test_orphan_of_an_older_attempt_stops_and_publishes_nothing(tmp_path: Path, tokens: Path) -> None:
    file, out = run_file(tmp_path, small_run(steps=3000)), tmp_path / "out"
    orphan = start(file, tokens, out, QPIPE_CHECKPOINT_SECONDS="0.1")
    deadline = time.monotonic() + 120
    while not newest_step(out / "scratch") and time.monotonic() < deadline:
        time.sleep(0.01)
    newer = out / "scratch" / "attempt-000002"  # what a second trainer does first
    newer.touch()
    _, errors = orphan.communicate(timeout=120)
    assert orphan.returncode == 2
    assert "newer attempt has taken over" in errors
    assert not (out / "record.json").exists()
    assert newest_step(out / "scratch")  # left for the newer attempt
