"""What a figure shows, apart from how it is drawn.

A figure function turns data into a `Chart`; `static` draws it with matplotlib for paper, `interactive` writes it as a
plotly specification for the page. Both read the same marks, limits and ticks, so the two can not disagree. There are
five kinds of marks, and every figure is a composition of them.
"""

from dataclasses import dataclass, field
from typing import Literal

from qpipe.report.axes import Axis
from qpipe.report.palette import GREY, INK, Look

Floats = tuple[float, ...]


@dataclass(frozen=True)
class Points:
    """Markers at (x, y), with optional error bars from `low` to `high` in y."""

    name: str
    x: Floats
    y: Floats
    look: Look
    hover: tuple[str, ...] = ()
    low: Floats = ()
    high: Floats = ()
    open: bool = False
    labels: bool = False
    """Write the name beside the markers where there is room."""


@dataclass(frozen=True)
class Line:
    """A line through (x, y)."""

    name: str
    x: Floats
    y: Floats
    color: str = INK
    dash: Literal["solid", "dash", "dot"] = "solid"
    width: float = 1.4
    label: Literal["", "margin", "end"] = ""
    """Write the name in the right margin, on a place of its own, or at the line's last point."""
    legend: bool = False
    """Name it in the legend."""
    group: str = ""
    """Representation that the line belongs to, where it has a name of its own."""


@dataclass(frozen=True)
class Band:
    """The area between `low` and `high` over x."""

    name: str
    x: Floats
    low: Floats
    high: Floats
    color: str = GREY


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from zero at rows 0, 1, ..., each with an interval and a text to its right."""

    values: Floats
    low: Floats
    high: Floats
    colors: tuple[str, ...]
    texts: tuple[str, ...]
    text_from: Floats
    """Where each text may start without covering a mark."""
    hover: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """A straight reference line across the panel at one x or one y."""

    at: float
    axis: Literal["x", "y"]
    name: str = ""
    color: str = GREY
    dash: Literal["solid", "dash", "dot"] = "dash"


Mark = Points | Line | Band | Bars | Rule


@dataclass(frozen=True)
class Panel:
    """One coordinate system."""

    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    title: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure: panels side by side, with the words that belong to it."""

    name: str
    """File stem, e.g. `loss-vs-n`."""
    title: str
    subtitle: str
    """Law, number of runs, interval level."""
    caption: str
    """How to read it, for someone who sees it the first time."""
    panels: tuple[Panel, ...]
    legend: Literal["side", "corner", "none"] = "side"
    """Where the legend stands on paper: beside the panels, or in the free lower right corner."""
    warning: str = ""
    """What a reader must know before trusting the figure; drawn in a colour of its own."""
    height: float = 4.6
    """Height of the drawing area, inches."""
    looks: dict[str, Look] = field(default_factory=dict)
    """Looks of the representations in the legend, in its order."""
