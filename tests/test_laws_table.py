"""Anyone's data: what is read, mapped, left out, and refused with a remedy."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from laws_cases import chinchilla_rows, compression_world

from qpipe.errors import QpipeError
from qpipe.laws import fit, get_law, read_losses
from qpipe.laws.expressions import matching_rows
from qpipe.laws.prepare import select_rows


def write(path: Path, table: pd.DataFrame) -> Path:
    table.to_csv(path, index=False)
    return path


def problems(table: pd.DataFrame, law: str = "compression", exclude: tuple[str, ...] = ()) -> str:
    with pytest.raises(QpipeError) as caught:
        select_rows(table, get_law(law), exclude)
    return str(caught.value)


def test_csv_parquet_and_folders_hold_the_same_rows(tmp_path: Path) -> None:
    table = compression_world()
    whole = read_losses(write(tmp_path / "all.csv", table))
    (tmp_path / "parts/a").mkdir(parents=True)
    table.iloc[:30].to_parquet(tmp_path / "parts/a/1.parquet")
    table.iloc[30:].to_parquet(tmp_path / "parts/2.parquet")
    parts = read_losses(tmp_path / "parts").sort_values(["representation", "n", "d"], ignore_index=True)
    pd.testing.assert_frame_equal(parts, whole.sort_values(["representation", "n", "d"], ignore_index=True))


def test_columns_and_units_are_mapped(tmp_path: Path) -> None:
    table = chinchilla_rows(30)
    foreign = pd.DataFrame({"params_m": table["n"] / 1e6, "tokens": table["d"], "val_loss": table["loss"]})
    path = write(tmp_path / "foreign.csv", foreign)
    read = read_losses(path, ["n=params_m*1e6,d=tokens", "loss=val_loss"])
    np.testing.assert_allclose(read[["n", "d", "loss"]], table[["n", "d", "loss"]], rtol=1e-12)
    assert set(read["representation"]) == {"dense"}
    with pytest.raises(QpipeError) as caught:
        read_losses(path)
    assert "--map d=tokens" in str(caught.value)
    assert "--map loss=val_loss" in str(caught.value)
    with pytest.raises(QpipeError, match="did you mean 'tokens'"):
        read_losses(path, ["d=tokns"])
    with pytest.raises(QpipeError, match="is not NAME=COLUMN"):
        read_losses(path, ["d"])


def test_missing_files_and_tables_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(QpipeError) as caught:
        read_losses([tmp_path / "no.csv", tmp_path / "empty"])
    assert len(caught.value.problems) == 2
    (tmp_path / "not.parquet").write_text("hello")
    with pytest.raises(QpipeError, match="cannot be read"):
        read_losses(tmp_path / "not.parquet")
    (tmp_path / "head.csv").write_text("n,d,loss\n")
    with pytest.raises(QpipeError, match="no rows"):
        read_losses(tmp_path / "head.csv")


def test_text_where_numbers_belong_names_the_rows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("n,d,loss,sparsity\n1e8,1e9,3.1,50%\n2e8,2e9,2.9,0.5\n1B,2e9,2.8,0\n")
    with pytest.raises(QpipeError) as caught:
        read_losses(tmp_path / "t.csv")
    message = str(caught.value)
    assert "row 1: '50%'" in message
    assert "percent" in message
    assert "row 3: '1B'" in message


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("loss", 23.5, "perplexities"),
        ("loss", -1.0, "must be positive"),
        ("loss", np.nan, "missing or not finite"),
        ("n", np.inf, "missing or not finite"),
        ("weight", 0.0, "--exclude"),
        ("sparsity", 50.0, "divided by 100"),
        ("gmse", 1.5, "between 0 and 1"),
    ],
)
def test_values_that_no_run_can_have_are_named_by_row(column: str, value: float, words: str) -> None:
    table = compression_world().assign(weight=1.0, sparsity=0.0, gmse=0.1)
    table.loc[6, column] = value
    message = problems(table)
    assert words in message
    assert "row 7" in message


def test_counts_in_other_units_are_recognised_by_size_or_by_their_ratio() -> None:
    table = compression_world()
    message = problems(table.assign(d=table["d"] / 1e9, n=table["n"] / 1e6))
    assert "--map d=d*1e9" in message
    assert "n is 30" in message
    few = table.assign(d=np.where(table.index < 3, table["d"] / 1e9, table["d"]))
    assert "rows 1, 2, 3: d is 0.75" in problems(few)
    assert "tokens per parameter" in problems(table.assign(d=table["d"] / 1e5))


def test_perplexities_below_the_largest_loss_are_refused_and_their_logarithm_is_a_mapping(tmp_path: Path) -> None:
    table = compression_world()
    message = problems(table.assign(loss=table["loss"] * 3.3))
    assert "--map loss=log(loss)" in message
    foreign = table.drop(columns="loss").assign(ppl=np.exp(table["loss"]))
    path = write(tmp_path / "ppl.csv", foreign)
    with pytest.raises(QpipeError, match=r"--map loss=log\(ppl\)"):
        read_losses(path)
    read = read_losses(path, ["loss=log(ppl)"])
    np.testing.assert_allclose(read["loss"], table["loss"], rtol=1e-12)


def test_the_reference_may_have_another_name(tmp_path: Path) -> None:
    table = compression_world()
    foreign = table.assign(representation=table["representation"].replace("dense", "BF16"))
    assert "--reference BF16" in problems(foreign)
    path = write(tmp_path / "foreign.csv", foreign)
    pd.testing.assert_frame_equal(read_losses(path, reference="BF16"), table, rtol=1e-12)
    with pytest.raises(QpipeError, match="did you mean 'BF16'"):
        read_losses(path, reference="BF1")
    with pytest.raises(QpipeError, match="only one of them"):
        read_losses(write(tmp_path / "both.csv", table), reference="f1")


def test_a_column_that_names_the_format_is_not_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", compression_world().rename(columns={"representation": "Format"}))
    with pytest.raises(QpipeError, match="--map representation=Format"):
        read_losses(path)
    assert set(read_losses(path, ["representation=Format"])["representation"]) == {"dense", "f1", "f2", "f3"}


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_are_read(tmp_path: Path, separator: str) -> None:
    table = compression_world()
    table.to_csv(tmp_path / "t.csv", sep=separator, index=False)
    pd.testing.assert_frame_equal(read_losses(tmp_path / "t.csv"), table, rtol=1e-12)


def test_tables_without_a_finished_run_say_what_was_found() -> None:
    table = compression_world()
    assert "found 'diverged', 'finished'" in problems(
        table.assign(status=np.where(table.index < 9, "diverged", "finished"))
    )
    assert len(select_rows(table.assign(status="OK"), get_law("compression")).table) == len(table)


def test_copies_of_a_run_are_refused_and_replicates_kept() -> None:
    table = compression_world()
    assert "more than once" in problems(pd.concat([table, table.iloc[[3]]], ignore_index=True))
    replicate = table.iloc[[3]].assign(loss=table["loss"].iloc[3] * 1.001)
    assert len(select_rows(pd.concat([table, replicate]), get_law("compression")).table) == len(table) + 1


def test_reference_and_columns_that_a_law_needs() -> None:
    table = compression_world()
    assert "needs dense rows" in problems(table[table["representation"] != "dense"])
    assert "--map gmse=COLUMN" in problems(table, "capacity")
    assert "gmse is missing" in problems(table.assign(gmse=np.nan), "capacity")


def test_only_ok_rows_are_fitted_and_all_exclusions_are_kept() -> None:
    table = compression_world().assign(status="ok")
    table.loc[0, ["status", "loss"]] = ["diverged", np.nan]
    rows = select_rows(table, get_law("compression"), ["representation == 'f1' and n > 3e8", "loss > 100"])
    assert rows.excluded == [
        {"rule": "representation == 'f1' and n > 3e8", "rows": 4},
        {"rule": "loss > 100", "rows": 0},
        {"rule": "status is not ok", "rows": 1},
    ]
    assert len(rows.table) == len(table) - 5


def test_digest_follows_the_fitted_values_alone() -> None:
    table, law = compression_world(), get_law("compression")
    base = select_rows(table, law).digest()
    assert select_rows(table.assign(note="x"), law).digest() == base
    changed = table.copy()
    changed.loc[0, "loss"] += 1e-9
    assert select_rows(changed, law).digest() != base


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("n > 2", [False, False, True]),
        ("1 < n <= 2 or name == 'c'", [False, True, True]),
        ("not (name in ['a', 'b'])", [False, False, True]),
        ("d / n == 10 and name != 'a'", [False, True, True]),
        ("n not in [1, 3]", [False, True, False]),
        ("n == -(-2)", [False, True, False]),
    ],
)
def test_rules_mean_what_python_means(rule: str, expected: list[bool]) -> None:
    table = pd.DataFrame({"n": [1.0, 2, 3], "d": [10.0, 20, 30], "name": ["a", "b", "c"]})
    assert matching_rows(table, rule).tolist() == expected


@pytest.mark.parametrize(
    "rule",
    ["__import__('os').getcwd()", "n.sum() > 1", "n >", "n", "m > 1", "name > 1", "n if n else d", "[x for x in n]",
     "lambda: 1", "", "True", "1 == 1", "f'{n}'", "n is 3"],
)  # fmt: skip
def test_anything_else_than_a_rule_is_refused(rule: str) -> None:
    table = pd.DataFrame({"n": [1.0, 2, 3], "d": [10.0, 20, 30], "name": ["a", "b", "c"]})
    with pytest.raises(QpipeError, match="exclusion"):
        matching_rows(table, rule)


def test_chinchilla_takes_dense_rows_and_says_so() -> None:
    result = fit(compression_world(), "chinchilla", bootstrap=0)
    assert result.n_rows == 16
    assert result.excluded == [{"rule": "representation is not dense", "rows": 48}]
