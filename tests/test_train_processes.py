"""Several processes train one run: the same losses as one process, up to the order of float sums."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from training_cases import make_store, small_run

from qpipe.model import Decoder
from qpipe.runs import Run
from qpipe.train.step import parameter_groups

ROOT = Path(__file__).parents[1]


def train(folder: Path, devices: int, steps: int = 30, representation: str = "w4", **environment: str):
    out = folder / f"out{devices}"
    process = start(folder, out, devices, small_run(representation, steps=steps), **environment)
    said, complained = process.communicate()
    return out, subprocess.CompletedProcess(process.args, process.returncode, said, complained)


def start(folder: Path, out: Path, devices: int, run: Run, **environment: str) -> subprocess.Popen[str]:
    run.write(folder / "run.yaml")
    if not (folder / "tokens").exists():
        make_store(folder / "tokens")
    command = [sys.executable, "-m", "qpipe", "train", *map(str, (folder / "run.yaml", folder / "tokens", out))]
    settings = {"QPIPE_DEVICES": str(devices), "QPIPE_ACCELERATOR": "cpu", "WANDB_MODE": "disabled", **environment}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("representation", "tolerance"),
    [
        ("dense", 2e-4),
        # rounding of float32 sums now and then moves a weight by a whole level
        ("w4a4", 2e-3),
        ("2:4", 2e-3),
        # trained scales of weights and activations
        ("w4a4-lsq", 2e-3),
    ],
)
def test_sharded_model_learns_the_same_and_publishes_the_same_files(tmp_path, representation, tolerance):
    alone, loss = finished(tmp_path, 1, representation)
    curve, found = finished(tmp_path, 2, representation, QPIPE_SHARD="1")
    assert found == pytest.approx(loss, rel=tolerance)
    np.testing.assert_allclose(curve["train_loss"][0], alone["train_loss"][0], rtol=1e-6)
    np.testing.assert_allclose(curve["gradient_norm"][0], alone["gradient_norm"][0], rtol=1e-4)
    np.testing.assert_allclose(curve["train_loss"], alone["train_loss"], rtol=10 * tolerance)
    np.testing.assert_allclose(curve["validation_loss"], alone["validation_loss"], rtol=10 * tolerance)
    weights, others = (safetensors.torch.load_file(tmp_path / f"out{n}/model.safetensors") for n in (1, 2))
    assert {k: (v.shape, v.dtype) for k, v in weights.items()} == {k: (v.shape, v.dtype) for k, v in others.items()}
    records = [json.loads((tmp_path / f"out{n}/record.json").read_text()) for n in (1, 2)]
    assert {key for key in records[0] if records[0][key] != records[1][key]} <= {
        *("loss", "bits_per_byte", "train_loss", "weights_digest"),
    }


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("representation", ["dense", "w4a4", "w4a4-lsq"])
def test_two_gpus_train_what_one_trains(tmp_path, representation):
    """Alone, copied and sharded, compiled; kernels of a GPU sum in no fixed order and bfloat16 rounds coarsely."""
    run = small_run(representation, steps=60, width=128, feed_forward=256, precision="bf16")
    losses = []
    for number, (devices, shard) in enumerate([(1, "0"), (2, "0"), (2, "1")]):
        out = tmp_path / str(number)
        process = start(tmp_path, out, devices, run, QPIPE_SHARD=shard, QPIPE_ACCELERATOR="gpu")
        said = process.communicate()[1]
        assert process.returncode == 0, said[-3000:]
        assert ("this process holds" in said) == (shard == "1")
        losses.append(json.loads((out / "record.json").read_text())["loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=2e-2)


@pytest.mark.parametrize(
    ("first", "second"),
    [((2, "1"), (1, "0")), pytest.param((1, "0"), (2, "1"), marks=pytest.mark.slow)],
    ids=["sharded, then alone", "alone, then sharded"],
)
def test_sharded_run_is_stopped_and_goes_on_in_any_way(tmp_path, first, second):
    """A checkpoint says nothing about how many processes wrote it."""
    run = small_run("w4a4-lsq", steps=300)
    process = start(tmp_path, tmp_path / "out", first[0], run, QPIPE_SHARD=first[1])
    heartbeat = tmp_path / "out/scratch/heartbeat.json"
    while not (heartbeat.exists() and json.loads(heartbeat.read_text())["step"] > 0):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert "SIGTERM: stopped after step" in said
    if first[1] == "1":
        held, of = (
            int(count.replace(",", "")) for count in re.search(r"holds (\S+) of (\S+) parameters", said).groups()
        )
        assert 0.45 < held / of < 0.55
    [checkpoint] = (tmp_path / "out/scratch").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["optimizer_states"][0]["state"]
    groups = parameter_groups(Decoder(run.shape, run.format_spec), run.training)
    shapes = [parameter.shape for group in groups for parameter in group["params"]]
    assert [state[index]["exp_avg"].shape for index in range(len(shapes))] == shapes
    process = start(tmp_path, tmp_path / "out", second[0], run, QPIPE_SHARD=second[1])
    said = process.communicate(timeout=120)[1]
    assert f"resumes from {checkpoint.name}" in said
    assert start(tmp_path, tmp_path / "alone", 1, run).wait(120) == 0
    curves = [pd.read_parquet(tmp_path / name / "curve.parquet") for name in ("alone", "out")]
    np.testing.assert_allclose(curves[1]["train_loss"], curves[0]["train_loss"], rtol=2e-2)
    losses = [json.loads((tmp_path / name / "record.json").read_text())["loss"] for name in ("alone", "out")]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def finished(folder: Path, devices: int, representation: str, **environment: str) -> tuple[pd.DataFrame, float]:
    out, done = train(folder, devices, representation=representation, **environment)
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
    _, done = train(tmp_path, 1, QPIPE_SHARD="1")
    assert done.returncode == 2
    assert "trains on one device, which has to hold all of it" in done.stderr


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
