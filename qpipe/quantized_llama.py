"""A trained run as a folder of quantized Llama weights that `transformers` opens through `compressed-tensors`.

That format knows integers with a scale per row or per group of a row, packed into 32-bit words, and 8-bit floating
point. So it holds weight-only representations without rotation and without a mask on integer grids that contain zero,
and on E4M3; here the numbers are stored exactly, and the model that opens computes with the same weights. Everything
else is refused with the reason, and is exported dequantized or packed in our own format instead.
"""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from qpipe.compress import CompressedLinear
from qpipe.compress.grids import lowest_level
from qpipe.compress.packing import unpack_codes
from qpipe.compress.prepare import prepare
from qpipe.compress.rounding import decode
from qpipe.compress.scales import grouped
from qpipe.errors import QpipeError
from qpipe.formats import Grid, Representation
from qpipe.huggingface import projections
from qpipe.model import Decoder

_WORD = 32
_WEIGHTS = "model.safetensors"


def why_not(representation: Representation) -> list[str]:
    """Return what of a representation `compressed-tensors` cannot hold; empty if nothing."""
    weights = representation.weights
    problems = []
    if representation.activations is not None:
        problems.append("it compresses activations")
    if weights is None or weights.parsed_grid is None:
        return [*problems, "its weights have no grid"]
    grid = weights.parsed_grid
    if representation.rotation:
        problems.append("its weights are rotated")
    if weights.mask is not None:
        problems.append("its weights are sparse")
    if grid.family not in ("tread", "narrow") and not _is_e4m3(grid):
        problems.append(f"grid {grid.word} is neither an integer grid with a zero nor e4m3")
    if weights.scale_format in ("e8m0", "e4m3"):
        problems.append(f"its scales are {weights.scale_format}")
    return problems


def _is_e4m3(grid: Grid) -> bool:
    return grid.family == "float" and (grid.exponent, grid.mantissa) == (4, 3)


def check(representation: Representation) -> None:
    """Refuse a representation that the format cannot hold, saying all reasons."""
    if problems := why_not(representation):
        raise QpipeError(
            f"'{representation.name}' cannot be stored as compressed-tensors: {'; '.join(problems)}; "
            "export it dequantized (--transformers) or packed"
        )


@torch.no_grad()
def write_quantized_llama(model: Decoder, representation: Representation, folder: Path) -> None:
    """Turn a dequantized Llama folder into a quantized one.

    Parameters
    ----------
    model
        The trained model.
    representation
        Its representation.
    folder
        As `save_pretrained` left the dequantized model, in one file of weights.

    Raises
    ------
    QpipeError
        The format cannot hold the representation.
    """
    check(representation)
    assert representation.weights is not None
    grid = representation.weights.parsed_grid
    assert grid is not None
    tensors = safetensors.torch.load_file(folder / _WEIGHTS)
    blocks: Any = model.blocks
    for number, block in enumerate(blocks):
        stored = {layer: _integers(layer) for layer in (block.attention.qkv, block.attention.out)}
        stored |= {layer: _integers(layer) for layer in (block.feed_forward.gate_up, block.feed_forward.down)}
        for name, linear, rows in projections(block, model.shape):
            values, scales = stored[linear]
            prefix = f"model.layers.{number}.{name}.weight"
            del tensors[prefix]
            tensors |= _stored(prefix, values[rows], scales[rows], grid)
    safetensors.torch.save_file(tensors, folder / _WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = _configuration(representation, grid)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _integers(layer: CompressedLinear) -> tuple[Tensor, Tensor]:
    """Return a layer's grid values (out, in) and scales (out, groups), float32."""
    assert layer.representation.weights is not None
    prepared = prepare(layer.representation.weights)
    assert prepared.grid is not None
    packed = layer.pack()
    codes = unpack_codes(packed["codes"], prepared.grid.codes, layer.weight.numel()).reshape(layer.weight.shape)
    scales = packed["scales"].float()
    values = decode(grouped(codes, prepared.part.group), prepared.grid, scales).reshape(layer.weight.shape)
    return values, scales.expand(layer.out_features, -1) if scales.ndim == 2 else scales.squeeze(-1)


def _stored(name: str, values: Tensor, scales: Tensor, grid: Grid) -> dict[str, Tensor]:
    parts = {f"{name}_scale": scales.contiguous()}
    if _is_e4m3(grid):
        return parts | {name: values.to(torch.float8_e4m3fn)}
    packed = pack_words(values.long(), _stored_bits(grid))
    return parts | {f"{name}_packed": packed, f"{name}_shape": torch.tensor(values.shape)}


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Pack signed integers (rows, columns), made non-negative, into int32 words (rows, words), lowest bits first."""
    per_word = _WORD // bits
    unsigned = torch.nn.functional.pad(values + 2 ** (bits - 1), (0, -values.shape[1] % per_word))
    words = (unsigned.unflatten(1, (-1, per_word)) << (bits * torch.arange(per_word))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _stored_bits(grid: Grid) -> int:
    """Bits per stored integer: the format packs four or eight."""
    return 4 if lowest_level(grid) >= -8 else 8


def _configuration(representation: Representation, grid: Grid) -> dict[str, Any]:
    assert representation.weights is not None
    group = representation.weights.group
    floating = _is_e4m3(grid)
    weights = {
        "num_bits": 8 if floating else _stored_bits(grid),
        "type": "float" if floating else "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "channel" if isinstance(group, str) else "group",
        "group_size": None if isinstance(group, str) else group,
    }
    layout = "float-quantized" if floating else "pack-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": layout}},
        "ignore": ["lm_head"],
    }
