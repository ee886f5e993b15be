"""Maintained tools on the same checkpoints and text: torchao's weight-only integers, Hugging Face's GPTQ tools.

Peers are measured by qpipe's own evaluation, on the same windows, at the bits that they store: codes and float16
scales of groups of 128, or of the largest divisor of the layers' widths below it (torchao keeps int8 containers; what
counts here is what a packer would need).
"""

import argparse
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from qpipe.corpus.store import TokenStore
from qpipe.ptq.network import Network, load_network
from qpipe.ptq.quantize import Request, quantize_checkpoint
from qpipe.ptq.result import Target
from qpipe.ptq.text import choose_text
from qpipe.ptq_methods import get_method

BITS = (2, 3, 4)


def peers(args: argparse.Namespace) -> None:
    """Measure torchao, and qpipe's methods at the same total bits; write peers.csv."""
    rows: list[dict[str, Any]] = []
    for run in args.runs:
        for bits in BITS:
            network, _ = load_network(run, torch.device(args.device))
            text = choose_text(TokenStore.open(args.tokens), network, 1, 0)
            windows = text.evaluation_windows(args.validation_tokens)
            dense = text.evaluate(network, windows)
            begin = time.monotonic()
            group = torchao_integers(network, bits)
            seconds = time.monotonic() - begin
            loss, total = text.evaluate(network, windows), bits + 16 / group
            row = {"checkpoint": run.name, "name": f"torchao int{bits}, groups of {group}", "bits_per_weight": total}
            rows.append({**row, "loss": loss, "increase": loss - dense, "seconds": seconds})
            rows += [ours(args, run, name, total) for name in ("rtn", "gptq", "cvxq")]
            for found in rows[-4:]:
                print(found, flush=True)
            pd.DataFrame(rows).to_csv(args.out / "peers.csv", index=False)


def torchao_integers(network: Network, bits: int) -> int:
    """Quantize all linear layers inside the blocks with torchao; return the weights per scale."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    linears = network.linears().values()
    group = int(np.gcd.reduce([128, *(linear.in_features for linear in linears)]))
    inside = {id(linear) for linear in linears}

    def chosen(module: nn.Module, name: str) -> bool:
        return id(module) in inside

    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group))
    quantize_(network.model, config, filter_fn=chosen)
    return group


def ours(args: argparse.Namespace, run: Any, name: str, bits: float) -> dict[str, Any]:
    """Quantize the same checkpoint with one of qpipe's methods to the same total bits."""
    out = args.out / "peers-work" / f"{run.name}-{name}-{bits:g}"
    begin = time.monotonic()
    request = Request(get_method(name), Target(bits=bits), 0, args.validation_tokens)
    result = quantize_checkpoint(run, args.tokens, out, request, torch.device(args.device))
    assert result.loss is not None
    assert result.dense_loss is not None
    row = {"checkpoint": run.name, "name": f"qpipe {name}", "bits_per_weight": result.bits_per_weight}
    rise = result.loss - result.dense_loss
    return {**row, "loss": result.loss, "increase": rise, "seconds": time.monotonic() - begin}
