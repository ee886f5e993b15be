"""What a finished run leaves behind, put in place so that a reader sees all of it or nothing.

`record.json` is renamed into place last: where it stands, the weights it gives the digest of stand beside it.
"""

import contextlib
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from qpipe.corpus.store import TokenStore
from qpipe.errors import QpipeError
from qpipe.files import replacing
from qpipe.model import Decoder
from qpipe.record import Record, load_record
from qpipe.runs import Run
from qpipe.train.history import History, write_curve

RECORD, WEIGHTS, CURVE, RUNTIME, RUN = "record.json", "model.safetensors", "curve.parquet", "runtime.json", "run.yaml"
STATE = "state.ckpt"
"""Weights and optimizer state of a run that ends in mid-schedule, for the runs that go on from there."""


def finished_record(run: Run, out: Path) -> Record | None:
    """Return the record of this run if `out` holds it with fitting weights (error: it holds another run's)."""
    if not (out / RECORD).exists():
        return None
    record = load_record(out / RECORD)
    if record.id != run.id:
        raise QpipeError(f"{out} holds the record of run {record.id}, not of {run.id}; choose another folder")
    if run.keeps_state and record.status == "ok" and not (out / STATE).exists():
        return None
    weights = out / WEIGHTS
    return record if weights.exists() and file_digest(weights) == record.weights_digest else None


def make_record(run: Run, store: TokenStore, history: History, steps: int, loss: float, tokens: int) -> Record:
    """Return the record, without the digest of the weights.

    Parameters
    ----------
    run, store, history
        What was trained on what, and how it went.
    steps
        Optimizer steps done.
    loss
        Validation loss (nats/token), of no meaning when the run has diverged.
    tokens
        Tokens that the loss is averaged over (count).
    """
    payload, total = run.bits_per_weight()
    count, good = run.parameters, not history.failure
    return Record(
        id=run.id,
        status="ok" if good else "diverged",
        message=history.failure,
        loss=loss if good else None,
        bits_per_byte=loss / math.log(2) / store.bytes_per_token if good else None,
        train_loss=history.tail_loss if good else None,
        validation_tokens=tokens,
        steps=steps,
        n=count.non_embedding,
        n_compressed=0 if run.format_spec.is_dense else count.blocks_linear,
        n_embedding=count.embedding + count.head,
        d=run.total_tokens,
        flops=run.total_flops,
        bits_per_weight=total,
        payload_bits=payload,
        tokens_digest=store.digest,
        weights_digest="",
        run=run,
    )


def publish(out: Path, record: Record, model: Decoder, history: History, runtime: dict[str, Any]) -> Record:
    """Write all results and rename them into place, the record last; return it with the weights' digest.

    Raises
    ------
    QpipeError
        The results cannot be written. Nothing is left half-written; scratch still holds the training.
    """
    try:
        with contextlib.ExitStack() as files:  # closes, and so renames, in reverse order
            record_file = files.enter_context(replacing(out / RECORD))
            weights_file = files.enter_context(replacing(out / WEIGHTS))
            runtime_file = files.enter_context(replacing(out / RUNTIME))
            safetensors.torch.save_file(weights(model), weights_file, metadata={"run": record.id})
            weights_file.chmod(0o644)  # safetensors makes files that nobody else may read
            record = record.model_copy(update={"weights_digest": file_digest(weights_file)})
            runtime_file.write_text(json.dumps(runtime, indent=1) + "\n", encoding="utf-8")
            record_file.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
            write_curve(out / CURVE, history.rows)
            if not (out / RUN).exists():
                record.run.write(out / RUN)
    except (OSError, safetensors.SafetensorError) as error:
        free = shutil.disk_usage(out).free
        raise QpipeError(
            f"results cannot be written to {out} ({error}; {free / 1e6:,.0f} MB are free there); "
            "make room and run the same command again, it resumes from the last checkpoint"
        ) from error
    return record


def weights(model: Decoder) -> dict[str, Tensor]:
    """Return the weights to be stored: all parameters, a tied head once."""
    state = model.state_dict()
    if model.shape.tied_embeddings:
        del state["head.weight"]
    return {name: value.detach().contiguous() for name, value in state.items()}


def load_weights(model: Decoder, path: Path) -> None:
    """Load stored weights into a model (errors: unreadable file, names or shapes that are not the model's)."""
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise QpipeError(f"{path}: cannot be read as weights: {error}") from error
    if model.shape.tied_embeddings:
        state["head.weight"] = state.get("embedding.weight")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise QpipeError(f"{path}: weights of another model: {error}") from error


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file (hexadecimal)."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
