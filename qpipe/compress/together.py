"""Weights of a whole model as products read them, in a training step that is captured as a CUDA graph.

A step changes weights once, at its end. So dense weights have 16-bit copies that the optimizer's launch writes with
them (`qpipe.triton_adamw`), and weights with a kernel of our own are rotated and rounded in one launch at the start of
a step (`qpipe.compress.triton_weights`). The products of all micro-batches read these copies.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qpipe.compress.dense import DenseLinear
from qpipe.compress.linear import CompressedLinear

if TYPE_CHECKING:
    from qpipe.compress.triton_weights import RoundedWeights


class WeightsTogether:
    """The weights of a model on a GPU, under autocast.

    Make it, capture a step while they are `represented`, with `finish` after the backward pass, `fill` it, and replay.
    It has to live as long as the graph. Layers with a bias, and those whose weights no kernel of ours represents, are
    left to themselves.

    Parameters
    ----------
    dense
        Whether to make 16-bit copies of dense weights: only if somebody writes them anew in each step.

    Attributes
    ----------
    copies
        Those of the dense weights, by weight, which hold their present values.
    """

    def __init__(self, model: nn.Module, *, dense: bool) -> None:
        self._dense: list[DenseLinear] = []
        self.copies: dict[Tensor, Tensor] = {}
        self._rounded: list[tuple[list[CompressedLinear], RoundedWeights]] = []
        if not torch.is_autocast_enabled("cuda"):
            return
        dtype = torch.get_autocast_dtype("cuda")
        layers = [layer for layer in model.modules() if isinstance(layer, DenseLinear | CompressedLinear)]
        layers = [layer for layer in layers if layer.bias is None and layer.weight.dtype == torch.float32]
        if dense:
            self._dense = [layer for layer in layers if isinstance(layer, DenseLinear)]
            self.copies = {layer.weight: layer.weight.detach().to(dtype) for layer in self._dense}
        alike: dict[object, list[CompressedLinear]] = defaultdict(list)
        for layer in layers:
            if isinstance(layer, CompressedLinear) and layer.has_weight_kernel:
                alike[layer.block, layer.representation].append(layer)
        for group in alike.values():
            self._rounded.append((group, _rounded_weights(group, dtype)))

    @contextmanager
    def represented(self) -> Iterator[None]:
        """Represent weights now, and let the layers' products read what they are represented by."""
        pairs: list[tuple[DenseLinear | CompressedLinear, Tensor]]
        pairs = [(layer, self.copies[layer.weight]) for layer in self._dense]
        for group, weights in self._rounded:
            weights.round()
            pairs += zip(group, weights.copies, strict=True)
        for layer, copy in pairs:
            layer.rounded = copy
        try:
            yield
        finally:
            for layer, _ in pairs:
                layer.rounded = None

    def finish(self) -> None:
        """Turn what the products left as gradients of the weights, those of their copies, into the weights' own."""
        for _, weights in self._rounded:
            weights.finish()

    def fill(self) -> None:
        """Note where the gradients lie that were captured."""
        for _, weights in self._rounded:
            weights.fill()


def _rounded_weights(layers: list[CompressedLinear], dtype: torch.dtype) -> "RoundedWeights":
    from qpipe.compress.triton_weights import RoundedWeights  # there is a GPU

    return RoundedWeights([layer.weight for layer in layers], layers[0].block, layers[0].rounding, dtype)
