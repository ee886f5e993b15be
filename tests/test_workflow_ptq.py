"""The real Snakefile on a study that quantizes its dense runs: what comes out, and what a change runs again."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from test_workflow import STUDY as SMOKE
from test_workflow import clone, snakemake

from qpipe.study import load_study
from qpipe.workflow import Workflow

# One size determines no exponents; with them held four runs are enough for a law.
STUDY = (
    SMOKE.replace("sizes: [10k, 30k]", "sizes: [10k]")
    + """
ptq: {methods: [rtn], bits: [2, 3.5]}
laws: [{law: compression, fix: {alpha: 0.34, beta: 0.37, E: 1.7}}]
"""
)

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    clone(folder)
    snakemake(folder, study=STUDY)
    return folder


def jobs(folder: Path, study: str) -> dict[str, int]:
    """Jobs per rule that a dry run would run."""
    done = snakemake(folder, "--dry-run", study=study)
    found = re.findall(r"^([a-z_]+) +(\d+)$", done.stdout + done.stderr, flags=re.MULTILINE)
    return {name: int(count) for name, count in found if name not in ("all", "total", "plan")}


def test_quantized_runs_have_rows_of_their_own(finished: Path) -> None:
    losses = pd.read_parquet(finished / "results/smoke/losses/ptq/rtn.parquet")
    dense = pd.read_parquet(finished / "results/smoke/losses/dense.parquet").set_index("run")
    assert sorted(losses["representation"]) == ["w2-rtn", "w2-rtn", "w3.5-rtn", "w3.5-rtn"]
    assert (losses["ptq_bits"] <= losses["representation"].str.extract(r"w([\d.]+)-")[0].astype(float)).all()
    for row in losses.to_dict("records"):
        parent = dense.loc[row["parent"]]
        assert (row["n"], row["d"], row["w_bits"]) == (parent["n"], parent["d"], 16)
        # Evaluated by the same code on the whole validation split, in batches of another size.
        assert row["parent_loss"] == pytest.approx(parent["loss"], abs=1e-4)
    fit = json.loads((finished / "results/smoke/fits/compression.json").read_text())
    assert set(fit["multipliers"]) == {"dense", "w4"}
    assert 'id="damage"' in (finished / "results/smoke/report.html").read_text()


def test_a_second_invocation_runs_nothing(finished: Path) -> None:
    assert jobs(finished, STUDY) == {}


def test_a_new_rate_quantizes_at_that_rate_alone(finished: Path) -> None:
    found = jobs(finished, STUDY.replace("[2, 3.5]", "[2, 3, 3.5]"))
    assert found == {"ptq": 2, "collect_ptq": 1, "damage": 1, "report": 1}


def test_a_new_method_leaves_the_others_alone(finished: Path) -> None:
    found = jobs(finished, STUDY.replace("[rtn]", "[rtn, higgs]"))
    assert found == {"ptq": 4, "collect_ptq": 1, "damage": 1, "report": 1}


def test_a_lost_quantization_is_done_again_and_trains_nothing(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    shutil.rmtree(next((folder / "results/smoke/ptq").iterdir()))
    found = jobs(folder, STUDY)
    assert found.pop("ptq") == 1
    assert {"train", "tokenize"}.isdisjoint(found)


def test_touched_weights_quantize_nothing(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, copy_function=shutil.copyfile)  # new time stamps throughout
    assert {"ptq", "train"}.isdisjoint(jobs(folder, STUDY))


def test_the_precision_law_takes_quantized_runs_where_it_names_a_method(finished: Path) -> None:
    found = jobs(finished, STUDY.replace("laws: [", "laws: [{law: precision, ptq: rtn}, "))
    assert found["fit"] == 1
    assert {"ptq", "train"}.isdisjoint(found)


# Beside two budgets of an ordinary size a run whose weights leave float32 in the first steps.
WITH_DIVERGED = STUDY.replace("[rtn]", "[rtn, higgs]").replace(
    "sizes: [10k]",
    """sizes:
  - 10k
  - {name: wild, nominal: 10000, layers: 1, width: 32, heads: 2, kv_heads: 2, learning_rate: 1.0e+38}
exclude: [{size: wild, tokens: 16384}, {size: wild, representation: w4}]""",
)


def test_neither_a_diverged_run_nor_a_failed_quantization_holds_up_the_others(tmp_path: Path) -> None:
    """A folder that is in use makes one quantization fail; then it is cleared and the same command goes on."""
    clone(tmp_path)
    results = tmp_path / "results/smoke"
    (tmp_path / "study.yaml").write_text(WITH_DIVERGED)
    names = set(Workflow(load_study(tmp_path / "study.yaml")).ptq)
    broken = next(name for name in sorted(names) if "rtn" in name and "wild" not in name)
    (results / "ptq" / broken).mkdir(parents=True)
    (results / "ptq" / broken / "notes.txt").write_text("mine")

    failed = snakemake(tmp_path, study=WITH_DIVERGED, check=False)
    assert failed.returncode == 1
    assert {path.parent.name for path in results.glob("ptq/*/ptq.json")} == names - {broken}
    assert (results / "losses/ptq/higgs.parquet").exists()
    assert not (results / "losses/ptq/rtn.parquet").exists()
    assert (results / "tables/compression/multipliers.md").exists()

    (results / "ptq" / broken / "notes.txt").unlink()
    snakemake(tmp_path, study=WITH_DIVERGED)
    for method in ("rtn", "higgs"):
        losses = pd.read_parquet(results / f"losses/ptq/{method}.parquet")
        diverged = losses["size"] == "wild"
        assert (diverged.sum(), len(losses)) == (2, 6)
        assert set(losses.loc[diverged, "status"]) == {"diverged"}
        assert losses.loc[diverged, ["loss", "parent_loss", "ptq_bits"]].isna().all(axis=None)
        assert losses.loc[~diverged, "loss"].notna().all()
    damage = json.loads((results / "damage/damage.json").read_text())
    said = {entry["method"]: f"({entry['rows_diverged']} diverged" for entry in damage["damages"]} | damage["unfitted"]
    assert set(said) == {"rtn", "higgs"}  # rounding may cost models of seconds too little for a fit
    assert all("(2 diverged" in words for words in said.values())
    assert not list(results.glob("ptq/*wild*/packed.safetensors"))
    assert 'id="damage"' in (results / "report.html").read_text()
    assert jobs(tmp_path, WITH_DIVERGED) == {}
