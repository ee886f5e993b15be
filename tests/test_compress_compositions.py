"""Every composition of parts is either refused with a reason or works: finite, packable, the same in evaluation."""

import itertools
import random
from typing import Any

import pytest
import torch

from qpipe.compress.linear import CompressedLinear
from qpipe.errors import QpipeError
from qpipe.formats import Representation, resolve

GRIDS = [
    "int1",
    "int4",
    "int3-tread",
    "int2-narrow",
    "ternary",
    "e2m1",
    "e4m3",
    "nf4",
    "gauss6",
    "vq2x16",
    "binary2",
    "noise3",
]
SCALES = [None, "gaussian", "absmax", "absmean", "mse", "learned", "elastic", "clip"]
GRADIENTS = [None, "ste", "clip", "trust", "learned-step", "stretched", "uniform-noise"]
GROUPS = ["row", "tensor", 16]
FORMATS = ["float32", "float16", "e8m0", "e4m3"]
MASKS: list[dict[str, Any] | None] = [
    None,
    {"sparsity": 0.5},
    {"n": 2, "m": 4, "backward": "dense"},
    {"n": 1, "m": 4, "block": 2, "backward": "trust"},
    {"sparsity": 0.7, "backward": "banded", "band": 0.1},
    {"sparsity": 0.7, "schedule": "cubic"},
]


REFUSALS: list[str] = []


def compositions() -> list[dict[str, Any]]:
    """A seeded sample of all products of parts, sensible or not."""
    every = itertools.product(GRIDS, SCALES, GRADIENTS, GROUPS, FORMATS, MASKS, (None, "lsq", "absmax"))
    fields = ("grid", "scale", "gradient", "group", "scale_format", "mask", "scale_start")
    chosen = random.Random(0).sample(list(every), 20_000)
    return [{k: v for k, v in zip(fields, values, strict=True) if v is not None} for values in chosen]


def build(side: str, part: dict[str, Any]) -> Representation | None:
    try:
        return resolve({"name": "x", side: part, "rotation": 16})
    except QpipeError as error:
        REFUSALS.extend(error.problems)
        return None


@pytest.fixture(scope="module")
def accepted() -> dict[str, list[Representation]]:
    every = compositions()
    return {side: [r for part in every if (r := build(side, part))] for side in ("weights", "activations")}


def test_most_random_compositions_are_refused_and_enough_remain(accepted: dict[str, list[Representation]]):
    assert 100 < len(accepted["weights"]) < 4000
    assert 50 < len(accepted["activations"]) < len(accepted["weights"])
    assert all(refusal.startswith("representation 'x'") and len(refusal) > 50 for refusal in REFUSALS)


def test_every_accepted_composition_trains_packs_and_evaluates(accepted: dict[str, list[Representation]]):
    x = torch.randn(6, 32, requires_grad=True)
    for representation in accepted["weights"][:400]:
        layer = CompressedLinear(32, 16, representation)
        with torch.no_grad():
            layer.weight[2] = 0
        layer(x).square().sum().backward()
        what = str(representation.canonical())
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters() if p.grad is not None), what
        assert layer.weight.grad is not None, what
        layer.eval().set_progress(1.0)
        with torch.no_grad():
            y = layer(x)
        assert torch.isfinite(y).all(), what
        part = representation.weights
        assert part is not None
        if part.grid == "noise3":
            continue
        torch.testing.assert_close(y, x @ layer.compressed_weight().T, rtol=1e-4, atol=1e-4)
        if part.group != "tensor":
            zero_row = layer.compressed_weight()[2].abs().max()
            assert zero_row <= (1e-4 if layer.weight_scale is not None else 0), what  # trained scales have a floor
        expected = layer.compressed_weight()
        assert torch.equal(layer.unpack(layer.pack()), expected), what


def test_every_accepted_activation_format_works_in_both_modes(accepted: dict[str, list[Representation]]):
    x = torch.randn(2, 3, 32, requires_grad=True)
    with torch.no_grad():
        x[0, 1] = 0
    for representation in accepted["activations"][:300]:
        layer = CompressedLinear(32, 16, representation)
        what = str(representation.canonical())
        y = layer(x)
        y.square().sum().backward()
        assert torch.isfinite(y).all(), what
        assert torch.isfinite(layer.weight.grad).all(), what  # type: ignore[arg-type]
        part = representation.activations
        assert part is not None
        if part.grid != "noise3" and part.gradient != "uniform-noise":
            with torch.no_grad():
                assert torch.equal(layer.eval()(x), y), what
