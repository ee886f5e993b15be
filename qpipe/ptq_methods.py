"""The named methods of post-training quantization: group shape, code books, allocator, way of rounding.

A description without torch, so that studies can name methods; what it describes is done in `qpipe.ptq`.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qpipe.errors import QpipeError, nearest

Kind = Literal["laplace", "gauss", "uniform", "lloyd-max"]
"""Families of code books (`qpipe.ptq.codebooks`)."""

Allocator = Literal["uniform", "layer", "variance", "closed-form", "table", "measured", "exact"]
"""Who decides depths, and on what:

uniform      one depth, or two neighbouring ones spread evenly; looks at nothing
layer        per layer, error measured, coefficients of the linearity theorem
variance     per group, variance x measured table D(B), blind to sensitivities
closed-form  per group, sensitivity x variance x 4^-B: the paper's model
table        per group, sensitivity x variance x D(B) measured on a sample of each layer's groups
measured     per group, sensitivity x its own error measured at every depth
exact        the same, solved to optimality by dynamic programming (small models)
"""


class Method(BaseModel):
    """How weights are quantized after training; every field can be changed by the user."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="label of the method, also of the representation in loss tables")
    rows: int = Field(ge=1, description="rows per group")
    columns: int = Field(ge=0, description="input columns per group; 0 for the whole width")
    clustered: bool = Field(default=False, description="sort rows by sensitivity into clusters before cutting groups")
    codebook: Kind = Field(description="levels of each depth")
    offset: bool = Field(default=False, description="give each group an offset beside its scale (16 bits)")
    rotation: int = Field(default=0, ge=0, description="block of the Hadamard rotation of the inputs; 0 for none")
    allocation: Allocator = Field(description="who decides the depths")
    probe: Literal["hidden", "loss"] = Field(
        default="hidden",
        description="output whose error counts: hidden state before the head, or the loss itself (Fisher)",
    )
    components: int = Field(
        default=0, ge=0, description="principal components of the hidden state that probes span; 0 for all directions"
    )
    positions: int = Field(default=0, ge=0, description="tokens per sequence that probes touch; 0 for all")
    tempered: bool = Field(
        default=False,
        description="let plans that trust sensitivities less, where there are any, and, with feedback, evenly spread "
        "depths compete on held-out text",
    )
    feedback: bool = Field(default=False, description="push each column's error to later columns (GPTQ)")
    damping: float = Field(default=0.01, gt=0, description="share of the mean diagonal added to GPTQ's Hessian")
    bias_correction: bool = Field(default=False, description="add a bias that keeps each output's mean")
    iterations: int = Field(default=1, ge=1, description="rounds of measuring sensitivities and quantizing anew")
    sequences: int = Field(default=16, ge=1, description="calibration sequences per round (and for GPTQ's Hessians)")

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.rotation & (self.rotation - 1):
            problems.append(f"rotation {self.rotation}: a Hadamard block is a power of two")
        if self.rotation and (self.clustered or self.needs_sensitivities):
            problems.append(
                f"rotation {self.rotation} mixes the input columns whose sensitivities allocation "
                f"'{self.allocation}' or clustered rows measure; use allocation uniform or layer, rows not clustered"
            )
        if self.clustered and not self.needs_sensitivities and self.allocation != "variance":
            problems.append("clustered rows are sorted by sensitivity; use an allocation that measures it")
        if problems:
            raise QpipeError(problems)
        return self

    @property
    def needs_sensitivities(self) -> bool:
        """Whether gradient second moments are measured."""
        return self.allocation in ("closed-form", "table", "measured", "exact")

    @property
    def streams(self) -> bool:
        """Whether the final rounding needs each layer's inputs."""
        return self.feedback or self.bias_correction

    @property
    def uses_seed(self) -> bool:
        """Whether calibration text or noise is drawn, so that seeds differ."""
        return not self.data_free or self.allocation == "layer"

    @property
    def data_free(self) -> bool:
        """Whether no calibration text is needed."""
        return not (self.needs_sensitivities or self.streams)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="cvxq",
            rows=1,
            columns=0,
            codebook="lloyd-max",
            allocation="table",
            probe="loss",
            tempered=True,
            feedback=True,
            iterations=2,
            sequences=32,
        ),
        Method(name="rtn", rows=1, columns=128, codebook="uniform", allocation="uniform"),
        Method(name="gptq", rows=1, columns=128, codebook="uniform", allocation="uniform", feedback=True, sequences=64),
        Method(name="higgs", rows=1, columns=1024, codebook="lloyd-max", rotation=1024, allocation="layer"),
    )
}


def get_method(name: str, **changes: object) -> Method:
    """Return a named method with some fields changed (errors: unknown name, unknown or impossible fields)."""
    if name not in METHODS:
        raise QpipeError(f"no method '{name}'{nearest(name, METHODS)}; known: {', '.join(METHODS)}")
    unknown = sorted(set(changes) - set(Method.model_fields))
    if unknown:
        known = ", ".join(Method.model_fields)
        raise QpipeError([f"a method has no '{u}'{nearest(u, Method.model_fields)}; it has {known}" for u in unknown])
    try:
        return Method.model_validate({**METHODS[name].model_dump(), **changes})
    except ValidationError as error:
        raise QpipeError([f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]) from error
