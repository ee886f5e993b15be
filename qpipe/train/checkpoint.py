"""Checkpoints: on a time interval, durable, and never trusted blindly.

A checkpoint is written under a temporary name, forced to disk and renamed; the one before it is removed only after
that. On resuming, the newest file that passes three tests is used: every byte fits its checksum (the file is a zip
archive with a CRC-32 per tensor), it loads without running any code (`weights_only=True`), and it belongs to this run.
A disk that is full costs a checkpoint, not the run.
"""

import logging
import pickle
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from qpipe.errors import QpipeError
from qpipe.files import replacing
from qpipe.train.history import History
from qpipe.train.lightning_import import TorchCheckpointIO, lightning
from qpipe.train.scratch import Scratch

log = logging.getLogger("qpipe.train")

_KEPT = 2


class DurableCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints straight to a temporary file, syncs and renames."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint durably (`storage_options` is Lightning's and has no meaning here)."""
        with replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


class TimedCheckpoint(lightning.Callback):
    """Saves a checkpoint whenever `seconds` have passed since the last.

    Parameters
    ----------
    scratch
        Where checkpoints lie.
    history
        Stored with the weights: curve and running means.
    run_id
        Stored, and asked for on resuming.
    seconds
        Time between checkpoints.
    """

    def __init__(self, scratch: Scratch, history: History, run_id: str, seconds: float) -> None:
        self.scratch, self.history, self.run_id, self.seconds = scratch, history, run_id, seconds
        self._last = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Return the history."""
        return self.history.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the history of a checkpoint."""
        self.history.load_state_dict(state_dict)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Mark the checkpoint as this run's."""
        checkpoint["qpipe_run"] = self.run_id

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save when it is time; all processes decide alike, at the end of a row."""
        step = trainer.global_step
        due = time.monotonic() - self._last >= self.seconds
        if trainer.world_size > 1:
            due = self.history.row_due(step) and trainer.strategy.broadcast(due)
        if due and not self.history.failure:
            self.save(trainer, step)
            self._last = time.monotonic()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save once more if the last steps cost much: what follows (validation, writing results) can still fail."""
        if time.monotonic() - self._last >= self.seconds / 10 and not self.history.failure:
            self.save(trainer, trainer.global_step)

    def save(self, trainer: Any, step: int) -> None:
        """Save now (error: a newer attempt has taken over)."""
        if self.scratch.superseded:
            raise QpipeError(f"run {self.run_id}: a newer attempt has taken over; this one stops")
        begin = time.monotonic()
        try:
            trainer.save_checkpoint(self.scratch.checkpoint_path(step))
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError of its zip writer
            log.warning("checkpoint at step %d could not be written, training goes on: %s", step, _first_line(error))
            trainer.strategy.barrier()  # where the other processes wait for the file
            return
        for old in self.scratch.checkpoints()[_KEPT:]:
            old.unlink(missing_ok=True)
        log.info("checkpoint at step %d (%.1f s)", step, time.monotonic() - begin)


def newest_checkpoint(scratch: Scratch, run_id: str) -> Path | None:
    """Return the newest checkpoint that is whole and belongs to the run; say so about others."""
    for path in scratch.checkpoints():
        problem = checkpoint_problem(path, run_id)
        if problem is None:
            return path
        log.warning("checkpoint %s is not usable (%s); falling back to the one before it", path, problem)
        path.unlink(missing_ok=True)
    return None


def checkpoint_problem(path: Path, run_id: str) -> str | None:
    """Return why a checkpoint cannot be used, or None: damaged, not loadable without code, another run's."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            return f"checksum of {broken} does not fit"
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("qpipe_run")
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        return _first_line(error)
    return None if found == run_id else f"it belongs to run {found}"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
