"""How far finetuning moved the weights: relative L1 change of each matrix, latent and quantized.

Per run the least, median and largest ||W - W0||_1 / ||W0||_1 over the blocks' matrices, of the trained (latent)
weights, of the quantized weights that the model computes with, and of rounding alone, before any step.

example:
  qpipe changes results/transition/runs/*finished* --out changes/
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="output folders of finetuned runs")
    parser.add_argument("--parent", type=Path, metavar="DIR", help="where they started (default: beside each run)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write changes.json and a figure here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print one line per run."""
    from qpipe.files import write_text
    from qpipe.train.change import weight_changes

    rows = []
    for folder in args.runs:
        one, changes = weight_changes(folder, args.parent)
        matrices = {change.matrix: [change.latent, change.quantized, change.rounding] for change in changes}
        rows.append({"run": one.id, "representation": one.representation_name, "matrices": matrices})
    if args.out:
        from qpipe.report.finetune_figures import change_chart
        from qpipe.report.static import save

        write_text(args.out / "changes.json", json.dumps(rows, indent=1) + "\n")
        save(change_chart(rows), args.out)
    print(json.dumps(rows, indent=1) if args.json else _text(rows))
    return 0


def _text(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["run"]) for row in rows)
    kinds = ("latent", "quantized", "rounding")
    lines = [f"{'run':<{width}}  " + "  ".join(f"{kind:<22}" for kind in kinds)]
    for row in rows:
        columns = zip(*row["matrices"].values(), strict=True)
        cells = [f"{min(c):.3f} {statistics.median(c):.3f} {max(c):.3f}" for c in columns]
        lines.append(f"{row['run']:<{width}}  " + "  ".join(f"{cell:<22}" for cell in cells))
    return "\n".join([*lines, "least, median and largest relative L1 change over matrices"])
