"""Several processes train one run: the same losses as one process, up to the order of float sums."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from training_cases import make_store, small_run

ROOT = Path(__file__).parents[1]


def train(folder: Path, devices: int, steps: int = 30, representation: str = "w4", **environment: str):
    run = small_run(representation, steps=steps)
    run.write(folder / "run.yaml")
    if not (folder / "tokens").exists():
        make_store(folder / "tokens")
    out = folder / f"out{devices}"
    command = [sys.executable, "-m", "qpipe", "train", *map(str, (folder / "run.yaml", folder / "tokens", out))]
    settings = {"QPIPE_DEVICES": str(devices), "QPIPE_ACCELERATOR": "cpu", "WANDB_MODE": "disabled", **environment}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **settings}, capture_output=True, text=True
    )
    return out, done


@pytest.mark.parametrize(
    ("representation", "counts", "tolerance"),
    [
        # float32 rounding, grown over 30 steps
        ("dense", [2, 4], 2e-4),
        # a rounding that falls on the other side moves a weight by a whole level
        pytest.param("w4a4", [2], 2e-3, marks=pytest.mark.slow),
    ],
)
def test_losses_do_not_depend_on_the_number_of_processes(tmp_path, representation, counts, tolerance):
    alone, loss = finished(tmp_path, 1, representation)
    for devices in counts:
        curve, found = finished(tmp_path, devices, representation)
        assert found == pytest.approx(loss, rel=tolerance)
        assert (curve["tokens"] == alone["tokens"]).all()
        # Before the first update only sums differ; a process that read another's slice would change the second digit.
        np.testing.assert_allclose(curve["train_loss"][0], alone["train_loss"][0], rtol=1e-6)
        np.testing.assert_allclose(curve["gradient_norm"][0], alone["gradient_norm"][0], rtol=1e-4)
        np.testing.assert_allclose(curve["train_loss"], alone["train_loss"], rtol=10 * tolerance)


def finished(folder: Path, devices: int, representation: str) -> tuple[pd.DataFrame, float]:
    out, done = train(folder, devices, representation=representation)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "runtime.json").read_text())["devices"] == devices
    return pd.read_parquet(out / "curve.parquet"), json.loads((out / "record.json").read_text())["loss"]


def test_batches_that_cannot_be_shared_are_refused(tmp_path):
    _, done = train(tmp_path, 3)
    assert done.returncode == 2
    assert "8 sequences per step, not a multiple of 3" in done.stderr
    _, done = train(tmp_path, 1, QPIPE_DEVICES="all")
    assert done.returncode == 2
    assert "QPIPE_DEVICES=all" in done.stderr


def test_processes_that_srun_starts_on_two_nodes_train_one_run(tmp_path):
    """Two processes with the variables that srun gives to the tasks of two nodes; that srun does is tested on Slurm."""
    alone, loss = finished(tmp_path, 1, "dense")
    out = tmp_path / "together"
    command = [sys.executable, "-m", "qpipe", "train", *map(str, (tmp_path / "run.yaml", tmp_path / "tokens", out))]
    shared = {"QPIPE_NODES": "2", "QPIPE_DEVICES": "1", "QPIPE_ACCELERATOR": "cpu", "WANDB_MODE": "disabled"}
    shared |= {"SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    tasks = []
    for rank in ("1", "0"):  # the main process comes last: the other waits for it
        environment = {**os.environ, **shared, "SLURM_PROCID": rank, "SLURM_NODEID": rank}
        tasks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True))
    for task in tasks:
        assert task.wait(120) == 0, task.communicate()[1]
        task.communicate()
    curve = pd.read_parquet(out / "curve.parquet")
    np.testing.assert_allclose(curve["gradient_norm"][0], alone["gradient_norm"][0], rtol=1e-4)
    assert json.loads((out / "record.json").read_text())["loss"] == pytest.approx(loss, rel=2e-4)
    assert json.loads((out / "runtime.json").read_text())["devices"] == 2


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_another_number_of_processes_than_asked_for_is_refused(tmp_path):
    _, done = train(tmp_path, 2, QPIPE_NODES="2", SLURM_NTASKS="2")
    assert done.returncode == 2
    assert "ask for 4 processes, srun has started 2; use srun --nodes=2 --ntasks-per-node=2" in done.stderr
