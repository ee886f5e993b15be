"""A run is its resolved `run.yaml`: the science fields of one experiment, and nothing else.

What decides the result stands in it (shape, training policy with the recipe's version, steps, representation, corpus,
seed); what does not (workers, devices, logging, where files lie) is left out. The run's id is a slug for people plus a
short digest of those fields for machines: equal id, same experiment, on any machine. `size` and the name of the
representation are labels: they appear in the slug and in tables, never in the digest.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qpipe.accounting import ParameterCount, count_parameters, linear_shapes, training_flops
from qpipe.errors import QpipeError
from qpipe.files import write_text
from qpipe.formats import Representation, from_canonical, storage_bits
from qpipe.identity import digest
from qpipe.recipe import ModelShape, Training
from qpipe.yaml_files import dump_yaml, read_yaml


class Run(BaseModel):
    """One pretraining run, fully resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = Field(default=1, description="version of this file's layout")
    size: str = Field(description="label of the size in its ladder")
    representation_name: str = Field(description="label of the representation")
    tokens_per_parameter: float = Field(gt=0, description="label: training tokens per nominal parameter")
    shape: ModelShape = Field(description="shape of the decoder")
    training: Training = Field(description="optimizer, schedule and batch")
    steps: int = Field(ge=1, description="optimizer steps")
    representation: dict[str, Any] = Field(description="canonical composition; empty for dense")
    corpus: str = Field(description="digest of corpus and tokenizer")
    seed: int = Field(ge=0, description="seed of initialisation and of the order of the data")

    def science(self) -> dict[str, Any]:
        """Return the fields that decide the result, as plain data: what the digest is taken of."""
        labels = {"size", "representation_name", "tokens_per_parameter"}
        return self.model_dump(mode="json", exclude=labels)

    @cached_property
    def id(self) -> str:
        """Readable slug + digest, e.g. ``n30m-d100x-w4a4-s0-1f3a9c2e``."""
        ratio, label = f"{self.tokens_per_parameter:.4g}", self.representation_name.replace(":", "-")
        return f"n{self.size.lower()}-d{ratio}x-{label}-s{self.seed}-{digest(self.science())}"

    @cached_property
    def format_spec(self) -> Representation:
        """The typed representation."""
        return from_canonical(self.representation, name=self.representation_name)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.training.batch_sequences * self.shape.context

    @property
    def tokens(self) -> int:
        """D: training tokens, exact."""
        return self.steps * self.tokens_per_step

    @cached_property
    def parameters(self) -> ParameterCount:
        """Parameters by group; `.non_embedding` is N."""
        return count_parameters(self.shape)

    @property
    def flops(self) -> float:
        """Training FLOPs (conventions in `qpipe.accounting`)."""
        return training_flops(self.shape, self.tokens)

    def bits_per_weight(self) -> tuple[float, float]:
        """Return (payload, total) stored bits per compressed weight, averaged over the block's linear layers."""
        return mean_bits(self.format_spec, self.shape)

    def write(self, path: Path) -> None:
        """Write `run.yaml`."""
        write_text(path, dump_yaml({"id": self.id, **self.model_dump(mode="json")}))


def mean_bits(representation: Representation, shape: ModelShape) -> tuple[float, float]:
    """Return (payload, total) stored bits per weight, weighted by the sizes of a block's linear layers."""
    payload = total = count = 0.0
    for _, inputs, outputs in linear_shapes(shape):
        storage = storage_bits(representation, inputs, outputs)
        payload += storage.payload_bits * inputs * outputs
        total += storage.total_bits * inputs * outputs
        count += inputs * outputs
    return payload / count, total / count


def load_run(path: Path) -> Run:
    """Read a `run.yaml` (errors: missing or unknown fields, an id that does not fit the content)."""
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise QpipeError(f"{path}: expected the fields of a run, found {type(raw).__name__}")
    stated = raw.pop("id", None)
    try:
        run = Run.model_validate(raw)
    except ValidationError as error:
        raise QpipeError([f"{path}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]) from error
    if stated is not None and stated != run.id:
        raise QpipeError(f"{path}: says it is run {stated}, its content is run {run.id}; the file was edited by hand")
    return run
