"""Charts on paper: matplotlib figures as SVG and PNG, equal bytes for equal data.

matplotlib's object interface is used without pyplot: no global state, no display, safe in any number of processes.
Text is drawn as outlines, so that a figure looks the same wherever it is opened.
"""

import io
import itertools
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from qpipe.files import replacing
from qpipe.report.axes import Axis
from qpipe.report.chart import Band, Bars, Chart, Line, Mark, Panel, Points, Rule
from qpipe.report.palette import INK, WARN

_MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^",
    "triangle-down": "v", "pentagon": "p", "star": "*", "hexagon": "h",
}  # fmt: skip
_DASHES: dict[str, Any] = {"solid": "-", "dash": (0, (5, 3)), "dot": (0, (1, 2))}
_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a representation may hold a dollar sign
    "svg.hashsalt": "qpipe",
    "svg.fonttype": "path",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#495057",
    "axes.linewidth": 0.8,
    "grid.color": "#e9ecef",
    "grid.linewidth": 0.7,
    "xtick.color": "#495057",
    "ytick.color": "#495057",
    "text.color": INK,
    "axes.labelcolor": INK,
}
_LABEL_SIZE = 7.5
_PANEL_WIDTH = 3.1
_DPI = 160
_LINE = 0.175
"""Height of a line of the header, inches."""


def draw(chart: Chart) -> Figure:
    """Return the chart as a matplotlib figure with a canvas, laid out and ready to be saved."""
    with mpl.rc_context(_SETTINGS):
        width = 1.6 + max(_PANEL_WIDTH * len(chart.panels), 5.2)
        header = _header(chart, width)
        top = 0.26 + _LINE * len(header)
        figure = Figure(figsize=(width, chart.height + top), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(figure)
        bottom = 1 - top / (chart.height + top)
        figure.set_layout_engine("constrained", rect=(0.005, 0.0, 0.99, bottom), w_pad=0.06)
        _write_header(figure, header)
        axes = figure.subplots(1, len(chart.panels), squeeze=False, sharey=_share_y(chart))[0]
        for position, (panel, ax) in enumerate(zip(chart.panels, axes, strict=True)):
            _draw_panel(ax, panel, outer=position == 0 or not _share_y(chart))
        _end_labels(axes[-1], chart)
        if chart.legend != "none":
            _legend(axes[-1], chart)
        figure.canvas.draw()
        figure.set_layout_engine("none")
        for panel, ax in zip(chart.panels, axes, strict=True):
            _point_labels(ax, panel)
        return figure


Kind = Literal["svg", "png"]
_DIGEST = re.compile(rb"\b[a-z][0-9a-f]{10}\b")
"""What matplotlib calls a thing that others refer to."""

_METADATA: dict[Kind, dict[str, Any]] = {"svg": {"Date": None, "Creator": "qpipe"}, "png": {"Software": "qpipe"}}


def render(chart: Chart, kind: Kind) -> bytes:
    """Return the chart as the bytes of a file."""
    return _encode(draw(chart), kind)


def save(chart: Chart, folder: Path) -> None:
    """Write `<name>.svg` and `<name>.png` into `folder`, atomically."""
    figure = draw(chart)
    for kind in _METADATA:
        with replacing(folder / f"{chart.name}.{kind}") as temporary:
            temporary.write_bytes(_encode(figure, kind))


def _encode(figure: Figure, kind: Kind) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context(_SETTINGS):
        figure.savefig(buffer, format=kind, dpi=_DPI, metadata=_METADATA[kind])
    return _numbered(buffer.getvalue()) if kind == "svg" else buffer.getvalue()


def _numbered(svg: bytes) -> bytes:
    """Name clips and markers by number instead of matplotlib's digests.

    Those are taken of coordinates before they are rounded, and the layout's last digit differs from process to process.
    """
    order = {name: b"%c%d" % (name[0], number) for number, name in enumerate(dict.fromkeys(_DIGEST.findall(svg)))}
    return _DIGEST.sub(lambda found: order[found.group()], svg)


def _share_y(chart: Chart) -> bool:
    return len({panel.y for panel in chart.panels}) == 1


def _header(chart: Chart, width: float) -> list[tuple[str, float, str]]:
    """Return the lines above the panels as (text, size, colour), wrapped to `width` inches."""
    lines = [(line, 12.0, INK) for line in textwrap.wrap(chart.title, int(width * 9.2))]
    lines += [(line, 8.5, "#495057") for line in textwrap.wrap(chart.subtitle, int(width * 14))]
    lines += [(line, 8.5, WARN) for line in textwrap.wrap(chart.warning, int(width * 13.5))]
    return lines


def _write_header(figure: Figure, lines: Sequence[tuple[str, float, str]]) -> None:
    width, height = figure.get_size_inches()
    below = 0.1
    for text, size, color in lines:
        title = size > 10
        figure.text(
            0.09 / width,
            1 - below / height,
            text,
            size=size,
            color=color,
            weight="bold" if title else "normal",
            va="top",
        )
        below += 1.3 * _LINE if title else _LINE


def _draw_panel(ax: Axes, panel: Panel, *, outer: bool) -> None:
    _set_axis(ax, panel.x, "x")
    _set_axis(ax, panel.y, "y")
    if not outer:
        ax.set_ylabel("")
        ax.tick_params(axis="y", left=False, labelleft=False)
    ax.set_title(panel.title, size=9, loc="left", pad=4)
    ax.set_axisbelow(True)
    for mark in panel.marks:
        _draw_mark(ax, mark)


def _set_axis(ax: Axes, axis: Axis, side: str) -> None:
    handle = ax.xaxis if side == "x" else ax.yaxis
    (ax.set_xscale if side == "x" else ax.set_yscale)("log" if axis.log else "linear")
    (ax.set_xlim if side == "x" else ax.set_ylim)(*axis.limits)
    (ax.set_xlabel if side == "x" else ax.set_ylabel)(axis.title)
    handle.set_ticks([value for value, _ in axis.ticks], labels=[label for _, label in axis.ticks])
    handle.set_tick_params(which="minor", bottom=False, left=False)
    handle.set_minor_formatter(mpl.ticker.NullFormatter())
    if axis.grid:
        ax.grid(visible=True, axis=side)  # type: ignore[arg-type]


def _draw_mark(ax: Axes, mark: Mark) -> None:
    match mark:
        case Points():
            _draw_points(ax, mark)
        case Line():
            ax.plot(mark.x, mark.y, color=mark.color, linestyle=_DASHES[mark.dash], linewidth=mark.width, zorder=2)
            if mark.label == "end":
                place = (mark.x[-1], mark.y[-1])
                ax.annotate(
                    mark.name, place, (0, 2), textcoords="offset points", size=_LABEL_SIZE, ha="center", va="bottom"
                )
        case Band():
            ax.fill_between(mark.x, mark.low, mark.high, color=mark.color, alpha=0.15, linewidth=0, zorder=1)
        case Bars():
            _draw_bars(ax, mark)
        case Rule():
            (ax.axvline if mark.axis == "x" else ax.axhline)(
                mark.at, color=mark.color, linestyle=_DASHES[mark.dash], linewidth=1, zorder=1.5
            )


def _draw_points(ax: Axes, mark: Points) -> None:
    if mark.low:
        ax.vlines(mark.x, mark.low, mark.high, color=mark.look.color, linewidth=1.1, zorder=2.5)
    ax.plot(
        mark.x, mark.y, linestyle="none", marker=_MARKERS[mark.look.marker], markersize=5.2, zorder=3,
        markerfacecolor="white" if mark.open else mark.look.color,
        markeredgecolor=mark.look.color if mark.open else "white", markeredgewidth=1.1 if mark.open else 0.5,
    )  # fmt: skip


def _draw_bars(ax: Axes, mark: Bars) -> None:
    ax.barh(range(len(mark.values)), mark.values, height=0.66, color=mark.colors, zorder=2)
    right = ax.get_xlim()[1]
    whisker: dict[str, Any] = {"solid_capstyle": "butt", "clip_on": True}
    for row, (low, high, text, start) in enumerate(zip(mark.low, mark.high, mark.texts, mark.text_from, strict=True)):
        # White under the whisker keeps it visible on a black bar.
        ax.plot([low, min(high, right)], [row, row], color="white", linewidth=3, zorder=3, **whisker)
        ax.plot([low, min(high, right)], [row, row], color="#495057", linewidth=1.4, zorder=4, **whisker)
        if high > right:
            ax.plot([right], [row], marker=">", color="#495057", markersize=5, clip_on=False, zorder=4)
        # A white ground keeps the numbers legible where they cross the reference line.
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        place = (min(start, right), row)
        ax.annotate(text, place, (6, 0), textcoords="offset points", va="center", size=_LABEL_SIZE, bbox=ground)


def _end_labels(ax: Axes, chart: Chart) -> None:
    """Name the lines at the right edge of the last panel, pushed apart vertically until no two overlap."""
    panel = chart.panels[-1]
    lines = [mark for mark in panel.marks if isinstance(mark, Line) and mark.label == "margin"]
    if not lines:
        return
    to_fraction = ax.transLimits.transform
    scale = ax.yaxis.get_transform()
    ends = [float(to_fraction((0, scale.transform([line.y[-1]])[0]))[1]) for line in lines]
    separation = _LABEL_SIZE * 1.22 / 72 / (chart.height * 0.86)
    for line, end, place in zip(lines, ends, spread(ends, separation), strict=True):
        ax.annotate(
            line.name, (1.0, end), (1.06, place), xycoords="axes fraction", textcoords="axes fraction",
            size=_LABEL_SIZE, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": line.color, "lw": 0.6, "shrinkB": 0},
        )  # fmt: skip


def spread(positions: Sequence[float], separation: float) -> list[float]:
    """Return places in [0, 1] in the order of `positions`, at least `separation` apart, moved as little as possible.

    With z_k = place_k - k separation the task is an isotonic regression with bounds. Pooling adjacent violators solves
    it in least squares, and clipping solves the bounds. Places beyond 1 are left where there are too many for [0, 1].
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    blocks: list[list[float]] = []
    for k, index in enumerate(order):
        blocks.append([positions[index] - k * separation])
        while len(blocks) > 1 and _mean(blocks[-2]) > _mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    pooled = [_mean(block) for block in blocks for _ in block]
    highest = max(0.0, 1 - (len(order) - 1) * separation)
    places = [0.0] * len(positions)
    for k, index in enumerate(order):
        places[index] = min(max(pooled[k], 0.0), highest) + k * separation
    return places


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _legend(ax: Axes, chart: Chart) -> None:
    handles: list[Line2D] = []
    hollow = {mark.name for panel in chart.panels for mark in panel.marks if isinstance(mark, Points) and mark.open}
    for name, look in chart.looks.items():
        face = "white" if name in hollow else look.color
        shape = {"marker": _MARKERS[look.marker], "color": look.color, "markerfacecolor": face, "markersize": 5}
        handles.append(Line2D([], [], linestyle="none", **shape))  # type: ignore[arg-type]
    names = list(chart.looks)
    for mark in itertools.chain.from_iterable(panel.marks for panel in chart.panels):
        if isinstance(mark, Line) and mark.legend and mark.name not in names:
            handles.append(Line2D([], [], color=mark.color, linestyle=_DASHES[mark.dash], linewidth=mark.width))
            names.append(mark.name)
    if not handles:
        return
    # A name that starts with an underscore means "no entry" to matplotlib; a leading space avoids that.
    labels = [f" {name}" if name.startswith("_") else name for name in names]
    place: dict[str, Any] = {"loc": "lower right"}
    if chart.legend == "side":
        columns = -(-len(labels) // int(chart.height / 0.19))
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.02), "ncols": columns, "borderaxespad": 0}
    ax.legend(handles, labels, frameon=False, fontsize=_LABEL_SIZE, handlelength=1.6, **place)


def _point_labels(ax: Axes, panel: Panel) -> None:
    """Write names beside points where they cover no mark and no other name; the legend names the rest."""
    marked = [mark for mark in panel.marks if isinstance(mark, Points) and mark.labels]
    if not marked:
        return
    canvas = ax.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    taken = [box for mark in marked for box in _occupied(ax, mark)]
    frame = ax.get_window_extent(renderer)
    for mark in marked:
        for dx, dy, ha, va in _PLACES:
            text = ax.annotate(
                mark.name, (mark.x[0], mark.y[0]), (dx, dy), textcoords="offset points",
                ha=ha, va=va, size=_LABEL_SIZE,
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            if frame.x0 < box.x0 and box.x1 < frame.x1 and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def _occupied(ax: Axes, mark: Points) -> list[Bbox]:
    """Return the pixels that markers and their intervals cover."""
    radius = 3.0 * _DPI / 72
    boxes = []
    for position, (x, y) in enumerate(zip(mark.x, mark.y, strict=True)):
        low, high = (mark.low[position], mark.high[position]) if mark.low else (y, y)
        (left, bottom), (right, top) = ax.transData.transform([(x, min(low, y)), (x, max(high, y))])
        boxes.append(Bbox.from_extents(left - radius, bottom - radius, right + radius, top + radius))
        if mark.low:  # the bar itself is thin; only the marker is wide
            centre = ax.transData.transform((x, y))[1]
            boxes[-1] = Bbox.from_extents(left - 1, bottom, right + 1, top)
            boxes.append(Bbox.from_extents(left - radius, centre - radius, right + radius, centre + radius))
    return boxes


_PLACES = (
    (6, 0, "left", "center"), (-6, 0, "right", "center"), (0, 6, "center", "bottom"), (0, -6, "center", "top"),
    (5, 5, "left", "bottom"), (5, -5, "left", "top"), (-5, 5, "right", "bottom"), (-5, -5, "right", "top"),
)  # fmt: skip
