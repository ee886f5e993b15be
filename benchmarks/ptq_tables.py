"""Tables and figures of `benchmarks/ptq.py`, made from its rows alone: drawn again without quantizing again."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from qpipe.ptq.result import PtqResult

FIELDS = ("bits_per_weight", "payload_bits", "loss", "dense_loss", "perplexity", "validation_tokens", "zero_bit_share",
          "allocation_gap", "partition_gain", "predicted_distortion", "measured_distortion", "file_bytes")  # fmt: skip


def describe(result: PtqResult, runtime: dict[str, Any]) -> dict[str, Any]:
    """Return what a row of results.csv says about one quantization."""
    row: dict[str, Any] = {field: getattr(result, field) for field in FIELDS}
    record = result.record
    row |= {"n": record.n if record else None, "d": record.d if record else None, "size": record and record.run.size}
    row |= {"representation": result.label, "seed": result.seed}
    row |= {"increase": (result.loss or np.nan) - (result.dense_loss or np.nan), "seconds": runtime["seconds"]["all"]}
    peak = runtime["peak_device_memory_bytes"] or runtime["peak_memory_bytes"]
    return row | {"peak_gib": peak / 2**30, "device": runtime["device"]}


def bit_map(result: PtqResult) -> dict[str, list[float]]:
    """Return the share of each layer's weights at 0, 1, ... 8 bits."""
    return {name: [round(share, 5) for share in layer.depth_shares] for name, layer in result.layers.items()}


def write_tables(rows: Sequence[dict[str, Any]], maps: dict[str, Any], folder: Path) -> None:
    """Write results.csv, bit-maps.json, table.md and the figures of all rows so far (at most 6 files)."""
    table = pd.DataFrame(rows).sort_values(["stage", "n", "checkpoint", "asked", "name", "seed"], na_position="first")
    table.to_csv(folder / "results.csv", index=False)
    (folder / "bit-maps.json").write_text(json.dumps(maps) + "\n")
    words = []
    for stage, part in table.groupby("stage", sort=False):
        words += [f"# {stage}", markdown(part)]
        draw_curves(part, folder / f"{stage}.png")
    (folder / "table.md").write_text("\n".join(words), encoding="utf-8")
    draw_bit_map(maps, folder / "bit-map.png")


def markdown(table: pd.DataFrame) -> str:
    """Return the loss increase (nats/token) by variant and bits, one table per checkpoint, bits as reached."""
    parts = []
    for checkpoint, found in table.groupby("checkpoint", sort=False):
        dense = found["dense_loss"].iloc[0]
        asked = sorted(found["asked"].unique())
        parts += [f"\n{checkpoint}: dense loss {dense:.4f} nats/token; increase at R total bits per weight\n"]
        parts += ["| | " + " | ".join(f"{bits:g}" for bits in asked) + " | seconds | peak GiB |"]
        parts += ["|" + "---|" * (len(asked) + 3)]
        for name, rows in found.groupby("name", sort=False):
            cells = [cell(rows[rows["asked"] == bits]) for bits in asked]
            means = rows[["seconds", "peak_gib"]].mean()
            parts += [f"| {name} | " + " | ".join(cells) + f" | {means['seconds']:.0f} | {means['peak_gib']:.1f} |"]
        parts += ["", *comparison(found)]
    return "\n".join(parts) + "\n"


def cell(rows: pd.DataFrame) -> str:
    """Return mean +- standard deviation over seeds (bits as reached)."""
    if rows.empty:
        return ""
    spread = f" ± {rows['increase'].std():.4f}" if len(rows) > 1 else ""
    return f"{rows['increase'].mean():.4f}{spread} ({rows['bits_per_weight'].mean():.3f})"


def comparison(table: pd.DataFrame) -> list[str]:
    """Say at which rates `cvxq` beats every rtn and gptq, and where not."""
    mean = table.groupby(["asked", "name"])["increase"].mean().unstack()
    rivals = [name for name in mean if name.startswith(("rtn", "gptq"))]
    if "cvxq" not in mean or not rivals:
        return []
    known = mean.dropna(subset=["cvxq"])
    best, names = known[rivals].min(axis=1), known[rivals].idxmin(axis=1)
    lost = [
        f"R = {bits:g}: {known.loc[bits, 'cvxq']:.4f} against {best[bits]:.4f} of {names[bits]}"
        for bits in known.index
        if known.loc[bits, "cvxq"] > best[bits]
    ]
    won = len(known) - len(lost)
    return [f"cvxq is no worse than the best rtn or gptq at {won} of {len(known)} rates.", *lost]


def draw_curves(table: pd.DataFrame, path: Path) -> None:
    """Draw rate-distortion curves: loss increase against total bits, one panel per checkpoint."""
    plt = _pyplot()
    names = list(table["checkpoint"].unique())
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        for variant, rows in table[table["checkpoint"] == name].groupby("name", sort=False):
            mean = rows.groupby("asked")[["bits_per_weight", "increase"]].mean()
            axis.plot(mean["bits_per_weight"], mean["increase"], marker="o", markersize=3, label=variant)
        axis.set(yscale="log", xlabel="total bits per weight", ylabel="loss increase (nats/token)", title=name)
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_bit_map(maps: dict[str, Any], path: Path) -> None:
    """Draw the share of each layer's weights at each depth for cvxq, a row per checkpoint, a panel per rate."""
    plt = _pyplot()
    found = {tuple(key.split("|")): value for key, value in maps.items()}
    runs = list(dict.fromkeys(run for run, name, _ in found if name == "cvxq"))
    if not runs:
        return
    rates = sorted({float(bits) for _, name, bits in found if name == "cvxq"})
    heights = [max(len(layers) for (name, *_), layers in found.items() if name == run) for run in runs]
    size = (2.2 * len(rates), 0.6 + 0.11 * sum(heights) + 0.5 * len(runs))
    shape = {"sharey": "row", "squeeze": False, "height_ratios": heights}
    figure, axes = plt.subplots(len(runs), len(rates), figsize=size, **shape)
    for row, run in zip(axes, runs, strict=True):
        for axis, bits in zip(row, rates, strict=True):
            if (layers := found.get((run, "cvxq", f"{bits:g}"))) is not None:
                _draw_layers(plt, axis, layers)
            axis.set_title(f"{run.split('-')[0]}, R = {bits:g}", fontsize=8)
            axis.set_xlim(0, 1)
    axes[0][-1].legend(fontsize=6, loc="lower right")
    figure.supxlabel("share of weights")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_layers(plt: Any, axis: Any, layers: dict[str, list[float]]) -> None:
    shares = np.array(list(layers.values()))
    left = np.zeros(len(layers))
    for depth in range(9):
        color = plt.colormaps["viridis"](depth / 8)
        axis.barh(range(len(layers)), shares[:, depth], left=left, label=f"{depth} bits", color=color)
        left += shares[:, depth]
    axis.set_yticks(range(len(layers)), [name.removeprefix("blocks.") for name in layers], fontsize=4)
    axis.set_ylim(len(layers) - 0.5, -0.5)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    return pyplot
