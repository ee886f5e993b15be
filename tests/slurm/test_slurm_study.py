"""A whole study on a real Slurm: the same table as on one machine, to the last digit."""

import re

import pytest
from clones import Clone
from lab import Lab, run

pytestmark = [pytest.mark.slurm, pytest.mark.workflow]


@pytest.fixture(scope="module")
def finished(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Clone, str]:
    clone = Clone(tmp_path_factory.mktemp("cluster"))
    return clone, clone.snakemake("tables")  # figures and report are drawn beside Slurm, by this machine


def test_table_equals_the_local_one_to_the_last_digit(finished, local):
    clone, _ = finished
    assert len(clone.runs()) == 8
    assert clone.science() == local.science()
    assert any("multipliers.csv" in name for name in clone.science())


def test_second_invocation_runs_nothing(finished):
    assert "Nothing to be done" in finished[0].snakemake("tables")


def test_jobs_are_named_after_their_runs_and_ask_for_what_their_rule_says(finished):
    clone, text = finished
    ids = re.findall(r"SLURM jobid (\d+)", text)
    jobs = [run("scontrol", "show", "job", job, "--oneliner") for job in ids]
    names = [re.search(r"JobName=(\S+)", job)[1] for job in jobs]
    assert set(clone.runs()) <= set(names)
    trained = jobs[names.index(clone.runs()[0])]
    assert "TresPerNode=gres:gpu:1" in trained or "TresPerNode=gpu:1" in trained
    assert "Requeue=1" in trained
    assert re.search(r"TimeLimit=00:1[5-9]:00", trained)


def test_every_job_has_its_own_log(finished):
    clone, _ = finished
    for name in clone.runs():
        assert "finished in" in (clone.folder / f"logs/train/smoke/{name}.log").read_text()
        assert list((clone.folder / f"logs/slurm/rule_train/{name}").glob("*.log"))
