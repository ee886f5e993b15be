"""Block Hadamard rotation of the input dimension.

H is the normalised Sylvester matrix of a power-of-two block: symmetric and orthogonal, so it is its own inverse and
x H (W H)^T = x W^T. Rotating mixes each block of inputs, which makes any row look Gaussian: the one distribution the
optimal grids are made for. It is applied as one small matrix product per block, never as a full block-diagonal one.
"""

import torch
from torch import Tensor

from qpipe.compress.tables import constant


def hadamard(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normalised Hadamard matrix, shape (size, size); entries +-1/sqrt(size): (-1)^popcount(i & j)."""
    return constant(f"hadamard{size}", lambda: _build(size), device, dtype)


def _build(size: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        upper = torch.cat([matrix, matrix], dim=1)
        matrix = torch.cat([upper, torch.cat([matrix, -matrix], dim=1)])
    return matrix / size**0.5


INNER = 16
"""On CPU a large block of b is rotated as H_(b/16) X H_16: 16 + b/16 products per number, not b."""
LARGE = 128
"""Blocks from which on that is faster: the left products of smaller ones are too many and too small."""


def rotate(x: Tensor, block: int) -> Tensor:
    """Rotate the last dimension of `x`, shape (..., width), in blocks that divide the width. Its own inverse."""
    if block == 1:
        return x
    if x.device.type != "cpu" or block < LARGE:  # on a GPU one product of full size keeps the tensor cores busy
        return (x.unflatten(-1, (-1, block)) @ hadamard(block, x.device, x.dtype)).flatten(-2)
    # Sylvester's matrix is a Kronecker product, H_b = H_(b/16) (x) H_16.
    outer, inner = hadamard(block // INNER, x.device, x.dtype), hadamard(INNER, x.device, x.dtype)
    blocks = (x.reshape(-1, INNER) @ inner).view(-1, block // INNER, INNER)
    return (outer @ blocks).view(x.shape)
