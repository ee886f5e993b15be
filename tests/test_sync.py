"""What was logged offline ends up on the server, a resumed run on one page; wandb's own uploader, a stand-in server."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_status import STUDY
from test_train_tracking import VARIABLES
from wandb_server import wandb_server

from qpipe.study import load_study, plan

LOG = """
import os, signal, sys, time
from pathlib import Path
from qpipe.runs import load_run
from qpipe.train.tracking import Tracking
out, first, last, killed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "killed"
with Tracking(load_run(out / "run.yaml"), out) as tracking:
    for step in range(first, last):
        tracking({"step": step, "train_loss": 1 / step, "padding": "x" * 2000 if killed else None})
    while killed:  # two blocks are on the disk, the rest is lost
        if sum(log.stat().st_size for log in out.glob("wandb/offline-run-*/*.wandb")) > 65536:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.05)
"""


def environment(home: Path, **variables: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name not in VARIABLES},
        "HOME": str(home),
        **variables,
    }


@pytest.fixture
def study(tmp_path):
    """A run that was killed, then stopped, then finished, all offline; its heartbeat says that it is still training."""
    (tmp_path / "study.yaml").write_text(STUDY)
    run = plan(load_study(tmp_path / "study.yaml"))[0]
    out = tmp_path / "results/unit/runs" / run.id
    run.write(out / "run.yaml")
    for first, last, end in ((1, 61, "killed"), (40, 81, "stopped"), (81, 91, "finished")):
        log(tmp_path, run.id, first, last, end)
    (out / "scratch").mkdir()
    (out / "scratch/heartbeat.json").write_text(json.dumps({"time": time.time()}))
    return tmp_path, run.id, out / "scratch/heartbeat.json"


def log(folder: Path, run: str, first: int, last: int, end: str) -> None:
    command = [sys.executable, "-c", LOG, str(folder / "results/unit/runs" / run), str(first), str(last), end]
    subprocess.run(command, env=environment(folder, WANDB_MODE="offline"), check=end != "killed", capture_output=True)


def sync(folder: Path, address: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qpipe", "sync", "study.yaml"],
        cwd=folder,
        env=environment(folder, WANDB_BASE_URL=address, WANDB_API_KEY="0" * 40),
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_pieces_of_a_resumed_run_are_joined_and_uploaded_once(study):
    folder, run, heartbeat = study
    with wandb_server() as server:
        assert "0 offline logs of study unit" in (said := sync(folder, server.address).stdout)
        assert "1 runs are still training" in said
        heartbeat.unlink()
        done = sync(folder, server.address)
        assert done.returncode == 0, done.stderr
        assert "3 offline logs of study unit" in done.stdout
        assert set(server.history) == {run}
        lines = [line for _, line in sorted(server.history[run].items())]
        assert sorted(server.history[run]) == list(range(len(lines)))  # appended: no line written over another
        steps = [line["trainer/global_step"] for line in lines]
        resumed = list(range(40, 91))
        killed = len(steps) - len(resumed)  # rows in whole blocks on the disk; how many, chance says
        assert 0 < killed <= 60
        assert steps == [*range(1, killed + 1), *resumed]
        assert [line["train_loss"] for line in lines] == pytest.approx([1 / step for step in steps])
        assert all(line["_step"] == line["trainer/global_step"] for line in lines)
        assert sync(folder, server.address).returncode == 0
        assert len(server.history[run]) == len(lines)


def test_nothing_logged_offline_is_no_error(tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY)
    done = sync(tmp_path, "http://127.0.0.1:9")
    assert (done.returncode, done.stdout.split(" of ")[0]) == (0, "0 offline logs")
