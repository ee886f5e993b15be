"""A checkout of the project that runs the smallest study, on the lab's Slurm or on this machine."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lab

from qpipe.study import load_study, plan

ROOT = Path(__file__).parents[2]
SOURCES = ["Snakefile", "workflow", "qpipe", "config", "profiles"]
STUDY = (ROOT / "tests/studies/smoke.yaml").read_text()
RUNS = (
    STUDY.replace("sizes: [10k, 30k]", "sizes: [10k]")
    .replace("tokens: [8192, 16384]", "tokens: [196608]")
    .replace("representations: [dense, w4]", "representations: [dense]\nseeds: {seeds}")
)
"""A study of as many runs as `seeds` has, long enough for something to happen to them."""


class Clone:
    """A checkout of the project with the Slurm profile edited for the lab, as a user edits it for a cluster."""

    def __init__(self, folder: Path, study: str = STUDY) -> None:
        self.folder, self.results = folder, folder / "results/smoke"
        self.extra: dict[str, str] = {}
        """more environment variables"""
        folder.mkdir(parents=True, exist_ok=True)
        for name in SOURCES:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, folder / name)
        (folder / "study.yaml").write_text(study)
        self.edit_profile(
            {
                "slurm_partition": "main",
                "slurm_account": "lab",
                "slurm-init-seconds-before-status-checks": 1,
                "latency-wait": 10,
                "tokenize": 1,
            }
        )
        self.edit_profile({"train": 1}, part="set-threads")

    def edit_profile(self, values: dict[str, object], part: str = "", profile: str = "slurm") -> None:
        """Replace values of a profile, keeping a string's two pairs of quotes."""
        path = self.folder / f"profiles/{profile}/config.yaml"
        before, mark, text = path.read_text().rpartition(f"{part}:\n") if part else ("", "", path.read_text())
        for key, value in values.items():
            shown = f"\"'{value}'\"" if isinstance(value, str) else str(value)
            text, count = re.subn(rf"^( *){key}: [^#\n]+", rf"\g<1>{key}: {shown} ", text, flags=re.MULTILINE)
            assert count, f"{path} has no {key}"
        path.write_text(before + mark + text)

    def command(self, *options: str, profile: str = "slurm") -> list[str]:
        return [
            *(sys.executable, "-m", "snakemake", *options),  # targets go first: --configfile takes several files
            *("--profile", f"profiles/{profile}", "--configfile", "study.yaml"),
        ]

    @property
    def environment(self) -> dict[str, str]:
        here = {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "QPIPE_CHECKPOINT_SECONDS": "1"}
        here["MASTER_ADDR"] = "127.0.0.1"  # the simulated nodes' names lead nowhere
        return {**lab.clean_environment(), **here, **self.extra}

    def delay(self, command: str, seconds: float) -> None:
        """Make one of Slurm's commands as slow as on a busy cluster, for this clone."""
        script, real = self.folder / "bin" / command, shutil.which(command)
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\nsleep {seconds}\nexec {real} "$@"\n')
        script.chmod(0o755)
        self.extra["PATH"] = f"{script.parent}:{self.environment['PATH']}"

    def snakemake(self, *options: str, profile: str = "slurm", check: bool = True) -> str:
        """Run Snakemake to its end; return what it said."""
        done = subprocess.run(
            self.command(*options, profile=profile),
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        text = done.stdout + done.stderr
        assert done.returncode == 0 or not check, text[-5000:] + self.logs()
        assert done.returncode != 0 or check, text[-3000:]
        return text

    def start(self, *options: str) -> subprocess.Popen[str]:
        """Start Snakemake as a shell starts a foreground job: Ctrl-C reaches it."""
        return subprocess.Popen(
            self.command(*options),
            cwd=self.folder,
            env=self.environment,
            stdout=(self.folder / "snakemake.out").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def said(self) -> str:
        return (self.folder / "snakemake.out").read_text()

    def logs(self) -> str:
        """Return the ends of the jobs' logs."""
        paths = [*(self.folder / "logs").rglob("*.log")]
        return "\n".join(f"== {path}\n{path.read_text()[-1500:]}" for path in paths if path.stat().st_size)

    def runs(self) -> list[str]:
        """Return the ids of the planned runs."""
        return [run.id for run in plan(load_study(self.folder / "study.yaml"), self.folder)]

    def science(self) -> dict[str, bytes]:
        """Return what must not depend on where and how often a run was started."""
        names = ("record.json", "curve.parquet", "model.safetensors")
        files = [path for name in names for path in self.results.glob(f"runs/*/{name}")]
        tables = [*self.results.glob("tables/*/multipliers.csv"), *self.results.glob("fits/*.json")]
        return {str(path.relative_to(self.results)): path.read_bytes() for path in [*files, *tables]}


def assert_as_in_peace(clone: Clone, peaceful: Clone) -> None:
    expected, found = peaceful.science(), clone.science()
    assert {name for name in found if name.endswith("record.json")}
    assert {name: found[name] == expected[name] for name in found} == dict.fromkeys(found, True)
    assert len(clone.runs()) == sum(name.endswith("record.json") for name in found)


def heartbeat(clone: Clone, run: str) -> dict[str, Any]:
    try:
        return json.loads((clone.results / "runs" / run / "scratch/heartbeat.json").read_text())
    except (OSError, ValueError):
        return {}


def wait_for_training(clone: Clone, seconds: float = 180) -> list[str]:
    """Wait until all runs train and have a checkpoint; return them."""
    for run in clone.runs():
        checkpoints = clone.results / "runs" / run / "scratch"
        lab.wait_until(lambda checkpoints=checkpoints: list(checkpoints.glob("step-*.ckpt")), seconds)
    return clone.runs()


def slow_down(clone: Clone, seconds: float) -> None:
    """Make every step of a clone's trainers take this much longer; results do not depend on the clock."""
    code = clone.folder / "qpipe/train/checkpoint.py"
    after_step = "        due = time.monotonic() - self._last >= self.seconds\n"
    assert after_step in code.read_text()
    code.write_text(code.read_text().replace(after_step, f"        time.sleep({seconds})\n{after_step}"))


def job_of(run: str) -> str:
    return lab.squeue("--name", run, "--states", "running")[0]


def finish(process: subprocess.Popen[str], clone: Clone, seconds: float = 300) -> str:
    process.wait(seconds)
    assert process.returncode == 0, clone.said()[-4000:] + clone.logs()
    return clone.said()


def runtime(clone: Clone, run: str) -> dict[str, Any]:
    return json.loads((clone.results / "runs" / run / "runtime.json").read_text())


def attempts(clone: Clone, run: str) -> int:
    return runtime(clone, run)["attempts"]
