"""Recipes: named policies that turn a model size into a shape, a learning rate, a batch and a schedule.

A recipe answers every question about a run that the study does not ask: how wide and deep is "30M", what is its peak
learning rate, how many tokens go into a step. It is data with a name and a version. The resolved numbers, the name and
the version all enter a run's identity, so a changed recipe (a new version) is a new experiment, while no other change
of code ever invalidates a trained run.

Two families ship:

``quest``
    The ladder of QuEST (arXiv 2502.05003, section 4.1 and appendix B; the same training code serves Quartet and
    "Unified Scaling Laws for Compressed Representations"): Llama-type decoders of head dimension 128, SwiGLU width
    8d/3 rounded up to a multiple of 256, AdamW (0.9, 0.95), weight decay 0.1 on linear weights, clipping at 1.0,
    512 x 512 tokens per step, 10 % warm-up from LR/100 and a cosine down to LR/10. Learning rates fall as 1/N from
    the 50M model on; every representation uses the dense one.
``tiny``
    The same design scaled down to models that a laptop trains in seconds, for demonstrations and tests. Its learning
    rates were chosen by short sweeps on documentation strings, not studied carefully.

A third recipe is for finetuning a finished dense model under a representation:

``paretoq``
    ParetoQ (arXiv 2502.02631): AdamW without weight decay, a cosine to zero without warm-up, 128 sequences of 2048
    tokens per step; 120,000 steps at 2e-5 for 1, 1.58 and 2 bits, 40,000 at 1e-5 for 3 and 4 (31.5 and 10.5 billion
    tokens). Betas, epsilon and clipping are the defaults of the trainer that its code uses.
"""

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from qpipe.errors import QpipeError, nearest


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Growing(_Frozen):
    """Part of a run's identity that may gain fields: those named in `later` are left out while they have their default.

    So a field added after runs were trained changes the id of none of them.
    """

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        found = handler(self)
        return {k: v for k, v in found.items() if k not in self.later or getattr(self, k) != fields[k].default}


class RopeScaling(_Frozen):
    """Slower rotary frequencies for contexts longer than those first trained on, as Llama 3.1 and 3.2 have them."""

    factor: float = Field(ge=1, description="by which wavelengths beyond the old context grow")
    low_freq_factor: float = Field(gt=0, description="old context over the shortest wavelength that grows in full")
    high_freq_factor: float = Field(gt=0, description="old context over the longest wavelength that stays")
    original_context: int = Field(ge=1, description="old context (tokens)")


class ModelShape(Growing):
    """The shape of a Llama-type decoder; every number that its parameter count depends on."""

    later: ClassVar[frozenset[str]] = frozenset({"rope_scaling", "qkv_bias"})

    layers: int = Field(ge=1, description="number of decoder blocks")
    width: int = Field(ge=2, description="residual width d (features)")
    heads: int = Field(ge=1, description="query heads")
    kv_heads: int = Field(ge=1, description="key and value heads; fewer than `heads` is grouped-query attention")
    feed_forward: int = Field(ge=1, description="hidden width of the SwiGLU block (features)")
    vocab_size: int = Field(ge=2, description="rows of the embedding and of the output head (tokens)")
    context: int = Field(ge=2, description="sequence length in training and validation (tokens)")
    tied_embeddings: bool = Field(default=False, description="share the embedding and the output head")
    rope_theta: float = Field(default=1e4, gt=0, description="base of the rotary position frequencies")
    norm_epsilon: float = Field(default=1e-5, gt=0, description="epsilon inside the root of RMSNorm")
    rope_scaling: RopeScaling | None = Field(default=None, description="Llama 3's scaling of the frequencies, if any")
    qkv_bias: bool = Field(default=False, description="queries, keys and values have biases, as Qwen 2's do")

    @property
    def head_dim(self) -> int:
        """Features per attention head."""
        return self.width // self.heads


class Training(Growing):
    """Optimizer, schedule and batch of a run, fully resolved."""

    later: ClassVar[frozenset[str]] = frozenset({"warmup_steps", "parameters"})

    recipe: str = Field(description="name of the recipe that these numbers come from")
    recipe_version: int = Field(ge=1, description="version of that recipe")
    learning_rate: float = Field(gt=0, description="peak learning rate")
    schedule: Literal["cosine", "wsd", "constant"] = Field(description="shape of the learning rate after warm-up")
    warmup_fraction: float = Field(ge=0, lt=1, description="share of the steps spent warming up from LR/100")
    warmup_steps: int | None = Field(default=None, ge=0, description="steps of warm-up, instead of a share of them")
    final_fraction: float = Field(ge=0, le=1, description="final learning rate as a share of the peak")
    decay_fraction: float = Field(default=0.2, gt=0, le=1, description="share of the steps that `wsd` spends decaying")
    weight_decay: float = Field(ge=0, description="AdamW decay of linear weights (not norms, embeddings, head)")
    beta1: float = Field(ge=0, lt=1, description="AdamW first-moment decay")
    beta2: float = Field(ge=0, lt=1, description="AdamW second-moment decay")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="AdamW epsilon")
    clip: float = Field(gt=0, description="gradient norm above which gradients are scaled down")
    batch_sequences: int = Field(ge=1, description="sequences per optimizer step, over all devices")
    precision: Literal["fp32", "bf16"] = Field(description="arithmetic of matmuls")
    parameters: Literal["fp32", "bf16"] = Field(
        default="fp32", description="master weights and AdamW's moments; trained scales are always fp32"
    )

    @model_validator(mode="after")
    def _short_parameters_need_short_products(self) -> Self:
        if self.parameters == "bf16" and self.precision != "bf16":
            raise ValueError("parameters in bf16 need precision bf16")
        return self


class Rung(_Frozen):
    """One size of a ladder."""

    nominal: int = Field(ge=1, description="parameters by which tokens-per-parameter ratios count (the size's name)")
    layers: int = Field(ge=1, description="number of decoder blocks")
    width: int = Field(ge=2, description="residual width (features)")
    heads: int = Field(ge=1, description="query heads")
    kv_heads: int | None = Field(default=None, ge=1, description="key and value heads; as many as `heads` if left out")
    learning_rate: float = Field(gt=0, description="peak learning rate")


class Recipe(_Frozen):
    """A ladder of sizes plus the training policy they share."""

    name: str
    version: int
    rungs: dict[str, Rung]
    context: int
    batch_sequences: int
    feed_forward_multiple: int
    precision: Literal["fp32", "bf16"]
    schedule: Literal["cosine", "wsd"] = "cosine"
    final_fraction: float = 0.1

    def shape(self, size: str, vocab_size: int) -> ModelShape:
        """Return the decoder shape of a named size (error: unknown size, with the nearest known one)."""
        rung = self._rung(size)
        return ModelShape(
            layers=rung.layers,
            width=rung.width,
            heads=rung.heads,
            kv_heads=rung.kv_heads or rung.heads,
            feed_forward=swiglu_width(rung.width, self.feed_forward_multiple),
            vocab_size=vocab_size,
            context=self.context,
        )

    def training(self, size: str) -> Training:
        """Return optimizer, schedule and batch of a named size."""
        return Training(
            recipe=self.name,
            recipe_version=self.version,
            learning_rate=self._rung(size).learning_rate,
            schedule=self.schedule,
            warmup_fraction=0.1,
            final_fraction=self.final_fraction,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            clip=1.0,
            batch_sequences=self.batch_sequences,
            precision=self.precision,
        )

    def _rung(self, size: str) -> Rung:
        if size not in self.rungs:
            known = ", ".join(self.rungs)
            raise QpipeError(f"recipe '{self.name}' has no size '{size}'{nearest(size, self.rungs)}; it has {known}")
        return self.rungs[size]


class FinetuneRecipe(_Frozen):
    """Training policy of quantization-aware finetuning, by bits per weight."""

    name: str
    version: int
    learning_rate: float
    low_bit_learning_rate: float
    steps: int
    low_bit_steps: int
    batch_sequences: int
    context: int

    def training(
        self,
        bits: float,
        *,
        batch_sequences: int,
        precision: Literal["fp32", "bf16"],
        learning_rate: float | None,
        parameters: Literal["fp32", "bf16"] = "fp32",
    ) -> Training:
        """Return optimizer and schedule for a weight format of so many bits; `learning_rate` None is the recipe's."""
        rate = self.low_bit_learning_rate if is_low_bit(bits) else self.learning_rate
        return Training(
            recipe=self.name,
            recipe_version=self.version,
            learning_rate=rate if learning_rate is None else learning_rate,
            schedule="cosine",
            warmup_fraction=0.0,
            final_fraction=0.0,
            weight_decay=0.0,
            beta1=0.9,
            beta2=0.999,
            clip=1.0,
            batch_sequences=batch_sequences,
            precision=precision,
            parameters=parameters,
        )

    def tokens(self, bits: float) -> int:
        """Return the published training length for a weight format of so many bits (tokens)."""
        steps = self.low_bit_steps if is_low_bit(bits) else self.steps
        return steps * self.batch_sequences * self.context


def is_low_bit(bits: float) -> bool:
    """Whether ParetoQ counts a weight format among those that rebuild the weights rather than adjust them."""
    return bits <= 2


def swiglu_width(width: int, multiple: int) -> int:
    """Return 8d/3 rounded up to a multiple: a gated block of a plain 4d one's size (2502.05003, app. B)."""
    return -(-(8 * width // 3) // multiple) * multiple


QUEST = Recipe(
    name="quest",
    version=1,
    context=512,
    batch_sequences=512,
    feed_forward_multiple=256,
    precision="bf16",
    rungs={
        "30M": Rung(nominal=30_000_000, layers=6, width=640, heads=5, learning_rate=1.2e-3),
        "50M": Rung(nominal=50_000_000, layers=7, width=768, heads=6, learning_rate=1.2e-3),
        "100M": Rung(nominal=100_000_000, layers=8, width=1024, heads=8, learning_rate=6e-4),
        "200M": Rung(nominal=200_000_000, layers=10, width=1280, heads=10, learning_rate=3e-4),
        "430M": Rung(nominal=430_000_000, layers=13, width=1664, heads=13, learning_rate=1.5e-4),
        "800M": Rung(nominal=800_000_000, layers=16, width=2048, heads=16, learning_rate=7.5e-5),
    },
)

TINY = Recipe(
    name="tiny",
    version=1,
    context=128,
    batch_sequences=16,
    feed_forward_multiple=32,
    precision="fp32",
    rungs={
        "10k": Rung(nominal=10_000, layers=2, width=32, heads=1, learning_rate=1e-2),
        "30k": Rung(nominal=30_000, layers=2, width=48, heads=2, learning_rate=1e-2),
        "100k": Rung(nominal=100_000, layers=2, width=64, heads=2, learning_rate=8e-3),
        "200k": Rung(nominal=200_000, layers=3, width=96, heads=3, learning_rate=6e-3),
        "400k": Rung(nominal=400_000, layers=3, width=128, heads=4, learning_rate=5e-3),
        "1M": Rung(nominal=1_000_000, layers=4, width=160, heads=5, learning_rate=4e-3),
        "3M": Rung(nominal=3_000_000, layers=5, width=256, heads=4, learning_rate=3e-3),
    },
)

PARETOQ = FinetuneRecipe(
    name="paretoq",
    version=1,
    learning_rate=1e-5,
    low_bit_learning_rate=2e-5,
    steps=40_000,
    low_bit_steps=120_000,
    batch_sequences=128,
    context=2048,
)

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (QUEST, TINY)}


def get_recipe(name: str, version: int | None = None) -> Recipe:
    """Return a named recipe; `version` given and different from the shipped one is an error, not a guess."""
    if name not in RECIPES:
        raise QpipeError(f"no recipe '{name}'{nearest(name, RECIPES)}; known: {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if version is not None and version != recipe.version:
        raise QpipeError(f"recipe '{name}' version {version} was asked for, this qpipe ships {recipe.version}")
    return recipe
