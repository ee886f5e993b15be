"""Constant tensors of grids, kept once per device and dtype."""

from collections.abc import Callable

import torch
from torch import Tensor

from qpipe.compress.codebooks import code_book, e8_magnitudes
from qpipe.compress.grids import levels
from qpipe.formats import Grid

_KEPT: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}


def constant(name: str, build: Callable[[], Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """`build()` moved to `device` and `dtype`, remembered under `name`."""
    key = (name, device, dtype)
    kept = _KEPT.get(key)
    if kept is None:
        with torch.inference_mode(False):
            kept = build().to(device=device, dtype=dtype)
        # A traced or fake tensor must not outlive its trace.
        if not torch.compiler.is_compiling() and device.type != "meta":
            _KEPT[key] = kept
    return kept


def level_table(grid: Grid, like: Tensor) -> Tensor:
    """Sorted levels of a scalar grid, shape (codes,), on the device and in the dtype of `like`."""
    return constant(
        grid.word, lambda: torch.tensor(levels(grid.word).tolist(), dtype=torch.float64), like.device, like.dtype
    )


def code_table(grid: Grid, like: Tensor) -> Tensor:
    """Code vectors of a vector grid, shape (codes, dimension)."""
    return constant(grid.word, lambda: torch.from_numpy(code_book(grid.dimension, grid.codes)), like.device, like.dtype)


def magnitude_table(like: Tensor) -> Tensor:
    """Magnitude patterns of the E8 ball, shape (256, 8)."""
    return constant("e8", lambda: torch.from_numpy(e8_magnitudes()), like.device, like.dtype)
