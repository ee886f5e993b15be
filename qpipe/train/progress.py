"""What a running training tells the world: log lines for people, a heartbeat for programs."""

import logging
import time
from typing import Any

from qpipe.runs import Run
from qpipe.train.history import History, Row
from qpipe.train.lightning_import import lightning
from qpipe.train.scratch import Scratch
from qpipe.train.validation import Validation, Windows, some_windows

log = logging.getLogger("qpipe.train")

_LINE_SECONDS = 5.0
_BEAT_SECONDS = 2.0
_VALIDATION_SHARE = 0.006  # of the training tokens per validation: ten of them cost 2 % of the training FLOPs


class Recorder(lightning.Callback):
    """Closes the rows of the curve, with periodic validation, and hands them to listeners.

    Parameters
    ----------
    history
        The run's history.
    validation
        The validation split; a fixed part of it is used.
    listeners
        Called with each new row.
    """

    def __init__(self, history: History, validation: Validation, listeners: list[Any]) -> None:
        self.history, self.validation, self.listeners = history, validation, listeners
        self.windows = periodic_windows(history.run, validation)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Close a row where one ends; stop a run that has diverged."""
        step = trainer.global_step
        if not self.history.row_due(step):
            return
        loss = None
        if self.history.validation_due(step):
            loss = self.validation.loss(pl_module.model, self.windows)
        if trainer.world_size > 1:
            self.history.average()
        row = self.history.close_row(step, loss)
        for listener in self.listeners:
            listener(row)
        if self.history.failure:
            log.warning("diverged: %s", self.history.failure)
            trainer.should_stop = True


def periodic_windows(run: Run, validation: Validation) -> Windows:
    """Return the fixed part of the validation split that is used during training, whole batches of it."""
    tokens = _VALIDATION_SHARE * run.tokens
    batches = max(1, round(tokens / (validation.context * validation.batch)))
    return some_windows(validation.windows, batches * validation.batch)


class Progress(lightning.Callback):
    """Log lines and heartbeat; also measures throughput.

    Attributes
    ----------
    step
        Optimizer steps done.
    """

    def __init__(self, run: Run, scratch: Scratch) -> None:
        self.run, self.scratch = run, scratch
        self.step, self.row = 0, Row()
        self._begin: tuple[float, int] | None = None
        self._line: tuple[float, int] = (time.monotonic(), 0)
        self._beat = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the clock."""
        self.step = trainer.global_step
        self._line = (time.monotonic(), self.step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Beat every few seconds."""
        self.step = trainer.global_step
        now = time.monotonic()
        if self._begin is None:  # the first step compiles and warms caches: not counted
            self._begin = (now, self.step)
        if now - self._beat >= _BEAT_SECONDS:
            self._beat = now
            self.beat("training")

    def beat(self, phase: str) -> None:
        """Write the heartbeat."""
        self.scratch.beat(
            phase=phase,
            step=self.step,
            steps=self.run.steps,
            loss=self.row.get("train_loss"),
            tokens_per_second=self.tokens_per_second,
        )

    def __call__(self, row: Row) -> None:
        """Log a row, at most one every few seconds, the first and the last in any case."""
        first, self.row = not self.row, row
        now, step = time.monotonic(), int(row["step"] or 0)
        if not (first or step == self.run.steps or now - self._line[0] >= _LINE_SECONDS):
            return
        speed = (step - self._line[1]) / max(now - self._line[0], 1e-9)
        self._line = (now, step)
        validation = row["validation_loss"]
        log.info(
            "step %d/%d (%.0f%%)  loss %.4f%s  lr %.2e  grad %.3f  %s tokens/s  ETA %s",
            step,
            self.run.steps,
            100 * step / self.run.steps,
            row["train_loss"],
            "" if validation is None else f"  validation {validation:.4f}",
            row["learning_rate"],
            row["gradient_norm"],
            f"{speed * self.run.tokens_per_step:,.0f}",
            duration((self.run.steps - step) / speed),
        )

    @property
    def tokens_per_second(self) -> float | None:
        """Throughput since the first step of this attempt, validation and checkpoints included."""
        if self._begin is None or self.step == self._begin[1]:
            return None
        return (self.step - self._begin[1]) * self.run.tokens_per_step / (time.monotonic() - self._begin[0])


def duration(seconds: float) -> str:
    """Return a duration as people say it: 42 s, 3 min 20 s, 5 h 7 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
