"""The multiplier table on W&B, read back from an offline log with wandb's own records; failures never fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from test_train_tracking import VARIABLES, log_entries


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    folder = tmp_path / "tables"
    folder.mkdir()
    pd.DataFrame({"representation": ["dense", "w4"], "eff": [1.0, 0.75], "runs": [4, 4]}).to_parquet(
        folder / "multipliers.parquet"
    )
    (folder / "multipliers.md").write_text("| table |\n")
    return folder


def track(tables: Path, out: Path, **variables: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-m", "qpipe", "track", str(tables), "--study", "unit", "--law", "compression"]
    done = subprocess.run(
        [*command, "--out", str(out)],
        env={**clean, "HOME": str(out.parent), **variables},
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_offline_log_holds_table_artifact_and_multipliers(tables, tmp_path):
    assert "offline" in track(tables, tmp_path / "out")  # no key, nothing set: offline without a prompt
    [log] = (tmp_path / "out").glob("wandb/offline-run-*/*.wandb")
    entries = list(log_entries(log))
    page = next(entry.run for entry in entries if entry.WhichOneof("record_type") == "run")
    assert (page.run_id, page.run_group, page.job_type) == ("unit-compression-multipliers", "unit", "fit")
    artifacts = [entry.artifact for entry in entries if entry.WhichOneof("record_type") == "artifact"]
    files = {content.path for artifact in artifacts for content in artifact.manifest.contents}
    assert {"multipliers.md", "multipliers.parquet"} <= files
    summary = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for entry in entries
        if entry.WhichOneof("record_type") == "summary"
        for item in entry.summary.update
    }
    assert summary["eff/w4"] == 0.75
    [table] = log.parent.glob("files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [["dense", 1.0, 4], ["w4", 0.75, 4]]


def test_disabled_writes_nothing(tables, tmp_path):
    assert "disabled" in track(tables, tmp_path / "out", QPIPE_WANDB_MODE="disabled")
    assert not (tmp_path / "out").exists()


def test_an_unreachable_server_leaves_an_offline_log(tables, tmp_path):
    out = track(
        tables, tmp_path / "out",
        QPIPE_WANDB_MODE="online", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9",
    )  # fmt: skip
    assert "offline (online failed" in out
    assert list((tmp_path / "out").glob("wandb/offline-run-*/*.wandb"))
