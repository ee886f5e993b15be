"""Every shipped profile is accepted by Snakemake and plans the same jobs; one study, any engine."""

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


@pytest.mark.parametrize("profile", PROFILES)
def test_failures_are_isolated_and_code_never_retrains(profile):
    settings = yaml.safe_load((ROOT / f"profiles/{profile}/config.yaml").read_text())
    assert settings["keep-going"] is True
    assert settings["rerun-triggers"] == ["mtime", "params"]
