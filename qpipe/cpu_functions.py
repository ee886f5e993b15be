"""What a training step on a CPU does between its matrix products, in few passes over memory, gradients by hand.

Features of a few thousand tokens do not fit into a level-2 cache, and each operation of the library reads and writes
all of them. So these functions go over them in parts that do fit, and backward forms each gradient where it belongs.
They are the CPU's side of `qpipe.triton_norm` and `qpipe.triton_rotary`; compiled blocks use neither.
Shapes: B sequences, T tokens, D width, H query heads, K key and value heads.
"""

from typing import Any

import torch
from torch import Tensor

NUMBERS = 2**17
"""Numbers of an array that are worked on at a time: 0.5 MiB in float32."""


def fits(features: Tensor) -> bool:
    """Whether these functions are for such features: on a CPU, in the precision of the weights, and not compiled."""
    on_cpu = features.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return on_cpu and features.dtype == torch.float32 and not torch.compiler.is_compiling()


class AddNorm(torch.autograd.Function):
    """(residual, update (B, T, D), weight (D), epsilon) -> residual + update, and its root-mean-square norm."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, update: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """Sum, scale of each token and norm, part by part."""
        width, size = weight.numel(), max(1, NUMBERS // weight.numel())
        total, normed = torch.empty_like(residual), torch.empty_like(residual)
        scale = residual.new_empty(residual.numel() // width, 1)  # 1 / rms
        arrays = (array.view(-1, width).split(size) for array in (residual, update, total, normed))
        for left, right, out, out_normed, part_scale in zip(*arrays, scale.split(size), strict=True):
            torch.add(left, right, out=out)
            torch.linalg.vector_norm(out, dim=-1, keepdim=True, out=part_scale)
            part_scale.square_().div_(width).add_(epsilon).rsqrt_()
            torch.mul(out, part_scale, out=out_normed).mul_(weight)
        ctx.save_for_backward(total, weight, scale)
        ctx.set_materialize_grads(False)  # nothing but its norm reads the last sum
        return total, normed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
        """s g w - x s^3 mean(g w x) plus the sum's gradient; x the sum, s = 1 / rms(x), w the weight, g the norm's."""
        total, weight, scale = ctx.saved_tensors
        to_total, to_normed = gradients
        assert to_normed is not None
        width, size = weight.numel(), max(1, NUMBERS // weight.numel())
        to_weight, result = torch.zeros_like(weight), torch.empty_like(total)
        carried = result if to_total is None else to_total
        product = total.new_empty(size, width)
        arrays = (array.reshape(-1, width).split(size) for array in (total, to_normed, carried, result))
        for x, gradient, onto, out, part_scale in zip(*arrays, scale.split(size), strict=True):
            buffer = torch.mul(gradient, x, out=product[: len(x)])
            to_weight.addmv_(buffer.T, part_scale[:, 0])
            shared = torch.mv(buffer, weight).unsqueeze(1).mul_(part_scale.pow(3)).div_(-width)
            torch.mul(gradient, weight, out=buffer)
            if to_total is None:
                torch.mul(buffer, part_scale, out=out)
            else:
                torch.addcmul(onto, buffer, part_scale, out=out)
            out.addcmul_(x, shared)
        return result, result, to_weight, None


class Rotary(torch.autograd.Function):
    """Heads (B, T, H + 2 K, head_dim) -> rotated queries, rotated keys, values; angles (T, 1, head_dim), H, K."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cosine: Tensor, sine: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys are rotated into an array of their own; values stay where they are."""
        ctx.save_for_backward(cosine, sine)
        source, value = qkv.split([heads + kv_heads, kv_heads], dim=2)
        rotated = torch.empty_like(source, memory_format=torch.contiguous_format)
        _rotate(source, rotated, cosine, _signed(sine))
        query, key = rotated.split([heads, kv_heads], dim=2)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        """All three gradients side by side, queries' and keys' rotated back."""
        cosine, sine = ctx.saved_tensors
        sizes = [gradient.shape[2] for gradient in gradients]
        batch, length, _, head_dim = gradients[0].shape
        result = gradients[0].new_empty(batch, length, sum(sizes), head_dim)
        *rotated, value = result.split(sizes, dim=2)
        for gradient, out in zip(gradients[:2], rotated, strict=True):
            _rotate(gradient, out, cosine, -_signed(sine))
        value.copy_(gradients[2])
        return result, None, None, None, None


def _signed(sine: Tensor) -> Tensor:
    """The sines by which a head with its halves exchanged is multiplied; all (T, 1, head_dim)."""
    first, second = sine.chunk(2, dim=-1)
    return torch.cat([-first, second], dim=-1)


def _rotate(source: Tensor, out: Tensor, cosine: Tensor, signed_sine: Tensor) -> None:
    """Rotate heads (B, T, heads, head_dim) into `out` of the same shape."""
    half = source.shape[-1] // 2
    size = max(1, NUMBERS // source[0].numel())
    for part, part_out in zip(source.split(size), out.split(size), strict=True):
        torch.mul(part, cosine, out=part_out).addcmul_(part.roll(half, -1), signed_sine)
