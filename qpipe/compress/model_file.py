"""A trained model as one file of packed bits, and back.

The file is safetensors. Each compressed layer NAME has its packed parts as `NAME.codes`, `NAME.scales`, ... (see
`qpipe.compress.packing`); every other tensor is stored as it is, once. The header's metadata holds, as JSON under
`qpipe`, the representation, the layers' shapes and whatever description the caller adds.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from qpipe.compress.linear import CompressedLinear
from qpipe.compress.packing import packed_bits
from qpipe.errors import QpipeError
from qpipe.files import replacing
from qpipe.formats import from_canonical, storage_bits

VERSION = 1
_KEY = "qpipe"


class PackedSize(NamedTuple):
    """What packing made of the compressed layers."""

    weights: int
    """Weights in compressed layers."""
    stored_bits: int
    """Bits of their packed tensors."""
    computed_bits: float
    """Bits that `storage_bits` counts for them; a code book is shared by all layers and not stored."""


class PackedModel(NamedTuple):
    """A packed file, read back."""

    state: dict[str, Tensor]
    """Dense state: packed layers as dequantized float32 weights under `NAME.weight`, everything else as stored."""
    description: dict[str, Any]


def save_packed(model: nn.Module, path: Path, description: Mapping[str, Any]) -> PackedSize:
    """Write `model` to `path`; layers that keep 16-bit weights are stored as they are.

    Raises
    ------
    QpipeError
        No layer of the model has compressed weights, or a weight is not finite.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, CompressedLinear) and layer.representation.weights is not None
    }
    if not layers:
        raise QpipeError("no layer of this model has compressed weights: there is nothing to pack")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if not bool(torch.isfinite(layer.weight).all()):
            raise QpipeError(f"layer {name} has weights that are not finite; a diverged run cannot be exported")
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in layer.pack().items()}
    size = _size(layers, tensors)
    replaced = {f"{name}.{own}" for name, layer in layers.items() for own in ("weight", "weight_scale")}
    rest, aliases = _without_aliases({k: v for k, v in model.state_dict().items() if k not in replaced})
    header = {
        "version": VERSION,
        "representation": next(iter(layers.values())).representation.canonical(),
        "layers": {name: [layer.out_features, layer.in_features] for name, layer in layers.items()},
        "aliases": aliases,
        "description": dict(description),
    }
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors | rest, temporary, {_KEY: json.dumps(header)})
    return size


def _size(layers: Mapping[str, CompressedLinear], tensors: Mapping[str, Tensor]) -> PackedSize:
    weights, computed = 0, 0.0
    for layer in layers.values():
        count = layer.in_features * layer.out_features
        storage = storage_bits(layer.representation, layer.in_features, layer.out_features)
        weights += count
        computed += (storage.total_bits - storage.codebook_bits) * count
    return PackedSize(weights, packed_bits(tensors), computed)


def _without_aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by their first name, and the names of those that share the memory of another (tied embeddings)."""
    first: dict[int, str] = {}
    aliases = {name: first[t.data_ptr()] for name, t in state.items() if first.setdefault(t.data_ptr(), name) != name}
    return {name: t.detach().cpu().contiguous() for name, t in state.items() if name not in aliases}, aliases


def read_packed(path: Path) -> PackedModel:
    """Read a packed file.

    Raises
    ------
    QpipeError
        Not a packed file, or one of a newer version.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise QpipeError(f"{path} is no packed model ({error}); write one with qpipe export") from None
    if not isinstance(header, dict) or header.get("version") != VERSION or "layers" not in header:
        raise QpipeError(f"{path} is no packed model of version {VERSION}; write one with qpipe export")
    representation = from_canonical(header["representation"])
    for name, (out_features, in_features) in header["layers"].items():
        layer = CompressedLinear(in_features, out_features, representation, device="meta")
        kept = {f"{name}.activation_scale", f"{name}.bias"}  # of the layer, and not of its packed weight
        parts = [key for key in tensors if key.rpartition(".")[0] == name and key not in kept]
        tensors[f"{name}.weight"] = layer.unpack({key.rpartition(".")[2]: tensors.pop(key) for key in parts})
    tensors |= {alias: tensors[name] for alias, name in header["aliases"].items()}
    return PackedModel(tensors, header["description"])
