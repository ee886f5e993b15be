"""Grids: the sets of values a compressed number may take, described without computing them.

A grid is named by a short word that a study can write in YAML. `parse_grid` turns the word into a `Grid`: its family,
how many codes it has and how many numbers one code stands for. The values themselves (which for some families need an
optimisation) live in `qpipe.compress.grids`; nothing here needs torch.

| word | family | codes |
|---|---|---|
| `int4` | integer, mid-rise | 2^b levels at odd multiples of half a step, no zero |
| `int4-tread` | integer, mid-tread | two's complement: -2^(b-1) .. 2^(b-1)-1 |
| `int4-narrow` | integer, narrow range | -(2^(b-1)-1) .. 2^(b-1)-1, symmetric with a zero |
| `ternary` | integer | -1, 0, 1 |
| `e2m1` | floating point | all codes finite, with subnormals; `e4m3` and `e5m2` as their standards define them |
| `nf4` | normal float | 16 levels at quantiles of the normal distribution |
| `gauss16` | Lloyd-Max | the n levels of least mean squared error for N(0, 1) |
| `vq2x256` | vector | n code vectors of dimension d with least mean squared error for N(0, I) |
| `e8x65536` | lattice ball | the n shortest points of the shifted E8 lattice |
| `binary2`, `binary2-optimal` | sums of signs | k-bit least-squares binary codes, greedy or optimal |
| `noise4` | none | Gaussian noise of variance 4^-b instead of a quantizer |
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from qpipe.errors import QpipeError, nearest

Family = Literal["rise", "tread", "narrow", "float", "normal", "gauss", "vector", "lattice", "binary", "noise"]


@dataclass(frozen=True)
class Grid:
    """A grid's description.

    Attributes
    ----------
    word : the name it was parsed from, e.g. ``int4``
    family : how its values are defined
    codes : number of values (scalar grids) or of code vectors; 0 for noise
    dimension : how many numbers one code stands for
    exponent, mantissa : field widths of a floating-point grid, in bits
    optimal : `binary` only, the optimal instead of the greedy codes
    bits_stated : `noise` only, the ideal bit count
    """

    word: str
    family: Family
    codes: int
    dimension: int = 1
    exponent: int = 0
    mantissa: int = 0
    optimal: bool = False
    bits_stated: float = 0.0

    @property
    def bits(self) -> float:
        """Payload per number, in bits: log2(codes) / dimension."""
        return self.bits_stated if self.family == "noise" else math.log2(self.codes) / self.dimension

    @property
    def uniform(self) -> bool:
        """Whether the levels are evenly spaced, so that rounding replaces a search."""
        return self.family in ("rise", "tread", "narrow")


_WORDS: tuple[str, ...] = (
    "int4",
    "int4-tread",
    "int4-narrow",
    "ternary",
    "e2m1",
    "e4m3",
    "nf4",
    "gauss16",
    "vq2x256",
    "e8x65536",
)
_WORDS += ("binary2", "binary2-optimal", "noise4")


def _integer(word: str, bits: str, kind: str | None) -> Grid:
    width = int(bits)
    family: Family = "rise" if kind is None else "tread" if kind == "-tread" else "narrow"
    lowest = 2 if family == "narrow" else 1
    if not lowest <= width <= 8:
        raise QpipeError(f"grid '{word}': {width} bits asked for; {family} integer grids have {lowest} to 8 bits")
    return Grid(word, family, 2**width - (family == "narrow"))


def _float(word: str, exponent: str, mantissa: str) -> Grid:
    e, m = int(exponent), int(mantissa)
    if not (1 <= e <= 6 and 0 <= m <= 6 and 2 <= 1 + e + m <= 8):
        raise QpipeError(
            f"grid '{word}': sign + {e} exponent + {m} mantissa bits; use 1-6 exponent bits, at most 8 in all"
        )
    return Grid(word, "float", 2 ** (1 + e + m), exponent=e, mantissa=m)


def _gauss(word: str, levels: str) -> Grid:
    if not 2 <= int(levels) <= 1024:
        raise QpipeError(f"grid '{word}': {levels} levels asked for; Lloyd-Max grids have 2 to 1024")
    return Grid(word, "gauss", int(levels))


def _vector(word: str, dimension: str, codes: str) -> Grid:
    d, n = int(dimension), int(codes)
    if d not in (2, 4, 8) or not 2 <= n <= 4096:
        raise QpipeError(f"grid '{word}': dimension {d} with {n} codes; use dimension 2, 4 or 8 and 2 to 4096 codes")
    return Grid(word, "vector", n, dimension=d)


def _lattice(word: str, codes: str) -> Grid:
    n = int(codes)
    if n not in (256, 4096, 65536):
        raise QpipeError(f"grid '{word}': {n} lattice points asked for; use 256, 4096 or 65536 (1, 1.5 or 2 bits)")
    return Grid(word, "lattice", n, dimension=8)


def _binary(word: str, bits: str, optimal: str | None) -> Grid:
    k = int(bits)
    if not 1 <= k <= 4 or (optimal and k != 2):
        raise QpipeError(f"grid '{word}': greedy binary codes have 1 to 4 bits, optimal ones 2")
    return Grid(word, "binary", 2**k, optimal=optimal is not None)


def _noise(word: str, bits: str) -> Grid:
    if not 0 < float(bits) <= 16:
        raise QpipeError(f"grid '{word}': {bits} ideal bits asked for; use more than 0 and at most 16")
    return Grid(word, "noise", 0, bits_stated=float(bits))


_PATTERNS: tuple[tuple[str, Callable[..., Grid]], ...] = (
    (r"int(\d+)(-tread|-narrow)?", _integer),
    (r"ternary", lambda word: Grid(word, "narrow", 3)),
    (r"e(\d)m(\d)", _float),
    (r"nf4", lambda word: Grid(word, "normal", 16)),
    (r"gauss(\d+)", _gauss),
    (r"vq(\d)x(\d+)", _vector),
    (r"e8x(\d+)", _lattice),
    (r"binary(\d)(-optimal)?", _binary),
    (r"noise(\d+(?:\.\d+)?)", _noise),
)


def parse_grid(word: str) -> Grid:
    """Describe the grid that `word` names; raises `QpipeError` for an unknown word or an impossible size."""
    for pattern, build in _PATTERNS:
        if match := re.fullmatch(pattern, word):
            return build(word, *match.groups())
    raise QpipeError(f"unknown grid '{word}'{nearest(word, _WORDS)}; grids look like {', '.join(_WORDS)}")
