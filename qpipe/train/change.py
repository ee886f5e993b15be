"""How far finetuning moved the weights: relative L1 change per matrix, ||W - W0||_1 / ||W0||_1.

W0 are the dense weights that finetuning began with. W is the latent weight that is trained, or the quantized weight
that the model computes with. ParetoQ (2502.02631, figure 4) reads "compensation" from small changes at 3 bits and more,
"reconstruction" from large ones below, and does not say which of the two it measured; so both are given. The quantized
change has a floor that has nothing to do with training: rounding alone moves weights by it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qpipe.compress import CompressedLinear
from qpipe.errors import QpipeError
from qpipe.formats import Representation
from qpipe.huggingface import dequantized, llama_parts, load_decoder
from qpipe.model import Decoder
from qpipe.runs import Run
from qpipe.train.evaluate import load_model
from qpipe.train.start import parent_folder, take_weights


@dataclass(frozen=True)
class Change:
    """Changes of one matrix."""

    matrix: str
    """name in a Llama checkpoint, e.g. model.layers.0.mlp.down_proj.weight"""
    latent: float
    """of the trained weight"""
    quantized: float
    """of the weight that the model computes with"""
    rounding: float
    """that rounding the initial weights alone makes"""


def weight_changes(out: Path, start: Path | None = None) -> tuple[Run, list[Change]]:
    """Return a finetuned run and the changes of its blocks' matrices, in order.

    Parameters
    ----------
    out
        Output folder of the run.
    start
        Folder of its parent or checkpoint; a parent is found beside `out`.

    Raises
    ------
    QpipeError
        The run did not start from other weights, or these are missing or others.
    """
    model, record = load_model(out)
    run = record.run
    if run.checkpoint is not None:
        if start is None:
            raise QpipeError(f"run {run.id} starts from a model trained elsewhere; name its folder with --parent")
        before = load_decoder(start, run.shape)
    elif run.parent is not None:
        before, _ = load_model(parent_folder(run, out, start))
    else:
        raise QpipeError(f"run {run.id} starts from random weights; give a finetuned run")
    rounded = Decoder(run.shape, run.format_spec)
    take_weights(rounded, before)
    with torch.no_grad():
        for layer in rounded.modules():
            if isinstance(layer, CompressedLinear):
                layer(torch.zeros(1, layer.in_features))  # trained scales take their first values
    reference = llama_parts(before)
    found = [llama_parts(m) for m in (_latent(model), dequantized(model), dequantized(rounded))]
    names = [name for name in reference if name.startswith("model.layers.") and name.endswith("proj.weight")]
    return run, [Change(name, *(_relative(parts[name], reference[name]) for parts in found)) for name in names]


def _latent(model: Decoder) -> Decoder:
    dense = Decoder(model.shape, Representation(name="dense"))
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("_scale")})
    return dense


def _relative(weight: Tensor, reference: Tensor) -> float:
    difference = (weight.double() - reference.double()).abs().sum()
    return float(difference / reference.double().abs().sum())
