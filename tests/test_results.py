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
