"""The record of a finished run, and the loss table made of records.

`record.json` is what a run leaves behind for science: plain JSON with exactly the fields below, deterministic to the
last bit for a given run on a given CPU, also when the run was killed and resumed. How long it took and where it ran is
not science and stands beside it in `runtime.json`. The loss table is one row per record with units and conventions in
the Arrow metadata of each column.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qpipe.errors import QpipeError
from qpipe.files import write_text
from qpipe.formats import TensorFormat
from qpipe.runs import Run


class Record(BaseModel):
    """Result of one run. Losses are mean cross-entropies over tokens (nats/token)."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")

    id: str = Field(description="run id")
    status: Literal["ok", "diverged"] = Field(description="`diverged`: the loss became non-finite or exploded")
    message: str = Field(default="", description="what happened, when not ok")
    loss: float | None = Field(description="loss over the whole validation split in fixed order; none when diverged")
    bits_per_byte: float | None = Field(description="the same loss in bits per byte of validation text")
    train_loss: float | None = Field(description="mean training loss over the last 5 % of the steps; none of a trunk")
    validation_tokens: int = Field(description="tokens that the loss is averaged over (count)")
    steps: int = Field(description="optimizer steps done, without those of a parent")
    n: int = Field(description="non-embedding parameters (count)")
    n_compressed: int = Field(description="parameters under the representation (count)")
    n_embedding: int = Field(description="embedding + head parameters, kept in high precision (count)")
    d: int = Field(description="training tokens, a parent's included (count)")
    flops: float = Field(description="training FLOPs, a parent's included")
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
    ("d", pa.int64(), "count", "training tokens, a parent's included"),
    ("representation", pa.string(), "", "label of the representation; dense is the reference"),
    ("loss", pa.float64(), "nats/token", "cross-entropy over the whole validation split"),
    ("seed", pa.int64(), "", "seed of initialisation and data order"),
    ("status", pa.string(), "", "ok or diverged; only ok rows are fitted"),
    ("bits_per_byte", pa.float64(), "bits/byte", "validation loss per byte of text"),
    ("train_loss", pa.float64(), "nats/token", "mean training loss over the last 5 % of the steps"),
    ("flops", pa.float64(), "FLOP", "training FLOPs, a parent's included"),
    ("bits_per_weight", pa.float64(), "bits", "stored bits per compressed weight with scales and masks"),
    ("payload_bits", pa.float64(), "bits", "stored bits per compressed weight, codes alone"),
    ("n_compressed", pa.int64(), "count", "parameters under the representation"),
    ("n_embedding", pa.int64(), "count", "embedding and head parameters, in high precision"),
    ("learning_rate", pa.float64(), "", "peak learning rate"),
    ("steps", pa.int64(), "count", "optimizer steps"),
    ("w_bits", pa.float64(), "bits", "bits per weight code; 16 where weights are not quantized"),
    ("a_bits", pa.float64(), "bits", "bits per activation code; 16 where activations are not quantized"),
    ("sparsity", pa.float64(), "share", "share of zero weights at the end of training"),
    ("gmse", pa.float64(), "", "mean squared error of the weight format on N(0, 1) data; 0 for dense"),
    ("activation_gmse", pa.float64(), "", "mean squared error of the activation format on N(0, 1) data"),
    ("rho", pa.float64(), "", "multiplier predicted from the errors, before any training"),
    ("qat_tokens", pa.int64(), "count", "tokens of d seen under the representation; 0 for dense runs"),
    ("trajectory", pa.string(), "", "dense trajectory that the run branches off; none for runs from random weights"),
    ("ptq_method", pa.string(), "", "method that quantized a finished dense run; none for trained runs"),
    ("ptq_bits", pa.float64(), "bits", "stored bits per weight after that quantization, everything counted"),
    ("parent", pa.string(), "", "id of the dense run that was quantized"),
    ("parent_loss", pa.float64(), "nats/token", "loss of the dense run on the same tokens"),
    ("calibration_seed", pa.int64(), "", "seed of calibration text and probes"),
]

LOSS_SCHEMA = pa.schema(
    [pa.field(name, kind, metadata={"unit": unit, "meaning": meaning}) for name, kind, unit, meaning in _COLUMNS]
)


def _code_bits(side: TensorFormat | None) -> float:
    grid = None if side is None else side.parsed_grid
    return 16.0 if grid is None else grid.bits


def loss_row(record: Record, capacity: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return one row of the loss table; `capacity` is the representation's entry of `qpipe capacity --json`."""
    run, kind = record.run, record.run.format_spec
    fields = record.model_dump(include={name for name, *_ in _COLUMNS} & set(Record.model_fields) - {"run"})
    mask = None if kind.weights is None else kind.weights.mask
    return {
        **fields,
        **{key: (capacity or {}).get(key) for key in ("gmse", "activation_gmse", "rho")},
        "w_bits": _code_bits(kind.weights),
        "a_bits": _code_bits(kind.activations),
        "sparsity": 0.0 if mask is None else mask.share,
        "run": record.id,
        "size": run.size,
        "representation": run.representation_name,
        "seed": run.seed,
        "learning_rate": run.training.learning_rate,
        "qat_tokens": run.qat_tokens,
        "trajectory": run.trajectory,
    }


def loss_table(records: list[Record], capacities: Mapping[str, Mapping[str, Any]] | None = None) -> pa.Table:
    """Return the loss table of records (errors: a run twice).

    Parameters
    ----------
    capacities
        Entries of `qpipe capacity --json` by representation, for the columns that theory predicts.
    """
    return table_of_rows(
        [loss_row(record, (capacities or {}).get(record.run.representation_name)) for record in records]
    )


def table_of_rows(found: list[dict[str, Any]]) -> pa.Table:
    """Return rows as a loss table, sorted by representation, size, tokens and seed (errors: a run twice)."""
    rows = sorted(found, key=lambda r: (r["representation"], r["n"], r["d"], r["seed"], r["run"]))
    twice = sorted({a["run"] for a, b in itertools.pairwise(rows) if a["run"] == b["run"]})
    if twice:
        raise QpipeError([f"run {run} was given twice" for run in twice])
    return pa.Table.from_pylist(rows, schema=LOSS_SCHEMA)


def read_runtime(path: Path) -> dict[str, Any]:
    """Read `runtime.json` beside a record: wall seconds, tokens/s, device, versions."""
    return dict(json.loads(path.read_text(encoding="utf-8")))
