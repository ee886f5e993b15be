"""The packed file: a quantized model in the bits it is said to have, as safetensors.

Per quantized layer NAME, all bit strings most significant bit first and filled up to whole bytes:

    NAME.codes     codes of all groups with 1 bit, then of all with 2 bits, ...: each in its own depth
    NAME.depths    index of each group's depth among the depths that the layer has; absent where it has one
    NAME.scales    float16, of the groups with at least 1 bit, in the order of groups
    NAME.offsets   float16, of all groups; absent where the method has none
    NAME.clusters  cluster of each row; absent where groups are runs of neighbouring rows
    NAME.bias      float16; absent where there is none

Everything else of the model (embedding, head, norms) is float16 under its own name, a tied head once. The header's
metadata says how to read it: `qpipe` holds JSON with the layers' shapes and the model's description. Levels are not
stored: a family of code books is known by its name.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qpipe.errors import QpipeError
from qpipe.files import replacing
from qpipe.formats import from_canonical
from qpipe.identity import canonical_json
from qpipe.model import Decoder
from qpipe.ptq.groups import Layout, plain_layout
from qpipe.ptq.layer import QuantizedLayer, depth_bits
from qpipe.ptq.network import Network, set_weight, wrap_decoder, wrap_transformers
from qpipe.runs import Run

VERSION = 1
_KEY = "qpipe"


@dataclass
class PackedModel:
    """Content of a packed file."""

    description: dict[str, Any]
    """what model it is: `Source.description`"""
    layers: dict[str, QuantizedLayer]
    rest: dict[str, Tensor]
    """all other tensors by name"""


def pack_layer(layer: QuantizedLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a layer, by the part of the name behind the dot, and its description."""
    distinct = layer.depth.unique().tolist()
    used = layer.depth > 0
    tensors = {"codes": _pack_codes(layer, distinct), "scales": layer.scale[used].half()}
    if len(distinct) > 1:
        tensors["depths"] = _bits(
            torch.searchsorted(torch.tensor(distinct), layer.depth.cpu()), depth_bits(len(distinct))
        )
    if layer.has_offset:
        tensors["offsets"] = layer.offset.half()
    if layer.layout.index_bits():
        tensors["clusters"] = _bits(layer.layout.cluster, (layer.layout.clusters - 1).bit_length())
    if layer.bias is not None:
        tensors["bias"] = layer.bias.half()
    described = {
        "shape": [len(layer.layout.cluster), layer.layout.width],
        "group": [layer.layout.rows, layer.layout.columns],
        "depths": distinct,
        "codebook": layer.kind,
        "rotation": layer.rotation,
        "bias_added": layer.bias_added,
    }
    return {part: value.cpu().contiguous() for part, value in tensors.items()}, described


def unpack_layer(tensors: dict[str, Tensor], described: dict[str, Any]) -> QuantizedLayer:
    """Return the layer that `pack_layer` packed."""
    (out, width), (rows, columns), distinct = described["shape"], described["group"], described["depths"]
    layout = plain_layout(out, width, rows, columns)
    if "clusters" in tensors:
        cluster = _unbits(tensors["clusters"], (layout.clusters - 1).bit_length(), out).long()
        layout = Layout(rows, columns, cluster, width)
    depth = torch.full((layout.groups,), distinct[0])
    if len(distinct) > 1:
        depth = torch.tensor(distinct)[_unbits(tensors["depths"], depth_bits(len(distinct)), layout.groups).long()]
    scale = torch.zeros(layout.groups)
    scale[depth > 0] = tensors["scales"].float()
    offset = tensors["offsets"].float() if "offsets" in tensors else torch.zeros(layout.groups)
    codes = _unpack_codes(tensors["codes"], depth, distinct, layout.size)
    return QuantizedLayer(
        layout=layout,
        kind=described["codebook"],
        has_offset="offsets" in tensors,
        rotation=described["rotation"],
        depth=depth,
        scale=scale,
        offset=offset,
        codes=codes,
        bias=tensors["bias"].float() if "bias" in tensors else None,
        bias_added=described["bias_added"],
    )


def write_packed(path: Path, layers: dict[str, QuantizedLayer], description: dict[str, Any], model: nn.Module) -> int:
    """Write a quantized model atomically; return the file's size (bytes).

    Raises
    ------
    QpipeError
        The file cannot be written.
    """
    tensors = remaining_tensors(model, layers)
    described = {}
    for name, layer in layers.items():
        parts, described[name] = pack_layer(layer)
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    header = {"version": VERSION, "model": description, "layers": described}
    try:
        with replacing(path) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata={_KEY: canonical_json(header)})
            temporary.chmod(0o644)
    except (OSError, safetensors.SafetensorError) as error:
        raise QpipeError(f"{path} cannot be written: {error}; make room and run the same command again") from error
    return path.stat().st_size


def remaining_tensors(model: nn.Module, quantized: dict[str, Any]) -> dict[str, Tensor]:
    """Return what is stored at 16 bits: all tensors but quantized layers, a shared one once under its first name.

    float16; bfloat16 for a tensor that float16 cannot hold.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if name.rpartition(".")[0] in quantized or value.data_ptr() in seen:
            continue
        seen.add(value.data_ptr())
        fits = value.numel() == 0 or float(value.abs().max()) <= 65504
        found[name] = value.detach().to(torch.float16 if fits else torch.bfloat16).cpu().contiguous()
    return found


def header_bytes(model: nn.Module, quantized: dict[str, Any]) -> int:
    """Return a bound on what a packed file holds beside its data: names, shapes, descriptions, bytes filled up."""
    entries = sum(len(name) + 100 for name in model.state_dict())
    return 3000 + entries + sum(5 * (len(name) + 110) + 200 for name in quantized)


def read_packed(path: Path) -> PackedModel:
    """Read a packed file (errors: unreadable, not ours, another version, parts missing)."""
    remedy = "quantize the checkpoint again with qpipe ptq"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["version"] != VERSION:
            raise QpipeError(f"{path}: packed format {header['version']} found, {VERSION} expected; {remedy}")
        layers = {
            name: unpack_layer(_parts_of(name, tensors), described) for name, described in header["layers"].items()
        }
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, QpipeError):
            raise
        raise QpipeError(f"{path}: not a packed model ({error!r}); {remedy}") from error
    return PackedModel(header["model"], layers, tensors)


def _parts_of(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the parts of a layer out of the tensors of a file."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def build(packed: PackedModel, device: torch.device) -> Network:
    """Return the network with the dequantized weights (errors: the description does not fit the weights)."""
    described = packed.description
    if described["kind"] == "qpipe":
        run = Run.model_validate(described["run"])
        network = wrap_decoder(Decoder(run.shape, from_canonical({}, name="dense")), run.training.precision == "bf16")
    else:
        network = wrap_transformers(empty_transformers(described["config"]))
    problems = network.model.load_state_dict(_dense_state(network, packed), strict=False)
    wrong = [*problems.unexpected_keys, *(k for k in problems.missing_keys if not _is_tied(network, k))]
    if wrong:
        raise QpipeError(f"packed weights do not fit their model: {', '.join(wrong[:5])}; quantize again")
    return network.to(device).eval()


def _dense_state(network: Network, packed: PackedModel) -> dict[str, Tensor]:
    """Return a state dict, making room for biases that the plain model does not have."""
    state = {name: value.float() for name, value in packed.rest.items()}
    linears = network.linears()
    for name, layer in packed.layers.items():
        state[f"{name}.weight"] = layer.dense()
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
            if linears[name].bias is None:
                set_weight(linears[name], linears[name].weight, layer.bias)
    return state


def _is_tied(network: Network, name: str) -> bool:
    """Whether a state's name is the head that shares the embedding's weight."""
    return network.head.weight is network.embedding.weight and name.endswith(".weight") and "head" in name


def empty_transformers(config: dict[str, Any]) -> Any:
    """Return a transformers model of a configuration, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)


def _pack_codes(layer: QuantizedLayer, distinct: list[int]) -> Tensor:
    parts = [_bits(layer.codes[layer.depth == depth].flatten(), depth) for depth in distinct if depth]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def _unpack_codes(packed: Tensor, depth: Tensor, distinct: list[int], size: int) -> Tensor:
    codes = torch.zeros(len(depth), size, dtype=torch.uint8)
    start = 0
    for bits in distinct:
        members = depth == bits
        count = int(members.sum()) * size
        if bits == 0:
            continue
        stop = start + -(-count * bits // 8)
        codes[members] = _unbits(packed[start:stop], bits, count).view(-1, size)
        start = stop
    return codes


def _bits(values: Tensor, width: int) -> Tensor:
    """Pack whole numbers into `width` bits each (1 to 16).

    Up to 8 bits, eight numbers fill `width` bytes: they are put side by side in one 64-bit word. Wider numbers, of
    which there are few, go bit by bit.
    """
    numbers: NDArray[np.int64] = values.cpu().numpy()
    if width > 8:
        shifts = np.arange(width - 1, -1, -1)
        return torch.from_numpy(np.packbits(((numbers[:, None] >> shifts) & 1).astype(np.uint8).ravel()))
    eights = np.zeros((-(-len(numbers) // 8), 8), np.uint8)
    eights.ravel()[: len(numbers)] = numbers
    words = np.zeros(len(eights), np.uint64)
    for column in eights.T:
        words = words << np.uint64(width) | column
    packed = words.astype(">u8").view(np.uint8).reshape(-1, 8)[:, 8 - width :]
    return torch.from_numpy(packed.ravel()[: -(-len(numbers) * width // 8)].copy())


def _unbits(packed: Tensor, width: int, count: int) -> Tensor:
    """Unpack `count` numbers of `width` bits, uint8; int64 for more than 8 bits."""
    if width > 8:
        bits = np.unpackbits(packed.numpy(), count=count * width).reshape(count, width)
        return torch.from_numpy(bits @ (1 << np.arange(width - 1, -1, -1)).astype(np.int64))
    data = np.zeros(-(-count // 8) * width, np.uint8)
    data[: len(packed)] = packed.numpy()
    words = np.zeros(len(data) // width, np.uint64)
    for column in data.reshape(-1, width).T:
        words = words << np.uint64(8) | column
    eights = np.empty((len(words), 8), np.uint8)
    for place in range(8):
        eights[:, place] = words >> np.uint64(width * (7 - place)) & np.uint64(2**width - 1)
    return torch.from_numpy(eights.ravel()[:count])
