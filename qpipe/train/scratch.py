"""The folder in which a run keeps what it needs to go on after being killed.

Checkpoints are not results: the workflow neither declares nor deletes them. They live in `$QPIPE_SCRATCH/<run id>/`
where that variable is set (a fast local or shared disk), else in `scratch/` inside the run's output folder, and the
folder is removed once the record is in place. It holds

    step-00001234.ckpt   the newest checkpoints, one file each
    attempt-000001       one empty file per process that ever trained this run here
    heartbeat.json       where training stands, rewritten every few seconds

Attempts are fences. The file of attempt n can be created by one process only, and whoever sees an attempt newer than
its own has been given up for dead and replaced: it stops and publishes nothing.
"""

import json
import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpipe.errors import QpipeError

CHECKPOINT_SECONDS = 600.0


@dataclass(frozen=True)
class Scratch:
    """One attempt's view of a run's scratch folder.

    Attributes
    ----------
    folder
        Where checkpoints and heartbeat lie.
    attempt
        Number of this attempt, from 1.
    """

    folder: Path
    attempt: int

    @classmethod
    def claim(cls, run_id: str, out: Path) -> "Scratch":
        """Begin a new attempt (error: the folder cannot be written)."""
        folder = scratch_folder(run_id, out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            attempt = _newest_attempt(folder) + 1
            while not _create(folder / f"attempt-{attempt:06d}"):
                attempt += 1
        except OSError as error:
            raise QpipeError(f"scratch folder {folder} cannot be used: {error}; set QPIPE_SCRATCH elsewhere") from error
        return cls(folder, attempt)

    @property
    def superseded(self) -> bool:
        """Whether a newer attempt has taken over, or has already finished and cleared the folder."""
        return _newest_attempt(self.folder) != self.attempt

    def checkpoints(self) -> list[Path]:
        """Return checkpoint files, newest first."""
        return sorted(self.folder.glob("step-*.ckpt"), reverse=True)

    def checkpoint_path(self, step: int) -> Path:
        """Return the file of the checkpoint taken after `step` steps."""
        return self.folder / f"step-{step:08d}.ckpt"

    def beat(self, **state: Any) -> None:
        """Rewrite the heartbeat with where training stands; a lost one is no harm, so it is not made durable."""
        if self.superseded:
            return  # the heartbeat is the newer attempt's
        content = {"pid": os.getpid(), "host": socket.gethostname(), "attempt": self.attempt, "time": time.time()}
        temporary = self.folder / f".heartbeat.{os.getpid()}.tmp"
        try:
            temporary.write_text(json.dumps({**content, **state}), encoding="utf-8")
            temporary.replace(self.folder / "heartbeat.json")
        except OSError:
            temporary.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder; the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


def scratch_folder(run_id: str, out: Path) -> Path:
    """Return a run's scratch folder, given its id and its output folder."""
    root = os.environ.get("QPIPE_SCRATCH")
    return Path(root) / run_id if root else out / "scratch"


def checkpoint_seconds() -> float:
    """Return the seconds between checkpoints (environment: QPIPE_CHECKPOINT_SECONDS)."""
    text = os.environ.get("QPIPE_CHECKPOINT_SECONDS", str(CHECKPOINT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise QpipeError(f"QPIPE_CHECKPOINT_SECONDS={text}: give seconds between checkpoints, such as 600")
    return seconds


def _newest_attempt(folder: Path) -> int:
    return max((int(path.name.removeprefix("attempt-")) for path in folder.glob("attempt-*")), default=0)


def _create(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
