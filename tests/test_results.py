"""Published tables against the runs that they are made from."""

import re
from pathlib import Path

import pandas as pd
import pytest

RESULTS = Path(__file__).parents[1] / "docs" / "results"
FORMATS = ("w4-seq", "w3-seq", "w2-seq", "w1.58-seq", "w1-seq")
LABELS = {"0": "wsd0", "50": "branch50", "75": "branch75", "90": "branch90", "100": "wsd100"}


def rows_of(title: str) -> dict[str, list[float]]:
    """Rows of the first table after a line of finetuning.md: leading percentage -> numbers."""
    lines = (RESULTS / "finetuning.md").read_text().split(title)[1].splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip(" *") for cell in line.strip("|").split("|"))
        rows[name.split()[0]] = [float(cell) for cell in cells]
    return rows


@pytest.mark.parametrize(
    ("title", "control"), [("Excess over a dense model", "wsd100"), ("What the format itself costs", None)]
)
def test_budget_splits_are_means_over_the_seeds_of_the_table(title: str, control: str | None):
    runs = pd.read_csv(RESULTS / "budget-split.csv")
    means = runs.groupby(["d", "representation"])["loss"].mean()
    shown = rows_of(title)
    assert len(shown) == (5 if control else 3)
    for share, numbers in shown.items():
        assert re.fullmatch(r"\d+", share)
        expected = [
            means[d, f"{name}:{LABELS[share]}"] - means[d, f"dense:{control or LABELS[share]}"]
            for d in sorted(runs["d"].unique())
            for name in FORMATS
        ]
        assert numbers == pytest.approx(expected, abs=6e-4)


def quantized() -> dict[tuple[str, float, str, float], pd.DataFrame]:
    """Rows of ptq.csv with their loss increase, by size, tokens per parameter, method and bits."""
    rows = pd.read_csv(RESULTS / "ptq.csv").assign(increase=lambda table: table["loss"] - table["parent_loss"])
    keys = ["size", (rows["d"] / rows["n"]).round(1).rename("ratio"), "name", "asked"]
    return dict(iter(rows.groupby(keys)))


def test_post_training_table_is_of_the_means_over_the_seeds_of_its_rows():
    found, rates = quantized(), (2.1, 2.5, 3.0, 3.5, 4.0)
    text = (RESULTS.parent / "ptq.md").read_text().split("### On an H200, three sizes")[1]
    lines = [line.strip("|").split("|") for line in text.split("![loss")[0].splitlines() if line.startswith("|")][2:]
    names = {"gptq rows": "gptq, rows", "gptq 128": "gptq, groups of 128", "rtn rows": "rtn, rows"}
    ahead = 0
    assert len(lines) == 12
    for (head, _, *own), (_, _, *rivals) in zip(lines[::2], lines[1::2], strict=True):
        size, ratio, dense = (part.strip() for part in head.split(","))
        for bits, cell, rival in zip(rates, own, rivals, strict=True):
            means = {name: found[size, float(ratio), name, bits]["increase"].mean() for name in names.values()}
            best = names[re.search(r"\((.*)\)", rival)[1]]
            assert best == min(means, key=means.__getitem__)
            for name, shown in (("cvxq", cell), (best, rival)):
                part = found[size, float(ratio), name, bits]
                mean, *spread = (float(number) for number in re.findall(r"\d\.\d{4}", shown))
                assert mean == pytest.approx(part["increase"].mean(), abs=6e-5)
                assert spread == ([pytest.approx(part["increase"].std(), abs=6e-5)] if len(part) > 1 else [])
                assert set(part["parent_loss"].round(3)) == {float(dense)}
            ahead += found[size, float(ratio), "cvxq", bits]["increase"].mean() <= means[best]
    assert f"at {ahead} of these {len(lines) // 2 * len(rates)} points" in text


def test_the_two_trainings_of_the_quantized_models_are_told_apart():
    now, earlier = (pd.read_csv(RESULTS / f"{name}.csv") for name in ("ptq", "ptq-earlier"))
    assert set(now["parent"]) == set(earlier["parent"])
    assert not set(now["parent_loss"]) & set(earlier["parent_loss"])
    assert now.groupby("parent")["parent_loss"].nunique().max() == 1
    text = (RESULTS.parent / "ptq.md").read_text()
    assert f"All {len(now)} rows" in text
    assert f"its {len(earlier)} rows" in text
