"""The front of loss against size, drawn: every model, the front of the means, and how sure each place on it is."""

from qpipe.front import LEVEL, Front
from qpipe.report.axes import numeric_axis
from qpipe.report.chart import Chart, Line, Mark, Panel, Points
from qpipe.report.law_figures import floats
from qpipe.report.palette import looks


def front_chart(found: Front, counted: str) -> Chart:
    """Return the chart of a front; `counted` says what sizes count."""
    points, colours = found.points, looks(found.points["representation"].unique())
    on = points[points["on_front"]]
    marks: list[Mark] = [Line("front of the means", floats(on["size_mib"]), floats(on["loss"]), dash="dash")]
    for name, group in points.groupby("representation", sort=False):
        hover = tuple(
            f"{name}: N {row.n:,.0f}, D {row.d:,.0f}, {row.size_mib:.4g} MiB, loss {row.loss:.4f}, "
            f"on the front in {row.share:.0%} of the draws"
            for row in group.itertuples()
        )
        marks.append(
            Points(str(name), floats(group["size_mib"]), floats(group["loss"]), colours[str(name)], hover, labels=True)
        )
    noise = f"noise between seeds {found.noise:.2g} nats/token" if found.freedom else "noise between seeds not known"
    return Chart(
        name="front",
        title="Loss against size",
        subtitle=f"{len(points)} models, {int(points['runs'].sum())} runs; {counted}; {noise}",
        caption="A model is on the front when no model of the same or smaller size has a lower loss. Of the "
        f"representations, {', '.join(found.members) or 'none'} are on it in at least {LEVEL:.0%} of the draws of the "
        "noise between seeds.",
        panels=(
            Panel(
                numeric_axis("size of the weights (MiB)", points["size_mib"], log=True),
                numeric_axis("validation loss (nats/token)", points["loss"]),
                tuple(marks),
            ),
        ),
        looks=colours,
    )
