"""Several processes train one run: the same losses as one process, up to the order of float sums."""

import json
import os
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
