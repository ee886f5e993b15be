"""Figures: what they show against the law's closed form, how they are drawn, and what the verb refuses."""

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import report_cases
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from report_cases import EFF, LAW, made, true_loss
from scipy.stats import chi2

from qpipe.cli import main
from qpipe.report.chart import Bars, Line, Panel, Points, Rule
from qpipe.report.figures import charts, write_figures
from qpipe.report.interactive import specification
from qpipe.report.law_figures import budgets, collapse, loss_vs_n, residuals
from qpipe.report.multiplier_figures import eff_vs_bits, multiplier_bars
from qpipe.report.profile_figure import profiles
from qpipe.report.static import draw, render
from qpipe.report.subject import Capacity, Multiplier, Subject

CAPACITIES = {name: Capacity(2.0 + k, 0.3 + 0.1 * k, 4.0 ** -(k + 1)) for k, name in enumerate(EFF) if name != "dense"}
HREF = "{http://www.w3.org/1999/xlink}href"
HOSTILE = ["$x_{1}$", "_hidden", "<script>alert(1)</script>", 'w4 & a="b"', "<b>bold</b>", "Ω" * 40]


def subject(fit=None, capacities=CAPACITIES) -> Subject:
    return Subject(fit or made(EFF), capacities)


def points(panel: Panel, name: str) -> Points:
    (found,) = [mark for mark in panel.marks if isinstance(mark, Points) and mark.name == name]
    return found


def test_loss_curves_are_the_law_and_markers_the_runs():
    chart = loss_vs_n(subject())
    assert [panel.title for panel in chart.panels] == ["D/N ≈ 10", "D/N ≈ 40", "D/N ≈ 160"]
    rows = report_cases.losses()
    for panel, ratio in zip(chart.panels, (10, 40, 160), strict=True):
        for line in (mark for mark in panel.marks if isinstance(mark, Line)):
            n = np.array(line.x)
            assert line.y == pytest.approx(true_loss(n, n * ratio, EFF[line.name]), rel=1e-6)
        for name in EFF:
            runs = rows[(rows["representation"] == name) & np.isclose(rows["d"] / rows["n"], ratio)]
            assert points(panel, name).x == pytest.approx(runs["n"])
            assert points(panel, name).y == pytest.approx(runs["loss"], rel=1e-7)


def test_collapse_leaves_each_run_as_far_from_the_line_as_from_the_law():
    case = subject()
    chart = collapse(case)
    (line,) = [mark for mark in chart.panels[0].marks if isinstance(mark, Line)]
    assert line.y == pytest.approx(LAW["A"] * np.array(line.x) ** -LAW["alpha"] + LAW["E"], rel=1e-6)
    for name, eff in EFF.items():
        marks, rows = points(chart.panels[0], name), case.rows[case.rows["representation"] == name]
        assert marks.x == pytest.approx(rows["n"] * eff, rel=1e-7)
        on_line = LAW["A"] * np.array(marks.x) ** -LAW["alpha"] + LAW["E"]
        assert np.array(marks.y) - on_line == pytest.approx(rows["loss"] - rows["fitted"], abs=1e-6)


def test_residuals_are_percent_of_log_loss():
    case = subject()
    chart = residuals(case)
    assert [panel.x.title for panel in chart.panels] == ["N (parameters)", "D (tokens)", "GMSE of the representation"]
    rows = case.rows[case.rows["representation"] == "w4"]
    expected = 100 * (np.log(rows["loss"]) - np.log(rows["fitted"]))
    assert points(chart.panels[0], "w4").y == pytest.approx(expected, rel=1e-6)
    assert points(chart.panels[2], "w4").x == pytest.approx([CAPACITIES["w4"].gmse] * len(rows))
    # Dense has no GMSE: it is in the other panels and not in this one.
    assert not [mark for mark in chart.panels[2].marks if isinstance(mark, Points) and mark.name == "dense"]


def test_residuals_of_a_real_fit_are_positive_where_runs_are_worse_than_the_law():
    fit = report_cases.fitted(bootstrap=0)
    case = Subject(fit, {})
    shown = points(residuals(case).panels[0], "w2")
    rows = case.rows[case.rows["representation"] == "w2"]
    predicted = fit.predict(rows["n"], rows["d"], "w2")
    assert shown.y == pytest.approx(100 * np.log(rows["loss"] / predicted), abs=1e-4)


def test_profiles_end_where_chi_square_says():
    fit = report_cases.fitted(bootstrap=0, profiles=["eff[w4]"], level=0.9)
    chart = profiles(Subject(fit, {}))
    assert [panel.title.split(":")[0] for panel in chart.panels] == ["alpha", "beta", "E", "eff[w4]"]
    for panel in chart.panels:
        (level,) = [mark.at for mark in panel.marks if isinstance(mark, Rule) and mark.axis == "y"]
        assert level == pytest.approx(chi2.ppf(0.9, 1))
        (curve,) = [mark for mark in panel.marks if isinstance(mark, Line)]
        for end in (mark.at for mark in panel.marks if isinstance(mark, Rule) and mark.axis == "x"):
            assert np.interp(end, curve.x, curve.y) == pytest.approx(level, rel=0.1)


def test_bars_are_ranked_and_carry_intervals():
    chart = multiplier_bars(subject())
    (bars,) = [mark for mark in chart.panels[0].marks if isinstance(mark, Bars)]
    assert bars.values == (1.0, 0.83, 0.7, 0.6, 0.35)
    assert [label for _, label in chart.panels[0].y.ticks] == ["dense", "w4", "2:4", "w4a4", "w2"]
    assert bars.low == pytest.approx([0.9 * v for v in bars.values])
    assert bars.texts[1] == "0.830 [0.747, 0.913]"


def test_equal_memory_lines_have_eff_proportional_to_bits():
    chart = eff_vs_bits(subject())
    lines = [mark for mark in chart.panels[0].marks if isinstance(mark, Line)]
    for line in lines:
        gain = float(line.name.rstrip("×"))
        assert np.array(line.y) * 16 / np.array(line.x) == pytest.approx(np.full(len(line.x), gain), rel=1e-6)


def test_open_and_missing_intervals():
    fit = made(EFF)
    fit.multipliers["w4"] |= {"low": 0.2, "high": None}
    fit.multipliers["w2"] |= {"low": None, "high": None}
    case = subject(fit)
    assert str(case.multipliers["w4"]) == "0.830 [0.200, ∞]"
    assert str(case.multipliers["w2"]) == "0.350"
    for chart in charts(case)[0]:
        json.dumps(specification(chart), allow_nan=False)
        draw(chart)
    axis = multiplier_bars(case).panels[0].x
    assert axis.limits[1] < 2  # an open interval must not flatten the bars


@pytest.mark.parametrize("eff", [12.0, 1e-4])
def test_extreme_multipliers_stay_readable(eff):
    case = subject(made(EFF | {"w2": eff}))
    (bars,) = [mark for mark in multiplier_bars(case).panels[0].marks if isinstance(mark, Bars)]
    assert eff in bars.values
    for chart in charts(case)[0]:
        draw(chart)


def test_budgets_of_the_quest_ladder_are_three_ratios():
    # 2502.05003: D/N of 25, 50 and 100 of nominal sizes; non-embedding N and D as trained.
    n = [30482560] * 3 + [49556736] * 3 + [102777856] * 3 + [822151168]
    d = [749993984, 1499987968, 2999975936, 1249902592, 2499805184, 4999872512]
    d += [2499805184, 4999872512, 9999745024, 79999795200]
    groups = budgets(pd.DataFrame({"n": n, "d": d}))
    assert [len(group.rows) for group in groups] == [3, 3, 4]
    assert [round(group.ratio) for group in groups if group.ratio] == [25, 49, 98]


def test_budgets_of_fixed_token_counts_and_of_scattered_runs():
    fixed = pd.DataFrame({"n": [1e7, 3e7, 1e8, 1e7, 3e7, 1e8], "d": [1e9] * 3 + [5e9] * 3})
    assert [group.label for group in budgets(fixed)] == ["D ≈ 1B tokens", "D ≈ 5B tokens"]
    assert budgets(fixed)[1].d(np.array([7e7])) == 5e9
    random = np.random.default_rng(0)
    scattered = pd.DataFrame({"n": 10 ** random.uniform(7, 10, 245), "d": 10 ** random.uniform(9, 12, 245)})
    groups = budgets(scattered)
    assert len(groups) == 4
    assert sum(len(group.rows) for group in groups) == 245


def test_figures_that_cannot_be_drawn_are_named_with_the_reason():
    drawn, omitted = charts(subject(capacities={}))
    assert {chart.name for chart in drawn} == {"multipliers", "loss-vs-n", "collapse", "residuals"}
    assert set(omitted) == {"eff-vs-bits", "rho-vs-eff", "profiles"}
    dense_only = replace(made({"dense": 1.0}), law="chinchilla", multipliers={})
    drawn, omitted = charts(subject(dense_only, {}))
    assert {chart.name for chart in drawn} == {"loss-vs-n", "residuals"}
    assert "no multipliers" in omitted["multipliers"]


def test_an_unsettled_fit_says_so_on_every_figure():
    drawn, _ = charts(subject(made(EFF, message="E is not identified")))
    assert all("Not a settled fit: E is not identified" in chart.warning for chart in drawn)
    assert all(chart.warning == "" for chart in charts(subject())[0])


def test_titles_state_law_runs_and_interval_level():
    for chart in charts(subject())[0]:
        assert "compression law" in chart.title
        assert "60 runs of 5 representations" in chart.subtitle
        assert "90 % intervals from 100 resamples" in chart.subtitle


def test_specifications_are_what_plotly_accepts_and_hold_every_run():
    for chart in charts(subject())[0]:
        made_figure = go.Figure(specification(chart))
        shown = sum(len(t.x) for t in made_figure.data if t.type == "scatter" and t.mode == "markers")
        described = sum(len(m.x) for panel in chart.panels for m in panel.marks if isinstance(m, Points))
        assert shown == described
        names = [trace.name for trace in made_figure.data if trace.showlegend]
        assert len(names) == len(set(names))
    runs = specification(loss_vs_n(subject()))
    assert sum(len(t["x"]) for t in runs["data"] if t["mode"] == "markers") == 60


def test_hostile_names_are_drawn_as_text():
    case = subject(
        made({"dense": 1.0} | dict.fromkeys(HOSTILE, 0.5)), {name: Capacity(4, 0.5, 0.01) for name in HOSTILE}
    )
    for chart in charts(case)[0]:
        svg = ElementTree.fromstring(render(chart, "svg"))
        assert not [node for node in svg.iter() if node.tag.endswith("script")]
        texts = json.dumps(specification(chart))
        assert "<script" not in texts
        assert "<b>" not in texts
    legend = draw(collapse(case)).axes[0].get_legend()
    assert {text.get_text().strip() for text in legend.get_texts()} >= set(HOSTILE)


def test_labels_overlap_neither_each_other_nor_leave_the_figure():
    names = {f"w{b}{kind}": 0.9 - 0.03 * b for b in range(1, 9) for kind in ("", "-absmax")} | {"dense": 1.0}
    case = subject(made(names), {name: Capacity(1 + i % 5, 0.1 + 0.01 * i, 0.01) for i, name in enumerate(names)})
    for chart in charts(case)[0]:
        figure = draw(chart)
        canvas = figure.canvas
        assert isinstance(canvas, FigureCanvasAgg)
        texts = [t for ax in figure.axes for t in ax.texts]
        boxes = [Text.get_window_extent(t, canvas.get_renderer()) for t in texts]  # without leader lines
        for i, box in enumerate(boxes):
            assert figure.bbox.x0 <= box.x0 + 1
            assert box.x1 <= figure.bbox.x1 + 1, (chart.name, texts[i].get_text())
            for j in range(i):
                assert not box.overlaps(boxes[j]), (texts[i].get_text(), texts[j].get_text())


def test_a_fit_from_real_search_is_drawn_from_its_file(tmp_path, capsys):
    report_cases.fitted().to_json(tmp_path / "fit.json")
    capacity = report_cases.write_capacities(tmp_path / "capacity.json", ["w4", "w4a4", "2:4", "w2"])
    out = tmp_path / "figures"
    assert main(["figures", str(tmp_path / "fit.json"), "--capacity", str(capacity), "--out", str(out)]) == 0
    content = json.loads((out / "figures.json").read_text())
    names = [figure["layout"]["meta"]["name"] for figure in content["figures"]]
    assert names == ["multipliers", "loss-vs-n", "eff-vs-bits", "rho-vs-eff", "collapse", "residuals", "profiles"]
    assert content["omitted"] == {}
    assert content["fit_digest"] == hashlib.sha256((tmp_path / "fit.json").read_bytes()).hexdigest()
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [f"{name}.{kind}" for name in names for kind in ("svg", "png")] + ["figures.json"]
    )
    assert "7 figures" in capsys.readouterr().out


def test_what_an_svg_refers_to_is_there_once(tmp_path):
    made(EFF).to_json(tmp_path / "fit.json")
    write_figures(tmp_path / "fit.json", [], tmp_path)
    for path in tmp_path.glob("*.svg"):
        elements = [element.attrib for element in ElementTree.parse(path).iter()]
        names = [attributes["id"] for attributes in elements if "id" in attributes]
        wanted = [
            name for attributes in elements for name in re.findall(r"url\(#(.+?)\)", " ".join(attributes.values()))
        ]
        wanted += [attributes[HREF].removeprefix("#") for attributes in elements if HREF in attributes]
        assert wanted
        assert all(names.count(name) == 1 for name in set(wanted)), path.name


def test_bytes_are_equal_in_another_process(tmp_path):
    made(EFF).to_json(tmp_path / "fit.json")
    write_figures(tmp_path / "fit.json", [], tmp_path / "here")
    environment = {**os.environ, "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "123456789"}
    command = [sys.executable, "-m", "qpipe", "figures", str(tmp_path / "fit.json"), "--out", str(tmp_path / "there")]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"representation": "w4"}', "not a list of capacities"),
        ('[{"rho": 1}]', "not a list of capacities"),
        ("[", "not JSON"),
    ],
)
def test_defective_capacities_are_refused(tmp_path, capsys, content, words):
    made(EFF).to_json(tmp_path / "fit.json")
    (tmp_path / "capacity.json").write_text(content)
    command = [
        "figures",
        str(tmp_path / "fit.json"),
        "--capacity",
        str(tmp_path / "capacity.json"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(command) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_missing_fit_is_refused(tmp_path, capsys):
    assert main(["figures", str(tmp_path / "no.json"), "--out", str(tmp_path / "o")]) == 2
    assert "no.json" in capsys.readouterr().err


def test_multiplier_text_keeps_three_digits():
    assert str(Multiplier(1.0, 0.98721, 1.0812, 5)) == "1.00 [0.987, 1.08]"
    assert str(Multiplier(0.016, 0.0123, float("inf"), 5)) == "0.0160 [0.0123, ∞]"


def test_help_needs_no_heavy_import():
    code = (
        "import sys; from qpipe.cli import main\n"
        "for verb in ('figures', 'report'):\n"
        "    try: main([verb, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'pandas', 'matplotlib', 'plotly', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parent.parent)
