"""GPU memory of a training step: pure arithmetic, no torch.

What is counted, in bytes, with p the bytes of a product's numbers (2 under bfloat16, else 4) and r those of a
parameter and of the residual stream (4, or 2 where parameters are bfloat16):

state
    weights and AdamW's two moments, 3 r per parameter, and gradients, r per parameter, where they are kept from one
    micro-batch to the next (one micro-batch: only the head's is there while activations are).
activations
    what a micro-batch keeps for its backward pass. Per token and layer of width D, feed-forward width F and K of H key
    and value heads: two sums of the residual (2 r D), the normed inputs of both halves (2 p D), rotated queries and
    keys, p D (1 + K/H), the product that holds the values, p D (1 + 2 K/H), attention's output (p D), gate and up
    (2 p F) and their product (p F). Once: the embedded tokens (r D) and the normed features of the head (p D).
compression
    per weight the copy that products read (p) and what the gradient rule keeps of it: nothing for straight-through,
    1 byte for a gate (1 bit where a kernel rotates and rounds), 5 for a trained scale (gate and float32 slope), 4 for
    noise. Compressed activations are copies of attention's output (p D), and keep a gate of every input of a linear
    layer (3 D + F numbers).
peak
    the larger of two moments on top of these: the loss (one chunk of logits, the head's copy, its float32 gradient
    and the features' gradient) and the backward pass of one block.

The estimate leaves out the CUDA context (about 0.5 GiB), the allocator's fragments and temporary arrays while a weight
is compressed.
"""

from dataclasses import dataclass

from qpipe.accounting import count_parameters, linear_shapes
from qpipe.formats import Representation, TensorFormat
from qpipe.recipe import ModelShape
from qpipe.runs import Run

GPU_LOGITS = 2**28
"""Logits held at once while computing the loss on a GPU (count): 0.5 GiB in bfloat16."""

_BATCH_TOKENS = 32768

GIB = 2**30


def sequences_at_once(shape: ModelShape, batch_sequences: int) -> int:
    """Return how many sequences go through the model together, in training (micro-batch) and in validation.

    A function of the run alone, never of the machine: a representation whose scale spans the whole activation tensor
    sees the batch, so that the grouping is part of the result. It divides `batch_sequences`.
    """
    limit = max(1, _BATCH_TOKENS * min(1024, shape.width) // shape.width // shape.context)
    return max(count for count in range(1, min(limit, batch_sequences) + 1) if batch_sequences % count == 0)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training step on one device, by use."""

    state: float
    """weights, moments, and gradients that outlive a micro-batch"""
    activations: float
    """kept for backward by the dense model"""
    compression: float
    """kept for backward beyond that: copies and gates of compressed numbers"""
    peak: float
    """on top of these at the worst moment"""
    end: float
    """weights, moments and all gradients, when nothing else is left"""

    @property
    def total(self) -> float:
        """Largest sum (bytes)."""
        return max(self.state + self.activations + self.compression + self.peak, self.end)

    @property
    def gib(self) -> float:
        """`total` in GiB."""
        return self.total / GIB


def step_memory(run: Run, sequences: int | None = None) -> StepMemory:
    """Return what a training step of a run needs on a GPU.

    Parameters
    ----------
    sequences
        Sequences in a micro-batch; None: as many as `qpipe train` takes on one device.
    """
    shape, training, count = run.shape, run.training, count_parameters(run.shape)
    sequences = sequences or sequences_at_once(shape, training.batch_sequences)
    tokens = sequences * shape.context
    short, long = _bytes(training.precision), _bytes(training.parameters)
    head = shape.vocab_size * shape.width
    several = sequences < training.batch_sequences
    gradients = long * (count.total if several else head)
    return StepMemory(
        state=3 * long * count.total + gradients,
        activations=tokens * _kept_per_token(shape, short, long),
        compression=count.blocks_linear * (0 if _exact(run) else short)
        + shape.layers * weight_gate_bytes(shape, run.format_spec)
        + tokens * shape.layers * activation_bytes(shape, run.format_spec, short),
        peak=max(
            short * (min(GPU_LOGITS, tokens * shape.vocab_size) + 2 * tokens * shape.width) + (short + long) * head,
            tokens * (3 * short * shape.feed_forward + 2 * (short + long) * shape.width) + 2 * long * head,
        ),
        end=4 * long * count.total,
    )


def kept_per_number(part: TensorFormat | None, block: int = 1) -> float:
    """Return the bytes that a gradient rule keeps of each number it represents, rotated in blocks of a size."""
    if part is None:
        return 0
    if part.rotates_and_rounds(block):
        return 1 / 8
    grid = part.parsed_grid
    if grid is not None and grid.family == "noise":
        return 4
    if part.gradient in ("learned-step", "stretched") or (part.gradient == "clip" and part.scale == "clip"):
        return 5
    return 0 if part.gradient in ("ste", "uniform-noise") and part.mask is None else 1


def weight_gate_bytes(shape: ModelShape, spec: Representation) -> float:
    """Return the bytes that gradient rules keep of a layer's weights."""
    layers = linear_shapes(shape)
    return sum(n * m * kept_per_number(spec.weights, spec.hadamard_block(n)) for _, n, m in layers)


def activation_bytes(shape: ModelShape, spec: Representation, short: int) -> float:
    """Return the bytes per token and layer that compressing the inputs of linear layers adds."""
    if spec.activations is None:
        return 0
    gates = (n * kept_per_number(spec.activations, spec.hadamard_block(n)) for _, n, _ in linear_shapes(shape))
    return short * shape.width + sum(gates)


def _kept_per_token(shape: ModelShape, short: int, long: int) -> float:
    """Return the bytes that a dense model keeps for the backward pass, per token."""
    width, shared = shape.width, shape.kv_heads * shape.head_dim
    attention = (width + shared) + (width + 2 * shared) + width
    layer = 2 * (long + short) * width + short * (attention + 3 * shape.feed_forward)
    return shape.layers * layer + (long + short) * width


def _bytes(word: str) -> int:
    return 2 if word == "bf16" else 4


def _exact(run: Run) -> bool:
    """Whether products read the parameters themselves, not copies of them."""
    return run.format_spec.weights is None and run.training.precision == run.training.parameters
