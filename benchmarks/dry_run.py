"""Time and memory of `snakemake -n` on a study of many runs, against a bare Snakefile with the same jobs and files.

The bare Snakefile holds the same rules with literal paths and `true` as every command: what Snakemake itself costs.
Both are measured in the same invocation, alternating, and the ratio of the medians is printed.

    python benchmarks/dry_run.py --runs 10000 --repeats 3
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

STUDY = """
name: big
corpus: {{source: docstrings}}
tokenizer: {{train: bpe, vocab_size: 1024}}
ladder: {{recipe: tiny}}
sizes: [10k, 30k, 100k, 200k, 400k]
tokens_per_parameter: [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120]
representations: [dense, w1, w2, w3, w4, w2a2, w4a4, w8a8, 2:4, 2:4+w4a4]
seeds: [{seeds}]
"""

BARE = """
import json
J = json.load(open("jobs.json"))
R = "results/big"
rule all:
    input: f"{R}/report.html", f"{R}/wandb/compression.txt", [f"{R}/runs/{run}/record.json" for run in J["runs"]]
rule plan:
    output: f"{R}/study.yaml", f"{R}/plan.json"
    shell: "true"
rule tokenize:
    output: J["tokens"]
    shell: "true"
rule train:
    input: J["tokens"]
    output: f"{R}/runs/{{run}}/record.json", f"{R}/runs/{{run}}/model.safetensors"
    shell: "true"
rule capacity:
    output: f"{R}/capacity/{{format}}.json"
    shell: "true"
rule collect:
    input: lambda w: [f"{R}/runs/{run}/record.json" for run in J["of"][w.format]]
    output: f"{R}/losses/{{format}}.parquet"
    shell: "true"
rule fit:
    input: [f"{R}/losses/{f}.parquet" for f in J["of"]], [f"{R}/capacity/{f}.json" for f in J["of"]]
    output: f"{R}/fits/{{law}}.json"
    shell: "true"
rule multipliers:
    input: f"{R}/fits/{{law}}.json"
    output: f"{R}/tables/{{law}}/multipliers.parquet"
    shell: "true"
rule figures:
    input: f"{R}/fits/{{law}}.json"
    output: f"{R}/figures/{{law}}/figures.json"
    shell: "true"
rule report:
    input: f"{R}/fits/compression.json", f"{R}/tables/compression/multipliers.parquet",
        f"{R}/figures/compression/figures.json", f"{R}/plan.json", f"{R}/study.yaml"
    output: f"{R}/report.html"
    shell: "true"
rule track:
    input: f"{R}/tables/{{law}}/multipliers.parquet", f"{R}/plan.json"
    output: f"{R}/wandb/{{law}}.txt"
    shell: "true"
"""


def measure(command: list[str], folder: Path) -> tuple[float, float, int]:
    """Return (wall seconds, peak MiB, jobs) of one dry run."""
    start = time.perf_counter()
    with (folder / "out.txt").open("w+") as out:
        child = subprocess.Popen(command, cwd=folder, stdout=out, stderr=subprocess.STDOUT, env=dict(os.environ))
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        out.seek(0)
        text = out.read()
    if status != 0:
        sys.exit(text[-2000:])
    totals = [int(line.split()[1]) for line in text.splitlines() if line.startswith("total ")]
    return seconds, usage.ru_maxrss / 1024, totals[-1]


def prepare(folder: Path, runs: int) -> None:
    """Write the study, and the bare Snakefile's list of the same jobs."""
    sys.path.insert(0, str(ROOT))
    from qpipe.workflow import Workflow, load_study

    (folder / "big.yaml").write_text(STUDY.format(seeds=", ".join(map(str, range(runs // 500)))))
    workflow = Workflow(load_study(folder / "big.yaml"), folder)
    jobs = {
        "runs": list(workflow.runs),
        "of": workflow.runs_of,
        "tokens": f"results/tokens/{workflow.corpus}/manifest.json",
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "Snakefile").write_text(BARE)


def main() -> None:
    """Alternate the two, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    snakemake = [sys.executable, "-m", "snakemake", "-n", "--quiet", "rules", "host", "--cores", "1"]
    commands = {
        "bare": [*snakemake, "--scheduler", "greedy"],
        "qpipe": [*snakemake, "--profile", str(ROOT / "profiles/local"), "--snakefile", str(ROOT / "Snakefile"),
                  "--configfile", "big.yaml"],
    }  # fmt: skip
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args.runs)
        seen: dict[str, list[tuple[float, float, int]]] = {key: [] for key in commands}
        for _ in range(args.repeats):
            for key, command in commands.items():
                seen[key].append(measure(command, folder))
    median = {k: [statistics.median(column) for column in zip(*v, strict=True)] for k, v in seen.items()}
    for key, (seconds, mib, jobs) in median.items():
        print(f"{key:6} {jobs:8.0f} jobs {seconds:7.2f} s {mib:7.0f} MiB")
    print(
        f"ratio  time {median['qpipe'][0] / median['bare'][0]:.2f}  memory {median['qpipe'][1] / median['bare'][1]:.2f}"
    )


if __name__ == "__main__":
    main()
