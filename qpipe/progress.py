"""What state a run is in, read from its files alone."""

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

from qpipe.errors import QpipeError
from qpipe.record import load_record

State = Literal["missing", "waiting", "running", "done", "diverged"]

HEARTBEAT = "heartbeat.json"
STALE_SECONDS = 120
"""A trainer rewrites its heartbeat every few seconds; one older than this belongs to a trainer that is gone."""


def scratch_folder(folder: Path, run_id: str) -> Path:
    """Return where a run keeps checkpoints and heartbeat: below $QPIPE_SCRATCH if set, else inside its own folder."""
    root = os.environ.get("QPIPE_SCRATCH")
    return Path(root) / run_id if root else folder / "scratch"


def read_heartbeat(scratch: Path) -> dict[str, Any] | None:
    """Return the last heartbeat of a run (step, steps, tokens_per_second, loss, time), or None."""
    try:
        return dict(json.loads((scratch / HEARTBEAT).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def run_state(folder: Path, run_id: str) -> State:
    """Return a run's state: `waiting` has a checkpoint or an old heartbeat and no trainer, `missing` has nothing.

    A record that cannot be read, or is another run's, counts as missing: the run will be trained again.
    """
    record = folder / "record.json"
    if record.exists():
        try:
            loaded = load_record(record)
        except QpipeError:
            return "missing"
        if loaded.id == run_id:
            return "done" if loaded.status == "ok" else "diverged"
        return "missing"
    heartbeat = read_heartbeat(scratch_folder(folder, run_id))
    if heartbeat is None:
        return "missing"
    return "running" if time.time() - float(heartbeat.get("time", 0)) < STALE_SECONDS else "waiting"
