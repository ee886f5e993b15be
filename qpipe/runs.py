"""A run is its resolved `run.yaml`: the science fields of one experiment, and nothing else.

What decides the result stands in it (shape, training policy with the recipe's version, steps, representation, corpus,
seed); what does not (workers, devices, logging, where files lie) is left out. The run's id is a slug for people plus a
short digest of those fields for machines: equal id, same experiment, on any machine. `size` and the name of the
representation are labels: they appear in the slug and in tables, never in the digest.

A run may have a `parent`: a dense run whose final weights it starts from. Then it is identified by the parent's science
fields beside its own, its batches are those that the parent would have read next, and D counts both runs' tokens. Or it
starts from a model trained elsewhere, identified by its weights; what that one was trained on is not known here, so D
counts the run's own tokens alone.
"""

import itertools
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qpipe.accounting import ParameterCount, count_parameters, linear_shapes, training_flops
from qpipe.errors import QpipeError
from qpipe.files import write_text
from qpipe.formats import Representation, from_canonical, storage_bits
from qpipe.identity import digest
from qpipe.recipe import Growing, ModelShape, Training
from qpipe.yaml_files import dump_yaml, read_yaml

_LABELS = ("size", "representation_name", "tokens_per_parameter")


class Parent(BaseModel):
    """The dense run that a run starts from, and how it goes on from there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: "Run" = Field(description="the dense run whose final weights are the start")
    optimizer: Literal["fresh", "kept"] = Field(description="AdamW's moments: zero, or taken over from the parent")
    horizon: int | None = Field(
        default=None, ge=1, description="steps of a schedule drawn over parent and child together; none: an own one"
    )

    def science(self) -> dict[str, Any]:
        """Return the fields that decide the result."""
        return {"run": self.run.science(), "optimizer": self.optimizer, "horizon": self.horizon}


class Checkpoint(BaseModel):
    """A model trained elsewhere that a run starts from, known by its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: str = Field(description="digest of its weight files")


class Run(Growing):
    """One training run, fully resolved."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    later: ClassVar[frozenset[str]] = frozenset({"parent", "checkpoint"})

    format: Literal[1] = Field(default=1, description="version of this file's layout")
    size: str = Field(description="label of the size in its ladder")
    representation_name: str = Field(description="label of the representation")
    tokens_per_parameter: float = Field(gt=0, description="label: training tokens per nominal parameter")
    shape: ModelShape = Field(description="shape of the decoder")
    training: Training = Field(description="optimizer, schedule and batch")
    steps: int = Field(ge=0, description="optimizer steps of its own; 0 only with a parent: its weights, rounded")
    representation: dict[str, Any] = Field(description="canonical composition; empty for dense")
    corpus: str = Field(description="digest of corpus and tokenizer")
    seed: int = Field(ge=0, description="seed of initialisation and of the order of the data")
    parent: Parent | None = Field(default=None, description="the dense run that it starts from; none: random weights")

    checkpoint: Checkpoint | None = Field(default=None, description="model trained elsewhere that it starts from")

    @model_validator(mode="after")
    def _fits_its_parent(self) -> Self:
        if self.parent is None:
            if self.steps < 1 and self.checkpoint is None:
                raise ValueError("a run from random weights needs at least one step")
            return self
        if self.checkpoint is not None:
            raise ValueError("a run starts from a parent or from a checkpoint, not from both")
        before, problems = self.parent.run, []
        if before.representation:
            problems.append(f"the parent is trained as '{before.representation_name}'; a parent is dense")
        if (before.shape, before.corpus, before.seed) != (self.shape, self.corpus, self.seed):
            problems.append("parent and child differ in shape, corpus or seed")
        if before.tokens_per_step != self.tokens_per_step:
            problems.append("parent and child differ in tokens per step, so that the data would not go on")
        if self.parent.optimizer == "kept" and not before.keeps_state:
            problems.append("the parent's schedule has ended and it keeps no optimizer state; use a fresh optimizer")
        if self.horizon is not None and self.horizon < self.first_step + self.steps:
            problems.append(f"the schedule ends at step {self.horizon}, before the run's last")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def science(self) -> dict[str, Any]:
        """Return the fields that decide the result, as plain data: what the digest is taken of."""
        own = self.model_dump(mode="json", exclude={*_LABELS, "parent"})
        return own if self.parent is None else {**own, "parent": self.parent.science()}

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
        """Training tokens of the run itself, exact."""
        return self.steps * self.tokens_per_step

    @property
    def first_step(self) -> int:
        """Steps that its ancestors have taken: the number of its first batch."""
        return 0 if self.parent is None else self.parent.run.first_step + self.parent.run.steps

    @property
    def horizon(self) -> int | None:
        """Steps of a schedule shared with its ancestors; None: the schedule is its own."""
        return None if self.parent is None else self.parent.horizon

    @property
    def total_tokens(self) -> int:
        """D: training tokens of the run and its ancestors."""
        return (self.first_step + self.steps) * self.tokens_per_step

    @property
    def qat_tokens(self) -> int:
        """Tokens of D seen under the representation; 0 for a dense run."""
        return 0 if self.format_spec.is_dense else self.tokens

    @property
    def keeps_state(self) -> bool:
        """Whether it ends in mid-schedule, and so keeps its optimizer's state for runs that go on from there."""
        if self.horizon is not None:
            return self.first_step + self.steps < self.horizon
        return self.training.schedule == "constant"

    @cached_property
    def trajectory(self) -> str | None:
        """Name of the dense trajectory it lies on, equal for all runs that branch off one trunk or run; else None."""
        first = self
        while first.parent is not None:
            first = first.parent.run
        if first.training.schedule != "constant":
            return None if self.parent is None else first.id
        return f"n{first.size.lower()}-trunk-s{first.seed}-{digest({**first.science(), 'steps': None})}"

    @cached_property
    def parameters(self) -> ParameterCount:
        """Parameters by group; `.non_embedding` is N."""
        return count_parameters(self.shape)

    @property
    def flops(self) -> float:
        """Training FLOPs of the run itself (conventions in `qpipe.accounting`)."""
        return training_flops(self.shape, self.tokens)

    @property
    def total_flops(self) -> float:
        """Training FLOPs of the run and its ancestors."""
        return training_flops(self.shape, self.total_tokens)

    def bits_per_weight(self) -> tuple[float, float]:
        """Return (payload, total) stored bits per compressed weight, averaged over the block's linear layers."""
        return mean_bits(self.format_spec, self.shape)

    def write(self, path: Path) -> None:
        """Write `run.yaml`."""
        write_text(path, dump_yaml({"id": self.id, **self.model_dump(mode="json")}))


def starts_from(runs: Mapping[str, Run]) -> dict[str, str]:
    """Return the run that has to be finished before a run can start, by id: its parent, or the next shorter trunk.

    Parameters
    ----------
    runs
        Runs by id, with all parents.
    """
    found = {run.id: run.parent.run.id for run in runs.values() if run.parent is not None}
    trunks: dict[str, list[Run]] = {}
    for run in runs.values():
        if run.keeps_state and run.parent is None:
            trunks.setdefault(str(run.trajectory), []).append(run)
    for along in trunks.values():
        ordered = sorted(along, key=lambda run: run.steps)
        found |= {later.id: earlier.id for earlier, later in itertools.pairwise(ordered)}
    return found


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
