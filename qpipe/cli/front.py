"""The front of loss against size: which models no smaller one beats, and in how many draws of the noise.

Sizes count what the weights need: linear layers at their stored bits (scales and masks included), embedding and head at
--embedding-bits, norms at 16. --payload counts codes, embedding and head alone, as ParetoQ does. Noise is the spread
between seeds, so that a table needs points with two seeds or more; --bootstrap 0 shows the front of the means.

example:
  qpipe front results/demo/losses --embedding-bits 4 --payload --exclude 'd < 1e6'
"""

import argparse
import json
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("losses", nargs="+", type=Path, metavar="LOSSES", help="loss tables (Parquet, CSV or folders)")
    parser.add_argument("--embedding-bits", type=float, default=16, help="bits per weight of embedding and head (16)")
    parser.add_argument("--payload", action="store_true", help="count codes alone: no scales, masks and norms")
    parser.add_argument("--bootstrap", type=int, default=1000, help="draws of the noise (1000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (0)")
    parser.add_argument("--exclude", metavar="EXPR", help="leave rows out, e.g. 'd < 1e9'")
    parser.add_argument("--figure", type=Path, metavar="DIR", help="also draw it: DIR/front.svg and .png")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the points, smallest first, and the formats on the front."""
    from qpipe.errors import QpipeError
    from qpipe.front import front
    from qpipe.laws.expressions import matching_rows
    from qpipe.laws.table import read_losses

    if args.bootstrap < 0 or args.embedding_bits <= 0:
        raise QpipeError(f"--bootstrap {args.bootstrap} must not be negative, --embedding-bits above 0")
    table = read_losses(args.losses)
    if args.exclude:
        table = table[~matching_rows(table, args.exclude)]
    found = front(table, embedding_bits=args.embedding_bits, payload=args.payload, draws=args.bootstrap, seed=args.seed)
    result = {
        "embedding_bits": args.embedding_bits,
        "counted": "payload" if args.payload else "stored",
        "noise": found.noise if found.freedom else None,
        "freedom": found.freedom,
        "draws": args.bootstrap,
        "formats": found.formats,
        "members": found.members,
        "points": found.points.to_dict("records"),
    }
    if args.figure:
        from qpipe.report.front_figure import front_chart
        from qpipe.report.static import save

        save(front_chart(found, f"{result['counted']} bits, embedding at {args.embedding_bits:g}"), args.figure)
    print(json.dumps(result, indent=1) if args.json else _text(result))
    return 0


def _text(result: dict[str, Any]) -> str:
    width = max(len(str(point["representation"])) for point in result["points"])
    lines = [f"{'representation':<{width}} {'N':>13} {'D':>15} {'runs':>4} {'MiB':>10} {'loss':>8}  on the front"]
    lines += [
        f"{point['representation']:<{width}} {point['n']:>13,.0f} {point['d']:>15,.0f} {point['runs']:>4} "
        f"{point['size_mib']:>10.4g} {point['loss']:>8.4f}  {'*' if point['on_front'] else ' '} {point['share']:.0%}"
        for point in result["points"]
    ]
    noise = "" if result["noise"] is None else f"; noise {result['noise']:.2g} nats, {result['freedom']} degrees"
    lines.append(f"{result['counted']} bits, embedding at {result['embedding_bits']:g}, {result['draws']} draws{noise}")
    lines.append(f"on the front in 90 % of them or more: {', '.join(result['members']) or 'none'}")
    return "\n".join(lines)
