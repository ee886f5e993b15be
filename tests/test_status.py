"""What `qpipe status` says, from files as runs leave them."""

import json
import shutil
import time
from pathlib import Path

import pytest

from qpipe.cli import main
from qpipe.record import Record
from qpipe.status import study_status
from qpipe.study import load_study, plan

STUDY = """
name: unit
corpus: {source: docstrings, packages: [numpy]}
tokenizer: {train: bpe, vocab_size: 512}
ladder: {recipe: tiny}
sizes: [10k]
tokens: [40960, 81920, 163840, 327680]
representations: [dense]
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY)
    return plan(load_study(tmp_path / "study.yaml")), tmp_path / "results/unit", tmp_path / "logs"


def finish(run, results: Path, seconds: float, status: str = "ok") -> None:
    count = run.parameters
    Record(
        id=run.id, status=status, loss=3.25 if status == "ok" else None, bits_per_byte=1.0, train_loss=3.0,
        validation_tokens=100, steps=run.steps, n=count.non_embedding, n_compressed=0, n_embedding=1, d=run.tokens,
        flops=run.flops, bits_per_weight=32, payload_bits=32, tokens_digest="t", weights_digest="w", run=run,
    ).write(results / "runs" / run.id / "record.json")  # fmt: skip
    runtime = {"wall_seconds": seconds, "tokens_per_second": run.tokens / seconds}
    (results / "runs" / run.id / "runtime.json").write_text(json.dumps(runtime))


def beat(run, results: Path, step: int, age: float = 0.0, speed: float = 1000.0) -> None:
    scratch = results / "runs" / run.id / "scratch"
    scratch.mkdir(parents=True)
    content = {"step": step, "steps": run.steps, "tokens_per_second": speed, "loss": 4.5, "time": time.time() - age}
    (scratch / "heartbeat.json").write_text(json.dumps(content))


def log(run, logs: Path, text: str, job: str = "", said: str = "") -> None:
    path = logs / "train/unit" / f"{run.id}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    if job:
        slurm = logs / "slurm/rule_train" / run.id / f"{job}.log"
        slurm.parent.mkdir(parents=True)
        slurm.write_text(said)


def stages(study, jobs=None):
    return [run.stage for run in study_status(*study, jobs).runs]


def test_nothing_begun(study):
    status = study_status(*study)
    assert [run.stage for run in status.runs] == ["waiting"] * 4
    assert status.seconds_left is None  # nothing is known yet, so nothing is claimed


def test_each_stage(study):
    runs, results, logs = study
    finish(runs[0], results, 10)
    finish(runs[1], results, 10, "diverged")
    beat(runs[2], results, 5)
    log(runs[2], logs, "step 5/80\n")
    log(runs[3], logs, "12:00:00 step 1/160\nqpipe train:\n  - the disk is full\n  - and slow\n")
    assert stages(study) == ["done", "diverged", "running", "failed"]
    assert study_status(*study).runs[3].error == "qpipe train: - the disk is full - and slow"
    assert stages(study, {runs[3].id: "17"})[3] == "queued"  # submitted again


def test_stale_heartbeat_is_a_dead_trainer(study):
    runs, results, logs = study
    beat(runs[0], results, 5, age=3600)
    log(runs[0], logs, "12:00:00 step 5/20\n", "12", "slurmstepd: error: StepId=12.0 exceeded memory limit (9 > 3)\n")
    status = study_status(*study).runs[0]
    assert (status.stage, status.step) == ("failed", 5)
    assert "exceeded memory limit" in status.error  # Slurm's reason, not the trainer's last progress line


def test_orderly_stop_is_no_failure(study):
    runs, results, logs = study
    beat(runs[0], results, 5, age=3600)
    log(runs[0], logs, "SIGUSR1: stopped after step 5; run the same command again to resume\n")
    assert stages(study)[0] == "waiting"


def test_time_left_by_hand(study):
    runs, results, _ = study
    # D doubles from run to run: 41k done in 8 s; 82k running at 2,000 tokens/s, a quarter done; 164k and 328k to come.
    finish(runs[0], results, 8)
    beat(runs[1], results, runs[1].steps // 4, speed=2000.0)
    status = study_status(*study)
    running = 0.75 * runs[1].tokens / 2000
    assert [run.seconds_left for run in status.runs] == pytest.approx([0, running, 32, 64])
    assert status.seconds_left == pytest.approx(running + 32 + 64)
    beat(runs[2], results, 0, speed=2000.0)  # two at once
    assert study_status(*study).seconds_left == pytest.approx((running + runs[2].tokens / 2000 + 64) / 2)


def test_command(study, capsys, monkeypatch):
    runs, results, logs = study
    monkeypatch.chdir(results.parents[1])
    monkeypatch.setattr(shutil, "which", lambda _: None)  # a machine without Slurm
    finish(runs[0], results, 10)
    log(runs[1], logs, "ValueError: no such thing\n")
    assert main(["status", "study.yaml"]) == 0
    text = capsys.readouterr().out
    assert f"failed  {runs[1].id}: ValueError: no such thing" in text
    assert "unit: 1 done, 1 failed, 2 waiting of 4 runs" in text
    assert main(["status", "study.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["done"], found["failed"], found["waiting"]) == (1, 1, 2)
    assert found["runs"][0]["loss"] == 3.25
