"""Maintained tools on the same checkpoints and text: torchao's weight-only integers, AutoRound with AutoScheme.

Peers are measured by qpipe's own evaluation, on the same windows, at the bits that they store: codes and a float16
scale per group of 128, or of the largest divisor of the layers' widths below it (torchao keeps int8 containers; what
counts here is what a packer would need). AutoRound (`pip install auto-round`, left out where it is missing) chooses
bits per layer for an average and learns how to round; it reads a Llama folder and calibrates on text, the text of the
same calibration windows.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from qpipe.corpus.store import TokenStore
from qpipe.ptq.export import to_llama
from qpipe.ptq.network import Network, load_network, wrap_transformers
from qpipe.ptq.quantize import Request, quantize_checkpoint
from qpipe.ptq.result import Target
from qpipe.ptq.text import Text, choose_text
from qpipe.ptq_methods import get_method

BITS = (2, 3, 4)
SEQUENCES = 64


def peers(args: argparse.Namespace) -> None:
    """Measure torchao and AutoRound, and qpipe's methods at the same total bits; write peers.csv."""
    rows: list[dict[str, Any]] = []
    for run in args.runs:
        for bits in BITS:
            network, _ = load_network(run, torch.device(args.device))
            text = choose_text(TokenStore.open(args.tokens), network, SEQUENCES, 0)
            windows = text.evaluation_windows(args.validation_tokens)
            dense = text.evaluate(network, windows)
            found = [autoround(args, network, text, bits)] if importlib.util.find_spec("auto_round") else []
            begin = time.monotonic()
            group = torchao_integers(network, bits)
            seconds = time.monotonic() - begin
            loss, total = text.evaluate(network, windows), bits + 16 / group
            row = {"checkpoint": run.name, "name": f"torchao int{bits}, groups of {group}", "bits_per_weight": total}
            found = [{**peer, "checkpoint": run.name, "increase": peer["loss"] - dense} for peer in found]
            found += [ours(args, run, "cvxq", peer["bits_per_weight"]) for peer in found]
            found.append({**row, "loss": loss, "increase": loss - dense, "seconds": seconds})
            found += [ours(args, run, name, total) for name in ("rtn", "gptq", "cvxq")]
            rows += found
            for one in found:
                print(one, flush=True)
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


def autoround(args: argparse.Namespace, network: Network, text: Text, bits: int) -> dict[str, Any]:
    """Quantize the network as a Llama with AutoRound to `bits` + 0.4 on average, groups of 64, side data counted."""
    from auto_round import AutoRound, AutoScheme
    from transformers import PreTrainedTokenizerFast

    folder = args.out / "autoround"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(args.tokens) / "tokenizer.json"))
    to_llama(network.model).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    sequences = torch.cat(text.calibration(0, SEQUENCES))
    lines = [{"text": tokenizer.decode(row.tolist())} for row in sequences]
    (folder / "calibration.json").write_text(json.dumps(lines))
    target, options = bits + 0.4, tuple(f"W{b}A16G64" for b in (2, 3, 4, 8) if b >= bits)
    begin = time.monotonic()
    # Text is shorter or longer once it is tokenized again; AutoRound drops what is shorter than its sequence length.
    model, layers = AutoRound(
        str(folder),
        scheme=AutoScheme(avg_bits=target, options=options),
        dataset=str(folder / "calibration.json"),
        seqlen=int(0.8 * sequences.shape[1]),
        nsamples=SEQUENCES,
        iters=args.iterations,
        device_map=args.device,
        enable_torch_compile=False,
    ).quantize()
    seconds = time.monotonic() - begin
    sizes = {name: module.weight.numel() for name, module in model.named_modules() if name in layers}
    stored = sum(sizes[name] * _stored(layers[name]) for name in sizes)
    windows = text.evaluation_windows(args.validation_tokens)
    loss = text.evaluate(wrap_transformers(model.float().to(args.device)), windows)
    name = f"AutoRound AutoScheme {target:g}"
    return {"name": name, "bits_per_weight": stored / sum(sizes.values()), "loss": loss, "seconds": seconds}


def _stored(layer: dict[str, Any]) -> float:
    """Bits per weight of a layer: code, float16 scale and, if it has one, zero point."""
    zero_point = 0 if layer.get("sym") else layer["bits"]
    return float(layer["bits"] + (16 + zero_point) / layer["group_size"])


def ours(args: argparse.Namespace, run: Any, name: str, bits: float) -> dict[str, Any]:
    """Quantize the same checkpoint with one of qpipe's methods to the same total bits."""
    out = args.out / "peers-work" / f"{run.name}-{name}-{bits:.4f}"
    begin = time.monotonic()
    request = Request(get_method(name), Target(bits=bits), 0, args.validation_tokens)
    result = quantize_checkpoint(run, args.tokens, out, request, torch.device(args.device))
    assert result.loss is not None
    assert result.dense_loss is not None
    row = {"checkpoint": run.name, "name": f"qpipe {name}", "bits_per_weight": result.bits_per_weight}
    rise = result.loss - result.dense_loss
    return {**row, "loss": result.loss, "increase": rise, "seconds": time.monotonic() - begin}
