"""The figures of a fitted law: data in, `Chart` out.

Which figures a fit gets depends on what it has: multipliers need a law with multipliers, eff against bits needs
bits/weight. `charts` returns the figures that can be drawn and, for each that can not, the reason.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from qpipe.files import write_text
from qpipe.laws import Fit
from qpipe.report.chart import Chart
from qpipe.report.inputs import file_digest, read_capacities
from qpipe.report.interactive import specification
from qpipe.report.law_figures import collapse, loss_vs_n, no_collapse, residuals
from qpipe.report.multiplier_figures import eff_vs_bits, multiplier_bars, rho_vs_eff
from qpipe.report.profile_figure import profiles
from qpipe.report.static import save
from qpipe.report.subject import Subject


def charts(subject: Subject) -> tuple[list[Chart], dict[str, str]]:
    """Return the figures of a fit, and name -> reason for those that can not be drawn from it."""
    compressed = [name for name in subject.multipliers if name != "dense"]
    choices: list[tuple[str, Callable[[Subject], Chart], str]] = [
        ("multipliers", multiplier_bars, "" if compressed else "the law has no multipliers"),
        ("loss-vs-n", loss_vs_n, ""),
        ("eff-vs-bits", eff_vs_bits, _unknown(subject, "bits_per_weight", "no bits/weight known")),
        ("rho-vs-eff", rho_vs_eff, _unknown(subject, "rho", "no predicted capacity known")),
        ("collapse", collapse, no_collapse(subject)),
        ("residuals", residuals, ""),
        ("profiles", profiles, "" if subject.fit.checks.get("profiles") else "no parameter was profiled"),
    ]
    drawn = [draw(subject) for _, draw, lacking in choices if not lacking]
    return drawn, {name: lacking for name, _, lacking in choices if lacking}


def _unknown(subject: Subject, quantity: str, words: str) -> str:
    compressed = [name for name in subject.with_known(quantity) if name != "dense"]
    return "" if compressed else f"{words} for any representation with a multiplier"


def write_figures(fit_path: Path, capacity_paths: Sequence[Path], folder: Path) -> tuple[list[str], dict[str, str]]:
    """Write SVG, PNG and figures.json into `folder`; return the names drawn, and name -> reason of those left out.

    figures.json is written last: where it stands, the figures of the same fit stand beside it.
    """
    digest = file_digest(fit_path)
    subject = Subject(Fit.from_json(fit_path), read_capacities(capacity_paths))
    drawn, omitted = charts(subject)
    content = {
        "law": subject.fit.law,
        "fit_digest": digest,
        "figures": [specification(chart) for chart in drawn],
        "omitted": omitted,
    }
    for chart in drawn:
        save(chart, folder)
    write_text(folder / "figures.json", json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")
    return [chart.name for chart in drawn], omitted
