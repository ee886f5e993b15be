"""A Slurm for the session and clones of the project that run the smallest study through it."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import lab as slurm
import pytest
from clones import RUNS, Clone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    problem = slurm.missing()
    for item in items:
        if item.get_closest_marker("slurm"):
            item.add_marker(pytest.mark.skipif(bool(problem), reason=problem))


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Lab]:
    """A Slurm of three nodes with two simulated GPUs each."""
    with slurm.only_one():
        one = slurm.Lab(tmp_path_factory.mktemp("slurm"))
        try:
            try:
                one.up()
            except (RuntimeError, TimeoutError, OSError) as error:
                pytest.skip(f"no Slurm comes up on this machine: {error}")
            yield one
        finally:
            one.down()


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """The same study, finished on this machine without Slurm."""
    clone = Clone(tmp_path_factory.mktemp("local"))
    clone.extra["QPIPE_WARM"] = "1"  # faster, and one more way in which results must not differ
    clone.snakemake("tables", "--cores", str(os.cpu_count()), profile="local")
    return clone


@pytest.fixture
def clone(lab: slurm.Lab, tmp_path: Path) -> Iterator[Clone]:
    """A fresh clone; jobs it leaves behind are cancelled."""
    yield Clone(tmp_path / "clone")
    slurm.run("scancel", "--user", "root", check=False)
    slurm.wait_until(lambda: not slurm.squeue("--states", "running,completing,pending"), 60)


@pytest.fixture(scope="session")
def peaceful(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """Three runs trained on this machine without Slurm."""
    clone = Clone(tmp_path_factory.mktemp("peaceful"), RUNS.format(seeds=[0, 1, 2]))
    clone.extra["QPIPE_WARM"] = "1"
    clone.snakemake("runs", "--cores", str(os.cpu_count()), profile="local")
    return clone


@pytest.fixture
def study(lab: slurm.Lab, clone: Clone, peaceful: Clone) -> Callable[..., Clone]:
    """A clone with planned runs and tokens, so that the first thing Slurm gets to do is to train."""

    def make(seeds: int, **profile: object) -> Clone:
        (clone.folder / "study.yaml").write_text(RUNS.format(seeds=list(range(seeds))))
        clone.edit_profile(profile)
        shutil.copytree(peaceful.folder / "results/tokens", clone.folder / "results/tokens")
        return clone

    return make
