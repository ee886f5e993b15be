"""Post-training quantization in a study: which finished dense runs are quantized, by which methods, to which sizes.

Jobs are the product dense runs x methods x bits x calibration seeds (one seed for methods that draw nothing). A job is
no run: nothing is trained, its parent's id says on what it rests, and its own id adds a digest of method, bits and
calibration. Its loss enters the loss table as representation `w2.5-cvxq` in a partition of its own, beside the loss of
the same weights before.
"""

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from qpipe.errors import QpipeError, nearest
from qpipe.identity import digest
from qpipe.ptq_methods import METHODS, Method, get_method
from qpipe.runs import Run


class Ptq(BaseModel):
    """What is quantized after training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: list[str] = Field(default=["cvxq"], min_length=1, description="methods: cvxq, gptq, higgs, rtn")
    bits: list[Annotated[float, Field(gt=0, le=16)]] = Field(
        min_length=1, description="average bits per weight, everything counted; any numbers"
    )
    sizes: list[str] | None = Field(default=None, description="sizes whose dense runs are quantized; all if left out")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        default=[0], min_length=1, description="seeds of calibration text and probes"
    )
    settings: dict[str, Any] = Field(
        default={}, description="fields of the methods to change, e.g. {sequences: 16}; see docs/ptq.md"
    )

    def chosen(self) -> dict[str, Method]:
        """Return the methods by name, changed as asked (errors: unknown names, unknown or impossible fields)."""
        return {name: get_method(name, **self.settings) for name in self.methods}

    def problems(self, sizes: Iterable[str]) -> Iterator[str]:
        """Yield what is wrong with the section in a study of these sizes."""
        known = list(sizes)
        for size in self.sizes or []:
            if size not in known:
                yield f"size '{size}' is not in this study{nearest(size, known)}; it has {', '.join(known)}"
        for name in self.methods:
            try:
                get_method(name, **(self.settings if name in METHODS else {}))
            except QpipeError as error:
                yield from error.problems
        if len(set(self.methods)) < len(self.methods):
            yield "a method is named twice"


@dataclass(frozen=True)
class PtqJob:
    """One quantization.

    Attributes
    ----------
    parent
        The dense run.
    method, bits, seed
        How, to how many bits per weight, and the seed of calibration.
    """

    parent: Run
    method: Method
    bits: float
    seed: int

    @property
    def representation(self) -> str:
        """Name in the loss table, e.g. `w2.5-cvxq`."""
        return ptq_representation(self.method.name, self.bits)

    @property
    def id(self) -> str:
        """Name of the job: parent, representation, calibration seed and a digest of everything that decides it."""
        fields = {"parent": self.parent.id, "method": self.method.model_dump(), "bits": self.bits, "seed": self.seed}
        return f"{self.parent.id}-{self.representation}-c{self.seed}-{digest(fields)}"

    def options(self, settings: Iterable[str]) -> str:
        """Return the command-line options of `qpipe ptq`; `settings` are the fields that the study changes."""
        changes = "".join(f" --set {shlex.quote(f'{name}={getattr(self.method, name)}')}" for name in sorted(settings))
        return f"--method {self.method.name} --bits {self.bits!r} --seed {self.seed}{changes}"


def ptq_representation(method: str, bits: float) -> str:
    """Return the name of a quantized model in loss tables: what was asked for, as in `w2.5-cvxq`."""
    return f"w{bits:g}-{method}"


def ptq_jobs(section: Ptq | None, runs: Iterable[Run]) -> list[PtqJob]:
    """Return the jobs of a section over the dense runs among a study's runs."""
    if section is None:
        return []
    methods = section.chosen().values()
    dense = [
        run
        for run in runs
        if run.representation_name == "dense" and (section.sizes is None or run.size in section.sizes)
    ]
    return [
        PtqJob(run, method, bits, seed)
        for run in dense
        for method in methods
        for bits in dict.fromkeys(section.bits)
        for seed in (dict.fromkeys(section.seeds) if method.uses_seed else section.seeds[:1])
    ]


def ptq_states(jobs: Iterable[PtqJob], folder: Path) -> dict[str, int]:
    """Count jobs by state below a study's results: done, begun (running, or killed and to be resumed), missing."""
    counts = {"done": 0, "begun": 0, "missing": 0}
    for job in jobs:
        place = folder / "ptq" / job.id
        counts["done" if (place / "ptq.json").exists() else "begun" if place.exists() else "missing"] += 1
    return counts


def ptq_summary(counts: dict[str, int]) -> str:
    """Return the counts in words, empty where nothing is quantized."""
    total = sum(counts.values())
    words = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{total} quantizations after training ({words})" if total else ""
