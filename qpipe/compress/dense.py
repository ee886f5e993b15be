"""The dense linear layer, whose weight gradient on a GPU leaves its product in float32.

Under autocast a float32 weight is rounded to 16 bits for the product. Autograd then forms the gradient of the rounded
copy, in 16 bits, and converts that. A matrix product sums in float32 anyway: written out as it is, it loses nothing,
and nothing has to be read again.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class DenseLinear(nn.Linear):
    """`nn.Linear` with the same numbers, but for a gradient of the weight that is not rounded to 16 bits."""

    rounded: Tensor | None = None
    """The weight in 16 bits, while all weights are represented together."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        dtype = product_dtype(input)
        rounded = dtype.itemsize == 2 and self.weight.dtype == torch.float32
        if not input.is_cuda or not rounded or self.bias is not None or torch.compiler.is_compiling():
            return super().forward(input)
        copy = self.weight.detach().to(dtype) if self.rounded is None else self.rounded
        return product_with(input, self.weight, copy)


def product_with(x: Tensor, weight: Tensor, rounded: Tensor) -> Tensor:
    """Return x rounded^T, (..., I), (O, I) -> (..., O); gradients of the copy become the weight's, in float32."""
    product: Tensor = _Product.apply(x, weight, rounded)
    return product


class _Product(torch.autograd.Function):
    """(x, weight, rounded) -> x rounded^T, whose gradient is the weight's; (..., I), (O, I), (O, I) -> (..., O)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, rounded: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        x = x.to(rounded.dtype)
        ctx.save_for_backward(x, rounded)
        return functional.linear(x, rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, rounded = ctx.saved_tensors
        gradient, to_weight = gradients[0], None
        if ctx.needs_input_grad[1]:  # post-training methods ask for those of features alone
            to_weight = torch.mm(gradient.flatten(0, -2).T, x.flatten(0, -2), out_dtype=torch.float32)
        return (gradient @ rounded).to(ctx.dtype), to_weight, None


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which products with `x` run: autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
