"""Compressed representations, described: names, typed compositions and their bits per weight (no torch).

>>> from qpipe.formats import resolve
>>> resolve("w4").canonical() == resolve("w4-quest").canonical()
True
"""

from qpipe.formats.grids import Grid, parse_grid
from qpipe.formats.presets import catalogue, catalogue_names, from_canonical, known_names, resolve
from qpipe.formats.spec import Mask, Representation, TensorFormat
from qpipe.formats.storage import Storage, check_shape, storage_bits

__all__ = [
    "Grid",
    "Mask",
    "Representation",
    "Storage",
    "TensorFormat",
    "catalogue",
    "catalogue_names",
    "check_shape",
    "from_canonical",
    "known_names",
    "parse_grid",
    "resolve",
    "storage_bits",
]
