"""The real Snakefile on a study with finetuned runs: parents first, and what a change runs again."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from test_workflow import clone, planned, snakemake

from qpipe.status import study_status
from qpipe.study import plan, read_study

STUDY = (Path(__file__).parent / "studies/finetune.yaml").read_text()

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    clone(folder)
    snakemake(folder, study=STUDY)
    return folder


def test_the_loss_table_tells_finetuned_runs_apart(finished: Path) -> None:
    losses = pd.read_parquet(finished / "results/finetune/losses").set_index("run")
    assert set(losses["representation"]) == {
        "dense", "dense:wsd100", "w4-seq", "w4-seq:branch50", "w4-seq:wsd100", "w4-seq:finished50",
    }  # fmt: skip
    finetuned = losses[losses["representation"].str.contains(":")]
    assert (finetuned["trajectory"].str.len() > 0).all()
    assert set(finetuned["d"]) == {8192, 16384}
    half = losses[losses["representation"].isin(["w4-seq:branch50", "w4-seq:finished50"])]
    assert (half["qat_tokens"] * 2 == half["d"]).all()
    assert (losses[losses["representation"] == "w4-seq:wsd100"]["qat_tokens"] == 0).all()
    table = pd.read_parquet(finished / "results/finetune/tables/compression/multipliers.parquet")
    assert "w4-seq:branch50" in set(table["representation"])
    curves = json.loads((finished / "results/finetune/splits/splits.json").read_text())["curves"]
    # Two sizes by two budgets; the finished family has one split and, from scratch, its ordinary run.
    assert sorted((curve["mode"], curve["share"]) for curve in curves) == [
        *[("branch", [0.5, 1.0])] * 4,
        *[("finished", [0.0, 0.5])] * 4,
    ]
    assert (finished / "results/finetune/splits/splits-branch.svg").exists()


def test_nothing_is_left_to_do(finished: Path) -> None:
    assert planned(finished, STUDY) == {}
    runs = plan(read_study(STUDY, "study"), finished)
    found = study_status(runs, finished / "results/finetune", finished / "logs")
    assert {one.stage for one in found.runs} == {"done"}


def test_a_new_split_trains_its_children_and_their_branch_points(finished: Path) -> None:
    study = STUDY.replace("splits: [0.5, 1]", "splits: [0.5, 0.75, 1]")
    jobs = planned(finished, study)
    # Two sizes by two budgets; the larger budget's half is another branch point than any of before.
    assert jobs["train"] == 8
    dry = snakemake(finished, "--dry-run", study=study)
    trained = set(re.findall(r"Training (\S+)", dry.stdout + dry.stderr))
    assert all("trunk" in run or "branch75" in run for run in trained)


def test_a_lost_parent_is_trained_alone_and_only_if_it_is_needed(finished: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    runs = folder / "results/finetune/runs"
    child = next(runs.glob("n10k-*w4-seq-branch50*/record.json"))
    before = child.read_bytes()
    child.unlink()
    assert planned(folder, STUDY)["train"] == 1
    parents = list(runs.glob("n10k-*trunk*/record.json"))
    for parent in parents:
        parent.unlink()
    assert planned(folder, STUDY)["train"] == 1 + len(parents)
    snakemake(folder, "--", "runs", study=STUDY)
    assert child.read_bytes() == before
