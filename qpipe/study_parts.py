"""The sections of a study file that are plain settings: ladder, rules, laws, fit options, tracking.

`qpipe.study` puts them together with corpus, tokenizer, finetuned and quantized runs, and expands the whole.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator

from qpipe.recipe import Rung

LawName = Literal["chinchilla", "compression", "capacity", "sparsity", "precision", "gamma", "qat-gap", "float"]


class Strict(BaseModel):
    """A frozen section that knows no other keys than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Ladder(Strict):
    """The recipe that turns a size into a shape and a training policy, and what this study changes of it."""

    recipe: str = Field(description="name of the recipe: quest, tiny")
    version: int | None = Field(default=None, ge=1, description="version of the recipe; asked for and checked")
    context: int | None = Field(default=None, ge=8, description="sequence length (tokens), else the recipe's")
    batch_sequences: int | None = Field(default=None, ge=1, description="sequences per step, else the recipe's")
    precision: Literal["fp32", "bf16"] | None = Field(default=None, description="arithmetic, else the recipe's")
    schedule: Literal["cosine", "wsd"] | None = Field(
        default=None, description="learning-rate shape, else the recipe's"
    )
    learning_rate_scale: float = Field(default=1.0, gt=0, description="factor on the recipe's learning rates")
    tied_embeddings: bool = Field(default=False, description="share embedding and output head")


class CustomSize(Rung):
    """A size that the recipe does not have."""

    name: str = Field(pattern=r"^[A-Za-z0-9.]+$", description="label of the size, used in run ids")


class Rule(Strict):
    """Selects runs: a run matches when it matches every key given. Values may be single or lists."""

    size: list[str] | None = Field(default=None, description="sizes")
    tokens_per_parameter: list[float] | None = Field(default=None, description="token budgets as ratios")
    tokens: list[int] | None = Field(default=None, description="token budgets as counts")
    representation: list[str] | None = Field(default=None, description="representations, by name")
    seed: list[int] | None = Field(default=None, description="seeds")

    @field_validator("*", mode="before")
    @classmethod
    def _single_value_is_a_list(cls, value: Any) -> Any:
        return value if value is None or isinstance(value, list) else [value]


class Law(Strict):
    """One law to fit."""

    law: LawName = Field(description="name of the law")
    representations: list[str] | None = Field(default=None, description="fit only these; all of the study if left out")
    fix: dict[str, float] = Field(default_factory=dict, description="parameters held at given values, e.g. {E: 1.69}")
    ptq: str | None = Field(
        default=None, description="law precision: method of the study's `ptq` whose losses are fitted too"
    )


class FitOptions(Strict):
    """How every law of the study is fitted."""

    bootstrap: int = Field(default=1000, ge=0, description="bootstrap resamples; 0 gives no intervals")
    level: float = Field(default=0.9, gt=0, lt=1, description="level of the intervals")
    seed: int = Field(default=0, ge=0, description="seed of the resampling")
    delta: float = Field(default=1e-3, gt=0, description="Huber threshold on log-loss residuals")
    exclude: str | None = Field(default=None, description="rows left out of every fit, e.g. 'd / n < 20'")


class Wandb(Strict):
    """Where runs are tracked. The environment's WANDB_MODE wins."""

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        default="auto", description="auto: online where an API key is set, else offline"
    )
    project: str = Field(default="qpipe", description="W&B project")
    entity: str | None = Field(default=None, description="W&B team or user")


def _size_kind(value: Any) -> str:
    return "named" if isinstance(value, str) else "custom"


Size = Annotated[Annotated[str, Tag("named")] | Annotated[CustomSize, Tag("custom")], Discriminator(_size_kind)]


def _representation_kind(value: Any) -> str:
    return "preset" if isinstance(value, str) else "composition"


RepresentationEntry = Annotated[
    Annotated[str, Tag("preset")] | Annotated[dict[str, Any], Tag("composition")], Discriminator(_representation_kind)
]
