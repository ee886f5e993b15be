"""The page: complete, closed to the network, escaped, honest about the fit, and equal to the files it is made from."""

import base64
import hashlib
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import report_cases
from page_reader import Page
from report_cases import EFF, made

from qpipe.cli import main
from qpipe.errors import QpipeError
from qpipe.laws import multiplier_table, write_multipliers
from qpipe.report.figures import write_figures
from qpipe.report.page import Sources, build
from qpipe.report.run_tables import gather_runs, timing_table
from qpipe.report.subject import Subject
from qpipe.report.tables import duration, number_cell
from qpipe.report.verdict import verdict


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Sources:
    """A whole study on disk: fit, table, figures, plan, losses, runs, with one run diverged and one missing."""
    folder = tmp_path_factory.mktemp("study")
    fit = report_cases.fitted()
    fit.to_json(folder / "fit.json")
    write_multipliers(fit, multiplier_table(fit), folder / "table")
    capacity = report_cases.write_capacities(folder / "capacity.json", [name for name in EFF if name != "dense"])
    write_figures(folder / "fit.json", [capacity], folder / "figures")
    table = report_cases.losses()
    table["run"] = [f"run-{i:02d}" for i in range(len(table))]
    table["status"] = ["diverged" if i == 3 else "ok" for i in range(len(table))]
    table.loc[3, "loss"] = np.nan
    plan = [
        {"id": f"run-{i:02d}", "representation": r, "n": n, "d": d, "state": "done"}
        for i, (r, n, d) in enumerate(zip(table["representation"], table["n"], table["d"], strict=True))
    ]
    (folder / "plan.json").write_text(json.dumps(plan))
    table.drop(index=5).to_parquet(folder / "losses.parquet")
    for i in (0, 1, 3):
        run = folder / "runs" / f"run-{i:02d}"
        run.mkdir(parents=True)
        versions = {"python": "3.12.1", "torch": "2.11.0"}
        runtime = {"wall_seconds": 60.0 * (i + 1), "tokens_per_second": 1234.5, "device": "a GPU", "versions": versions}
        (run / "runtime.json").write_text(json.dumps(runtime))
        (run / "record.json").write_text(json.dumps({"message": "the loss exploded at step 7"}))
        curve = pd.DataFrame({"tokens": np.linspace(1e6, 1e8, 300), "train_loss": np.linspace(9, 3, 300)})
        curve.to_parquet(run / "curve.parquet")
    (folder / "study.yaml").write_text("name: </title><script>alert(1)</script>\ndescription: a & b <i>c</i>\n")
    return Sources(
        fits=[folder / "fit.json"],
        study=folder / "study.yaml",
        plan=folder / "plan.json",
        tables=[folder / "table"],
        figures=[folder / "figures"],
        losses=[folder / "losses.parquet"],
        runs=folder / "runs",
        capacity=[capacity],
        steps={"fit": folder / "absent.tsv"},
    )


@pytest.fixture(scope="module")
def html(study) -> str:
    return build(study)


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_nothing_is_loaded_from_outside(page):
    for tag, attributes in page.elements:
        for name in ("src", "href", "data", "action", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/svg+xml;base64,")), (tag, name, value)
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in page.text
    assert not re.search(r"url\(\s*['\"]?(?!data:)", page.text)


def test_policy_allows_the_page_s_scripts_and_nothing_else(page):
    (policy,) = [
        a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    code = [text for attributes, text in page.scripts if attributes.get("type") != "application/json"]
    digests = {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in code}
    assert set(rules["script-src"].split()) == digests
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data: blob:"


def test_plotly_is_embedded_once(page, html):
    code = [text for attributes, text in page.scripts if "type" not in attributes]
    assert sum(len(text) > 1_000_000 for text in code) == 1
    assert len(html) < 12e6


def test_text_of_the_study_is_shown_and_not_interpreted(page):
    assert len(page.scripts) == 3
    assert "</title><script>alert(1)</script>" in page.text
    assert "a & b <i>c</i>" in page.text
    assert not [tag for tag, _ in page.elements if tag == "i"]


def test_hostile_representation_names_are_only_text(tmp_path):
    names = {"dense": 1.0, "<img src=x onerror=alert(1)>": 0.5, "</script><script>alert(1)</script>": 0.4}
    fit = made(names)
    fit.to_json(tmp_path / "fit.json")
    write_multipliers(fit, multiplier_table(fit), tmp_path)
    write_figures(tmp_path / "fit.json", [], tmp_path)
    parsed = Page(build(Sources([tmp_path / "fit.json"], tables=[tmp_path], figures=[tmp_path])))
    assert len(parsed.scripts) == 3
    assert all(a["src"].startswith("data:") for t, a in parsed.elements if t == "img")
    assert {row[0] for row in parsed.tables["multipliers"][1:]} == set(names)


def test_multipliers_are_those_of_the_table(page, study):
    table = pd.read_parquet(study.tables[0] / "multipliers.parquet").set_index("representation")
    header, *rows = page.tables["multipliers"]
    assert header[1] == "eff"
    assert len(rows) == len(table)
    for row in rows:
        assert float(row[1]) == pytest.approx(table.loc[row[0], "eff"], rel=5e-3)
        if row[0] != "dense":
            low, high = map(float, row[2].split(" to "))
            assert low == pytest.approx(table.loc[row[0], "low"], rel=5e-3)
            assert high == pytest.approx(table.loc[row[0], "high"], rel=5e-3)


def test_all_runs_are_listed_with_loss_state_and_time(page, study):
    losses = pd.read_parquet(study.losses[0]).set_index("run")
    header, *rows = page.tables["runs"]
    column = {name: position for position, name in enumerate(header)}
    assert len(rows) == 60
    found = {row[0]: row for row in rows}
    assert found["run-05"][column["status"]] == "missing"
    assert found["run-03"][column["status"]] == "diverged"
    assert found["run-03"][column["loss"]] == ""
    assert found["run-01"][column["wall time"]] == "2 min 00 s"
    for name, row in found.items():
        if row[column["status"]] == "ok":
            assert float(row[column["loss"]]) == pytest.approx(losses.loc[name, "loss"], abs=6e-5)
            assert int(row[column["N"]].replace(",", "")) == losses.loc[name, "n"]


def test_missing_and_diverged_runs_are_named_on_top(page):
    before = page.text.split("The compression law", 2)[1]
    assert "run-03: diverged: the loss exploded at step 7" in before
    assert "run-05: missing" in before


def test_times_versions_and_digests(page, study):
    timing = {row[0]: row[1:] for row in page.tables["timing"][1:]}
    assert timing["fit"][0] == "not recorded"
    assert timing["runs, by their own clocks"][:4] == ["3", "7 min 00 s", "2 min 00 s", "4 min 00 s"]
    assert "python 3.12.1, torch 2.11.0" in page.tables["versions"][2][1]
    digests = {row[0]: row[1] for row in page.tables["digests"][1:]}
    for path in (study.fits[0], study.study, study.plan, study.losses[0]):
        assert digests[str(path)] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_figures_in_the_page_are_those_drawn_and_each_has_a_static_twin(page, study):
    drawn = json.loads((study.figures[0] / "figures.json").read_text())["figures"]
    (block,) = [json.loads(text) for attributes, text in page.scripts if attributes.get("type") == "application/json"]
    assert block[: len(drawn)] == drawn
    assert block[-1]["layout"]["meta"]["name"] == "curves"
    places = [int(a["data-figure"]) for t, a in page.elements if t == "div" and "data-figure" in a]
    assert places == list(range(len(block)))
    images = [a for t, a in page.elements if t == "img"]
    assert len(images) == len(block)
    assert all(image["alt"] for image in images)
    first = base64.b64decode(images[0]["src"].split(",", 1)[1])
    assert first == (study.figures[0] / f"{drawn[0]['layout']['meta']['name']}.svg").read_bytes()


def test_page_is_accessible_in_structure(page):
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == tags.count("main") == 1
    headings = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in itertools.pairwise(headings))
    assert ("html", {"lang": "en"}) in page.elements
    identifiers = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    links = [a["href"][1:] for t, a in page.elements if t == "a"]
    assert set(links) <= set(identifiers)
    assert all(a.get("scope") == "col" for t, a in page.elements if t == "th")


def test_equal_inputs_give_equal_bytes(study, html):
    assert build(study) == html


def test_page_of_a_fit_alone(tmp_path):
    made({"dense": 1.0, "w4": 0.8}).to_json(tmp_path / "fit.json")
    assert main(["report", "--fit", str(tmp_path / "fit.json"), "--out", str(tmp_path / "sub" / "report.html")]) == 0
    parsed = Page((tmp_path / "sub" / "report.html").read_text())
    assert "The compression law is identified by these runs" in parsed.text
    assert "runs" not in parsed.tables
    assert not [path for path in (tmp_path / "sub").iterdir() if path.name != "report.html"]


def test_laws_without_multipliers_need_no_table_and_stand_last(tmp_path, study):
    dense = made({"dense": 1.0})
    dense.law, dense.multipliers = "chinchilla", {}
    dense.to_json(tmp_path / "dense.json")
    parsed = Page(build(Sources([tmp_path / "dense.json", study.fits[0]], tables=study.tables)))
    assert parsed.text.index("The compression law") < parsed.text.index("The chinchilla law")


# What the words above the numbers say.


def test_verdict_on_an_unidentified_fit_comes_before_any_number(tmp_path):
    fit = made(EFF, message="E at a bound: not identified by these runs")
    fit.status["at_bound"] = ["E"]
    fit.multipliers["w2"] |= {"low": 0.1, "high": 0.9}
    fit.to_json(tmp_path / "fit.json")
    write_multipliers(fit, multiplier_table(fit), tmp_path)
    text = Page(build(Sources([tmp_path / "fit.json"], tables=[tmp_path]))).text
    words = text.index("These runs do not identify the compression law: read the intervals, not the values")
    assert words < text.index("What each representation is worth")
    assert "w2 (0.350 [0.100, 0.900])" in text
    assert "The best value of E is the end of the allowed range" in text


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({}, "settled", "is identified"),
        ({"converged": False}, "failed", "did not converge"),
        ({"identified": False}, "careful", "do not identify"),
        ({"at_bound": ["E"]}, "careful", "sits at its bound"),
    ],
)
def test_verdict_follows_the_status(change, level, words):
    fit = made(EFF)
    fit.status |= change
    found = verdict(Subject(fit, {}))
    assert found.level == level
    assert words in found.headline


def test_verdict_without_resamples_claims_no_certainty():
    fit = made(EFF)
    fit.interval["resamples"] = 0
    for entry in fit.multipliers.values():
        entry |= {"low": None, "high": None}
    assert any("nothing is known of how sure" in text for text in verdict(Subject(fit, {})).sentences)


def test_verdict_names_representations_whose_eff_drifts():
    fit = made(EFF)
    entry = {"representation": "w2", "axis": "n", "slope": -0.16, "standard_error": 0.03, "p": 1e-6, "p_adjusted": 1e-4}
    fit.checks = {"trends": [entry, entry | {"representation": "w4", "p_adjusted": 0.3}]}
    text = " ".join(verdict(Subject(fit, {})).sentences)
    assert "w2 with size (log-log slope -0.16)" in text
    assert "w4 with" not in text


def test_checks_of_the_fit_are_in_the_page(page, study):
    checks = json.loads(study.fits[0].read_text())["checks"]
    shown = page.tables["checks"]
    for entry in checks["trends"]:
        assert [f"{entry['slope']:+.3f}".replace("-", "−")] == [
            row[2] for row in shown if row[:2] == [entry["representation"], entry["axis"]]
        ]
    assert all(any(row[:2] == [e["law"], e["held_out"]] for row in shown) for e in checks["hold_outs"])


# What is refused.


def test_table_of_another_fit_is_refused(tmp_path, study):
    other = made(EFF | {"w4": 0.5})
    write_multipliers(other, multiplier_table(other), tmp_path)
    with pytest.raises(QpipeError, match="its multipliers are not those of the compression fit"):
        build(Sources(study.fits, tables=[tmp_path]))


def test_figures_of_another_fit_are_refused(tmp_path, study):
    made(EFF).to_json(tmp_path / "other.json")
    with pytest.raises(QpipeError, match="drawn from another fit"):
        build(Sources([tmp_path / "other.json"], figures=study.figures))


def test_number_of_tables_must_fit(study):
    with pytest.raises(QpipeError, match="1 of the fits have multipliers and 2 tables"):
        build(Sources(study.fits, tables=[*study.tables, *study.tables]))


def test_lost_svg_is_named(tmp_path, study):
    content = json.loads((study.figures[0] / "figures.json").read_text())
    (tmp_path / "figures.json").write_text(json.dumps(content))
    with pytest.raises(QpipeError, match=r"multipliers\.svg: a figure that figures\.json names is gone"):
        build(Sources(study.fits, figures=[tmp_path]))


@pytest.mark.parametrize("content", ["[1, 2]", '{"id": 1}', "not json"])
def test_defective_plan_leaves_no_page(tmp_path, study, content, capsys):
    (tmp_path / "plan.json").write_text(content)
    out = tmp_path / "report.html"
    assert main(["report", "--fit", str(study.fits[0]), "--plan", str(tmp_path / "plan.json"), "--out", str(out)]) == 2
    assert "plan.json" in capsys.readouterr().err
    assert not out.exists()


def test_damaged_curve_and_benchmark_are_named(tmp_path):
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "curve.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "plan.json").write_text(json.dumps([{"id": "a", "representation": "w4"}]))
    from qpipe.report.run_tables import curves_chart

    with pytest.raises(QpipeError, match=r"curve\.parquet"):
        curves_chart(gather_runs(tmp_path / "plan.json", None, tmp_path / "runs"))
    (tmp_path / "b.tsv").write_text("x\n1\n")
    with pytest.raises(QpipeError, match=r"b\.tsv: not a benchmark"):
        timing_table({"b": tmp_path / "b.tsv"}, [])


# Small parts.


def test_timing_adds_up_benchmark_files(tmp_path):
    for i, seconds in enumerate((10.0, 20.0, 3600.0)):
        (tmp_path / f"{i}.tsv").write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:10\t{'-' if i == 0 else 100 * i}\n")
    table = timing_table({"train": tmp_path}, [])
    assert table is not None
    assert [cell.text for cell in table.rows[0]] == ["train", "3", "1 h 00 min", "20 s", "1 h 00 min", "200"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.25 s"),
        (9.96, "9.96 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (86400 * 3 + 3600 * 4, "3 d 04 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_number_cells_sort_by_value_and_stay_empty_for_nothing():
    assert number_cell(30482560, "count").text == "30.5M"
    assert number_cell(30482560, "count").sort == 30482560
    assert number_cell(None).sort is None
    assert number_cell(float("nan")).text == ""
    assert number_cell(float("inf")).text == "∞"


def test_many_runs_stay_small(tmp_path):
    table = pd.concat([report_cases.losses()] * 50, ignore_index=True)
    table["run"] = [f"run-{i}" for i in range(len(table))]
    table.to_parquet(tmp_path / "losses.parquet")
    made(EFF).to_json(tmp_path / "fit.json")
    text = build(Sources([tmp_path / "fit.json"], losses=[tmp_path / "losses.parquet"]))
    assert len(text) - len(build(Sources([tmp_path / "fit.json"]))) < 3000 * 800


def test_page_assets_belong_to_the_package():
    folder = Path(__file__).parent.parent / "qpipe" / "report" / "assets"
    assert sorted(path.name for path in folder.iterdir()) == ["page.css", "page.html", "page.js"]
