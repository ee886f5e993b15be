"""W&B: what an offline run holds, read back with wandb's own record reader; and that W&B can never stop a training."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from training_cases import make_store, small_run
from wandb_server import wandb_server

from qpipe.errors import QpipeError
from qpipe.record import load_record
from qpipe.train.tracking import tracking_mode

VARIABLES = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_PROJECT", "QPIPE_WANDB_MODE", "QPIPE_SCRATCH")


def train(out: Path, tokens: Path, home: Path, **variables: str) -> str:
    """Train in a process of its own with a clean environment; return its log."""
    run = small_run("w4a4", steps=40)
    run.write(out / "run.yaml")
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment = {**clean, "HOME": str(home), "OMP_NUM_THREADS": "1", **variables}
    code = (
        "import sys; from qpipe.cli import main; code = main(sys.argv[1:]); print('wandb' in sys.modules); exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(out / "run.yaml"), str(tokens), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert load_record(out / "record.json").status == "ok"
    return done.stderr + done.stdout


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("data") / "tokens").path


def log_entries(path: Path) -> Iterator[Any]:
    """The records of a W&B transaction log: LevelDB framing (32 KiB blocks) of wandb's own protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data.startswith(b":W&B")
    position, pending = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        pending = (b"" if kind in (1, 2) else pending) + data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            yield record


def items(entries: Any) -> dict[str, Any]:
    return {entry.key or ".".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def test_offline_run_read_back(tmp_path: Path, tokens: Path) -> None:
    """Without an API key and without a mode, a run is logged offline and never prompts."""
    train(tmp_path, tokens, tmp_path, QPIPE_WANDB_MODE="auto", QPIPE_WANDB_GROUP="study", QPIPE_WANDB_PROJECT="project")
    record = load_record(tmp_path / "record.json")
    (log,) = tmp_path.glob(f"wandb/offline-run-*/run-{record.id}.wandb")
    entries = list(log_entries(log))
    run = next(entry.run for entry in entries if entry.HasField("run"))
    assert (run.run_id, run.display_name, run.run_group, run.project) == (record.id, record.id, "study", "project")
    config = items(run.config.update)
    assert {name: config[name] for name in record.run.model_dump()} == record.run.model_dump(mode="json")
    assert (config["n"], config["d"]) == (record.n, record.d)

    history = [items(entry.history.item) for entry in entries if entry.HasField("history")]
    curve = pyarrow.parquet.read_table(tmp_path / "curve.parquet").to_pylist()
    assert [row["trainer/global_step"] for row in history] == list(range(1, 41))
    for logged, row in zip(history, curve, strict=True):
        assert {name: logged.get(name) for name in row} == row

    summary: dict[str, Any] = {}
    for entry in entries:
        if entry.HasField("summary"):
            summary |= items(entry.summary.update)
    for name, value in {"final_loss": record.loss, "n": record.n, "d": record.d}.items():
        assert summary[name] == value
    assert summary["bits_per_weight"] == record.bits_per_weight
    assert [entry.exit.exit_code for entry in entries if entry.HasField("exit")] == [0]


def test_disabled_does_not_even_import_wandb(tmp_path: Path, tokens: Path) -> None:
    output = train(tmp_path, tokens, tmp_path, QPIPE_WANDB_MODE="disabled")
    assert output.splitlines()[-1] == "False"
    assert not (tmp_path / "wandb").exists()


@pytest.mark.parametrize("listens", [False, True], ids=["no server", "a server that says nothing"])
def test_unreachable_server_falls_back_to_offline_and_training_does_not_wait(
    listens: bool, tmp_path: Path, tokens: Path
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()  # the kernel takes connections in; nobody reads from them
        output = train(tmp_path, tokens, tmp_path, **online(f"http://127.0.0.1:{server.getsockname()[1]}"))
    assert "W&B does not start online: http://127.0.0.1" in output
    [log] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    history = [items(entry.history.item) for entry in log_entries(log) if entry.HasField("history")]
    assert [row["step"] for row in history] == list(range(1, 41))
    if listens:  # which takes two seconds to find out; the first of forty steps takes a tenth of one
        assert output.index("step 1/40") < output.index("W&B does not start")


def online(address: str) -> dict[str, str]:
    return {"WANDB_MODE": "online", "WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address}


def test_stopped_run_continues_its_own_page(tmp_path: Path, tokens: Path) -> None:
    """Online, with wandb's own client against a stand-in server."""
    run = small_run("w4", steps=1000)
    run.write(tmp_path / "run.yaml")
    command = [sys.executable, "-m", "qpipe", "train", *map(str, (tmp_path / "run.yaml", tokens, tmp_path))]
    with wandb_server() as server:
        environment = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", **online(server.address)}
        first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        heartbeat = tmp_path / "scratch/heartbeat.json"
        while not (run.id in server.history and heartbeat.exists()):
            assert first.poll() is None, first.communicate()[1]
            time.sleep(0.02)
        first.send_signal(signal.SIGTERM)
        _, said = first.communicate(timeout=60)
        assert "SIGTERM: stopped after step" in said
        before = len(server.history[run.id])
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "resumes from" in done.stderr
    assert list(server.history) == [run.id]
    lines = server.history[run.id]
    assert [lines[line]["step"] for line in sorted(lines)] == list(range(5, 1001, 5))
    assert 0 < before < 200


@pytest.mark.slow
def test_server_that_falls_silent_delays_nothing_but_the_end_and_that_briefly(tmp_path: Path, tokens: Path) -> None:
    with wandb_server(silent_after=1) as server:
        train(tmp_path, tokens, tmp_path, **online(server.address))
        ended = time.time()
    assert server.history
    # It waits 15 s for the upload; wandb by itself would go on trying.
    assert ended - (tmp_path / "record.json").stat().st_mtime < 60


@pytest.mark.parametrize(
    ("user", "study", "key", "expected"),
    [
        ("", "", "", "offline"),
        ("", "", "k", "online"),
        ("", "auto", "k", "online"),
        ("", "offline", "k", "offline"),
        ("disabled", "online", "k", "disabled"),
        ("dryrun", "online", "k", "offline"),
        ("online", "disabled", "", "online"),
    ],
)
def test_mode(user: str, study: str, key: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WANDB_MODE": user, "QPIPE_WANDB_MODE": study, "WANDB_API_KEY": key}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tracking_mode() == expected


def test_key_in_netrc_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert tracking_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example")
    assert tracking_mode() == "offline"


def test_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(QpipeError, match="did you mean 'offline'"):
        tracking_mode()
