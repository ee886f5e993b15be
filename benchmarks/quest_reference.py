"""The training step of QuEST's published code (2502.05003) as an algorithm, to time ours against.

Separate q, k, v, gate and up layers, each quantizing its own input; the Hadamard rotation as one full block-diagonal
product; rounding left to autograd and the compiler; logits in float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qpipe.compress.gaussian import gaussian_multiplier
from qpipe.formats import TensorFormat, resolve
from qpipe.recipe import ModelShape

STEP = {bits: gaussian_multiplier(f"int{bits}") for bits in (2, 3, 4, 8)}
"""Best step of 2^bits mid-rise levels in standard deviations; looked up here, since compiling the lookup fails."""


def _trust(rotated: Tensor, bits: int) -> Tensor:
    """Round to 2^bits mid-rise levels at the Gaussian-optimal scale; gradient where the error is at most half a step.

    As the published code writes it: the numbers times a float mask, plus a difference without gradient, all left to
    autograd and the compiler.
    """
    with torch.no_grad():
        deviation = rotated.square().mean(-1, keepdim=True).sqrt()
        step = STEP[bits] * deviation + 1e-8
        top = (2 ** (bits - 1) - 0.5) * step
        value = torch.round(rotated.clamp(-top, top) / step + 0.5) * step - step / 2
        mask = ((value - rotated).abs() <= deviation * STEP[bits] / 2).float()
    passed = rotated * mask
    return passed + (value - passed).detach()


class _ReferenceLinear(nn.Linear):
    """Both operands rotated by the full block-diagonal Hadamard matrix, then quantized, as the published code does."""

    def __init__(self, inputs: int, outputs: int, bits: tuple[int, int]) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.bits = bits
        block = min(128, inputs & -inputs)
        matrix = torch.ones(1, 1)
        while len(matrix) < block:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        full = torch.block_diag(*[matrix / block**0.5] * (inputs // block))
        self.hadamard: Tensor | None
        self.register_buffer("hadamard", full if min(bits) < 16 else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.hadamard is None:
            return super().forward(x)
        weight = _trust(self.weight @ self.hadamard, self.bits[0])
        if self.bits[1] == 16:
            return F.linear(x, weight @ self.hadamard)
        return F.linear(_trust(x @ self.hadamard, self.bits[1]), weight)


class _ReferenceBlock(nn.Module):
    def __init__(self, shape: ModelShape, bits: tuple[int, int]) -> None:
        super().__init__()
        self.heads = shape.heads
        width, inner = shape.width, shape.feed_forward
        self.norms = nn.ModuleList(nn.RMSNorm(width, shape.norm_epsilon) for _ in range(2))
        self.q, self.k, self.v, self.o = (_ReferenceLinear(width, width, bits) for _ in range(4))
        self.gate, self.up = (_ReferenceLinear(width, inner, bits) for _ in range(2))
        self.down = _ReferenceLinear(inner, width, bits)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norms[0](x)
        q, k, v = (part(y).view(batch, length, self.heads, -1) for part in (self.q, self.k, self.v))
        q, k = (_rotate(part, rotation) for part in (q, k))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, width))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions by complex products of neighbouring features."""
    pairs = torch.view_as_complex(heads.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation[None, :, None]).flatten(-2).to(heads.dtype)


class Reference(nn.Module):
    """Decoder and loss; weights and activations rounded to as many levels as the representation has."""

    def __init__(self, shape: ModelShape, representation: str) -> None:
        super().__init__()
        part = resolve(representation)
        bits = _bits(part.weights), _bits(part.activations)
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.blocks = nn.ModuleList(_ReferenceBlock(shape, bits) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, shape.norm_epsilon)
        self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        frequency = 1e4 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angle = torch.outer(torch.arange(shape.context), frequency)
        self.register_buffer("rotation", torch.polar(torch.ones_like(angle), angle), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of targets (B, T) after tokens (B, T)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotation)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _bits(part: TensorFormat | None) -> int:
    return 16 if part is None or part.parsed_grid is None else int(math.log2(part.parsed_grid.codes))
