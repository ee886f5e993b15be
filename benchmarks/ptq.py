"""Post-training quantization measured: methods at equal total bits, an ablation of allocators, peers, and speed.

    python benchmarks/ptq.py compare RUN... --tokens TOKENS --out DIR --minutes 6      methods, then allocators
    python benchmarks/ptq.py peers RUN... --tokens TOKENS --out DIR                    torchao and AutoRound
    python benchmarks/ptq.py speed --sizes 100M 1B --out DIR                           time and memory, random weights

RUN is the folder of a finished dense run (or a transformers model with a token store of its own tokenizer). `compare`
goes through its jobs in the order of their worth (every method at every rate once, then the allocators on identical
quantizers, then further seeds), several at a time, and stops at its time limit with what it has; results are kept in
--work and a second call goes on. DIR/results.csv has one row per quantization, which `qpipe damage` reads,
DIR/table.md the increase of the loss by method and bits (mean over seeds +- standard deviation) and where cvxq is not
the best, DIR/*.png the rate-distortion curves and the bits of every layer. Baselines appear in several group sizes:
compare with the best. Seconds and memory of `compare` are those of processes that share a device; `speed` runs alone.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from ptq_random import SHAPES, random_run, random_store  # noqa: E402
from ptq_tables import bit_map, describe, write_tables  # noqa: E402

from qpipe.errors import QpipeError  # noqa: E402
from qpipe.ptq.quantize import Request, quantize_checkpoint  # noqa: E402
from qpipe.ptq.result import PtqResult, Target, load_result  # noqa: E402
from qpipe.ptq_methods import get_method  # noqa: E402

_ROWS: dict[str, Any] = {"columns": 0}
_COLUMN_CLUSTERS = {"rows": 512, "columns": 1, "clustered": True}
COMPARED: dict[str, tuple[str, dict[str, Any]]] = {
    "cvxq": ("cvxq", {}),
    "gptq, groups of 128": ("gptq", {}),
    "rtn, groups of 128": ("rtn", {}),
    "higgs": ("higgs", {}),
    "gptq, rows": ("gptq", _ROWS),
    "rtn, rows": ("rtn", _ROWS),
    "cvxq, columns of row clusters": ("cvxq", _COLUMN_CLUSTERS),
    "cvxq, groups of 256": ("cvxq", {"columns": 256}),
    "gptq, rows, lloyd-max": ("gptq", {"columns": 0, "codebook": "lloyd-max"}),
    "cvxq, no feedback": ("cvxq", {"feedback": False}),
    "cvxq, hidden probe": ("cvxq", {"probe": "hidden"}),
    "cvxq, not tempered": ("cvxq", {"tempered": False}),
    "cvxq, no feedback, bias": ("cvxq", {"feedback": False, "bias_correction": True}),
}
BASIC = 6
"""The first so many are measured at every rate before anything else."""
ALLOCATORS = ("uniform", "variance", "closed-form", "table", "measured", "exact")
SAME_QUANTIZERS = {"feedback": False, "tempered": False}
ABLATION_BITS = (2.1, 2.5, 3.0)


@dataclass(frozen=True)
class Job:
    """One quantization to measure."""

    stage: str
    run: Path
    name: str
    method: str
    bits: float
    seed: int
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Digest of all that decides the result: names its folder."""
        parts = [self.method, self.changes, str(self.run.resolve()), self.bits, self.seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def jobs(runs: list[Path], bits: list[float], seeds: int) -> Iterator[Job]:
    """Yield all jobs, those that are worth most first."""
    names = list(COMPARED)
    ablation = [
        Job("ablation", run, name, "cvxq", rate, 0, {**SAME_QUANTIZERS, "allocation": name})
        for run in runs
        for rate in ABLATION_BITS
        for name in ALLOCATORS
    ]
    yield from compared(runs, names[:BASIC], bits, 0)
    yield from ablation
    for seed in range(1, seeds):
        yield from compared(runs, [n for n in names[:BASIC] if not get_method(COMPARED[n][0]).data_free], bits, seed)
    yield from compared(runs, names[BASIC:], bits, 0)


def compared(runs: list[Path], names: list[str], bits: list[float], seed: int) -> Iterator[Job]:
    """Yield jobs of the comparison."""
    for rate in bits:
        for name in names:
            method, changes = COMPARED[name]
            yield from (Job("methods", run, name, method, rate, seed, changes) for run in runs)


def measure(job: Job, tokens: Path, work: Path, device: str, validation_tokens: int | None) -> dict[str, Any]:
    """Quantize one checkpoint, or read what an earlier call found; return its row, with `problem` where it failed."""
    row = {"stage": job.stage, "checkpoint": job.run.name, "name": job.name, "asked": job.bits, "seed": job.seed}
    out = work / job.key
    try:
        request = Request(get_method(job.method, **job.changes), Target(bits=job.bits), job.seed, validation_tokens)
        result, runtime = quantized(job.run, tokens, out, request, torch.device(device))
    except (QpipeError, RuntimeError) as error:
        return row | {"problem": f"{type(error).__name__}: {error}"[:500]}
    if result.status != "ok":
        return row | {"problem": result.message}
    (out / "packed.safetensors").unlink(missing_ok=True)  # results are kept, models are not
    # The columns that `qpipe damage` reads; the ablation's variants are no methods.
    law = {"parent": job.run.name, "parent_loss": result.dense_loss, "ptq_bits": result.bits_per_weight}
    law |= {"ptq_method": job.name if job.stage == "methods" else ""}
    return {**describe(result, runtime), **row, **law, "bit_map": bit_map(result)}


def quantized(
    run: Path, tokens: Path, out: Path, request: Request, device: torch.device
) -> tuple[PtqResult, dict[str, Any]]:
    """Return result and runtime of one quantization, finished earlier or now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    done = (out / "ptq.json").exists()
    result = load_result(out / "ptq.json") if done else quantize_checkpoint(run, tokens, out, request, device)
    return result, json.loads((out / "runtime.json").read_text())


def compare(args: argparse.Namespace) -> None:
    """Measure as many jobs as time allows; write tables and figures."""
    deadline = time.monotonic() + 60 * args.minutes
    chosen = [job for job in jobs(args.runs, args.bits, args.seeds) if not args.only or job.name in args.only]
    work = partial(
        measure,
        tokens=args.tokens,
        work=args.work or args.out / "work",
        device=args.device,
        validation_tokens=args.validation_tokens,
    )
    rows: list[dict[str, Any]] = []
    maps: dict[str, Any] = {}
    problems: list[str] = []
    pool = multiprocessing.get_context("spawn").Pool(args.processes, _prepare, (args.threads,))
    try:
        found = pool.imap_unordered(work, chosen)
        for _ in chosen:
            row = found.next(timeout=max(0.0, deadline - time.monotonic()))
            take(row, rows, maps, problems)
    except multiprocessing.TimeoutError:
        problems.append(f"time limit of {args.minutes:g} minutes: {len(rows)} of {len(chosen)} jobs measured")
    finally:
        pool.terminate()
        pool.join()
    (args.out / "problems.txt").write_text("\n".join(problems) + "\n")
    if rows:
        write_tables(rows, maps, args.out)
        print((args.out / "table.md").read_text())
    print("\n".join(problems))


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)


def take(row: dict[str, Any], rows: list[dict[str, Any]], maps: dict[str, Any], problems: list[str]) -> None:
    """Keep a measured row, its bit map apart, or its problem."""
    where = f"{row['checkpoint']}  {row['name']:26} R={row['asked']:<4g} seed {row['seed']}"
    if "problem" in row:
        problems.append(f"{where}: {row['problem']}")
        return
    depths = row.pop("bit_map")
    if row["seed"] == 0:
        maps[f"{row['checkpoint']}|{row['name']}|{row['asked']:g}"] = depths
    rows.append(row)
    print(f"{where}  {row['bits_per_weight']:.4f} bits  {row['increase']:+.4f}  {row['seconds']:.1f} s", flush=True)


def speed(args: argparse.Namespace) -> None:
    """Time cvxq and gptq (or the methods of --only) on random weights, one after the other."""
    rows = []
    for size in args.sizes:
        run = random_run(args.out / "random" / size, size)
        store = random_store(args.out / "random" / "tokens")
        for name in args.only or ("cvxq", "gptq"):
            out = args.out / "random" / f"{size}-{name}-{time.time_ns()}"
            changes = {} if args.sequences is None else {"sequences": args.sequences}
            request = Request(get_method(name, **changes), Target(bits=3.0))
            begin = time.process_time()
            _, runtime = quantized(run, store, out, request, torch.device(args.device))
            cpu = time.process_time() - begin
            peak = runtime["peak_device_memory_bytes"] or runtime["peak_memory_bytes"]
            (out / "packed.safetensors").unlink()
            rows.append({"size": size, "method": name, **runtime["seconds"], "cpu": cpu, "peak_gib": peak / 2**30,
                         "host_gib": runtime["peak_memory_bytes"] / 2**30, "device": runtime["device"]})  # fmt: skip
            print(rows[-1], flush=True)
            pd.DataFrame(rows).to_csv(args.out / "speed.csv", index=False)


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "peers", "speed"])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where results are kept from call to call (default: OUT/work)")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop handing out results after so long")
    parser.add_argument("--processes", type=int, default=1, help="quantizations at a time, sharing the device")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    parser.add_argument("--bits", type=float, nargs="+", default=[2.1, 2.5, 3.0, 3.5, 4.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["100M"])
    parser.add_argument("--sequences", type=int, help="calibration sequences per round in `speed`")
    parser.add_argument("--iterations", type=int, default=200, help="AutoRound's iterations in `peers`")
    parser.add_argument("--validation-tokens", type=int)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the methods (or allocators)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO if args.what == "speed" else logging.WARNING, format="%(asctime)s %(message)s"
    )
    if args.what == "speed":
        speed(args)
    elif args.what == "peers":
        from ptq_peers import peers

        peers(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
