"""The typed description of a compressed representation: a composition of small parts.

A `Representation` says how a linear layer's weights and activations are stored and trained. Each side is a
`TensorFormat`:

    grid x group x scale rule x gradient estimator x mask (pattern, schedule, backward rule)

and both sides share one `rotation`, because x H^T and W H^T only cancel when H is the same. Leaving a side out keeps
it in 16-bit floating point; leaving both out is `dense`.

Defaults are part of what a composition means: `canonical()` leaves out every field that has its default value, so a
field added later never changes the identity of existing runs, and a default must never be changed.
"""

import math
import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qpipe.errors import QpipeError
from qpipe.formats.grids import Grid, parse_grid

Scale = Literal["gaussian", "absmax", "absmean", "mse", "learned", "elastic", "clip"]
Gradient = Literal["ste", "clip", "trust", "learned-step", "stretched", "uniform-noise"]
Backward = Literal["forward", "dense", "trust", "rms", "banded", "banded-area"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Mask(_Part):
    """Which numbers are kept. Either a share (`sparsity`) or a pattern (`n` of every `m`)."""

    sparsity: float | None = Field(default=None, gt=0, lt=1)
    """Share of zeros in each tensor (weights) or each token (activations), unstructured."""
    n: int | None = Field(default=None, ge=1)
    """Kept units in every `m`."""
    m: int | None = Field(default=None, ge=2)
    """Consecutive units that share one choice of `n`."""
    block: int = Field(default=1, ge=1)
    """Numbers per unit; 2 keeps or drops pairs together, as QuEST's 2:4 over pairs does."""
    schedule: Literal["constant", "cubic"] = "constant"
    """`constant`: the full sparsity from the first step; `cubic`: gradual magnitude pruning (Zhu & Gupta 2017)."""
    start: float = Field(default=0.25, ge=0, lt=1)
    """`cubic`: share of training after which sparsity begins to rise (2309.08520)."""
    end: float = Field(default=0.75, gt=0, le=1)
    """`cubic`: share of training at which the final sparsity is reached."""
    updates: int = Field(default=100, ge=1)
    """`cubic`: number of equal steps in which the ramp rises."""
    backward: Backward = "forward"
    """Which weights receive gradient: the kept ones (`forward`), all (`dense`), those a trust estimator trusts
    (`trust`, 2502.05003), or the rules of 2506.01863 section 5.2 (`rms`, `banded` = RBBM, `banded-area`)."""
    band: float | None = Field(default=None, ge=0, le=1)
    """`rms` and `banded`: p in (0, 0.5); `banded-area`: a in [0, 1]."""

    @property
    def share(self) -> float:
        """Share of zeros once the schedule has ended."""
        return self.sparsity if self.sparsity is not None else 1 - self.n / self.m  # type: ignore[operator]

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems: list[str] = []
        pattern = self.n is not None and self.m is not None
        if (self.sparsity is not None) == pattern or (self.n is None) != (self.m is None):
            problems.append("a mask needs either `sparsity` or both `n` and `m`")
        elif pattern and self.n >= self.m:  # type: ignore[operator]
            problems.append(f"{self.n}:{self.m} keeps everything; n must be smaller than m, as in 2:4")
        if self.block > 1 and not pattern:
            problems.append("`block` groups the units of an n:m pattern; leave it out with `sparsity`")
        if self.schedule == "cubic" and self.end <= self.start:
            problems.append(f"the ramp starts at {self.start} and ends at {self.end}; end must be later")
        problems.extend(self._band_problems())
        if problems:
            raise QpipeError(problems)
        return self

    def _band_problems(self) -> list[str]:
        banded = self.backward in ("rms", "banded", "banded-area")
        if not banded:
            return [] if self.band is None else [f"`band` has no meaning with backward '{self.backward}'"]
        if self.band is None:
            return [f"backward '{self.backward}' needs `band`"]
        if self.n is not None:
            return [f"backward '{self.backward}' compares with one threshold per tensor; use `sparsity` instead of n:m"]
        if self.backward != "banded-area" and not 0 < self.band < 0.5:
            return [f"backward '{self.backward}' needs `band` between 0 and 0.5, got {self.band}"]
        return []


class TensorFormat(_Part):
    """How one side (weights or activations) is represented and how gradients pass through it."""

    grid: str | None = None
    """A grid word such as `int4` or `e2m1` (see `qpipe.formats.grids`); none for sparsity alone."""
    group: Literal["tensor", "row"] | int = "row"
    """Numbers that share a scale: the whole tensor, one output row (weights) or token (activations), or a run of
    this many numbers along the input dimension."""
    scale: Scale | None = None
    """How the scale of a group is found."""
    scale_start: Literal["lsq", "absmax", "absmean"] | None = None
    """Trained scales only, value before the first step: `lsq` 2 mean|x| / sqrt(top level), or the rule of that name."""
    scale_format: Literal["float32", "float16", "e8m0", "e4m3"] = "float32"
    """How a scale is stored, and rounded in training: `e8m0` a power of two (MX), `e4m3` eight bits times one float32
    per tensor (NVFP4)."""
    gradient: Gradient | None = None
    """Estimator of the gradient through the rounding."""
    outer: float | None = Field(default=None, ge=1)
    """`trust`, 1 bit: numbers beyond `outer` times the top level lose their gradient (2502.05003)."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Share of numbers quantized in a training step, chosen afresh each time (Quant-Noise, 2004.07320)."""
    power: float = Field(default=1.0, ge=1)
    """Weights only: w = sign(v) |v|^power of the stored v (Powerpropagation, 2110.00296)."""
    published_slope: bool = False
    """`stretched`, ternary: keep the authors' slope 1 of a saturated weight's scale where the derivative is 2/3."""
    mask: Mask | None = None

    @property
    def parsed_grid(self) -> Grid | None:
        """The described grid, or None."""
        return None if self.grid is None else parse_grid(self.grid)

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn in training."""
        grid = self.parsed_grid
        return self.gradient == "uniform-noise" or self.share < 1 or (grid is not None and grid.family == "noise")

    def rotates_and_rounds(self, block: int) -> bool:
        """Whether GPUs rotate blocks of so many numbers and round them in one kernel, keeping a bit for each.

        That is QuEST's quantizer (2502.05003): uniform levels, a Gaussian scale per row, trust, and nothing else.
        """
        if (grid := self.parsed_grid) is None or grid.family != "rise" or not 16 <= block <= 128:
            return False
        return self == TensorFormat(grid=self.grid, scale="gaussian", gradient="trust")

    def is_local(self, block: int, *, per_token: bool) -> bool:
        """Whether a number's representation depends on its run of `block` neighbours and the whole tensor alone.

        Not on its row, then. `per_token`: unstructured masks choose within rows (activations).
        """
        grid, mask = self.parsed_grid, self.mask
        if self.scale in TRAINED_SCALES or (grid is not None and grid.family == "noise"):
            return False
        if mask is not None and (per_token if mask.m is None else block % (mask.m * mask.block) > 0):
            return False
        return grid is None or self.group == "tensor" or (isinstance(self.group, int) and block % self.group == 0)

    @field_validator("group")
    @classmethod
    def _group_size(cls, group: str | int) -> str | int:
        if isinstance(group, int) and not 2 <= group <= 65536:
            raise QpipeError(f"a group of {group} numbers; use 2 to 65536, `row` or `tensor`")
        return group

    @model_validator(mode="after")
    def _check(self) -> Self:
        grid = self.parsed_grid
        problems = _without_grid(self) if grid is None else _with_grid(self, grid)
        if self.mask is not None and self.mask.backward == "trust" and self.gradient != "trust":
            problems.append("mask backward 'trust' judges pruned numbers by a trust estimator; set gradient: trust")
        if problems:
            raise QpipeError(problems)
        return self


def _without_grid(part: TensorFormat) -> list[str]:
    problems = [
        f"`{field}` is set but there is no `grid` to use it; add a grid such as int4 or remove `{field}`"
        for field in ("scale", "gradient", "outer")
        if getattr(part, field) is not None
    ]
    if part.mask is None and part.power == 1:
        problems.append("the composition changes nothing; give a `grid`, a `mask` or leave this side out")
    return problems


_GRADIENTS_OF_LEARNED = {"learned": "learned-step", "elastic": "stretched", "clip": "clip"}
TRAINED_SCALES = tuple(_GRADIENTS_OF_LEARNED)
"""Scale rules whose scale is a parameter of the layer."""


def _with_grid(part: TensorFormat, grid: Grid) -> list[str]:
    if grid.family == "noise":
        extra = [field for field in ("scale", "gradient", "outer") if getattr(part, field) is not None]
        return [f"grid '{part.grid}' adds noise: `{field}` has no meaning, remove it" for field in extra]
    if part.gradient is None:
        return [f"grid '{part.grid}' needs `gradient`: {', '.join(Gradient.__args__)}"]  # type: ignore[attr-defined]
    if grid.family == "binary":
        return _with_binary_grid(part)
    if part.scale is None:
        return [f"grid '{part.grid}' needs `scale`: {', '.join(Scale.__args__)}"]  # type: ignore[attr-defined]
    return _scale_problems(part, grid) + _gradient_problems(part, grid)


def _with_binary_grid(part: TensorFormat) -> list[str]:
    problems = []
    if part.scale is not None:
        problems.append(f"grid '{part.grid}' finds its own scales by least squares; remove `scale`")
    if part.scale_format != "float32":
        problems.append(f"grid '{part.grid}' keeps its scales in float32; remove `scale_format`")
    if part.gradient not in ("ste", "clip"):
        problems.append(f"grid '{part.grid}' works with gradient ste or clip, not {part.gradient}")
    return problems


def _scale_problems(part: TensorFormat, grid: Grid) -> list[str]:
    problems = []
    if grid.dimension > 1 and part.scale != "gaussian":
        problems.append(f"vector grid '{part.grid}' is made for N(0, 1) data; use scale gaussian, not {part.scale}")
    if grid.dimension > 1 and part.mask is not None:
        problems.append(f"zeros inside the vectors of '{part.grid}' save no bits; use a scalar grid with the mask")
    if isinstance(part.group, int) and part.group % grid.dimension:
        problems.append(f"groups of {part.group} cut the {grid.dimension}-vectors of '{part.grid}'")
    if part.scale == "absmean" and part.grid not in ("ternary", "int1"):
        problems.append(f"scale absmean belongs to ternary and 1-bit grids (BitNet), not '{part.grid}'; try gaussian")
    if part.scale in TRAINED_SCALES and not grid.uniform:
        problems.append(f"scale {part.scale} needs an integer grid, not '{part.grid}'; try gaussian or mse")
    if part.scale == "elastic" and part.grid not in ("int1", "ternary", "int2"):
        problems.append(
            f"scale elastic is the stretched rule for int1, ternary and int2, not '{part.grid}'; try learned"
        )
    if (part.scale_start is not None) != (part.scale in TRAINED_SCALES):
        problems.append("`scale_start` is needed by the trained scales (learned, elastic, clip) and by no others")
    if part.scale_format != "float32" and part.scale in TRAINED_SCALES:
        problems.append(f"trained scales are float32; remove scale_format {part.scale_format}")
    return problems


def _gradient_problems(part: TensorFormat, grid: Grid) -> list[str]:
    problems = []
    needed = _GRADIENTS_OF_LEARNED.get(part.scale or "")
    if needed and part.gradient != needed:
        problems.append(f"scale {part.scale} is trained by gradient {needed}, not {part.gradient}")
    if not needed and part.gradient in ("learned-step", "stretched"):
        problems.append(f"gradient {part.gradient} trains a scale; use it with scale learned or elastic")
    if part.gradient == "uniform-noise" and not grid.uniform:
        problems.append(f"gradient uniform-noise needs an integer grid, not '{part.grid}'")
    if part.outer is not None and (part.gradient != "trust" or part.grid != "int1"):
        problems.append("`outer` belongs to gradient trust on grid int1")
    if part.published_slope and (part.gradient != "stretched" or part.grid != "ternary"):
        problems.append("`published_slope` belongs to gradient stretched on the ternary grid")
    return problems


class Representation(_Part):
    """A compressed representation R of a linear layer.

    `name` is the label in tables and figures and is no part of the identity; `canonical()` is.
    """

    name: str
    """Label in tables, e.g. `w4a4-quest`."""
    weights: TensorFormat | None = None
    activations: TensorFormat | None = None
    rotation: int = 0
    """Block size of the Hadamard rotation of the input dimension, shared by both sides; 0 for none. Where it does not
    divide the width, the block is the largest power of two up to it that does."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9:+._-]{0,63}", name):
            raise QpipeError(f"representation name '{name}': use up to 64 letters, digits and : + . _ -")
        return name

    @field_validator("rotation")
    @classmethod
    def _check_rotation(cls, rotation: int) -> int:
        if rotation and (not 2 <= rotation <= 4096 or rotation & (rotation - 1)):
            raise QpipeError(f"rotation {rotation}: a Hadamard block is a power of two from 2 to 4096, or 0 for none")
        return rotation

    @model_validator(mode="after")
    def _check_sides(self) -> Self:
        problems = []
        if self.rotation and self.is_dense:
            problems.append("`rotation` alone changes nothing; give `weights` or `activations`, or remove it")
        if self.activations is not None:
            problems += _activation_problems(self.activations)
        if problems:
            raise QpipeError(problems)
        return self

    @property
    def is_dense(self) -> bool:
        """Whether nothing is compressed."""
        return self.weights is None and self.activations is None

    @property
    def slug(self) -> str:
        """The name, safe in file names."""
        return self.name.replace(":", "-")

    def canonical(self) -> dict[str, Any]:
        """JSON-able fields that define the representation, defaults and name left out; `{}` is dense."""
        return self.model_dump(mode="json", exclude={"name"}, exclude_defaults=True)

    def hadamard_block(self, width: int) -> int:
        """Block size of the rotation for an input of `width` numbers (1: no rotation)."""
        return min(self.rotation, width & -width) if self.rotation else 1


def _activation_problems(part: TensorFormat) -> list[str]:
    problems = []
    if part.power != 1:
        problems.append("activations: `power` reparameterises weights only")
    if part.mask is not None and (part.mask.backward != "forward" or part.mask.schedule != "constant"):
        problems.append("activations: masks are top-k per token with a constant schedule and backward forward")
    if part.scale in TRAINED_SCALES and part.group != "tensor":
        problems.append(f"activations: a trained scale ({part.scale}) is one number per layer; set group: tensor")
    if part.grid is not None and (grid := parse_grid(part.grid)).family == "binary" and grid.optimal:
        problems.append("activations: optimal binary codes need a sort per token; use the greedy ones")
    return problems


def density_entropy(sparsity: float) -> float:
    """Entropy in bits per number of an unstructured mask with this share of zeros."""
    return -sum(p * math.log2(p) for p in (sparsity, 1 - sparsity) if p > 0)
