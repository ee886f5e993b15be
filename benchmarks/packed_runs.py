"""Runs per hour of a grid of small runs on one device: one process each, packed, and in warm workers.

    python benchmarks/packed_runs.py TOKENS --sizes 1M 3M 10M --representations dense w4a4 --runs 12 --tokens 8000000

TOKENS is a token store (`qpipe tokenize`); nothing else is needed, no Snakemake and no network. Ways, in this order:

    plain      one process per run, one after the other
    packed K   K processes at a time, each run a process of its own
    warm       one warm worker trains run after run (QPIPE_WARM)
    warm K     K warm workers at a time

and, where NVIDIA's multi-process service is found, the ways with K again under it (`+mps`). All train the same runs:
sizes and representations in turn, each with a seed of its own. Before anything is counted, one run of each kind is
trained twice, in processes of their own: the first fills the compile caches, the second says what that saves. Within a
way the first K runs to finish are not counted, so that a rate is that of a long grid. Losses are compared run by run.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qpipe.corpus.store import TokenStore
from qpipe.formats import resolve
from qpipe.identity import digest
from qpipe.recipe import TINY, ModelShape, swiglu_width
from qpipe.runs import Run

SHAPES = {"10k": (2, 32, 1), "1M": (4, 160, 5), "3M": (5, 256, 4), "5M": (6, 288, 4), "10M": (6, 384, 6)}
"""Layers, width, heads."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens_folder", type=Path, metavar="TOKENS")
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["1M", "3M", "10M"])
    parser.add_argument("--representations", nargs="+", default=["dense", "w4a4"])
    parser.add_argument("--runs", type=int, default=12, help="runs that are counted, per way")
    parser.add_argument("--tokens", type=int, default=8_000_000, help="training tokens of a run")
    parser.add_argument("--batch", type=int, default=64, help="sequences per step")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--at-once", type=int, nargs="*", default=[4], metavar="K")
    parser.add_argument("--ways", nargs="+", choices=["plain", "packed", "warm"], default=["plain", "packed", "warm"])
    parser.add_argument("--no-fill", dest="fill", action="store_false", help="do not fill compile caches beforehand")
    parser.add_argument("--json", type=Path, help="write what was measured here, after each way")
    args = parser.parse_args()
    store = TokenStore.open(args.tokens_folder)
    runs = grid(args, store)
    kinds = len(args.sizes) * len(args.representations)
    print(f"{args.runs} runs of {args.tokens:,} tokens, {args.sizes} x {args.representations}", flush=True)
    with tempfile.TemporaryDirectory(prefix="packed-") as name:
        bench = Bench(Path(name), args.tokens_folder.absolute())
        measured: dict[str, Any] = {"ways": {}, "fill": bench.fill(runs[:kinds]) if args.fill else []}
        for first, second in measured["fill"]:
            print(f"a kind's first run {first:.1f} s, with caches filled {second:.1f} s", flush=True)
        losses: dict[str, dict[str, float]] = {}
        for way, at_once, mps in ways(args):
            label = f"{way}{f' {at_once}' if at_once > 1 else ''}{' +mps' if mps else ''}"
            with service(Path(name) / "mps") if mps else contextlib.nullcontext(True) as available:
                if not available:
                    print(f"{label}: the multi-process service does not start here", flush=True)
                    continue
                seconds, losses[label] = bench.way(label, runs[: args.runs + at_once], way == "warm", at_once)
            measured["ways"][label] = seconds
            ratio = measured["ways"].get("plain", float("nan")) / seconds
            apart = max_difference(losses[label], next(iter(losses.values())))
            print(
                f"{label:>14}: {3600 / seconds:7,.0f} runs per hour, {ratio:5.2f} x plain, "
                f"losses differ by at most {apart:.1e}",
                flush=True,
            )
            if args.json:
                args.json.write_text(json.dumps({**measured, "losses": losses}, indent=1))


def ways(args: argparse.Namespace) -> list[tuple[str, int, bool]]:
    """Return (way, runs at a time, whether under the multi-process service) of all that is to be measured."""
    mps = shutil.which("nvidia-cuda-mps-control") is not None
    found = [("plain", 1, False)] if "plain" in args.ways else []
    for way in ("packed", "warm"):
        if way in args.ways:
            counts = args.at_once if way == "packed" else [1, *args.at_once]
            found += [(way, count, with_mps) for count in counts for with_mps in ([False, True] if mps else [False])]
    return [one for one in found if not (one[1] == 1 and one[2])]


def grid(args: argparse.Namespace, store: TokenStore) -> list[Run]:
    """Return more runs than any way counts, kinds in turn, a seed per round."""
    kinds = [(size, name) for name in args.representations for size in args.sizes]
    count = args.runs + max([*args.at_once, 1]) + len(kinds)
    return [make_run(args, store, *kinds[number % len(kinds)], number // len(kinds)) for number in range(count)]


def make_run(args: argparse.Namespace, store: TokenStore, size: str, name: str, seed: int) -> Run:
    layers, width, heads = SHAPES[size]
    shape = ModelShape(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=heads,
        feed_forward=swiglu_width(width, 32),
        vocab_size=store.vocab_size,
        context=args.context,
    )
    policy = TINY.training("1M").model_copy(update={"batch_sequences": args.batch, "precision": args.precision})
    resolved = resolve(name)
    return Run(
        size=size,
        representation_name=resolved.name,
        tokens_per_parameter=1.0,
        shape=shape,
        training=policy,
        steps=max(1, args.tokens // (args.batch * args.context)),
        representation=resolved.canonical(),
        corpus=digest(store.manifest.get("identity"), 12),
        seed=seed,
    )


class Bench:
    """Trains runs below a folder, with compile caches of its own."""

    def __init__(self, folder: Path, tokens: Path) -> None:
        self.folder, self.tokens = folder, tokens
        self.settings = {
            "WANDB_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
        }

    def train(self, run: Run, out: Path, warm: bool) -> float:
        """Train a run; return when it was finished (error: it failed). Its parent folder has its own warm workers."""
        run_file = self.folder / f"{run.id}.yaml"
        if not run_file.exists():
            run.write(run_file)
        command = [sys.executable, "-m", "qpipe", "train", str(run_file), str(self.tokens), str(out)]
        out.parent.mkdir(exist_ok=True)
        own = {"QPIPE_WARM": "1" if warm else "0", "TMPDIR": str(out.parent)}
        environment = {**os.environ, **self.settings, **own}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{run.id}: {done.stderr[-3000:]}")
        return time.monotonic()

    def fill(self, kinds: list[Run]) -> list[tuple[float, float]]:
        """Train a run of each kind twice, each in a process of its own; return both wall times (seconds)."""
        times = []
        for run in kinds:
            begin = time.monotonic()
            first = self.train(run, self.folder / "first" / run.id, False)
            times.append((first - begin, self.train(run, self.folder / "second" / run.id, False) - first))
        return times

    def way(self, label: str, runs: list[Run], warm: bool, at_once: int) -> tuple[float, dict[str, float]]:
        """Return seconds per run once all places are busy, and loss by run."""
        folder = self.folder / label.replace(" ", "-")
        with ThreadPoolExecutor(at_once) as pool:
            ends = sorted(pool.map(lambda run: self.train(run, folder / run.id, warm), runs))
        losses = {run.id: json.loads((folder / run.id / "record.json").read_text())["loss"] for run in runs}
        return (ends[-1] - ends[at_once - 1]) / (len(runs) - at_once), losses


def max_difference(one: dict[str, float], other: dict[str, float]) -> float:
    """Return the largest relative difference of the losses of runs in both."""
    return max(abs(one[run] / other[run] - 1) for run in one.keys() & other.keys())


@contextlib.contextmanager
def service(folder: Path) -> Iterator[bool]:
    """Run NVIDIA's multi-process service while inside; yields whether it has started."""
    folder.mkdir(exist_ok=True)
    own = {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    os.environ.update(own)
    started = subprocess.run(["nvidia-cuda-mps-control", "-d"], capture_output=True).returncode == 0
    try:
        yield started
    finally:
        if started:
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", capture_output=True)
        for name in own:
            del os.environ[name]


if __name__ == "__main__":
    main()
