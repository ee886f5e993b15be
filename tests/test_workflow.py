"""The real Snakefile on a real study: one whole run, then what a change runs again and what it leaves alone."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ["Snakefile", "workflow", "qpipe", "config", "profiles"]
STUDY = (ROOT / "tests/studies/smoke.yaml").read_text()

pytestmark = pytest.mark.workflow


def clone(target: Path) -> None:
    """Copy the sources: a checkout with new time stamps."""
    target.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, target / name, ignore=shutil.ignore_patterns("__pycache__"), copy_function=shutil.copyfile
            )
        else:
            shutil.copyfile(source, target / name)


def snakemake(
    folder: Path, *options: str, study: str = STUDY, check: bool = True, **variables: str
) -> subprocess.CompletedProcess:
    (folder / "study.yaml").write_text(study)
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", "snakemake", "--profile", "profiles/local", "--configfile", "study.yaml", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 or not check, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def planned(folder: Path, study: str = STUDY) -> dict[str, int]:
    """Jobs per rule that a dry run would run."""
    done = snakemake(folder, "--dry-run", study=study)
    text = done.stdout + done.stderr
    jobs = {name: int(count) for name, count in re.findall(r"^([a-z]+) +(\d+)$", text, flags=re.MULTILINE)}
    assert jobs or "Nothing to be done" in text, text[-2000:]
    return {name: count for name, count in jobs.items() if name not in ("all", "total")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished study in a fresh clone; tests that change files take a copy."""
    folder = tmp_path_factory.mktemp("clone")
    clone(folder)
    done = snakemake(folder)
    return folder, done.stdout + done.stderr


@pytest.fixture
def copied(finished, tmp_path):
    """A private copy of the finished study with its time stamps and Snakemake's metadata."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    return folder


def test_whole_run_ends_with_a_table(finished):
    folder, text = finished
    results = folder / "results/smoke"
    losses = pd.read_parquet(results / "losses")
    assert sorted(losses.groupby("representation").size().items()) == [("dense", 4), ("w4", 4)]
    assert (losses["status"] == "ok").all()
    assert losses["loss"].between(2, 6).all()  # below ln 300 = 5.7 of an untrained model
    table = pd.read_parquet(results / "tables/compression/multipliers.parquet")
    assert set(table["representation"]) == {"dense", "w4"}
    for suffix in ("csv", "md", "tex"):
        assert (results / f"tables/compression/multipliers.{suffix}").stat().st_size > 50
    assert (results / "report.html").read_text().startswith("<!")
    assert "w4" in text
    assert "report.html" in text


def test_tables_know_their_units(finished):
    import pyarrow.parquet as pq

    schema = pq.read_schema(finished[0] / "results/smoke/losses/dense.parquet")
    assert schema.field("loss").metadata[b"unit"] == b"nats/token"
    assert schema.field("d").metadata[b"unit"] == b"count"


def test_second_invocation_runs_nothing(finished):
    assert planned(finished[0]) == {}


def test_new_representation_trains_its_runs_alone(finished):
    jobs = planned(finished[0], STUDY.replace("[dense, w4]", "[dense, w4, w2]"))
    assert jobs.pop("plan") == 1
    assert jobs == {"train": 4, "collect": 1, "capacity": 1, "fit": 1, "multipliers": 1, "figures": 1, "report": 1}


def test_new_seed_and_new_size_train_their_runs_alone(finished):
    assert planned(finished[0], STUDY + "\nseeds: [0, 1]\n")["train"] == 8
    assert planned(finished[0], STUDY.replace("[10k, 30k]", "[10k, 30k, 100k]"))["train"] == 4


def test_bootstrap_count_refits_and_trains_nothing(finished):
    jobs = planned(finished[0], STUDY.replace("bootstrap: 20", "bootstrap: 21"))
    assert "train" not in jobs
    assert "collect" not in jobs
    assert jobs["fit"] == 1


def test_changed_figure_code_refits_nothing(copied):
    source = copied / "qpipe/report/figures.py"
    source.write_text(source.read_text() + "\n_UNUSED = 1\n")
    jobs = planned(copied)
    assert {"train", "collect", "fit", "multipliers"}.isdisjoint(jobs)
    assert jobs["figures"] == 1
    assert jobs["report"] == 1


def test_comments_and_docstrings_run_nothing(copied):
    for source in (copied / "qpipe").rglob("*.py"):
        text = source.read_text()
        source.write_text("# a comment\n" + text)
    assert planned(copied) == {}


def test_changed_training_code_trains_nothing(copied):
    for source in (copied / "qpipe/train").rglob("*.py"):
        source.write_text(source.read_text() + "\n_UNUSED = 1\n")
    assert planned(copied) == {}


def test_touched_files_run_nothing(copied):
    now = time.time() + 5
    for path in copied.rglob("*"):
        if path.is_file() and ".snakemake" not in path.parts:
            os.utime(path, (now, now))
    assert planned(copied) == {}


def test_new_clone_without_snakemakes_memory_trains_nothing(finished, tmp_path):
    folder = tmp_path / "again"
    clone(folder)
    shutil.copytree(finished[0] / "results", folder / "results", copy_function=shutil.copyfile)
    assert "train" not in planned(folder)
    assert "tokenize" not in planned(folder)


def test_lost_memory_makes_no_stale_result_look_fresh(copied):
    """Snakemake alone knows with which options the fit was made; without its folder the old fit must not stay."""
    changed = STUDY.replace("bootstrap: 20", "bootstrap: 30")
    assert changed != STUDY
    shutil.rmtree(copied / ".snakemake")
    for _ in range(2):  # a dry run forgets nothing
        jobs = planned(copied, changed)
        assert {"fit", "multipliers", "report"} <= set(jobs)
        assert "train" not in jobs
    snakemake(copied, "--until", "collect", study=changed)
    assert {"fit", "multipliers", "report"} <= set(planned(copied, changed))  # interrupted before it got there


def test_deleted_record_trains_one_run(copied):
    next((copied / "results/smoke/runs").glob("*/record.json")).unlink()
    assert planned(copied)["train"] == 1


def test_deleted_token_store_trains_nothing_that_is_finished(copied):
    shutil.rmtree(copied / "results/tokens")
    assert planned(copied) == {}
    jobs = planned(copied, STUDY.replace("[dense, w4]", "[dense, w4, w2]"))
    assert (jobs["tokenize"], jobs["train"]) == (1, 4)


def test_two_changes_at_once_are_both_seen(copied):
    next((copied / "results/smoke/runs").glob("*/record.json")).unlink()
    study = STUDY.replace("[dense, w4]", "[dense, w4, w2]").replace("bootstrap: 20", "bootstrap: 21")
    jobs = planned(copied, study)
    assert (jobs["train"], jobs["fit"]) == (5, 1)


def test_retrained_run_gives_the_same_record(copied):
    record = next((copied / "results/smoke/runs").glob("n10k*/record.json"))
    before = record.read_bytes()
    record.unlink()
    snakemake(copied, "--until", "train")
    assert record.read_bytes() == before


def test_one_failing_run_does_not_block_the_others(copied):
    runs = sorted(path.parent for path in (copied / "results/smoke/runs").glob("*/record.json"))
    for run in runs[:3]:
        (run / "record.json").unlink()
    (runs[0] / "scratch").write_text("a file where a folder belongs")
    done = snakemake(copied, check=False)
    assert done.returncode != 0
    assert [(run / "record.json").exists() for run in runs[:3]] == [False, True, True]
    table = copied / "results/smoke/tables/compression/multipliers.md"
    before = table.read_text()
    snakemake(copied, "--", "tables", QPIPE_PARTIAL="1")
    assert f"Planned runs that are missing (1): {runs[0].name}." in table.read_text()
    assert "\n- 7 runs; " in table.read_text()
    (runs[0] / "scratch").unlink()
    snakemake(copied, "--", "tables")
    assert table.read_text() == before


def test_removed_representation_refits_without_it(finished):
    jobs = planned(finished[0], STUDY.replace("[dense, w4]", "[dense]"))
    assert jobs == {"plan": 1, "fit": 1, "multipliers": 1, "figures": 1, "report": 1}
    command = snakemake(finished[0], "--dry-run", "--printshellcmds", study=STUDY.replace("[dense, w4]", "[dense]"))
    assert "losses/dense.parquet" in command.stdout + command.stderr
    assert "losses/w4.parquet --" not in command.stdout + command.stderr


def test_bad_study_stops_with_one_message(tmp_path):
    clone(tmp_path)
    done = snakemake(tmp_path, study=STUDY.replace("sizes:", "sises:"), check=False)
    assert done.returncode != 0
    assert "sises: unknown key (did you mean 'sizes'?)" in done.stderr + done.stdout


def test_configuration_on_the_command_line_is_refused(tmp_path):
    clone(tmp_path)
    done = snakemake(tmp_path, "--config", "seeds=1", check=False)
    assert "a run is its study file" in done.stderr + done.stdout
