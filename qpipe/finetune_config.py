"""Finetuned runs: a dense model first, the same model under a representation afterwards.

A section names representations, total token budgets B and splits: the share f of B that is trained dense. f = 0 is
training under the representation from scratch, f = 1 a dense model whose weights are rounded, and everything between
spends f B tokens dense and (1 - f) B under the representation. Three modes say how the learning rate goes on:

``finished``
    The dense model is finished first, with the ladder's schedule drawn over its own f B tokens, and then finetuned by
    ParetoQ's recipe (2502.02631): fresh optimizer, cosine to zero without warm-up, its own learning rates.
``branch``
    The dense model is a trunk at a constant rate; a child branches off it at f B with the trunk's moments, goes on at
    that rate and spends the last `decay_fraction` of its own steps decaying. One trunk per size and seed serves every
    split of every budget.
``fused``
    One schedule over all of B, warm-up, constant rate, decay over the last `decay_fraction` of B; only the
    representation changes at f B, so that the decay is part of the finetuning (2509.22935).

The ends f = 0 and f = 1 of `branch` and `fused` are the same runs, `NAME:wsd0` and `NAME:wsd100`; their dense reference
is `dense:wsd100`. Between, a run is labelled by mode and percentage: `w2-seq:branch90`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qpipe.formats import Representation, resolve
from qpipe.recipe import PARETOQ, ModelShape, Training, is_low_bit
from qpipe.runs import Parent, Run

DENSE = Representation(name="dense")


class Finetune(BaseModel):
    """One family of finetuned runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["finished", "branch", "fused"] = Field(description="how the learning rate goes on after the split")
    label: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z][A-Za-z.-]*$",
        description="word for the mode in tables, where two sections share one",
    )
    representations: list[str | dict[str, Any]] = Field(
        min_length=1, description="what the dense model is finetuned to; `dense` trains on without compression"
    )
    splits: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(
        default=None, min_length=1, description="shares of the total budget trained dense, from 0 to 1"
    )
    qat_tokens: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, min_length=1, description="instead of splits: tokens after a dense model of the whole budget"
    )
    low_bit_tokens_factor: float = Field(
        default=1.0, gt=0, description="factor on `qat_tokens` at 2 bits and below; ParetoQ's is 3"
    )
    sizes: list[str] | None = Field(default=None, min_length=1, description="sizes, else the study's")
    learning_rate: float | None = Field(
        default=None, gt=0, description="peak rate of the finetuning; else the trunk's, and ParetoQ's where finished"
    )
    low_bit_learning_rate_factor: float = Field(
        default=1.0, gt=0, description="factor on `learning_rate` at 2 bits and below; ParetoQ's is 2"
    )
    parameters: Literal["fp32", "bf16"] = Field(
        default="fp32", description="master weights of the finetuning where finished; ParetoQ's code has bf16"
    )
    decay_fraction: float = Field(default=0.2, gt=0, le=1, description="branch, fused: share of the steps that decay")
    warmup_tokens_per_parameter: float = Field(
        default=1.0, ge=0, description="branch, fused: warm-up of the trunk, in tokens per nominal parameter"
    )

    @property
    def word(self) -> str:
        """What stands for the section in labels."""
        return self.label or self.mode

    def problems(self, default_method: str, known_sizes: set[str], precision: str) -> Iterator[str]:
        """Yield what types cannot say."""
        if self.parameters == "bf16" and precision != "bf16":
            yield f"parameters in bf16 need `ladder: {{precision: bf16}}`, found {precision}"
        if (self.splits is None) == (self.qat_tokens is None):
            yield "give either splits (e.g. [0, 0.5, 0.9, 1]) or qat_tokens"
        if self.qat_tokens is not None and self.mode == "fused":
            yield "qat_tokens lengthen a finished schedule; mode fused draws one over a total budget: give splits"
        if self.mode == "fused" and self.decay_fraction == 1:
            yield "a schedule that decays from its first step has no trunk to branch off: decay_fraction below 1"
        if self.parameters == "bf16" and self.mode != "finished":
            yield "parameters in bf16 belong to ParetoQ's recipe: use mode finished"
        if self.low_bit_learning_rate_factor != 1 and self.learning_rate is None:
            yield "low_bit_learning_rate_factor needs learning_rate"
        if unknown := sorted(set(self.sizes or []) - known_sizes):
            yield f"sizes {unknown} are not in the ladder; it has {sorted(known_sizes)}"
        for entry in self.representations:
            if not isinstance(entry, str) and "name" not in entry:
                yield "representations: an inline composition needs `name`"
                continue
            kind = resolve(entry, default_method=default_method)
            if kind.weights is not None and kind.weights.power != 1 and self.mode != "finished":
                yield f"representations: '{kind.name}' trains another parameter than the weight; use mode finished"


@dataclass(frozen=True)
class Ground:
    """What a section grows on: one size of the ladder with a seed and a corpus."""

    size: str
    nominal: int
    shape: ModelShape
    training: Training
    corpus: str
    seed: int

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.training.batch_sequences * self.shape.context

    def run(
        self,
        label: str,
        kind: Representation,
        steps: int,
        training: Training,
        parent: Parent | None = None,
    ) -> Run:
        """Return a run of this size; `label` is its representation's name in tables."""
        before = 0 if parent is None else parent.run.first_step + parent.run.steps
        return Run(
            size=self.size,
            representation_name=label,
            tokens_per_parameter=(before + steps) * self.tokens_per_step / self.nominal,
            shape=self.shape,
            training=training,
            steps=steps,
            representation=kind.canonical(),
            corpus=self.corpus,
            seed=self.seed,
            parent=parent,
        )


def finetuned_runs(section: Finetune, ground: Ground, tokens: float, default_method: str) -> Iterator[Run]:
    """Yield the runs of a section for one size, seed and total budget (tokens), each after the parents it needs."""
    steps = max(1, int(tokens // ground.tokens_per_step))
    for entry in section.representations:
        kind = resolve(entry, default_method=default_method)
        for split in section.splits or []:
            yield from with_parents(_split_run(section, ground, steps, split, kind))
        for asked in section.qat_tokens or []:
            yield from with_parents(_longer_run(section, ground, steps, asked, kind))


def with_parents(run: Run) -> Iterator[Run]:
    """Yield a run's ancestors, the first one first, and then the run."""
    if run.parent is not None:
        yield from with_parents(run.parent.run)
    yield run


def _split_run(section: Finetune, ground: Ground, steps: int, split: float, kind: Representation) -> Run:
    dense_steps = round(split * steps)
    if section.mode == "finished":
        return _finished(section, ground, dense_steps, steps - dense_steps, kind, _label(kind, section.word, split))
    joint = _wsd(section, ground)
    if dense_steps == steps or (kind.is_dense and not dense_steps):
        whole = _decayed(ground, steps, steps, joint)
        rounded = Parent(run=whole, optimizer="fresh")
        return whole if kind.is_dense else ground.run(_label(kind, "wsd", 1), kind, 0, joint, rounded)
    if not dense_steps:
        return ground.run(_label(kind, "wsd", 0), kind, steps, joint)
    label, rate = _label(kind, section.word, split), _rate(section, kind)
    if section.mode == "branch":
        own = {"warmup_steps": None, "learning_rate": rate or joint.learning_rate}
        parent = Parent(run=_trunk(ground, dense_steps, joint), optimizer="kept")
        return ground.run(label, kind, steps - dense_steps, joint.model_copy(update=own), parent)
    before = _decayed(ground, dense_steps, steps, joint)
    parent = Parent(run=before, optimizer="kept", horizon=steps)
    changed = joint.model_copy(update={"learning_rate": rate or joint.learning_rate})
    return ground.run(label, kind, steps - dense_steps, changed, parent)


def _longer_run(section: Finetune, ground: Ground, steps: int, asked: int, kind: Representation) -> Run:
    """Return a finetuning of so many tokens after a dense model of the whole budget."""
    low = kind.weights is not None and is_low_bit(_bits(kind))
    own = int(asked * (section.low_bit_tokens_factor if low else 1) // ground.tokens_per_step)
    label = f"{kind.name}:{section.word}+{asked}"
    if section.mode == "finished":
        return _finished(section, ground, steps, own, kind, label)
    joint = _wsd(section, ground)
    changed = {"warmup_steps": None, "learning_rate": _rate(section, kind) or joint.learning_rate}
    parent = Parent(run=_trunk(ground, steps, joint), optimizer="kept")
    return ground.run(label, kind, own, joint.model_copy(update=changed), parent)


def _finished(section: Finetune, ground: Ground, dense_steps: int, steps: int, kind: Representation, label: str) -> Run:
    """Return a finetuning of a finished dense run; without dense steps an ordinary run from scratch."""
    if not dense_steps:
        return ground.run(kind.name, kind, steps, ground.training)
    dense = ground.run("dense", DENSE, dense_steps, ground.training)
    if kind.is_dense and not steps:
        return dense
    training = PARETOQ.training(
        _bits(kind),
        batch_sequences=ground.training.batch_sequences,
        precision=ground.training.precision,
        learning_rate=_rate(section, kind),
        parameters=section.parameters,
    )
    return ground.run(label, kind, steps, training, Parent(run=dense, optimizer="fresh"))


def _wsd(section: Finetune, ground: Ground) -> Training:
    """Return the ladder's policy with one schedule: absolute warm-up, constant rate, linear decay."""
    warmup = round(section.warmup_tokens_per_parameter * ground.nominal / ground.tokens_per_step)
    return ground.training.model_copy(
        update={
            "schedule": "wsd",
            "warmup_fraction": 0.0,
            "warmup_steps": warmup,
            "decay_fraction": section.decay_fraction,
        }
    )


def _trunk(ground: Ground, steps: int, joint: Training) -> Run:
    """Return the dense run at a constant rate; how it would decay is none of its business."""
    default = Training.model_fields["decay_fraction"].default
    constant = joint.model_copy(update={"schedule": "constant", "decay_fraction": default})
    return ground.run("dense:trunk", DENSE, steps, constant)


def _decayed(ground: Ground, steps: int, horizon: int, joint: Training) -> Run:
    """Return the dense run that has taken `steps` of a schedule of `horizon` steps."""
    constant_steps = int(horizon - joint.decay_fraction * horizon)
    if steps <= constant_steps:
        return _trunk(ground, steps, joint)
    if not constant_steps:
        # The schedule decays from the first step on, so that no trunk leads there: only its end can be trained.
        return ground.run("dense:wsd100", DENSE, steps, joint)
    parent = Parent(run=_trunk(ground, constant_steps, joint), optimizer="kept", horizon=horizon)
    label = "dense:wsd100" if steps == horizon else "dense:decaying"
    return ground.run(label, DENSE, steps - constant_steps, joint, parent)


def _rate(section: Finetune, kind: Representation) -> float | None:
    if section.learning_rate is None:
        return None
    low = kind.weights is not None and is_low_bit(_bits(kind))
    return section.learning_rate * (section.low_bit_learning_rate_factor if low else 1.0)


def _bits(kind: Representation) -> float:
    """Return the bits of a weight's code; 16 where weights have no grid."""
    grid = None if kind.weights is None else kind.weights.parsed_grid
    return 16.0 if grid is None else float(grid.bits)


def _label(kind: Representation, word: str, split: float) -> str:
    return f"{kind.name}:{word}{100 * split:.4g}"
