"""The folder of `qpipe damage` and its section of the report, on losses made by a known law."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from test_laws_damage import TRUE, rounded, trained, with_diverged

from qpipe.cli import main

EFFS = {"dense": (1.0, 16.0), "w3": (0.8, 3.0), "w4": (0.95, 4.0)}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with losses.parquet, fit.json and damage/."""
    folder = tmp_path_factory.mktemp("damage")
    pd.concat([trained(EFFS), rounded()], ignore_index=True).to_parquet(folder / "losses.parquet")
    trained(EFFS).to_parquet(folder / "trained.parquet")
    run("fit", folder / "trained.parquet", "--law", "compression", "--bootstrap", 0, "--out", folder / "fit.json")
    run(
        "damage", folder / "losses.parquet", "--fit", folder / "fit.json", "--bootstrap", 20, "--out", folder / "damage"
    )
    return folder


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def test_models_that_diverged_are_counted_in_print_and_on_the_page(place, tmp_path, capsys):
    lost = with_diverged(rounded()).query("status == 'diverged'").assign(ptq_method="rtn")
    table = pd.concat([trained(EFFS), with_diverged(rounded()), lost], ignore_index=True)
    table.to_parquet(tmp_path / "losses.parquet")
    law = ["--fit", place / "fit.json", "--bootstrap", 0]
    run("damage", tmp_path / "losses.parquet", *law, "--out", tmp_path / "damage")
    printed = capsys.readouterr().out
    assert "27 models of 9 dense runs; 2 diverged and are left out" in printed
    assert "rtn: not fitted: all of its 2 models diverged" in printed
    (entry,) = json.loads((tmp_path / "damage/damage.json").read_text())["damages"]
    assert entry["parameters"] == pytest.approx(TRUE, rel=1e-6)
    lost.to_parquet(tmp_path / "lost.parquet")
    run("damage", tmp_path / "lost.parquet", place / "trained.parquet", *law, "--out", tmp_path / "nothing")
    assert json.loads((tmp_path / "nothing/damage.json").read_text())["damages"] == []


def test_the_folder_holds_terms_comparison_and_figures(place):
    content = json.loads((place / "damage/damage.json").read_text())
    (entry,) = content["damages"]
    assert entry["parameters"] == pytest.approx(TRUE, rel=1e-6)
    assert entry["rows"] == 27
    table = pd.read_csv(place / "damage/comparison.csv")
    assert sorted(table["representation"].unique()) == ["w3", "w4"]
    assert len(content["statements"]) == len(table) == 4
    for name in ("damage", "rounding-or-training"):
        assert (place / f"damage/{name}.svg").stat().st_size > 1000
        assert (place / f"damage/{name}.png").stat().st_size > 1000


def test_figures_show_every_quantization(place):
    content = json.loads((place / "damage/damage.json").read_text())
    drawn = next(f for f in content["figures"] if f["layout"]["meta"]["name"] == "damage")
    points = [trace for trace in drawn["data"] if trace["mode"] == "markers" and trace["x"] != [None]]
    assert sum(len(trace["x"]) for trace in points) == 27
    found = sorted(y for trace in points for y in trace["y"])
    table = rounded()
    assert found == pytest.approx(sorted(table["loss"] - table["parent_loss"]), rel=1e-6)


def test_the_report_says_until_when_rounding_is_enough(place):
    out = place / "report.html"
    run("report", "--fit", place / "fit.json", "--damage", place / "damage", "--out", out)
    text = out.read_text()
    said = re.findall(r"Rounding is enough up to ([\d.]+)", text)
    table = pd.read_csv(place / "damage/comparison.csv")
    assert [float(value) for value in said] == pytest.approx(table["enough_until_d_per_n"].tolist(), rel=6e-3)
    assert 'id="damage"' in text
    assert "damage.json" in text  # its digest, where it comes from


def test_damage_alone_needs_no_law(place, tmp_path, capsys):
    run("damage", place / "losses.parquet", "--bootstrap", 0, "--out", tmp_path, "--json")
    content = json.loads(capsys.readouterr().out)
    assert content["comparison"] == []
    assert content["damages"][0]["intervals"]["C_T"] is None
    assert not (tmp_path / "rounding-or-training.svg").exists()


def test_wrong_input_is_refused_and_nothing_is_written(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["damage", str(place / "trained.parquet"), "--out", str(out)]) == 2
    assert "lacks" in capsys.readouterr().err
    assert not out.exists()
    (tmp_path / "damage.json").write_text("{}")
    arguments = ["report", "--fit", str(place / "fit.json"), "--damage", str(tmp_path), "--out", str(tmp_path / "r")]
    assert main(arguments) == 2
    assert "not written by qpipe damage" in capsys.readouterr().err
