"""From depths to codes: every layer rounded on its own, or block by block with the layers' inputs at hand."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from qpipe.files import replacing
from qpipe.identity import canonical_json
from qpipe.ptq.feedback import round_with_feedback
from qpipe.ptq.fitting import encode, fit_groups, tables, to_half
from qpipe.ptq.layer import QuantizedLayer, to_device
from qpipe.ptq.network import Network, set_weight
from qpipe.ptq.packed import pack_layer, unpack_layer
from qpipe.ptq.planning import Plan
from qpipe.ptq.streaming import Inputs, stream
from qpipe.ptq.tasks import LayerTask
from qpipe.ptq_methods import Method

Report = Callable[[str], None]


def round_layer(task: LayerTask, depth: Tensor, method: Method, inputs: Inputs | None = None) -> QuantizedLayer:
    """Quantize one layer at given depths.

    Parameters
    ----------
    task
        The layer.
    depth
        Bits per weight of each group, shape (groups,).
    inputs
        What the layer is fed; with second moments errors are fed back, without each weight is rounded on its own.
    """
    groups = task.layout.gather(task.weight)
    if inputs is not None and inputs.second_moment is not None:
        fit, codes = round_with_feedback(
            task.weight,
            inputs.second_moment,
            task.layout,
            depth,
            method.codebook,
            method.offset,
            method.damping,
        )
    else:
        fit = fit_groups(groups, depth, method.codebook, method.offset)
        codes = encode(groups, fit, tables(method.codebook, groups.device))
    return QuantizedLayer(
        task.layout, method.codebook, method.offset, task.rotation, depth, fit.scale, fit.offset, codes
    )


def round_independently(
    network: Network, tasks: dict[str, LayerTask], plan: Plan, method: Method
) -> dict[str, QuantizedLayer]:
    """Quantize all layers without looking at their inputs, and put the result into the network."""
    layers = {}
    for name, linear in network.linears().items():
        layers[name] = round_layer(tasks[name], plan.depths[name], method)
        layers[name].bias = None if linear.bias is None else to_half(linear.bias.data)
        set_weight(linear, layers[name].dense())
    return layers


def round_streaming(
    network: Network,
    tasks: dict[str, LayerTask],
    plan: Plan,
    method: Method,
    batches: list[Tensor],
    pieces: "Pieces | None",
    report: Report,
) -> dict[str, QuantizedLayer]:
    """Quantize block by block with error feedback and bias correction, and put the result into the network.

    The network holds the dense weights before. Finished blocks are kept in `pieces`, so that interrupted work goes on
    where it stood.
    """
    layers: dict[str, QuantizedLayer] = {}
    for number, block, inputs in stream(network, batches, second_moments=method.feedback):
        found = pieces.read(number) if pieces else None
        if found is None:
            found = dict(_round_block(network, block, tasks, plan, method, inputs))
            if pieces:
                pieces.write(number, found)
        for name, layer in found.items():
            layers[name] = to_device(layer, network.device)
            set_weight(network.linears()[name], layers[name].dense(), layers[name].bias)
        report(f"block {number + 1}/{len(network.blocks)} quantized")
    return layers


def _round_block(
    network: Network,
    block: nn.Module,
    tasks: dict[str, LayerTask],
    plan: Plan,
    method: Method,
    inputs: dict[str, Inputs],
) -> Iterator[tuple[str, QuantizedLayer]]:
    for name, linear in network.block_linears(block).items():
        layer = round_layer(tasks[name], plan.depths[name], method, inputs[name])
        if method.bias_correction:
            layer.bias, layer.bias_added = corrected_bias(linear, layer, inputs[name].mean), linear.bias is None
        elif linear.bias is not None:
            layer.bias = to_half(linear.bias.data)
        yield name, layer


def corrected_bias(linear: nn.Linear, layer: QuantizedLayer, mean_input: Tensor) -> Tensor:
    """Return b + (W - Wq) E[x]: the bias that keeps each output's mean, rounded to float16 (2409.02026)."""
    correction = (linear.weight.data - layer.dense()) @ mean_input
    return to_half(correction if linear.bias is None else linear.bias.data + correction)


class Pieces:
    """Finished blocks in scratch, one file each.

    Parameters
    ----------
    folder
        Scratch.
    identity
        Of the whole work and its depths; pieces of another are not used.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity

    def _path(self, number: int) -> Path:
        return self.folder / f"block-{number:04d}.safetensors"

    def write(self, number: int, layers: dict[str, QuantizedLayer]) -> None:
        """Keep a block durably."""
        tensors: dict[str, Tensor] = {}
        described = {}
        for name, layer in layers.items():
            parts, described[name] = pack_layer(layer)
            tensors |= {f"{name}.{part}": value for part, value in parts.items()}
        metadata = {"identity": self.identity, "layers": canonical_json(described)}
        with replacing(self._path(number)) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)

    def read(self, number: int) -> dict[str, QuantizedLayer] | None:
        """Return a kept block, or None where there is none of this work."""
        try:
            with safetensors.safe_open(self._path(number), framework="pt") as file:
                metadata = file.metadata()
                if metadata.get("identity") != self.identity:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError):
            return None
        layers = {}
        for name, described in json.loads(metadata["layers"]).items():
            prefix = f"{name}."
            parts = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            layers[name] = unpack_layer(parts, described)
        return layers
