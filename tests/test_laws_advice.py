"""Multiplier tables, predictions and advice against closed forms and brute force, and the verbs end to end."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from laws_cases import EFFS, compression_world, covariate_table, quest

from qpipe.cli import main
from qpipe.errors import QpipeError
from qpipe.laws import Fit, fit, multiplier_table, write_multipliers
from qpipe.laws.advice import (
    Budget,
    advise,
    bits_of,
    crossovers,
    extrapolation,
    next_runs,
    predict_with_interval,
)

BITS = {"dense": 16.0, "f1": 8.0, "f2": 4.0, "f3": 2.0}


@pytest.fixture(scope="module")
def world() -> Fit:
    table = compression_world()
    table["bits_per_weight"] = table["representation"].map(BITS)
    table["w_bits"] = table["bits_per_weight"]
    return fit(table.assign(rho=table["representation"].map(EFFS)), bootstrap=200)


@pytest.fixture(scope="module")
def exact() -> Fit:
    return fit(compression_world(noise=0.0), bootstrap=0)


def loss(n: Any, d: Any, name: str) -> Any:
    return 60.0 * (n * EFFS[name]) ** -0.25 + 800.0 * d**-0.32 + 1.6


def test_table_columns_follow_their_definitions(world: Fit) -> None:
    table = multiplier_table(world, at_n=1e9).set_index("representation")
    entry = world.multipliers["f2"]
    assert table.loc["f2", "iso_memory"] == pytest.approx(entry["eff"] * 16 / 4)
    assert table.loc["f2", "iso_memory_low"] == pytest.approx(entry["low"] * 16 / 4)
    assert table.loc["f2", "equivalent_n"] == pytest.approx(entry["eff"] * 1e9)
    assert table.loc["f2", "rho_deviation"] == pytest.approx((entry["eff"] - 0.6) / entry["standard_error"])
    assert table.loc["dense", ["eff", "low", "high", "iso_memory"]].tolist() == [1, 1, 1, 1]
    assert table["n_runs"].tolist() == [16] * 4


def test_iso_compute_follows_the_named_cost_model() -> None:
    table = covariate_table()
    table["loss"] = loss(table["n"], table["d"], "dense") * np.where(table["representation"] == "dense", 1, 1.05)
    result = fit(table, "precision", bootstrap=0)
    by_bits = multiplier_table(result).set_index("representation")
    by_product = multiplier_table(result, cost_model="bit-product").set_index("representation")
    assert by_bits.loc["f2", "iso_compute"] == pytest.approx(by_bits.loc["f2", "eff"] / (8 / 16))
    assert by_product.loc["f2", "iso_compute"] == pytest.approx(by_bits.loc["f2", "eff"] / (4 * 8 / 256))
    with pytest.raises(QpipeError, match="no cost model"):
        multiplier_table(result, cost_model="magic")


def test_files_agree_and_carry_meaning(world: Fit, tmp_path: Path) -> None:
    table = multiplier_table(world)
    write_multipliers(world, table, tmp_path)
    arrow = pq.read_table(tmp_path / "multipliers.parquet")
    assert arrow.schema.field("eff").metadata[b"meaning"]
    assert b"runs" in arrow.schema.metadata[b"notes"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "multipliers.csv"), table, rtol=1e-9, check_dtype=False)
    pd.testing.assert_frame_equal(arrow.to_pandas(), table)
    markdown = (tmp_path / "multipliers.md").read_text()
    assert "Status: " in markdown
    assert "Excluded: nothing" in markdown
    latex = (tmp_path / "multipliers.tex").read_text()
    for word in ("\\toprule", "\\midrule", "\\bottomrule", "\\end{tabular}"):
        assert latex.count(word) == 1
    widths = {line.count(" & ") for line in latex.splitlines() if line.endswith("\\\\")}
    assert len(widths) == 1


AWKWARD = ["2:4+w4_50%~x^y\\{a}|<>\"'`--- é#$&", "[1]*", "*ρ 语"]


def test_latex_compiles_with_booktabs(tmp_path: Path) -> None:
    """The compiler is the judge: rows of odd names, empty intervals, and notes with rules and formulas."""
    compiler = shutil.which("pdflatex")
    if compiler is None:
        pytest.skip("pdflatex is not installed (Debian: texlive-latex-recommended)")
    table = compression_world().assign(bits_per_weight=4.25, rho=0.5)
    table["representation"] = table["representation"].replace(dict(zip(["f1", "f2", "f3"], AWKWARD, strict=True)))
    result = fit(table, bootstrap=0, exclude=["loss > 5 or representation == 'w1_%'"])
    write_multipliers(result, multiplier_table(result), tmp_path)
    for packages in ("", "\\usepackage[T1]{fontenc}"):
        (tmp_path / "page.tex").write_text(
            "\\documentclass{article}\\usepackage{booktabs}" + packages + "\\begin{document}\n"
            "\\begin{table}\\input{multipliers.tex}\\caption{x}\\end{table}\n\\end{document}\n"
        )
        done = subprocess.run(
            [compiler, "-interaction=nonstopmode", "-halt-on-error", "page.tex"], cwd=tmp_path, capture_output=True
        )
        assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
        assert (tmp_path / "page.pdf").stat().st_size > 5000


def test_prediction_intervals_hold_the_truth_and_flag_extrapolation(world: Fit) -> None:
    inside = predict_with_interval(world, 2e8, 1e10, "f2")
    assert inside["low"] < inside["loss"] < inside["high"]
    assert inside["run_high"] - inside["run_low"] > inside["high"] - inside["low"]
    assert inside["loss"] == pytest.approx(loss(2e8, 1e10, "f2"), rel=0.005)
    assert inside["extrapolates"] == []
    assert "is 10 times the largest fitted n" in extrapolation(world, 4e9, 8e10, "f2")[0]
    assert "below the smallest fitted d" in str(extrapolation(world, 4e7, 5e8, "f2"))
    assert any("d/n" in note for note in extrapolation(world, 2e8, 2e9, "f2"))
    with pytest.raises(QpipeError, match="did you mean 'f2'"):
        world.predict(1e8, 1e10, "f22")
    with pytest.raises(QpipeError, match="positive"):
        world.predict(-1, 1e10)


def test_interval_of_a_single_run_covers_new_runs(world: Fit) -> None:
    new = compression_world(seed=99)
    inside = 0
    for row in new.itertuples():
        answer = predict_with_interval(world, row.n, row.d, row.representation)
        inside += answer["run_low"] <= row.loss <= answer["run_high"]
    assert 0.8 <= inside / len(new) <= 1.0


def test_capacity_predicts_representations_that_were_never_trained() -> None:
    table = covariate_table().drop(columns="activation_gmse").assign(family="")
    bits = np.log(np.maximum(table["gmse"], 1e-300)) / np.log(0.25)
    rho = np.where(table["gmse"] > 0, np.tanh(0.4 * bits) ** 1.4, 1.0)
    table["loss"] = 60.0 * (table["n"] * rho) ** -0.25 + 800.0 * table["d"] ** -0.32 + 1.6
    result = fit(table, "capacity", objective="log-l2", bootstrap=0)
    found = result.predict(1e8, 5e9, "new", covariates={"gmse": 0.1})
    expected = 60.0 * (1e8 * np.tanh(0.4 * np.log(0.1) / np.log(0.25)) ** 1.4) ** -0.25 + 800.0 * 5e9**-0.32 + 1.6
    assert found == pytest.approx(expected, rel=1e-4)
    with pytest.raises(QpipeError, match="no representation"):
        result.predict(1e8, 5e9, "new")


def test_advice_for_a_compute_budget_is_the_closed_form_optimum(exact: Fit) -> None:
    """At alpha A N^-alpha = beta B D^-beta, with N D = C / 6 (2203.15556 section 3.3)."""
    spend = 1e19 / 6
    best = advise(exact, Budget(flops=1e19), BITS).set_index("representation").loc["dense"]
    g = (0.25 * 60.0 / (0.32 * 800.0)) ** (1 / (0.25 + 0.32))
    assert best["n"] == pytest.approx(g * spend ** (0.32 / 0.57), rel=0.02)
    assert best["loss"] == pytest.approx(loss(best["n"], best["d"], "dense"), rel=1e-6)


def test_advice_for_memory_ranks_by_multiplier_per_bit(exact: Fit) -> None:
    table = advise(exact, Budget(memory=1e8, tokens=1e10), BITS)
    expected = sorted(BITS, key=lambda name: -EFFS[name] / BITS[name])
    assert table["representation"].tolist() == expected
    np.testing.assert_allclose(table["memory"], 1e8)


def test_advice_under_both_budgets_equals_brute_force(exact: Fit) -> None:
    table = advise(exact, Budget(memory=3e7, flops=2e18), BITS).set_index("representation")
    for name, bits in BITS.items():
        n = np.geomspace(1e5, 8 * 3e7 / bits, 200_001)
        assert table.loc[name, "loss"] == pytest.approx(loss(n, 2e18 / 6 / n, name).min(), rel=1e-6)


def test_budgets_that_bound_nothing_and_unknown_bits_are_refused(world: Fit, exact: Fit) -> None:
    with pytest.raises(QpipeError, match="needs --memory"):
        Budget(tokens=1e10)
    with pytest.raises(QpipeError, match="must be positive"):
        Budget(memory=-1)
    assert bits_of(world) == BITS
    with pytest.raises(QpipeError, match="--bits f1="):
        bits_of(exact)


def test_crossover_is_where_the_losses_are_equal(exact: Fit) -> None:
    ties = crossovers(exact, "dense", "f2", BITS, flops=1e19)
    assert len(ties) == 1
    n, m = ties[0]["n_first"], ties[0]["n_second"]
    assert loss(n, 1e19 / 6 / n, "dense") == pytest.approx(loss(m, 1e19 / 6 / m, "f2"), rel=1e-4)
    assert crossovers(exact, "dense", "f2", BITS, tokens=1e10) == []


def test_next_runs_shrink_the_interval_as_a_refit_would(world: Fit) -> None:
    """The promised shrinkage equals that of the covariance computed with and without the candidate."""
    table = world.table()
    candidate = pd.DataFrame({"n": [1.5e9], "d": [3e10], "representation": ["f2"]})
    found = next_runs(world, "f2", candidate).iloc[0]

    def error(rows: pd.DataFrame) -> float:
        p = world.parameters
        names = ["f1", "f2", "f3"]
        eff = rows["representation"].map({k: v["eff"] for k, v in world.multipliers.items()}).to_numpy()
        size = p["A"] * (rows["n"].to_numpy() * eff) ** -p["alpha"]
        data = p["B"] * rows["d"].to_numpy() ** -p["beta"]
        columns = [size, -p["alpha"] * size * np.log(rows["n"].to_numpy() * eff), data,
                   -p["beta"] * data * np.log(rows["d"].to_numpy()), np.ones(len(rows))]  # fmt: skip
        columns += [np.where(rows["representation"] == name, -p["alpha"] * size, 0.0) for name in names]
        jacobian = np.stack(columns, axis=1) / (size + data + p["E"])[:, None]
        scale = np.linalg.norm(jacobian, axis=0)
        return float(np.sqrt(np.linalg.inv((jacobian / scale).T @ (jacobian / scale))[6, 6]) / scale[6])

    both = pd.concat([table[["n", "d", "representation"]], candidate])
    assert found["shrink"] == pytest.approx(1 - error(both) / error(table), rel=1e-3)
    assert found["flops"] == pytest.approx(6 * 1.5e9 * 3e10)
    with pytest.raises(QpipeError, match="is not fitted"):
        next_runs(world, "f9", candidate)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_verbs_from_losses_to_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses, path = tmp_path / "losses.csv", tmp_path / "fit.json"
    quest().to_csv(losses, index=False)
    exclude = ["--exclude", "representation == 'w1a1-quest-norotation'"]
    assert run("fit", losses, "--law", "compression", "--out", path, "--bootstrap", 40, "--seed", 3, *exclude) == 0
    words = capsys.readouterr().out
    assert "E at a bound: not identified" in words
    assert "(5 rows)" in words
    assert run("multipliers", path, "--out", tmp_path / "tables", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["representation"] for row in rows} == set(quest()["representation"]) - {"w1a1-quest-norotation"}
    assert sorted(p.name for p in (tmp_path / "tables").iterdir()) == [
        "multipliers.csv", "multipliers.md", "multipliers.parquet", "multipliers.tex",
    ]  # fmt: skip
    assert run("predict", path, "--n", 1e8, "--d", 1e10, "--representation", "w4a4-quest", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["loss"] == pytest.approx(2.9477, abs=0.02)  # the 100M run that QuEST published
    assert run("fit", losses, "--law", "compression", "--bootstrap", 0, "--json") == 0
    assert json.loads(capsys.readouterr().out)["n_rows"] == 104


def test_capacity_table_gives_bits_and_rho(world: Fit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world.to_json(tmp_path / "fit.json")
    entries = [{"representation": "f2", "bits_per_weight": 4.5, "rho": 0.55}]
    (tmp_path / "capacity.json").write_text(json.dumps(entries))
    assert run("multipliers", tmp_path / "fit.json", "--capacity", tmp_path / "capacity.json", "--json") == 0
    row = next(r for r in json.loads(capsys.readouterr().out) if r["representation"] == "f2")
    assert (row["bits_per_weight"], row["rho"]) == (4.5, 0.55)
    (tmp_path / "capacity.json").write_text("{}")
    (tmp_path / "bad.json").write_text("[1]")
    assert run("multipliers", tmp_path / "fit.json", "--capacity", tmp_path / "bad.json") == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "missing.csv", "--law", "compression"],
        ["predict", "missing.json", "--n", "1e8", "--d", "1e9"],
        ["multipliers", "missing.json"],
    ],
)
def test_wrong_input_is_exit_code_two_and_one_message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no such" in captured.err
