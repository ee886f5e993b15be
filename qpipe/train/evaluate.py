"""Reloading a trained run and reproducing its recorded loss: proof that weights, record and tokens belong together."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qpipe.errors import QpipeError
from qpipe.memory import sequences_at_once
from qpipe.model import Decoder
from qpipe.record import Record, load_record
from qpipe.train.results import RECORD, WEIGHTS, file_digest, load_weights
from qpipe.train.store import open_store
from qpipe.train.validation import Validation

TOLERANCE = {"fp32": 2e-5, "bf16": 2e-3}
"""Difference that another machine's rounding may make, by precision of the matmuls (nats/token). The same CPU with the
same number of threads gives the same bits."""


@dataclass(frozen=True)
class Evaluation:
    """A recorded loss and the one found now (nats/token; None where the run has diverged)."""

    id: str
    recorded: float | None
    found: float
    tolerance: float
    validation_tokens: int

    @property
    def reproduced(self) -> bool:
        """Whether both agree up to rounding; a diverged run has no loss to agree with."""
        return self.recorded is None or abs(self.found - self.recorded) <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "reproduced": self.reproduced}


def load_model(out: Path) -> tuple[Decoder, Record]:
    """Rebuild a trained model from its output folder, on the CPU (errors: weights missing or not the record's)."""
    record = load_record(out / RECORD)
    weights = out / WEIGHTS
    if not weights.exists():
        raise QpipeError(f"{weights} is missing; delete {out / RECORD} to train the run again")
    if (found := file_digest(weights)) != record.weights_digest:
        raise QpipeError(
            f"{weights} has digest {found[:12]}..., the record was made with {record.weights_digest[:12]}...; "
            f"delete {out / RECORD} to train the run again"
        )
    model = Decoder(record.run.shape, record.run.format_spec)
    load_weights(model, weights)
    model.set_progress(1.0)
    return model, record


def evaluate_run(out: Path, tokens: Path) -> Evaluation:
    """Compute the loss of a trained run over the whole validation split of a token store.

    Parameters
    ----------
    out
        Output folder of `qpipe train`.
    tokens
        Token store it was trained on: its folder or its `manifest.json` (error: another store).
    """
    model, record = load_model(out)
    run = record.run
    store = open_store(run, tokens)
    if store.digest != record.tokens_digest:
        raise QpipeError(f"{tokens} is not the token store that {out} was trained on (digests differ)")
    batch = sequences_at_once(run.shape, run.training.batch_sequences)
    validation = Validation(store.validation, run.shape.context, batch, run.training.precision, run.seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return Evaluation(
        id=record.id,
        recorded=record.loss,
        found=validation.loss(model, validation.windows),
        tolerance=TOLERANCE[run.training.precision],
        validation_tokens=validation.windows.tokens,
    )
