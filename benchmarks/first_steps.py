"""Time to a run's first step on one GPU, with empty and with filled compile caches, a process of its own each.

    python benchmarks/first_steps.py --size 30M --representation dense w4a4 mxfp4 nvfp4 vq2x256

Counted from making the model to the end of the first step, through Lightning; the imports before it are given beside.
Each representation has cache folders of its own, so none profits from another's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_CHILD = """
import argparse, json, sys, time
begin = time.perf_counter()
import torch
from training_gpu import WARM_STEPS, make_run, time_lightning
imported = time.perf_counter()
options = argparse.Namespace(**json.loads(sys.argv[1]), steps=WARM_STEPS + 2)
run = make_run(options.size, options.representation, options)
torch.zeros(1, device="cuda")
ready = time.perf_counter()
clock, _ = time_lightning(run, options)
print(json.dumps({"imports": imported - begin, "device": ready - imported, "first": clock.first}))
"""


def first_step(name: str, options: argparse.Namespace, caches: Path) -> dict[str, float]:
    """Return seconds of imports, of opening the device and to the first step of one new process."""
    told = {**vars(options), "representation": name}
    folders = {key: str(caches / key) for key in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
    environment = {**os.environ, **folders, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(told)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quest")
    parser.add_argument("--size", default="30M")
    parser.add_argument("--representation", nargs="*", default=["dense", "w4a4", "mxfp4"])
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=64)
    options = parser.parse_args()
    print(f"{'':<14}{'empty':>8}{'filled':>8}{'imports':>10}{'device':>8}   seconds")
    for name in options.representation:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as caches:
            empty, filled = (first_step(name, options, Path(caches)) for _ in range(2))
        print(
            f"{name:<14}{empty['first']:8.1f}{filled['first']:8.1f}{filled['imports']:10.1f}{filled['device']:8.1f}"
            f"   (both processes {time.perf_counter() - begin:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
