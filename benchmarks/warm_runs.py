"""Runs per hour of a grid of small runs: one process each, and back to back in warm workers.

    python benchmarks/warm_runs.py --runs 8 --size 10k --tokens 16384

Runs follow each other, one at a time, on whatever device there is; the first run of each kind, which fills file caches
and starts the worker, is not counted. Prints seconds per run, runs per hour and whether the losses agree.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qpipe.corpus import tokenize_corpus
from qpipe.study import load_study, plan

STUDY = """
name: bench
corpus: {{source: docstrings, packages: [numpy], max_bytes: 4000000, validation_fraction: 0.05}}
tokenizer: {{train: bpe, vocab_size: 512}}
ladder: {{recipe: tiny}}
sizes: [{size}]
tokens: [{tokens}]
representations: [{representation}]
seeds: {seeds}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--size", default="10k")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--representation", default="w4")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = STUDY.format(**{**vars(args), "seeds": list(range(args.runs + 1))})
        (folder / "study.yaml").write_text(text)
        study = load_study(folder / "study.yaml")
        tokenize_corpus(study.corpus, study.tokenizer, folder / "tokens", base=folder, workers=1, progress=False)
        runs = plan(study)
        for run in runs:
            run.write(folder / f"{run.id}.yaml")
        rates = {kind: seconds_per_run(folder, [run.id for run in runs], kind) for kind in ("plain", "warm")}
        losses = [[loss(folder / kind / run.id) for run in runs] for kind in rates]
    for kind, seconds in rates.items():
        print(f"{kind}: {seconds:.2f} s per run, {3600 / seconds:,.0f} runs per hour")
    print(
        f"warm / plain: {rates['plain'] / rates['warm']:.2f} x; losses {'equal' if losses[0] == losses[1] else losses}"
    )


def seconds_per_run(folder: Path, runs: list[str], kind: str) -> float:
    """Train the runs one after the other; return the mean wall time of all but the first."""
    settings = {"QPIPE_WARM": "1" if kind == "warm" else "0", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    begin = 0.0
    for number, run in enumerate(runs):
        if number == 1:
            begin = time.monotonic()
        paths = (folder / f"{run}.yaml", folder / "tokens", folder / kind / run)
        command = [sys.executable, "-m", "qpipe", "train", *map(str, paths)]
        subprocess.run(command, env={**os.environ, **settings}, check=True, capture_output=True)
    return (time.monotonic() - begin) / (len(runs) - 1)


def loss(folder: Path) -> float:
    """Return the recorded loss of a run."""
    return float(json.loads((folder / "record.json").read_text())["loss"])


if __name__ == "__main__":
    main()
