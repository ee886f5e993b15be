"""A quantized layer in memory: groups, codes, scales; its dense values and its bits."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from qpipe.compress.rotation import rotate
from qpipe.ptq.fitting import decode, tables
from qpipe.ptq.groups import Layout
from qpipe.ptq_methods import Kind

SCALE_BITS = 16
"""Bits of a scale, of an offset, and of a bias."""


@dataclass(frozen=True)
class Bits:
    """Stored bits of one or several layers (counts of bits)."""

    weights: int = 0
    """weights (count), not bits"""
    payload: int = 0
    """codes"""
    scales: int = 0
    offsets: int = 0
    depths: int = 0
    clusters: int = 0
    """the cluster of each row, where rows are sorted into clusters"""
    biases: int = 0
    """biases that the model did not have before"""

    def __add__(self, other: "Bits") -> "Bits":
        return Bits(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> int:
        """All bits."""
        return self.payload + self.scales + self.offsets + self.depths + self.clusters + self.biases

    @property
    def payload_per_weight(self) -> float:
        """Codes alone (bits/weight)."""
        return self.payload / self.weights

    @property
    def per_weight(self) -> float:
        """Everything (bits/weight)."""
        return self.total / self.weights


@dataclass
class QuantizedLayer:
    """Codes of a layer and all that is needed to read them.

    Attributes
    ----------
    layout
        Groups.
    kind, has_offset, rotation
        Family of code books; whether offsets are stored; block of the Hadamard rotation of the inputs (0: none).
    depth, scale, offset
        Per group, shape (groups,): int64, and float32 holding float16 values.
    codes
        Shape (groups, size), uint8.
    bias
        Shape (out,), float16 values, or None.
    bias_added
        Whether the model had no bias here before.
    """

    layout: Layout
    kind: Kind
    has_offset: bool
    rotation: int
    depth: Tensor
    scale: Tensor
    offset: Tensor
    codes: Tensor
    bias: Tensor | None = None
    bias_added: bool = False

    def dense(self) -> Tensor:
        """Return the weight that the codes stand for, (out, in), float32."""
        values = decode(self.codes, self.depth, self.scale, self.offset, tables(self.kind, self.codes.device))
        weight = self.layout.scatter(values)
        return rotate(weight, self.rotation) if self.rotation else weight

    def bits(self) -> Bits:
        """Count the stored bits."""
        return Bits(
            weights=self.codes.numel(),
            payload=int(self.depth.sum()) * self.layout.size,
            scales=int((self.depth > 0).sum()) * SCALE_BITS,
            offsets=self.layout.groups * SCALE_BITS if self.has_offset else 0,
            depths=self.layout.groups * depth_bits(len(self.depth.unique())),
            clusters=self.layout.index_bits(),
            biases=len(self.bias) * SCALE_BITS if self.bias_added and self.bias is not None else 0,
        )


def depth_bits(distinct: int) -> int:
    """Bits per group that name its depth among those that a layer has: none where it has one."""
    return (distinct - 1).bit_length()


def rotation_block(requested: int, width: int) -> int:
    """Return the largest power of two up to `requested` that divides the width (0 for no rotation)."""
    return min(requested, width & -width) if requested else 0


def to_device(layer: QuantizedLayer, device: torch.device) -> QuantizedLayer:
    """Copy a layer to a device."""
    layout = Layout(layer.layout.rows, layer.layout.columns, layer.layout.cluster.to(device), layer.layout.width)
    moved = {name: getattr(layer, name).to(device) for name in ("depth", "scale", "offset", "codes")}
    bias = None if layer.bias is None else layer.bias.to(device)
    return replace(layer, layout=layout, bias=bias, **moved)
