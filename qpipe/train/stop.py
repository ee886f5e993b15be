"""Stopping in order when the machine asks for it: the step is finished, a checkpoint written, and the attempt ends.

Two signals ask. SIGTERM comes from schedulers that cancel or preempt a job and from people. SIGUSR1 comes from Slurm
shortly before a job's time limit (`--signal=USR1@120` in the profile); inside a Slurm job the job is then put back
into the queue, under its old number, so that whoever waits for it goes on waiting and the run resumes where it stood,
however often it reaches the limit. A job whose limit is too short for a single step is not put back.

The handler only takes a note. What is saved is saved between two steps, where model, optimizer and running means
belong together.
"""

import logging
import os
import signal
import subprocess
from typing import Any

from qpipe.train.checkpoint import TimedCheckpoint
from qpipe.train.lightning_import import lightning

log = logging.getLogger("qpipe.train")


class Stopped(Exception):
    """An attempt was asked to stop and has done so; the run resumes from its checkpoint."""


class StopOnSignal(lightning.Callback):
    """Ends training after the step during which a signal came, or after the first.

    Parameters
    ----------
    checkpoint
        Writes the last checkpoint of the attempt.
    """

    def __init__(self, checkpoint: TimedCheckpoint) -> None:
        self.checkpoint = checkpoint
        self._noted: signal.Signals | None = None
        signal.signal(signal.SIGUSR1, self._note)  # early: a signal that comes while a checkpoint is loaded counts

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the signals from Lightning, which would stop without a checkpoint; it restores them after training."""
        for one in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(one, self._note)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop if asked to; several processes stop together, at the end of a row of the curve."""
        noted = self._noted is not None
        if trainer.world_size > 1:
            noted = self.checkpoint.history.row_due(trainer.global_step) and bool(
                trainer.strategy.reduce_boolean_decision(noted, all=False)
            )
        if noted:
            self._stop(trainer)

    def _note(self, number: int, _: Any) -> None:
        self._noted = signal.Signals(number)

    def _stop(self, trainer: Any) -> None:
        name, step = (self._noted or signal.SIGTERM).name, trainer.global_step
        self.checkpoint.save(trainer, step)
        if name == "SIGUSR1" and trainer.is_global_zero:
            requeue()
        raise Stopped(f"{name}: stopped after step {step}; run the same command again to resume")


def requeue() -> None:
    """Put the Slurm job this process runs in back into the queue; without a Slurm job, do nothing."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    if done.returncode:
        log.warning("Slurm job %s could not be requeued: %s", job, done.stderr.strip())
    else:
        log.info("Slurm job %s goes back into the queue", job)
