"""A fitted law on Weights & Biases: the multiplier table, its files as an artifact, and eff in the runs' summaries.

The page belongs to the study's group and is named after the law, with a stable id, so that a refit continues it. Where
W&B is online, the summary of every training run of the study gets its `eff`; offline pages cannot be edited after the
fact, so there `eff` stands in the summary of the law's page alone.
"""

import logging
import os
from pathlib import Path
from typing import Any

import pandas as pd

from qpipe.train.tracking import require_answer, tracking_mode

log = logging.getLogger("qpipe.report")

_INIT_SECONDS = 20.0


def track_multipliers(study: str, law: str, table: Path, files: list[Path], runs: dict[str, str], out: Path) -> str:
    """Log a multiplier table; return what happened in a few words. W&B failing is never an error.

    Parameters
    ----------
    study, law
        Group and name of the page.
    table
        multipliers.parquet.
    files
        What the artifact holds.
    runs
        Representation by run id: the training runs whose summaries get `eff` (online only).
    out
        Folder for W&B's own files.
    """
    mode = tracking_mode()
    if mode == "disabled":
        return "disabled"
    failure = ""
    for attempt in ("online", "offline") if mode == "online" else ("offline",):
        try:
            _log(attempt, study, law, pd.read_parquet(table), files, runs, out)
            return attempt + failure
        except Exception as error:  # wandb raises its own, network and OS errors; none may end the workflow
            failure = f" ({attempt} failed: {(str(error).splitlines() or [repr(error)])[0]})"
            log.warning("W&B does not take the multipliers%s", failure)
            _forget_failed_start()
    return f"failed{failure}"


def _forget_failed_start() -> None:
    """Let the page's id be used again: wandb holds it after a start that failed."""
    import wandb

    wandb.teardown()


def _log(
    mode: str, study: str, law: str, table: pd.DataFrame, files: list[Path], runs: dict[str, str], out: Path
) -> None:
    import wandb

    if mode == "online":
        require_answer(wandb.setup().settings.base_url)
    project = os.environ.get("QPIPE_WANDB_PROJECT") or os.environ.get("WANDB_PROJECT") or "qpipe"
    entity = os.environ.get("QPIPE_WANDB_ENTITY") or None
    effs = {str(row["representation"]): float(row["eff"]) for row in table.to_dict("records")}
    out.mkdir(parents=True, exist_ok=True)
    page = wandb.init(
        name=f"{study} {law}",
        id=f"{study}-{law}-multipliers",
        resume="allow",
        dir=out,
        project=project,
        entity=entity,
        group=study,
        job_type="fit",
        mode=mode,  # type: ignore[arg-type]
        settings=wandb.Settings(console="off", silent=True, init_timeout=_INIT_SECONDS),
    )
    page.log({"multipliers": wandb.Table(dataframe=table)})
    artifact = wandb.Artifact(f"{study}-{law}-multipliers", type="multipliers")
    for path in files:
        artifact.add_file(str(path))
    page.log_artifact(artifact)
    page.summary.update({f"eff/{name}": value for name, value in effs.items()})
    page.finish(exit_code=0)
    if mode == "online":
        _update_runs(wandb.Api(timeout=20), f"{entity}/{project}" if entity else project, runs, effs)


def _update_runs(api: Any, path: str, runs: dict[str, str], effs: dict[str, float]) -> None:
    for run_id, representation in runs.items():
        if representation in effs:
            page = api.run(f"{path}/{run_id}")
            page.summary["eff"] = effs[representation]
            page.summary.update()
