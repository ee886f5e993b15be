"""The training step of QuEST's published code (2502.05003) as an algorithm, to time ours against.

One layer for q, k and v, separate gate and up, each quantizing its own input; the Hadamard rotation as one full
block-diagonal product; rounding in float32, left to autograd and the compiler; norms and logits in float32.

The published code has two quantizers with rotation and trust. `HadamardTrustQuantizer` rotates its result back, so that
it can stand before any product, one with 16-bit activations too. `HalfHadamardTrustQuantizer` leaves it rotated and has
to stand on both sides of a product. The product is the same; `half` chooses the second, cheaper one.
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


def _trust(x: Tensor, hadamard: Tensor, bits: int, *, back: bool) -> Tensor:
    """Round x H to 2^bits mid-rise levels at the Gaussian-optimal scale; rotate back or not.

    The gradient passes where the error is at most half a step. As the published code writes it: the numbers times a
    float mask, plus a difference without gradient, all left to autograd and the compiler. Autocast takes powers in
    float32, and so is all that follows from this one.
    """
    rotated = x @ hadamard
    with torch.no_grad():
        deviation = (rotated**2).mean(-1, keepdim=True).sqrt()
        step = STEP[bits] * deviation + 1e-8
        top = (2 ** (bits - 1) - 0.5) * step
        value = torch.round(rotated.clamp(-top, top) / step + 0.5) * step - step / 2
        mask = ((value - rotated).abs() <= deviation * STEP[bits] / 2).float()
        value = value @ hadamard.T if back else value
    passed = rotated * mask
    passed = passed @ hadamard.T if back else passed
    return passed + (value - passed).detach()


class _ReferenceLinear(nn.Linear):
    """Both operands rotated by the full block-diagonal Hadamard matrix, then quantized, as the published code does."""

    def __init__(self, inputs: int, outputs: int, bits: tuple[int, int], half: bool) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.bits, self.back = bits, not half
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
        if self.bits[1] < 16:
            x = _trust(x, self.hadamard, self.bits[1], back=self.back)
        return F.linear(x, _trust(self.weight, self.hadamard, self.bits[0], back=self.back or self.bits[1] == 16))


class _ReferenceNorm(nn.RMSNorm):
    """Root-mean-square norm, written out, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        numbers = x.float()
        scale = torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + self.eps)
        return (numbers * scale).type_as(x) * self.weight


class _ReferenceBlock(nn.Module):
    def __init__(self, shape: ModelShape, bits: tuple[int, int], half: bool) -> None:
        super().__init__()
        self.heads = shape.heads
        width, inner = shape.width, shape.feed_forward
        self.norms = nn.ModuleList(_ReferenceNorm(width, shape.norm_epsilon) for _ in range(2))
        self.qkv = _ReferenceLinear(width, 3 * width, bits, half)
        self.out = _ReferenceLinear(width, width, bits, half)
        self.gate, self.up = (_ReferenceLinear(width, inner, bits, half) for _ in range(2))
        self.down = _ReferenceLinear(inner, width, bits, half)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norms[0](x)).split(width, dim=2)
        q, k, v = (part.view(batch, length, self.heads, -1) for part in parts)
        q, k = (_rotate(part, rotation) for part in (q, k))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        y = self.norms[1](x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions on neighbouring features, in float32; rotation (T, head_dim / 2, 2) of cosine and sine."""
    first, second = heads.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotation[None, :, None].unbind(-1)
    turned = torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return turned.flatten(-2).to(heads.dtype)


class Reference(nn.Module):
    """Decoder and loss; weights and activations rounded to as many levels as the representation has."""

    def __init__(self, shape: ModelShape, representation: str, *, half: bool = False) -> None:
        super().__init__()
        part = resolve(representation)
        bits = _bits(part.weights), _bits(part.activations)
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.blocks = nn.ModuleList(_ReferenceBlock(shape, bits, half) for _ in range(shape.layers))
        self.norm = _ReferenceNorm(shape.width, shape.norm_epsilon)
        self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        frequency = 1e4 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angle = torch.outer(torch.arange(shape.context), frequency)
        self.register_buffer("rotation", torch.stack([angle.cos(), angle.sin()], dim=-1), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of targets (B, T) after tokens (B, T)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotation)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _bits(part: TensorFormat | None) -> int:
    return 16 if part is None or part.parsed_grid is None else int(math.log2(part.parsed_grid.codes))
