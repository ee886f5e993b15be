"""A Llama-type decoder in one file.

    tokens -> embedding -> [ x + attention(norm(x));  x + feed_forward(norm(x)) ] * layers -> norm -> head -> logits

Root-mean-square norms before each half of a block, rotary positions, grouped-query attention, a SwiGLU feed-forward,
head tied to the embedding or not, no biases (but Qwen 2's on queries, keys and values, where asked for). With the same
weights its logits are those of `transformers`' `LlamaForCausalLM` up to float32 rounding.

Two things differ from the usual layout, neither of which changes a number:

* The query, key and value projections are one linear layer, and so are gate and up. They read the same input, and a
  representation works per output row (weights) and per token (activations), so fusing changes no result while it
  halves the number of matmuls and of activation quantizations.
* Logits are never stored: head, softmax and loss are one step (`qpipe.cross_entropy`).

Only the linear layers inside the blocks are under the run's representation; embedding, head, norms and the attention
product stay in high precision (2502.05003, appendix B). Shapes: B sequences, T tokens, D width, H heads, V vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qpipe import cpu_functions
from qpipe.attention import causal_attention, rotary_tables
from qpipe.compress import CompressedLinear, make_linear
from qpipe.compress.dense import DenseLinear, product_dtype
from qpipe.cross_entropy import chunk_rows, linear_cross_entropy
from qpipe.formats import Representation
from qpipe.recipe import ModelShape

if torch.cuda.is_available():
    from qpipe import triton_kernels, triton_norm

INIT_STD = 0.02
"""Standard deviation of initial weights; projections back into the residual get INIT_STD / sqrt(2 layers)."""


class Decoder(nn.Module):
    """Decoder-only language model.

    Parameters
    ----------
    shape
        Shape of the model.
    representation
        What the linear layers of the blocks are compressed to.
    device
        Where to create the parameters; `meta` creates none.

    The weights are uninitialised until `initialize` or `load_state_dict` has run.
    """

    cosine: Tensor
    sine: Tensor
    joins_norms = True
    """In training, a sum into the residual and the norm that reads it are one function, across blocks too."""

    def __init__(
        self, shape: ModelShape, representation: Representation, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.shape = shape
        with _Undrawn():
            self.embedding = Embedding(shape.vocab_size, shape.width, device=device)
            self.blocks = nn.ModuleList(Block(shape, representation, device) for _ in range(shape.layers))
            self.norm = nn.RMSNorm(shape.width, shape.norm_epsilon, device=device)
            self.head = DenseLinear(shape.width, shape.vocab_size, bias=False, device=device)
        if shape.tied_embeddings:
            self.head.weight = self.embedding.weight
        # Not part of the weights: recomputed from the shape wherever the model is built.
        cosine, sine = rotary_tables(shape)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw the weights: N(0, 0.02^2), output projections 0.02 / sqrt(2 layers), norms 1.

        Drawn on the CPU in a fixed order, so that every device and every representation starts from the same weights.
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = INIT_STD / math.sqrt(2 * self.shape.layers)
        for name, module in self.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
                bias.zero_()
            if isinstance(module, nn.RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(weight, nn.Parameter) and not (self.shape.tied_embeddings and name == "head"):
                std = residual_std if name.endswith(("attention.out", "feed_forward.down")) else INIT_STD
                given = not isinstance(module, CompressedLinear) and weight.is_cpu and weight.dtype == torch.float32
                drawn = weight if given else torch.empty(weight.shape)
                drawn.normal_(0.0, std, generator=generator)
                if isinstance(module, CompressedLinear):
                    module.load_dense_weight(drawn)  # some representations train another parameter than the weight
                elif not given:
                    weight.copy_(drawn)

    def set_progress(self, fraction: float) -> None:
        """Tell representations whose masks follow a schedule how much of training is done (0 to 1)."""
        for module in self.modules():
            if isinstance(module, CompressedLinear):
                module.set_progress(fraction)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Return the normed features (B, T, D) that the head reads."""
        length = tokens_BT.shape[1]
        cosine, sine = self.cosine[:length], self.sine[:length]
        joinable = self.embedding.weight.is_cuda or cpu_functions.fits(self.embedding.weight)
        if joinable and torch.is_grad_enabled() and self.joins_norms:
            return self._hidden_with_joined_norms(tokens_BT, cosine, sine)
        features = self.embedding(tokens_BT)
        for block in self.blocks:
            features = block(features, cosine, sine)
        return self.norm(features)

    def _hidden_with_joined_norms(self, tokens: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """The same features, where each sum into the residual is taken together with the norm that reads it."""
        blocks: list[Any] = list(self.blocks)
        norms = [*(block.attention_norm.weight for block in blocks), self.norm.weight]
        rows, epsilon = self.embedding.weight, self.shape.norm_epsilon
        measured = reads_mean_square(blocks[0].attention.qkv)
        if rows.is_cuda and rows.requires_grad:
            features, normed, mean_square = embed_norm(rows, tokens, norms[0], epsilon, measured)
        else:  # the embedding as a module: where weights are fixed a hook starts gradients there (`qpipe.ptq`)
            features, normed, mean_square = add_norm(self.embedding(tokens), None, norms[0], epsilon, measured)
        for block, next_norm in zip(blocks, norms[1:], strict=True):
            features, normed, mean_square = block(features, cosine, sine, normed, mean_square, next_norm)
        return normed

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return logits (B, T, V)."""
        return self.head(self.hidden(tokens_BT))

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the mean cross-entropy (nats/token, scalar) with its gradient."""
        hidden = self.hidden(tokens_BT).flatten(0, 1)
        return linear_cross_entropy(hidden, self.head.weight, targets_BT.flatten(), self.head.rounded)

    @torch.no_grad()
    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return each token's cross-entropy (nats), shape (B, T), float32, without gradient."""
        hidden = self.hidden(tokens_BT).flatten(0, 1)
        targets = targets_BT.flatten()
        rows = chunk_rows(hidden.device, self.shape.vocab_size)
        losses = [
            F.cross_entropy(self.head(part).float(), target, reduction="none")
            for part, target in zip(hidden.split(rows), targets.split(rows), strict=True)
        ]
        return torch.cat(losses).view(targets_BT.shape)


class _Undrawn(TorchFunctionMode):
    """Under it modules are made without drawing weights, which takes longer than everything else about a model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, unless it fills a tensor with random numbers."""
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return (kwargs or {}).get("tensor", *args[:1])
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    """One decoder block: attention and feed-forward, each read through a norm and added to the residual."""

    def __init__(self, shape: ModelShape, representation: Representation, device: torch.device | str | None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width, shape.norm_epsilon, device=device)
        self.attention = Attention(shape, representation, device)
        self.feed_forward_norm = nn.RMSNorm(shape.width, shape.norm_epsilon, device=device)
        self.feed_forward = FeedForward(shape, representation, device)

    def forward(
        self,
        features: Tensor,
        cosine: Tensor,
        sine: Tensor,
        normed: Tensor | None = None,
        mean_square: Tensor | None = None,
        next_norm: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
        """Map features (B, T, D) to features.

        With `normed` and `mean_square`, what `add_norm` made of the features and this block's first norm, and
        `next_norm`, the weight of the norm that reads the result, return what it makes of those.
        """
        normed = self.attention_norm(features) if normed is None else normed
        update = self.attention(normed, cosine, sine, mean_square)
        epsilon = self.feed_forward_norm.eps
        if next_norm is None:
            features = features + update
            return features + self.feed_forward(self.feed_forward_norm(features))
        weight, measured = self.feed_forward_norm.weight, reads_mean_square(self.feed_forward.gate_up)
        features, normed, mean_square = add_norm(features, update, weight, epsilon, measured)
        update = self.feed_forward(normed, mean_square)
        return add_norm(features, update, next_norm, epsilon, reads_mean_square(self.attention.qkv))


def add_norm(
    residual: Tensor, update: Tensor | None, weight: Tensor, epsilon: float | None, measured: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return residual + update (B, T, D), its root-mean-square norm in the precision in which products run, and, on
    GPUs and where that is to be `measured`, the mean square of the latter (B, T).
    """
    assert epsilon is not None
    dtype = product_dtype(residual) if update is None else update.dtype
    if residual.is_cuda:
        total, normed, mean_square = triton_norm.AddNorm.apply(residual, update, weight, epsilon, dtype, measured)
        return total, normed, mean_square if measured else None
    if update is not None and cpu_functions.fits(update):
        return (*cpu_functions.AddNorm.apply(residual, update, weight, epsilon), None)
    residual = residual if update is None else residual + update
    return residual, F.rms_norm(residual, weight.shape, weight, epsilon).to(dtype), None


def embed_norm(
    embedding: Tensor, tokens: Tensor, weight: Tensor, epsilon: float, measured: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the rows (B, T, D) of tokens (B, T) in an embedding (V, D) on a GPU, and what `add_norm` makes of them."""
    dtype = product_dtype(embedding)
    features, normed, mean_square = triton_norm.EmbedNorm.apply(embedding, tokens, weight, epsilon, dtype, measured)
    return features, normed, mean_square if measured else None


def reads_mean_square(layer: nn.Linear | CompressedLinear) -> bool:
    """Whether a layer rounds its inputs by a kernel that is faster where it is told their mean squares."""
    return isinstance(layer, CompressedLinear) and layer.reads_mean_square


def project(layer: nn.Linear | CompressedLinear, features: Tensor, mean_square: Tensor | None) -> Tensor:
    """Return the layer's product with features (B, T, D), whose mean squares (B, T) rounding them can use."""
    result: Tensor = layer(features, mean_square) if isinstance(layer, CompressedLinear) else layer(features)
    return result


class Attention(nn.Module):
    """Causal self-attention with rotary positions and, where `kv_heads` < `heads`, shared keys and values."""

    def __init__(self, shape: ModelShape, representation: Representation, device: torch.device | str | None) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        rows = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.qkv = make_linear(shape.width, rows, representation, bias=shape.qkv_bias, device=device)
        self.out = make_linear(shape.heads * shape.head_dim, shape.width, representation, device=device)

    def forward(self, features: Tensor, cosine: Tensor, sine: Tensor, mean_square: Tensor | None = None) -> Tensor:
        """Map normed features (B, T, D), of mean squares (B, T), to the attention's contribution to the residual."""
        batch, length, _ = features.shape
        qkv = project(self.qkv, features, mean_square).view(
            batch, length, self.heads + 2 * self.kv_heads, self.head_dim
        )
        return self.out(causal_attention(qkv, cosine, sine, self.heads, self.kv_heads).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer, 2002.05202)."""

    def __init__(self, shape: ModelShape, representation: Representation, device: torch.device | str | None) -> None:
        super().__init__()
        self.gate_up = make_linear(shape.width, 2 * shape.feed_forward, representation, device=device)
        self.down = make_linear(shape.feed_forward, shape.width, representation, device=device)

    def forward(self, features: Tensor, mean_square: Tensor | None = None) -> Tensor:
        """Map normed features (B, T, D), of mean squares (B, T), to the feed-forward's contribution to the residual."""
        gate_up = project(self.gate_up, features, mean_square)
        return project(self.down, *swiglu(gate_up, reads_mean_square(self.down)))


class Embedding(nn.Embedding):
    """Embedding (V, D) whose gradient on a GPU is a kernel of its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of tokens (B, T), shape (B, T, D)."""
        return embed(input, self.weight)


def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """Return the rows of the embedding (V, D) of tokens (B, T)."""
    if weight.is_cuda:
        rows: Tensor = triton_kernels.Embedding.apply(weight, tokens)
        return rows
    return F.embedding(tokens, weight)


def swiglu(gate_up: Tensor, measured: bool) -> tuple[Tensor, Tensor | None]:
    """Return silu(gate) * up of the two halves of the last dimension, (..., 2 F) -> (..., F).

    On GPUs and where that is to be `measured`, also its mean square, (...).
    """
    if gate_up.is_cuda:
        product, mean_square = triton_kernels.SwiGLU.apply(gate_up, measured)
        return product, mean_square if measured else None
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up, None
