"""Post-training quantization measured: methods at equal total bits, an ablation of allocators, and speed.

    python benchmarks/ptq.py compare RUN... --tokens TOKENS --out DIR          loss against bits for every method
    python benchmarks/ptq.py ablation RUN... --tokens TOKENS --out DIR         allocators on identical quantizers
    python benchmarks/ptq.py peers RUN... --tokens TOKENS --out DIR            torchao on the same models
    python benchmarks/ptq.py speed --sizes 100M 1B --out DIR                   time and memory, random weights

RUN is the folder of a finished dense run (or a transformers model with a token store of its own tokenizer). Every
result is kept in DIR; a second call goes on where the first stopped. DIR/results.csv has one row per result,
DIR/table.md the loss increase by method and bits (mean over seeds, +- standard deviation), DIR/*.png the
rate-distortion curves and the bit map of the layers. Baselines appear in several group sizes: compare with the best.
"""

import argparse
import hashlib
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qpipe.corpus.store import FORMAT, FORMAT_VERSION, TokenStore, content_digest, token_dtype  # noqa: E402
from qpipe.corpus.writer import SplitWriter, partial_store, publish  # noqa: E402
from qpipe.model import Decoder  # noqa: E402
from qpipe.ptq.methods import get_method  # noqa: E402
from qpipe.ptq.network import load_network  # noqa: E402
from qpipe.ptq.quantize import Request, quantize_checkpoint  # noqa: E402
from qpipe.ptq.result import PtqResult, Target, load_result  # noqa: E402
from qpipe.ptq.text import choose_text  # noqa: E402
from qpipe.recipe import QUEST, ModelShape  # noqa: E402
from qpipe.record import Record  # noqa: E402
from qpipe.runs import Run  # noqa: E402
from qpipe.train.results import file_digest, weights  # noqa: E402

COMPARED: dict[str, tuple[str, dict[str, Any]]] = {
    "cvxq": ("cvxq", {}),
    "cvxq, no feedback": ("cvxq", {"feedback": False}),
    "cvxq, no feedback, bias": ("cvxq", {"feedback": False, "bias_correction": True}),
    "cvxq, loss probe": ("cvxq", {"probe": "loss"}),
    "gptq, groups of 128": ("gptq", {}),
    "gptq, rows": ("gptq", {"columns": 0}),
    "gptq, rows, lloyd-max": ("gptq", {"columns": 0, "codebook": "lloyd-max"}),
    "rtn, groups of 128": ("rtn", {}),
    "rtn, rows": ("rtn", {"columns": 0}),
    "higgs": ("higgs", {}),
}
ALLOCATORS = ("uniform", "variance", "closed-form", "table", "measured", "exact")
SHAPES = {
    "30M": QUEST.shape("30M", 32000),
    "100M": QUEST.shape("100M", 32000),
    "800M": QUEST.shape("800M", 32000),
    "1B": ModelShape(layers=20, width=2048, heads=16, kv_heads=16, feed_forward=5632, vocab_size=32000, context=2048),
}


def measure(
    name: str, method: str, changes: dict[str, Any], run: Path, args: argparse.Namespace, bits: float, seed: int
) -> tuple[PtqResult, dict[str, Any]]:
    """Quantize one checkpoint, or read what an earlier call found; return the result and its runtime."""
    key = hashlib.sha256(json.dumps([method, changes, str(run.resolve()), bits, seed]).encode()).hexdigest()[:12]
    out = args.out / "work" / key
    request = Request(get_method(method, **changes), Target(bits=bits), seed, args.validation_tokens)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    done = (out / "ptq.json").exists()
    result = load_result(out / "ptq.json") if done else quantize_checkpoint(run, args.tokens, out, request, device)
    (out / "packed.safetensors").unlink(missing_ok=True)  # results are kept, models are not
    rise = float("nan") if result.loss is None or result.dense_loss is None else result.loss - result.dense_loss
    print(f"{run.name}  {name:26} R={bits:<4g} seed {seed}  {result.bits_per_weight:.4f} bits  {rise:+.4f}", flush=True)
    return result, json.loads((out / "runtime.json").read_text())


def sweep(args: argparse.Namespace, variants: dict[str, tuple[str, dict[str, Any]]], key: str) -> None:
    """Measure all variants at all bits and seeds; write table and figures."""
    rows, maps = [], {}
    for run in args.runs:
        for bits in args.bits:
            for name, (method, changes) in variants.items():
                for seed in range(args.seeds):
                    result, runtime = measure(name, method, changes, run, args, bits, seed)
                    rows.append(describe(result, runtime) | {key: name, "asked": bits, "checkpoint": run.name})
                    maps[run.name, name, bits] = result
    table = pd.DataFrame(rows)
    table.to_csv(args.out / "results.csv", index=False)
    (args.out / "table.md").write_text(markdown(table, key), encoding="utf-8")
    draw_curves(table, key, args.out / "rate-distortion.png")
    for run in args.runs:
        draw_bit_map(maps, run.name, next(iter(variants)), args.out / f"bit-map-{run.name}.png")
    print((args.out / "table.md").read_text())


def describe(result: PtqResult, runtime: dict[str, Any]) -> dict[str, Any]:
    fields = ("bits_per_weight", "payload_bits", "loss", "dense_loss", "perplexity", "zero_bit_share", "allocation_gap",
              "partition_gain", "predicted_distortion", "measured_distortion", "seed", "file_bytes")  # fmt: skip
    row = {field: getattr(result, field) for field in fields}
    record = result.record
    row |= {"n": record.n if record else None, "d": record.d if record else None}
    row |= {"increase": (result.loss or np.nan) - (result.dense_loss or np.nan), "seconds": runtime["seconds"]["all"]}
    peak = runtime["peak_device_memory_bytes"] or runtime["peak_memory_bytes"]
    return row | {"peak_gib": peak / 2**30, "device": runtime["device"]}


def markdown(table: pd.DataFrame, key: str) -> str:
    """Return the loss increase (nats/token) by variant and bits, one table per checkpoint, bits as reached."""
    parts = []
    for checkpoint, found in table.groupby("checkpoint"):
        dense = found["dense_loss"].iloc[0]
        asked = sorted(found["asked"].unique())
        parts += [f"\n{checkpoint}: dense loss {dense:.4f} nats/token; increase at R total bits per weight\n"]
        parts += [f"| {key} | " + " | ".join(f"{bits:g}" for bits in asked) + " | seconds | peak GiB |"]
        parts += ["|" + "---|" * (len(asked) + 3)]
        for name, rows in found.groupby(key, sort=False):
            cells = [cell(rows[rows["asked"] == bits]) for bits in asked]
            means = rows[["seconds", "peak_gib"]].mean()
            parts += [f"| {name} | " + " | ".join(cells) + f" | {means['seconds']:.0f} | {means['peak_gib']:.1f} |"]
    return "\n".join(parts) + "\n"


def cell(rows: pd.DataFrame) -> str:
    spread = f" ± {rows['increase'].std():.4f}" if len(rows) > 1 else ""
    return f"{rows['increase'].mean():.4f}{spread} ({rows['bits_per_weight'].mean():.3f})"


def draw_curves(table: pd.DataFrame, key: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    names = list(table["checkpoint"].unique())
    figure, axes = plt.subplots(1, len(names), figsize=(5.5 * len(names), 4.2), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for variant, rows in table[table["checkpoint"] == name].groupby(key, sort=False):
            mean = rows.groupby("asked")[["bits_per_weight", "increase"]].mean()
            axis.plot(mean["bits_per_weight"], mean["increase"], marker="o", label=variant)
        axis.set(yscale="log", xlabel="total bits per weight", ylabel="loss increase (nats/token)", title=name)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_bit_map(maps: dict[tuple[str, str, float], PtqResult], run: str, variant: str, path: Path) -> None:
    """Draw the share of each layer's weights at each depth, one panel per rate."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    found = {bits: result for (name, kind, bits), result in maps.items() if (name, kind) == (run, variant)}
    figure, axes = plt.subplots(1, len(found), figsize=(3.2 * len(found), 6), sharey=True, squeeze=False)
    for axis, (bits, result) in zip(axes[0], sorted(found.items()), strict=True):
        layers = list(result.layers)
        shares = np.array([result.layers[name].depth_shares for name in layers])
        left = np.zeros(len(layers))
        for depth in range(9):
            color = plt.colormaps["viridis"](depth / 8)
            axis.barh(range(len(layers)), shares[:, depth], left=left, label=f"{depth} bits", color=color)
            left += shares[:, depth]
        axis.set(title=f"R = {bits:g}", xlabel="share of weights", xlim=(0, 1))
        axis.set_yticks(range(len(layers)), [name.removeprefix("blocks.") for name in layers], fontsize=5)
        axis.invert_yaxis()
    axes[0][-1].legend(fontsize=6, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def peers(args: argparse.Namespace) -> None:
    """torchao's weight-only integers on the same model and text: whole bits, groups of 128 or the largest that fits."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    rows = []
    for run in args.runs:
        for bits in (2, 3, 4):
            network, _ = load_network(run, torch.device(args.device))
            text = choose_text(TokenStore.open(args.tokens), network, 1, 0)
            windows = text.evaluation_windows(args.validation_tokens)
            dense = text.evaluate(network, windows)
            group = int(np.gcd.reduce([128, *(linear.in_features for linear in network.linears().values())]))
            inside = {id(linear) for linear in network.linears().values()}
            config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group))
            begin = time.monotonic()
            quantize_(network.model, config, filter_fn=lambda module, name, inside=inside: id(module) in inside)
            seconds = time.monotonic() - begin
            loss = text.evaluate(network, windows)
            rows.append({"checkpoint": run.name, "peer": f"torchao int{bits}, groups of {group}", "seconds": seconds,
                         "bits_per_weight": bits + 16 / group, "loss": loss, "increase": loss - dense})  # fmt: skip
            print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(args.out / "peers.csv", index=False)


def speed(args: argparse.Namespace) -> None:
    """Time cvxq and gptq on random weights."""
    rows = []
    for size in args.sizes:
        run = random_run(args.out / "random" / size, size)
        args.tokens = random_store(args.out / "random" / "tokens")
        for name in ("cvxq", "gptq"):
            _, runtime = measure(f"{size} {name}", name, {}, run, args, 3.0, int(time.time()))
            peak = runtime["peak_device_memory_bytes"] or runtime["peak_memory_bytes"]
            rows.append({"size": size, "method": name, **runtime["seconds"], "peak_gib": peak / 2**30})
            print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(args.out / "speed.csv", index=False)


def random_run(folder: Path, size: str) -> Path:
    """Save a decoder as training leaves one, with initial weights."""
    import safetensors.torch

    shape = SHAPES[size]
    run = Run(size=size, representation_name="dense", tokens_per_parameter=1, shape=shape, steps=1, seed=0, corpus="0",
              training=QUEST.training("800M"), representation={})  # fmt: skip
    if not (folder / "record.json").exists():
        model = Decoder(shape, run.format_spec)
        model.initialize(0)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(weights(model), folder / "model.safetensors")
        count, total = run.parameters, run.bits_per_weight()[1]
        Record(id=run.id, status="ok", loss=1.0, bits_per_byte=None, train_loss=None, validation_tokens=1, steps=1,
               n=count.non_embedding, n_compressed=0, n_embedding=count.embedding, d=run.tokens, flops=run.flops,
               bits_per_weight=total, payload_bits=total, tokens_digest="0", run=run,
               weights_digest=file_digest(folder / "model.safetensors")).write(folder / "record.json")  # fmt: skip
    return folder


def random_store(folder: Path) -> Path:
    """Write a token store of random ids."""
    if (folder / "manifest.json").exists():
        return folder
    generator = np.random.default_rng(0)
    with partial_store(folder) as partial:
        splits = {}
        for name, count in (("train", 1_000_000), ("validation", 20_000)):
            writer = SplitWriter(partial, name, 2_000_000)
            writer.append(generator.integers(0, 32000, count).astype(token_dtype(32000)), 1, 4 * count)
            writer.close()
            splits[name] = writer.describe()
        manifest = {"format": FORMAT, "version": FORMAT_VERSION, "dtype": token_dtype(32000).str, "vocab_size": 32000,
                    "eos": 0, "tokenizer": {"sha256": hashlib.sha256(b"{}").hexdigest()}, "splits": splits}  # fmt: skip
        publish(partial, folder, "{}", {**manifest, "digest": content_digest(manifest)})
    return folder


def main() -> None:
    """Run one of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "ablation", "peers", "speed"])
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=float, nargs="+", default=[2.1, 2.5, 3.0, 3.5, 4.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=["100M"])
    parser.add_argument("--validation-tokens", type=int)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the compared methods")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "speed":
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        speed(args)
    elif args.what == "peers":
        peers(args)
    elif args.what == "compare":
        sweep(args, {name: COMPARED[name] for name in args.only or COMPARED}, "method")
    else:
        same = {"clustered": False, "feedback": False}
        sweep(args, {name: ("cvxq", {**same, "allocation": name}) for name in args.only or ALLOCATORS}, "allocator")


if __name__ == "__main__":
    main()
