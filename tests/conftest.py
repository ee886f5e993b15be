"""Side by side (`pytest -n 2`): a file's tests share a process and its fixtures, as do all that need the one Slurm."""

from typing import Any

import pytest


@pytest.fixture
def untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No W&B, and scratch beside the results."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.delenv("QPIPE_SCRATCH", raising=False)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if nodeid.startswith("tests/slurm/") else nodeid.split("::", 1)[0]

    return ByFile(config, log)
