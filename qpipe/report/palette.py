"""One look per representation, the same in every figure of a study.

Representations come in families: W4A4 beside W2A2 and W8A8, S50 beside S75. The hue tells the family, lightness and
marker tell the member, so that a reader sees the family first and 20 representations stay apart. Hues are spread in
OKLCH (Ottosson 2020), a space where equal steps look equal, at lightnesses that stand out from white and from black.
Dense, the reference, is drawn in ink: black on paper, white on a dark page.
"""

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

INK = "#111111"
"""Colour of dense, text and fitted lines; a dark page replaces it by a light one."""
GREY = "#868e96"
"""Reference lines and second-rank marks; readable on both backgrounds."""
WARN = "#c2410c"
"""What a reader must not overlook."""

MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "star", "hexagon")
_HUES = (258.0, 52.0, 148.0, 345.0, 200.0, 300.0, 105.0, 20.0)
LIGHTEST, DARKEST = 0.648, 0.525
"""OKLCH lightnesses between which every hue has a contrast of 3 to 1 with white and with the dark page."""
_PREFERRED = {"w#": 0, "w#a#": 1, "s#": 2, "#:#": 2, "w#e#m#": 3, "mxfp#": 3, "vq#x#": 5}
"""Places in `_HUES` that the usual families take when free, so that they keep their hue from study to study."""


@dataclass(frozen=True)
class Look:
    """Colour (hexadecimal sRGB) and marker of one representation."""

    color: str
    marker: str


def family(representation: str) -> str:
    """Return a representation's name with its numbers taken out: `w4a4-quest` and `w2a2-quest` are one family."""
    return re.sub(r"\d+(\.\d+)?", "#", representation)


def looks(representations: Iterable[str]) -> dict[str, Look]:
    """Return the look of each representation; depends on the set of names only, not on their order."""
    names = sorted(set(representations) - {"dense"}, key=_natural)
    families = {name: [n for n in names if family(n) == name] for name in dict.fromkeys(map(family, names))}
    result = {"dense": Look(INK, "circle")}
    for name, place in _places(families).items():
        for rank, member in enumerate(families[name]):
            result[member] = _member(place, rank, len(families[name]))
    return result


def _places(families: Iterable[str]) -> dict[str, int]:
    """Return a place in the wheel of hues for each family: the preferred one where free, else the next free one."""
    taken: dict[int, str] = {}
    for name in families:
        preferred = _PREFERRED.get(re.split(r"[-+]", name)[0])
        if preferred is not None and preferred not in taken:
            taken[preferred] = name
    rest = [name for name in families if name not in taken.values()]
    free = (place for place in itertools.count() if place not in taken)
    return {name: place for place, name in taken.items()} | dict(zip(rest, free, strict=False))


def _member(place: int, rank: int, count: int) -> Look:
    share = rank / (count - 1) if count > 1 else 0.4
    # Beyond the chosen hues, steps of the golden angle never come back to one that is taken.
    centre = _HUES[place] if place < len(_HUES) else 137.50776 * place
    hue = centre + 28.0 * (share - 0.5)
    marker = MARKERS[(rank + place) % len(MARKERS)]
    return Look(oklch(LIGHTEST - (LIGHTEST - DARKEST) * share, 0.15, hue), marker)


def _natural(name: str) -> list[tuple[int, float, str]]:
    """Sort key that puts w2 before w10."""
    pieces = re.findall(r"\d+(?:\.\d+)?|\D+", name)
    return [(0, float(piece), "") if piece[0].isdigit() else (1, 0.0, piece) for piece in pieces]


def oklch(lightness: float, chroma: float, hue: float) -> str:
    """Return the sRGB colour of OKLCH coordinates (hue in degrees), chroma reduced until it is in gamut."""
    angle = math.radians(hue)
    while True:
        rgb = _oklab_to_linear(lightness, chroma * math.cos(angle), chroma * math.sin(angle))
        if all(-1e-4 <= channel <= 1.0001 for channel in rgb):
            break
        chroma *= 0.97
    return "#" + "".join(f"{round(255 * _gamma(min(1.0, max(0.0, channel)))):02x}" for channel in rgb)


def _oklab_to_linear(lightness: float, a: float, b: float) -> tuple[float, float, float]:
    """OKLab to linear sRGB, with the matrices of Ottosson, 'A perceptual color space for image processing' (2020)."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )


def _gamma(channel: float) -> float:
    return 12.92 * channel if channel <= 0.0031308 else 1.055 * channel ** (1 / 2.4) - 0.055
