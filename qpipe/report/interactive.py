"""Charts on screen: plotly specifications as plain JSON, drawn by the page's one copy of plotly's script.

Only scatter and bar traces are used, which plotly draws as SVG without WebGL. Names come from studies and tables and
may hold markup, which plotly would interpret; every text is escaped here.
"""

import html
import math
from typing import Any

from qpipe.report.axes import Axis
from qpipe.report.chart import Band, Bars, Chart, Line, Mark, Panel, Points, Rule
from qpipe.report.palette import GREY, INK

Json = dict[str, Any]


def specification(chart: Chart) -> Json:
    """Return the chart as a plotly figure: `data`, `layout`, and in `layout.meta` the words around it."""
    traces: list[Json] = []
    layout = _layout(chart)
    named: set[str] = set()
    for number, panel in enumerate(chart.panels, start=1):
        suffix = "" if number == 1 else str(number)
        for mark in panel.marks:
            place = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
            traces += [trace | place for trace in _traces(mark)]
            if isinstance(mark, Rule):
                layout["shapes"].append(_rule(mark, suffix))
        layout |= _axes(chart, panel, number, suffix)
        layout["annotations"].append(_panel_title(panel, suffix))
    traces += _group_entries(chart)
    ranks = {_text(name): 1000 + rank for rank, name in enumerate(chart.looks)}
    for trace in traces:
        if trace["name"] in ranks:
            trace["legendrank"] = ranks[trace["name"]]
        if trace["showlegend"]:
            trace["showlegend"] = trace["name"] not in named
            named.add(trace["name"])
    return {"data": traces, "layout": layout}


def _group_entries(chart: Chart) -> list[Json]:
    """Return traces of one empty point each (plotly drops traces of none) that name groups of lines in the legend."""
    marks = [mark for panel in chart.panels for mark in panel.marks if isinstance(mark, Line) and mark.group]
    names = sorted({mark.group for mark in marks})
    return [_points(Points(name, (), (), chart.looks[name])) | {"x": [None], "y": [None]} for name in names]


def _text(value: str) -> str:
    return html.escape(value, quote=False)


def _layout(chart: Chart) -> Json:
    return {
        "shapes": [],
        "annotations": [],
        "height": round(96 * (chart.height + 0.45)),
        "margin": {"l": 62, "r": 16, "t": 44, "b": 50},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "hovermode": "closest",
        "showlegend": True,
        "legend": {"itemsizing": "constant", "tracegroupgap": 0},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": INK},
        "meta": {
            "name": chart.name,
            "title": chart.title,
            "subtitle": chart.subtitle,
            "caption": chart.caption,
            "warning": chart.warning,
            "panels": len(chart.panels),
        },
    }


def _axes(chart: Chart, panel: Panel, number: int, suffix: str) -> Json:
    count = len(chart.panels)
    shared = len({p.y for p in chart.panels}) == 1
    gap = 0.03 if shared else 0.09
    width = (1 - gap * (count - 1)) / count
    left = (number - 1) * (width + gap)
    x, y = _axis(panel.x), _axis(panel.y)
    x |= {"domain": [round(left, 4), round(min(left + width, 1), 4)], "anchor": f"y{suffix}"}
    y["anchor"] = f"x{suffix}"
    if shared and number > 1:
        y |= {"matches": "y", "showticklabels": False, "title": {"text": ""}}
    return {f"xaxis{suffix}": x, f"yaxis{suffix}": y}


def _axis(axis: Axis) -> Json:
    limits = [math.log10(v) for v in axis.limits] if axis.log else list(axis.limits)
    return {
        "type": "log" if axis.log else "linear",
        "range": limits,
        "title": {"text": _text(axis.title), "standoff": 8},
        "tickmode": "array",
        "tickvals": [value for value, _ in axis.ticks],
        "ticktext": [_text(label) for _, label in axis.ticks],
        "showgrid": axis.grid,
        "gridcolor": "rgba(134,142,150,0.22)",
        "zeroline": False,
        "showline": True,
        "linecolor": GREY,
        "automargin": True,
    }


def _panel_title(panel: Panel, suffix: str) -> Json:
    return {
        "text": _text(panel.title),
        "xref": f"x{suffix} domain",
        "yref": f"y{suffix} domain",
        "x": 0,
        "y": 1,
        "xanchor": "left",
        "yanchor": "bottom",
        "showarrow": False,
    }


def _traces(mark: Mark) -> list[Json]:
    match mark:
        case Points():
            return [_points(mark)]
        case Line():
            return [_line(mark)]
        case Band():
            return [_band(mark)]
        case Bars():
            return [_bars(mark)]
        case _:
            return []


def _points(mark: Points) -> Json:
    color = mark.look.color
    trace: Json = {
        "type": "scatter",
        "mode": "markers",
        "name": _text(mark.name),
        "legendgroup": _text(mark.name),
        "showlegend": True,
        "x": list(mark.x),
        "y": list(mark.y),
        "marker": {"color": color, "size": 8, "symbol": mark.look.marker + ("-open" if mark.open else "")},
    }
    if mark.hover:
        trace |= {"text": [_hover(text) for text in mark.hover], "hoverinfo": "text"}
    if mark.low:
        trace["error_y"] = _interval(mark.y, mark.low, mark.high, color)
    return trace


def _line(mark: Line) -> Json:
    named = {"mode": "lines+text", "text": [""] * (len(mark.x) - 1) + [_text(mark.name)], "textposition": "top center"}
    return {
        "type": "scatter",
        "mode": "lines",
        "name": _text(mark.name),
        "legendgroup": _text(mark.group or mark.name),
        "showlegend": mark.legend,
        "hoverinfo": "name" if mark.group else "skip",
        "hoverlabel": {"namelength": -1},
        "x": list(mark.x),
        "y": list(mark.y),
        "line": {"color": mark.color, "dash": mark.dash, "width": mark.width},
        "cliponaxis": mark.label != "end",
        **(named if mark.label == "end" else {}),
    }


def _band(mark: Band) -> Json:
    red, green, blue = (int(mark.color[i : i + 2], 16) for i in (1, 3, 5))
    return {
        "type": "scatter",
        "mode": "lines",
        "name": _text(mark.name),
        "showlegend": False,
        "hoverinfo": "skip",
        "x": [*mark.x, *reversed(mark.x)],
        "y": [*mark.high, *reversed(mark.low)],
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},0.15)",
        "line": {"width": 0},
    }


def _bars(mark: Bars) -> Json:
    return {
        "type": "bar",
        "orientation": "h",
        "name": "",
        "showlegend": False,
        "x": list(mark.values),
        "y": list(range(len(mark.values))),
        "width": 0.66,
        "marker": {"color": list(mark.colors)},
        "text": [_text(text) for text in mark.texts],
        "textposition": "none",
        "hovertext": [_hover(text) for text in mark.hover],
        "hoverinfo": "text",
        "error_x": _interval(mark.values, mark.low, mark.high, GREY),
    }


def _interval(values: tuple[float, ...], low: tuple[float, ...], high: tuple[float, ...], color: str) -> Json:
    return {
        "type": "data",
        "symmetric": False,
        "array": [h - v for v, h in zip(values, high, strict=True)],
        "arrayminus": [v - low_ for v, low_ in zip(values, low, strict=True)],
        "color": color,
        "thickness": 1.6,
        "width": 3,
    }


def _hover(text: str) -> str:
    return _text(text).replace("\n", "<br>")


def _rule(mark: Rule, suffix: str) -> Json:
    along, across = ("y", "x") if mark.axis == "x" else ("x", "y")
    return {
        "type": "line",
        "layer": "below",
        f"{across}ref": f"{across}{suffix}",
        f"{along}ref": f"{along}{suffix} domain",
        f"{across}0": mark.at,
        f"{across}1": mark.at,
        f"{along}0": 0,
        f"{along}1": 1,
        "line": {"color": mark.color, "dash": mark.dash, "width": 1},
    }
