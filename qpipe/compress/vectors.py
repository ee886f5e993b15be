"""Nearest code vectors: learned Gaussian code books and the E8 ball.

Numbers are taken in runs of the grid's dimension along the last axis. A code book is searched by one matrix product,
because |y - g|^2 = |y|^2 - 2 (y.g - |g|^2 / 2). The E8 ball has 2^16 points but needs only 2 x 256 of those products:
for each shift of +-1/4 and each magnitude pattern the best signs are those of the data, with one flipped where the sum
of the lattice vector would be odd.
"""

import torch
from torch import Tensor

from qpipe.compress.tables import code_table, magnitude_table
from qpipe.formats import Grid

if torch.cuda.is_available():
    from qpipe.compress import triton_search

E8_UNIT = 0.968
"""Grid unit in standard deviations with the least error for N(0, 1) data, found by search (flat within +-0.005)."""
_CHUNK = 2**22
"""Largest number of scores computed at once."""


def nearest_codes(y: Tensor, grid: Grid) -> Tensor:
    """Index of the nearest code vector, shape (..., width / dimension), int64."""
    vectors = y.unflatten(-1, (-1, grid.dimension)).flatten(0, -2)
    shape = (*y.shape[:-1], y.shape[-1] // grid.dimension)
    if y.is_cuda and y.dtype == torch.float32 and grid.family == "lattice":
        return triton_search.nearest_e8(vectors, magnitude_table(vectors)).reshape(shape)
    search = _search_e8 if grid.family == "lattice" else _search_book
    per_vector = 256 if grid.family == "lattice" else grid.codes
    parts = vectors.split(max(_CHUNK // per_vector, 1)) if not torch.compiler.is_compiling() else (vectors,)
    codes = torch.cat([search(part, grid) for part in parts])
    return codes.reshape(shape)


def decode_vectors(codes: Tensor, grid: Grid, like: Tensor) -> Tensor:
    """Code vectors of `codes`, laid out along the last dimension, in the dtype and on the device of `like`."""
    if grid.family == "lattice":
        return _decode_e8(codes, like).flatten(-2)
    return code_table(grid, like)[codes].flatten(-2)


def outer_radius(grid: Grid, like: Tensor) -> Tensor:
    """Norm of the longest code vector: no trust beyond it (2506.01863 appendix D, which does not give its radius)."""
    if grid.family == "lattice":
        return magnitude_table(like).norm(dim=-1).amax() + 0.25
    return code_table(grid, like).norm(dim=-1).amax()


def _search_book(vectors: Tensor, grid: Grid) -> Tensor:
    book = code_table(grid, vectors)
    return (vectors @ book.T - book.square().sum(-1) / 2).argmax(-1)


def _search_e8(vectors: Tensor, grid: Grid) -> Tensor:
    """Code = shift bit, 7 sign bits, 8 pattern bits."""
    scores, codes = zip(*(_search_shift(vectors, shift) for shift in (0, 1)), strict=True)
    return torch.where(scores[1] > scores[0], codes[1], codes[0])


def _search_shift(vectors: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Best pattern and signs around the lattice moved by +1/4 (shift 0) or -1/4 (shift 1); score = -distance^2."""
    moved = vectors - (0.25 - 0.5 * shift)
    magnitude, negative = moved.abs(), moved < 0
    patterns = magnitude_table(vectors)
    product = magnitude @ patterns.T
    # Flipping the sign of coordinate k adds 2 p_k, an odd number, to the sum: it repairs the parity.
    odd_pattern = patterns.sum(-1).long() % 2
    odd = (odd_pattern + (negative.sum(-1, keepdim=True))) % 2 == 1
    smallest = (magnitude.unsqueeze(-2) * patterns).amin(-1)
    score = 2 * (product - 2 * smallest * odd) - patterns.square().sum(-1)
    best, pattern = score.max(-1)
    flip = (magnitude * patterns[pattern]).argmin(-1, keepdim=True)
    flipped = negative.scatter(-1, flip, negative.gather(-1, flip) ^ odd.gather(-1, pattern.unsqueeze(-1)))
    weights = 2 ** torch.arange(7, device=vectors.device)
    signs = (flipped[:, :7] * weights).sum(-1)
    return best - moved.square().sum(-1), pattern + 256 * signs + 32768 * shift


def _decode_e8(codes: Tensor, like: Tensor) -> Tensor:
    """Shape (...,) -> (..., 8). The eighth sign is the one that makes the coordinate sum even."""
    patterns = magnitude_table(like)[codes % 256]
    places = torch.arange(7, device=codes.device)
    negative = ((codes // 256 % 128).unsqueeze(-1) >> places) & 1
    last = (patterns.sum(-1).long() + negative.sum(-1)) % 2
    sign = 1 - 2 * torch.cat([negative, last.unsqueeze(-1)], dim=-1)
    return patterns * sign + (0.25 - 0.5 * (codes // 32768)).unsqueeze(-1)
