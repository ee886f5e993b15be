"""Weights & Biases, as a view of a run and never a condition for it.

Mode, project, entity and group come from the environment. WANDB_MODE, set by the user, wins over QPIPE_WANDB_MODE, set
by the workflow from the study; both are `online`, `offline`, `disabled` or `auto`. `auto`, also meant where neither is
set, logs online where an API key is found and offline where none is, so nothing ever prompts. `disabled` does not even
import wandb. QPIPE_WANDB_PROJECT, QPIPE_WANDB_ENTITY and QPIPE_WANDB_GROUP name where the run appears.

Name and id of the W&B run are the run's id, and it is opened with `resume="allow"`: a resumed run continues its own
page. Whatever goes wrong in W&B is logged once and training goes on.
"""

import functools
import logging
import netrc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from qpipe.errors import QpipeError, nearest
from qpipe.record import Record
from qpipe.runs import Run
from qpipe.train.history import Row

log = logging.getLogger("qpipe.train")

Mode = Literal["online", "offline", "disabled"]
_INIT_SECONDS = 15.0
_FINISH_SECONDS = 60.0


def tracking_mode() -> Mode:
    """Return online, offline or disabled (error: any other word in the environment)."""
    word = os.environ.get("WANDB_MODE") or os.environ.get("QPIPE_WANDB_MODE") or "auto"
    modes: dict[str, Mode] = {
        "online": "online",
        "offline": "offline",
        "dryrun": "offline",  # wandb's own older name
        "disabled": "disabled",
        "auto": "online" if _has_key() else "offline",
    }
    if word not in modes:
        raise QpipeError(f"W&B mode '{word}'{nearest(word, modes)}: use one of online, offline, disabled, auto")
    return modes[word]


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Tracking:
    """The W&B run of a training; call it with each row of the curve.

    Attributes
    ----------
    logger
        Lightning's WandbLogger, or None where tracking is disabled or failed to start.
    """

    def __init__(self, run: Run, out: Path) -> None:
        self.logger: Any = None
        mode = tracking_mode()
        if mode == "disabled":
            return
        attempts: tuple[Mode, ...] = ("online", "offline") if mode == "online" else ("offline",)
        for attempt in attempts:
            if self._guarded(functools.partial(self._start, run, out, attempt), f"W&B does not start {attempt}"):
                return

    def _start(self, run: Run, out: Path, mode: Mode) -> None:
        import wandb

        from qpipe.train.lightning_import import WandbLogger

        if mode == "online" and not _has_key():
            raise QpipeError("no API key (WANDB_API_KEY or netrc)")
        wandb.teardown()  # of a start that failed: its helper process still holds the run's id
        experiment = wandb.init(
            name=run.id,
            id=run.id,
            resume="allow",
            dir=out,
            project=os.environ.get("QPIPE_WANDB_PROJECT") or os.environ.get("WANDB_PROJECT") or "qpipe",
            entity=os.environ.get("QPIPE_WANDB_ENTITY") or None,
            group=os.environ.get("QPIPE_WANDB_GROUP") or None,
            job_type="train",
            mode=mode,
            config={**run.model_dump(mode="json"), "n": run.parameters.non_embedding, "d": run.total_tokens},
            settings=wandb.Settings(console="off", silent=True, init_timeout=_INIT_SECONDS),
        )
        experiment.define_metric("*", step_metric="trainer/global_step")
        self.logger = WandbLogger(experiment=experiment)

    def __call__(self, row: Row) -> None:
        """Log a row of the curve."""
        if self.logger is not None:
            values = {name: value for name, value in row.items() if value is not None}
            step = int(row["step"] or 0)
            # W&B's own step is the optimizer's, so that the pieces of a resumed run share one axis.
            values["trainer/global_step"] = step
            self._guarded(lambda: self.logger.experiment.log(values, step=step), "W&B does not log")

    def finish(self, record: Record) -> None:
        """Write the summary and close the W&B run, waiting for an upload only so long."""
        if self.logger is None:
            return
        summary = record.model_dump(exclude={"run"})
        summary["final_loss"] = record.loss

        def close() -> None:
            self.logger.experiment.summary.update(summary)
            self.logger.experiment.finish(exit_code=0)

        closing = threading.Thread(target=lambda: self._guarded(close, "W&B does not finish"), daemon=True)
        closing.start()
        closing.join(_FINISH_SECONDS)
        if closing.is_alive():
            log.warning("W&B has not finished uploading after %.0f s; left behind", _FINISH_SECONDS)

    def _guarded(self, action: Callable[[], None], complaint: str) -> bool:
        try:
            action()
        except Exception as error:  # wandb raises its own, network and OS errors; none may end a training
            log.warning("%s: %s", complaint, (str(error).splitlines() or [repr(error)])[0])
            self.logger = None
            return False
        return True
