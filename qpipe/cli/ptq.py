"""Quantize a dense checkpoint after training, to any average number of bits per weight.

CHECKPOINT is the folder of a finished dense run, or a folder that transformers saved with a Llama- or OPT-type model.
The average is asked for in one of three ways: --bits (with scales, offsets, depths and biases counted; --payload-only
counts codes alone), --size (of the whole file) or --max-loss-increase (nats/token on held-out calibration text).

methods:
  cvxq    bits per group by convex allocation on measured distortion and gradient second moments (2409.02026)
  gptq    the same depth everywhere, error feedback over columns (2210.17323)
  higgs   Hadamard rotation, Gaussian-optimal levels, bits per layer by the linearity theorem (2411.17525)
  rtn     the same depth everywhere, nearest level

Writes to OUT: packed.safetensors (the model in the bits it is said to have), ptq.json (what was measured, on the file
read back), runtime.json, and with --export a folder that transformers loads. Text comes from a token store: the
training split calibrates and selects, the validation split only evaluates. Killed work goes on where it stood.

example:
  qpipe ptq results/demo/runs/n200k-d20x-dense-s0-5a1f04b1 out/ --tokens results/tokens/3d3d4d47 --bits 2.5
  qpipe ptq models/opt-125m out/ --method rtn --bits 3.5 --set columns=64
"""

import argparse
import re
from pathlib import Path
from typing import Any

from qpipe.cli.logs import logged_to_stderr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="finished dense run or transformers model")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the results")
    parser.add_argument("--method", default="cvxq", help="cvxq, gptq, higgs or rtn (default: cvxq)")
    parser.add_argument("--tokens", type=Path, metavar="TOKENS", help="token store: its folder or its manifest.json")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--bits", type=float, metavar="R", help="average bits per weight, any number")
    target.add_argument("--size", type=_bytes, metavar="SIZE", help="size of the packed file, e.g. 45MiB or 2GB")
    target.add_argument("--max-loss-increase", type=float, metavar="X", help="largest rise of the loss (nats/token)")
    parser.add_argument("--payload-only", action="store_true", help="--bits counts codes alone")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of calibration text and probes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of the method, e.g. rows=128"
    )
    parser.add_argument("--validation-tokens", type=int, metavar="K", help="evaluate about K tokens (default: all)")
    parser.add_argument("--export", action="store_true", help="also write OUT/transformers, dequantized")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Quantize and print what was found."""
    from qpipe.ptq.result import Target
    from qpipe.ptq_methods import get_method

    method = get_method(args.method, **_changes(args.set))
    with logged_to_stderr("qpipe.ptq"):
        import torch

        from qpipe.leases import leased_gpu
        from qpipe.ptq.export import export_transformers
        from qpipe.ptq.quantize import Request, quantize_checkpoint, summary

        target = Target(
            bits=args.bits, size=args.size, max_loss_increase=args.max_loss_increase, payload_only=args.payload_only
        )
        request = Request(method, target, args.seed, args.validation_tokens)
        with leased_gpu():
            device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
            result = quantize_checkpoint(args.checkpoint, args.tokens, args.out, request, device)
        if args.export:
            export_transformers(args.out, args.checkpoint)
    print(result.model_dump_json(indent=1) if args.json else summary(result))
    return 0


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]*)", text)
    if match is None or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write it like 45MiB, 2GB or 1048576")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _changes(settings: list[str]) -> dict[str, Any]:
    """Return FIELD=VALUE settings as fields; values are read as YAML."""
    import yaml

    from qpipe.errors import QpipeError

    wrong = [text for text in settings if "=" not in text]
    if wrong:
        raise QpipeError([f"--set {text}: write it as FIELD=VALUE, e.g. rows=128" for text in wrong])
    pairs = (text.split("=", 1) for text in settings)
    return {field: yaml.safe_load(value) for field, value in pairs}
