"""The record of a finished run, and the loss table made of records.

`record.json` is what a run leaves behind for science: plain JSON with exactly the fields below, deterministic to the
last bit for a given run on a given CPU, also when the run was killed and resumed. How long it took and where it ran is
not science and stands beside it in `runtime.json`. The loss table is one row per record with units and conventions in
the Arrow metadata of each column.
"""

import itertools
import json
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qpipe.errors import QpipeError
from qpipe.files import write_text
from qpipe.runs import Run


class Record(BaseModel):
    """Result of one run. Losses are mean cross-entropies over tokens (nats/token)."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")

    id: str = Field(description="run id")
    status: Literal["ok", "diverged"] = Field(description="`diverged`: the loss became non-finite or exploded")
    message: str = Field(default="", description="what happened, when not ok")
    loss: float | None = Field(description="loss over the whole validation split in fixed order; none when diverged")
    bits_per_byte: float | None = Field(description="the same loss in bits per byte of validation text")
    train_loss: float | None = Field(description="mean training loss over the last 5 % of the steps")
    validation_tokens: int = Field(description="tokens that the loss is averaged over (count)")
    steps: int = Field(description="optimizer steps done")
    n: int = Field(description="non-embedding parameters (count)")
    n_compressed: int = Field(description="parameters under the representation (count)")
    n_embedding: int = Field(description="embedding + head parameters, kept in high precision (count)")
    d: int = Field(description="training tokens (count)")
    flops: float = Field(description="training FLOPs")
    bits_per_weight: float = Field(description="stored bits per compressed weight, scales and masks included")
    payload_bits: float = Field(description="stored bits per compressed weight, codes alone")
    tokens_digest: str = Field(description="digest of the token store's manifest")
    weights_digest: str = Field(description="SHA-256 of model.safetensors")
    run: Run = Field(description="the resolved run")

    def write(self, path: Path) -> None:
        """Write `record.json` atomically."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def load_record(path: Path) -> Record:
    """Read a record (errors: missing, truncated, foreign fields, an id that is not its run's)."""
    try:
        record = Record.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise QpipeError(f"{path}: no such record") from error
    except (ValidationError, UnicodeDecodeError) as error:
        raise QpipeError(f"{path}: not a run's record ({error}); delete it to train the run again") from error
    if record.id != record.run.id:
        raise QpipeError(f"{path}: record of {record.id} holds run {record.run.id}; delete it to train the run again")
    return record


_COLUMNS: list[tuple[str, pa.DataType, str, str]] = [
    ("run", pa.string(), "", "run id"),
    ("size", pa.string(), "", "label of the size"),
    ("n", pa.int64(), "count", "non-embedding parameters; for sparse runs total, not non-zero"),
    ("d", pa.int64(), "count", "training tokens"),
    ("representation", pa.string(), "", "label of the representation; dense is the reference"),
    ("loss", pa.float64(), "nats/token", "cross-entropy over the whole validation split"),
    ("seed", pa.int64(), "", "seed of initialisation and data order"),
    ("status", pa.string(), "", "ok or diverged; only ok rows are fitted"),
    ("bits_per_byte", pa.float64(), "bits/byte", "validation loss per byte of text"),
    ("train_loss", pa.float64(), "nats/token", "mean training loss over the last 5 % of the steps"),
    ("flops", pa.float64(), "FLOP", "training FLOPs"),
    ("bits_per_weight", pa.float64(), "bits", "stored bits per compressed weight with scales and masks"),
    ("payload_bits", pa.float64(), "bits", "stored bits per compressed weight, codes alone"),
    ("n_compressed", pa.int64(), "count", "parameters under the representation"),
    ("n_embedding", pa.int64(), "count", "embedding and head parameters, in high precision"),
    ("learning_rate", pa.float64(), "", "peak learning rate"),
    ("steps", pa.int64(), "count", "optimizer steps"),
]

LOSS_SCHEMA = pa.schema(
    [pa.field(name, kind, metadata={"unit": unit, "meaning": meaning}) for name, kind, unit, meaning in _COLUMNS]
)


def loss_row(record: Record) -> dict[str, Any]:
    """Return one row of the loss table."""
    run = record.run
    fields = record.model_dump(include={name for name, *_ in _COLUMNS} & set(Record.model_fields) - {"run"})
    return {
        **fields,
        "run": record.id,
        "size": run.size,
        "representation": run.representation_name,
        "seed": run.seed,
        "learning_rate": run.training.learning_rate,
    }


def loss_table(records: list[Record]) -> pa.Table:
    """Return the loss table of records, sorted by representation, size, tokens and seed (errors: a run twice)."""
    rows = sorted(map(loss_row, records), key=lambda r: (r["representation"], r["n"], r["d"], r["seed"], r["run"]))
    twice = sorted({a["run"] for a, b in itertools.pairwise(rows) if a["run"] == b["run"]})
    if twice:
        raise QpipeError([f"run {run} was given twice" for run in twice])
    return pa.Table.from_pylist(rows, schema=LOSS_SCHEMA)


def read_runtime(path: Path) -> dict[str, Any]:
    """Read `runtime.json` beside a record: wall seconds, tokens/s, device, versions."""
    return dict(json.loads(path.read_text(encoding="utf-8")))
