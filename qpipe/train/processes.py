"""Several processes that train one run together, each on its own device: who does what.

The global batch stays what the run says; each process takes its slice of it, gradients are averaged (Lightning's DDP),
and the running means are averaged whenever a row of the curve ends. So a run's losses do not depend on the number of
processes, up to the order in which floats are added. The main process (rank 0) alone claims the attempt, chooses the
checkpoint, writes heartbeat and results, and talks to W&B; it starts the others with the command it was started with,
and what they have to know goes along in the environment.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from qpipe.errors import QpipeError
from qpipe.resources import DEVICES
from qpipe.runs import Run
from qpipe.train.checkpoint import newest_checkpoint
from qpipe.train.scratch import Scratch, scratch_folder

_ATTEMPT, _CHECKPOINT = "QPIPE_MAIN_ATTEMPT", "QPIPE_MAIN_CHECKPOINT"


@dataclass(frozen=True)
class Processes:
    """The processes that train a run.

    Attributes
    ----------
    count
        Processes, one per device.
    rank
        Number of this one, from 0.
    """

    count: int
    rank: int

    @classmethod
    def from_environment(cls, run: Run) -> "Processes":
        """Read QPIPE_DEVICES, 1 by default (errors: no count, a batch that cannot be shared equally)."""
        text = os.environ.get(DEVICES, "1")
        if not text.isdigit() or int(text) < 1:
            raise QpipeError(f"{DEVICES}={text}: give the number of devices that train one run, 1 or more")
        count, batch = int(text), run.training.batch_sequences
        if batch % count:
            raise QpipeError(
                f"{DEVICES}={count}: run {run.id} has {batch} sequences per step, not a multiple of {count}"
            )
        return cls(count, int(os.environ.get("LOCAL_RANK", "0")) if count > 1 else 0)

    @property
    def main(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.rank == 0

    def claim(self, run: Run, out: Path) -> tuple[Scratch, Path | None]:
        """Begin an attempt and choose its checkpoint, or join the attempt that the main process has begun."""
        if not self.main:
            name = os.environ[_CHECKPOINT]
            return Scratch(scratch_folder(run.id, out), int(os.environ[_ATTEMPT])), Path(name) if name else None
        scratch = Scratch.claim(run.id, out)
        checkpoint = newest_checkpoint(scratch, run.id)
        os.environ[_ATTEMPT], os.environ[_CHECKPOINT] = str(scratch.attempt), str(checkpoint or "")
        return scratch, checkpoint
