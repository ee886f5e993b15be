"""Parameters, FLOPs and bytes of a run: pure arithmetic, no torch.

Conventions, used everywhere in qpipe:

N
    non-embedding parameters: every weight of the decoder blocks plus all norms; the token embedding and the output
    head are not counted (QuEST, 2502.05003, counts so, and its published N are reproduced exactly).
D
    training tokens: sequences x context x optimizer steps, exact.
training FLOPs
    6 (N_linear + head) per token for the matmuls of forward and backward, plus causal attention scores and their
    product with the values: 6 * layers * context * width per token (half of the 12 of full attention, since a causal
    mask leaves half of the scores). Norms, rotary embedding, softmax and the optimizer are not counted.
"""

from dataclasses import dataclass

from qpipe.recipe import ModelShape


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by group; `non_embedding` is the N of the laws."""

    blocks_linear: int
    """weights of the linear layers inside the blocks, the ones a representation compresses"""
    norms: int
    """RMSNorm gains, the final one included, and biases where there are any"""
    embedding: int
    """token embedding (vocab_size x width)"""
    head: int
    """output head; 0 when tied to the embedding"""

    @property
    def non_embedding(self) -> int:
        """N: block linears + norms (count)."""
        return self.blocks_linear + self.norms

    @property
    def total(self) -> int:
        """All parameters (count)."""
        return self.non_embedding + self.embedding + self.head


def linear_shapes(shape: ModelShape) -> list[tuple[str, int, int]]:
    """Return (name, in_features, out_features) of each compressed linear layer of one block, in forward order."""
    key_value = shape.kv_heads * shape.head_dim
    return [
        ("attention.qkv", shape.width, shape.width + 2 * key_value),
        ("attention.out", shape.width, shape.width),
        ("feed_forward.gate_up", shape.width, 2 * shape.feed_forward),
        ("feed_forward.down", shape.feed_forward, shape.width),
    ]


def count_parameters(shape: ModelShape) -> ParameterCount:
    """Count the parameters of a decoder by group."""
    block = sum(inputs * outputs for _, inputs, outputs in linear_shapes(shape))
    embedding = shape.vocab_size * shape.width
    biases = shape.width + 2 * shape.kv_heads * shape.head_dim if shape.qkv_bias else 0
    return ParameterCount(
        blocks_linear=shape.layers * block,
        norms=(2 * shape.layers + 1) * shape.width + shape.layers * biases,
        embedding=embedding,
        head=0 if shape.tied_embeddings else embedding,
    )


def training_flops_per_token(shape: ModelShape) -> float:
    """Return forward + backward FLOPs per training token (see the module's conventions)."""
    count = count_parameters(shape)
    head = shape.vocab_size * shape.width
    return 6.0 * (count.blocks_linear + head) + 6.0 * shape.layers * shape.context * shape.width


def training_flops(shape: ModelShape, tokens: int) -> float:
    """Return the FLOPs of training on `tokens` tokens."""
    return training_flops_per_token(shape) * tokens


MIB = 2**20
NORM_BITS = 16
"""Bits at which norms and other weights outside the representation are counted."""


def model_mib(compressed: float, bits: float, embedding: float, embedding_bits: float = 16, other: float = 0) -> float:
    """Return the size of a model's weights (MiB): linear layers at `bits`, embedding and head at `embedding_bits`.

    ParetoQ's size axis (2502.02631, figures 1 and 7) counts payload bits, 1.58 for ternary, and neither scales nor
    norms; its figures differ in `embedding_bits`: 16 in figure 1 of the first version, 4 in figure 7. Stored bits per
    weight, with scales and masks, and `other` give the size on disk instead.

    Parameters
    ----------
    compressed
        Weights of the linear layers (count) at `bits` each.
    embedding
        Weights of the embedding, and of the head where it is not tied (count).
    other
        Weights at 16 bits (count): norms, and all linear layers of a dense model.
    """
    return (compressed * bits + embedding * embedding_bits + other * NORM_BITS) / 8 / MIB
