"""Every shipped profile is accepted by Snakemake and plans the same jobs; one study, any engine."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROFILES = sorted(path.name for path in (ROOT / "profiles").iterdir() if path.is_dir())

pytestmark = pytest.mark.workflow


@pytest.mark.parametrize("profile", PROFILES)
def test_profile_plans_the_whole_study(profile, tmp_path):
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--directory", str(tmp_path), "--snakefile", "Snakefile"]
    command += ["--profile", f"profiles/{profile}", "--configfile", "tests/studies/smoke.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    jobs = dict(re.findall(r"^([a-z]+) +(\d+)$", done.stdout + done.stderr, flags=re.MULTILINE))
    assert (jobs["train"], jobs["total"]) == ("8", "19")


@pytest.mark.parametrize(
    "command", re.findall(r"^snakemake (.*?)(?: +#.*)?$", (ROOT / "docs/slurm.md").read_text(), flags=re.MULTILINE)
)
def test_commands_of_the_first_run_on_a_cluster(command, tmp_path):
    """Each is accepted as it stands, on another study, as a dry run."""
    options = command.replace("config/quest-c4.yaml", "tests/studies/smoke.yaml").split()
    assert "tests/studies/smoke.yaml" in options
    command = [sys.executable, "-m", "snakemake", *options, "--dry-run", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "tokenize" in done.stdout + done.stderr


@pytest.mark.parametrize("profile", PROFILES)
def test_failures_are_isolated_and_code_never_retrains(profile):
    settings = yaml.safe_load((ROOT / f"profiles/{profile}/config.yaml").read_text())
    assert settings["keep-going"] is True
    assert settings["rerun-triggers"] == ["mtime", "params"]


@pytest.mark.slow
def test_gpu_box_never_trains_two_runs_on_one_gpu(tmp_path):
    """Eight runs on three simulated GPUs: CUDA_VISIBLE_DEVICES names them, and the CPU trains."""
    command = [sys.executable, "-m", "snakemake", "runs", "--directory", str(tmp_path), "--cores", "3"]
    command += ["--profile", "profiles/gpu-box", "--configfile", "tests/studies/smoke.yaml"]
    command += ["--resources", "gpu_places=3", "--set-threads", "train=1"]
    simulated = {"CUDA_VISIBLE_DEVICES": "0,1,GPU-8a", "QPIPE_ACCELERATOR": "cpu", "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **simulated}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    spans = []
    for path in tmp_path.glob("results/smoke/runs/*/runtime.json"):
        found, end = json.loads(path.read_text()), path.stat().st_mtime
        spans.append((found["visible_devices"], end - found["wall_seconds"], end))
    assert len(spans) == 8
    assert {gpu for gpu, _, _ in spans} == {"0", "1", "GPU-8a"}
    for one, other in itertools.combinations(spans, 2):
        assert one[0] != other[0] or one[2] <= other[1] or other[2] <= one[1]
