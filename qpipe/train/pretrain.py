"""Pretraining one run from start to record: the whole process, in order."""

import logging
import os
import time
import warnings
from pathlib import Path
from typing import Any

from qpipe.corpus.store import TokenStore
from qpipe.errors import QpipeError
from qpipe.memory import sequences_at_once
from qpipe.model import Decoder
from qpipe.record import Record
from qpipe.runs import Run, load_run
from qpipe.train.checkpoint import DurableCheckpointIO, TimedCheckpoint
from qpipe.train.data import Batches
from qpipe.train.history import History
from qpipe.train.lightning_import import LightningEnvironment, lightning
from qpipe.train.module import TrainingModule
from qpipe.train.processes import Processes
from qpipe.train.progress import Progress, Recorder, duration
from qpipe.train.results import finished_record, make_record, publish
from qpipe.train.runtime import describe
from qpipe.train.scratch import Scratch, checkpoint_seconds
from qpipe.train.shards import ShardedStrategy
from qpipe.train.start import KeepState, find_start, keep_state, shorten, trunk_state
from qpipe.train.stop import StopOnSignal
from qpipe.train.store import open_store
from qpipe.train.tracking import Tracking
from qpipe.train.validation import Validation, diverged

OURS: dict[str, Any] = {
    "max_epochs": -1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "use_distributed_sampler": False,
}
"""What Lightning's trainer leaves to this package."""

log = logging.getLogger("qpipe.train")


def train_run(run_file: Path, tokens: Path, out: Path, parent: Path | None = None) -> Record | None:
    """Train a run, or resume it, or return its record if it is finished (None in processes beside the main one).

    Parameters
    ----------
    run_file
        The resolved `run.yaml`.
    tokens
        Token store: its folder or its `manifest.json`.
    out
        Receives `record.json`, `model.safetensors`, `curve.parquet`, `runtime.json` and `run.yaml`.
    parent
        Where its start lies: output folder of its parent, by default the one of that id beside `out`, or the folder
        of the checkpoint.

    Raises
    ------
    QpipeError
        Run and token store do not fit together, `out` holds another run, or the results cannot be written.
    Stopped
        A signal asked for it; the run resumes from where it stands.
    """
    begin = time.monotonic()
    run = load_run(run_file)
    if (record := finished_record(run, out)) is not None:
        log.info("run %s is already finished: %s", run.id, summary(record))
        return record
    store = open_store(run, tokens)
    batches, validation, history = plan_data(run, store)
    processes = Processes.from_environment(run)
    start = find_start(run, out, parent)
    scratch, checkpoint = processes.claim(run, out)
    checkpoint = checkpoint or trunk_state(run, out, parent)
    module = TrainingModule(run, batches, history)
    if start is not None:
        start.weights(module.model)
    if run.training.parameters == "bf16":
        shorten(module.model)
    states = [*([start] if start else []), *([KeepState(out)] if run.keeps_state else [])]
    if not processes.main:
        beside = make_trainer(run, scratch, [Recorder(history, validation, []), *states], history, processes)
        beside.fit(module, ckpt_path=checkpoint, weights_only=True)
        return None
    log.info("run %s: %s", run.id, describe_plan(run, batches))
    with Tracking(run, out) as tracking:
        progress = Progress(run, scratch)
        callbacks = [Recorder(history, validation, [progress, tracking]), progress, *states]
        trainer = make_trainer(run, scratch, callbacks, history, processes)
        if checkpoint is not None:
            log.info("attempt %d resumes from %s", scratch.attempt, checkpoint.name)
        trainer.fit(module, ckpt_path=checkpoint, weights_only=True)
        if run.keeps_state and not history.failure:
            keep_state(out, checkpoint)

        module.model.float()  # what is stored and reloaded is float32, whatever was trained
        loss = final_loss(trainer, module, validation, progress)
        if diverged(loss, run.shape.vocab_size) and not history.failure:
            history.failure = f"validation loss {loss:.4g} is not finite or above 2 ln V"
        record = make_record(run, store, history, trainer.global_step, loss, validation.windows.tokens)
        if scratch.superseded:
            raise QpipeError(f"run {run.id}: a newer attempt has taken over; this one publishes nothing")
        seconds = time.monotonic() - begin
        runtime = {
            "wall_seconds": seconds,
            "attempts": scratch.attempt,
            "resumed_from": checkpoint.name if checkpoint else None,
            "data_wait_share": module.seconds_waited / seconds,
            "epochs": batches.epochs(run.steps),
            **describe(run, trainer.strategy.root_device, trainer.world_size, progress.tokens_per_second),
        }
        record = publish(out, record, module.model, history, runtime)
        scratch.remove()
        log.info("run %s finished in %s: %s", run.id, duration(seconds), summary(record))
        tracking.finish(record)
        return record


def plan_data(run: Run, store: TokenStore) -> tuple[Batches, Validation, History]:
    """Return the data of a run and an empty history (error: a split too short for one sequence)."""
    context, size = run.shape.context, run.training.batch_sequences
    batches = Batches(store.train, context, size, run.seed)
    held_out = Validation(
        store.validation, context, sequences_at_once(run.shape, size), run.training.precision, run.seed
    )
    return batches, held_out, History(run)


def make_trainer(run: Run, scratch: Scratch, callbacks: list[Any], history: History, processes: Processes) -> Any:
    """Return Lightning's Trainer for a run, with nothing in it that a run does not use."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for known in (r".*`srun` command is available.*", r".*isinstance\(treespec, LeafSpec\).*"):
        warnings.filterwarnings("ignore", message=known)  # about how Lightning was started and what it uses itself
    timed = TimedCheckpoint(scratch, history, run.id, checkpoint_seconds())
    return lightning.Trainer(
        accelerator=os.environ.get("QPIPE_ACCELERATOR", "auto"),
        devices=processes.per_node,
        num_nodes=processes.nodes,
        strategy=ShardedStrategy() if processes.sharded else "ddp" if processes.count > 1 else "auto",
        # Without this, Lightning inside a Slurm job would wait for srun, and take requeueing into its own hands.
        plugins=[DurableCheckpointIO(), LightningEnvironment()],
        precision="bf16-mixed" if run.training.precision == "bf16" else "32-true",
        max_steps=run.steps,
        callbacks=[*callbacks, timed, StopOnSignal(timed)],
        logger=False,
        default_root_dir=scratch.folder,
        **OURS,
    )


def final_loss(trainer: Any, module: TrainingModule, validation: Validation, progress: Progress) -> float:
    """Return the loss over the whole validation split, telling how far it is where that takes long."""
    model: Decoder = module.model.to(trainer.strategy.root_device)
    model.set_progress(1.0)
    last = time.monotonic()

    def tick(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            progress.beat("validation")
            log.info("validation %d/%d (%.0f%%)", done, total, 100 * done / total)

    return validation.loss(model, validation.windows, tick)


def describe_plan(run: Run, batches: Batches) -> str:
    """Return one line that says what is about to be trained."""
    epochs = batches.epochs(run.steps)
    return (
        f"N = {run.parameters.non_embedding:,}, D = {run.total_tokens:,} tokens, {run.steps:,} steps of its own, "
        f"{run.representation_name}, {epochs:.2f} epochs of {len(batches.split):,} tokens"
    )


def summary(record: Record) -> str:
    """Return one line that says how a run ended."""
    if record.status != "ok":
        return f"diverged: {record.message}"
    return f"loss {record.loss:.4f} nats/token over {record.validation_tokens:,} validation tokens"
