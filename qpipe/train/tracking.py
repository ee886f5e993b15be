"""Weights & Biases, as a view of a run and never a condition for it.

Mode, project, entity and group come from the environment. WANDB_MODE, set by the user, wins over QPIPE_WANDB_MODE, set
by the workflow from the study; both are `online`, `offline`, `disabled` or `auto`. `auto`, also meant where neither is
set, logs online where an API key is found and offline where none is, so nothing ever prompts. `disabled` does not even
import wandb. QPIPE_WANDB_PROJECT, QPIPE_WANDB_ENTITY and QPIPE_WANDB_GROUP name where the run appears.

Name and id of the W&B run are the run's id, and it is opened with `resume="allow"`: a resumed run continues its own
page.

A thread of its own does all the talking, so that training begins at once and never waits: rows of the curve, a few
hundred in all, are put into a queue, from which the thread takes them when W&B has started. A server that does not
answer within two seconds is replaced by an offline log, which `qpipe sync` uploads later; whatever else goes wrong is
logged once and training goes on. Only at its end, results or checkpoint in place, does a run wait for the upload, and
only `_FINISH_SECONDS`.
"""

import contextlib
import http.client
import importlib
import logging
import netrc
import os
import queue
import ssl
import threading
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlparse

from qpipe.errors import QpipeError, nearest
from qpipe.record import Record
from qpipe.runs import Run
from qpipe.train.history import Row

log = logging.getLogger("qpipe.train")

Mode = Literal["online", "offline", "disabled"]
_ANSWER_SECONDS = 2.0
_INIT_SECONDS = 15.0
_FINISH_SECONDS = 15.0
_END = None


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


def require_answer(server: str) -> None:
    """Raise if a W&B server cannot be reached or says nothing for two seconds; any answer will do, also a refusal.

    Without this, wandb would try for much longer.
    """
    try:
        with urllib.request.urlopen(urllib.request.Request(server, method="HEAD"), timeout=_ANSWER_SECONDS):
            return
    except (urllib.error.HTTPError, http.client.HTTPException, ssl.SSLError):
        return
    except OSError as error:
        reason = getattr(error, "reason", error)
        if not isinstance(reason, ssl.SSLError):  # which certificates count is wandb's business
            raise QpipeError(f"{server} does not answer ({reason})") from error


class Tracking:
    """The W&B run of a training; call it with each row of the curve. A context manager: at its end the run is closed.

    Raises
    ------
    QpipeError
        An unknown mode in the environment; nothing else ever.
    """

    def __init__(self, run: Run, out: Path) -> None:
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._summary: dict[str, Any] = {}
        self._thread: threading.Thread | None = None
        self._mode = tracking_mode()
        if self._mode != "disabled":
            options = {
                "name": run.id,
                "id": run.id,
                "resume": "allow",
                "dir": out,
                "project": os.environ.get("QPIPE_WANDB_PROJECT") or os.environ.get("WANDB_PROJECT") or "qpipe",
                "entity": os.environ.get("QPIPE_WANDB_ENTITY") or None,
                "group": os.environ.get("QPIPE_WANDB_GROUP") or None,
                "job_type": "train",
                "config": {**run.model_dump(mode="json"), "n": run.parameters.non_embedding, "d": run.total_tokens},
            }
            self._thread = threading.Thread(target=self._talk, args=(options,), name="wandb", daemon=True)
            self._thread.start()

    def __call__(self, row: Row) -> None:
        """Log a row of the curve."""
        self._queue.put({name: value for name, value in row.items() if value is not None})

    def finish(self, record: Record) -> None:
        """Give the run its summary."""
        self._summary = {**record.model_dump(exclude={"run"}), "final_loss": record.loss}

    def __enter__(self) -> "Tracking":
        """Return itself; the thread is already at work."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        """Close the W&B run, waiting for it only so long."""
        if self._thread is None:
            return
        self._queue.put(_END)
        self._thread.join(_FINISH_SECONDS + 1)
        if self._thread.is_alive():
            log.warning("W&B has not finished; left behind, what it has not uploaded lies in its folder")

    def _talk(self, options: dict[str, Any]) -> None:
        """Start W&B, log what comes, finish; in the thread."""
        attempts: tuple[Mode, ...] = ("online", "offline") if self._mode == "online" else ("offline",)
        for mode in attempts:
            try:
                page = _start(mode, options)
                break
            except Exception as error:  # wandb raises its own, network and OS errors; none may end a training
                log.warning("W&B does not start %s: %s", mode, _first_line(error))
        else:
            return
        try:
            while (values := self._queue.get()) is not _END:
                # W&B's own step is the optimizer's, so that the pieces of a resumed run share one axis.
                page.log({**values, "trainer/global_step": values["step"]}, step=values["step"])
            page.summary.update(self._summary)
            page.finish(exit_code=0 if self._summary else 1)
        except Exception as error:  # as above
            log.warning("W&B does not log: %s", _first_line(error))


def _start(mode: Mode, options: dict[str, Any]) -> Any:
    """Return a W&B run (errors: of any kind)."""
    import wandb

    _silence_usage_metrics()
    if mode == "online":
        if not _has_key():
            raise QpipeError("no API key (WANDB_API_KEY or netrc)")
        require_answer(wandb.setup().settings.base_url)
    wandb.teardown()  # of a start that failed: its helper process still holds the run's id
    settings = wandb.Settings(console="off", silent=True, init_timeout=_INIT_SECONDS, finish_timeout=_FINISH_SECONDS)
    page = wandb.init(mode=mode, settings=settings, **options)
    page.define_metric("*", step_metric="trainer/global_step")
    return page


def _silence_usage_metrics() -> None:
    """Turn off wandb's metrics about itself (0.31): at the end of a process they wait half a minute for a server."""
    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module("wandb.analytics.opentelemetry.opentelemetry_proxy").disable()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
