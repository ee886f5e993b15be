"""Compression mechanics: grids, scales, rotations, masks, gradient rules, and the layer that composes them."""

from qpipe.compress.capacity import capacity
from qpipe.compress.linear import CompressedLinear, make_linear, set_progress

__all__ = ["CompressedLinear", "capacity", "make_linear", "set_progress"]
