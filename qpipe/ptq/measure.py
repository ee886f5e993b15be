"""What is said about a quantized checkpoint, measured on the packed file after reading it back."""

import math

import torch
from torch import Tensor

from qpipe.ptq.layer import Bits, QuantizedLayer
from qpipe.ptq.linearity import divergence
from qpipe.ptq.network import Network
from qpipe.ptq.result import LayerResult
from qpipe.ptq.text import Text


def measure_losses(stored: Network, dense: Network, text: Text, tokens: int | None) -> dict[str, float | int]:
    """Return `loss`, `dense_loss` and `validation_tokens` on the validation split, `selection_loss` and `perplexity`.

    Parameters
    ----------
    stored
        The packed file, read back.
    dense
        The network with its dense weights.
    text
        Where validation and selection windows come from.
    tokens
        About how many validation tokens; None for all.
    """
    windows = text.evaluation_windows(tokens)
    loss = text.evaluate(stored, windows)
    return {
        "loss": loss,
        "dense_loss": text.evaluate(dense, windows),
        "validation_tokens": windows.tokens,
        "selection_loss": text.selection(stored),
        "perplexity": math.exp(min(loss, 700.0)),
    }


@torch.no_grad()
def measure_distortion(stored: Network, dense: Network, text: Text, probe: str) -> float:
    """Return the error per token of the probed output on held-out text, in the unit of the prediction.

    Probe `hidden`: squared distance of the hidden states. Probe `loss`: twice the divergence of the predictions, which
    for small errors is the Fisher-weighted square that was predicted.
    """
    total = tokens = 0.0
    for batch in text.selection_batches():
        with dense.arithmetic():
            reference, other = (network.hidden(batch).flatten(0, 1) for network in (dense, stored))
        total += (
            _squares(reference, other) if probe == "hidden" else 2 * len(other) * divergence(dense, reference, other)
        )
        tokens += len(other)
    return total / tokens


def _squares(reference: Tensor, other: Tensor) -> float:
    return float((reference.double() - other.double()).square().sum())


def total_bits(layers: dict[str, QuantizedLayer]) -> Bits:
    """Return the stored bits of all layers."""
    return sum((layer.bits() for layer in layers.values()), Bits())


def zero_bit_share(layers: dict[str, QuantizedLayer]) -> float:
    """Return the share of weights in groups of 0 bits."""
    zero = sum(int((layer.depth == 0).sum()) * layer.layout.size for layer in layers.values())
    return zero / total_bits(layers).weights


def describe_layer(layer: QuantizedLayer, exact: Tensor) -> LayerResult:
    """Return the bit map and the error of a layer."""
    shares = torch.bincount(layer.depth.cpu(), minlength=9).double() / layer.layout.groups
    error = (layer.dense() - exact).double().square().sum() / exact.double().square().sum()
    return LayerResult(
        weights=exact.numel(),
        mean_depth=float(layer.depth.double().mean()),
        depth_shares=[float(share) for share in shares],
        relative_error=float(error),
        group=[layer.layout.rows, layer.layout.columns],
    )
