"""Packed weights: real bits, exact round trips, sizes as computed."""

from pathlib import Path

import pytest
import safetensors.torch
import torch

from qpipe.compress.linear import CompressedLinear, make_linear
from qpipe.compress.model_file import read_packed, save_packed
from qpipe.compress.packing import pack_codes, packed_bits, unpack_codes
from qpipe.errors import QpipeError
from qpipe.formats import catalogue_names, resolve, storage_bits

EXTRA = ["s50", "s75+w4", "2:4", "4:8+w2", "2:4-pairs+w4", "s50-rbbm+w1.58", "s30-gradual", "s50+w4-lsq"]
NAMES = [
    n for n in [*catalogue_names(), *EXTRA] if (w := resolve(n).weights) and not (w.grid or "").startswith("noise")
]


@pytest.mark.parametrize("count", [2, 3, 4, 7, 16, 256, 65536])
@pytest.mark.parametrize("number", [1, 7, 40])
def test_codes_survive_packing_and_take_their_bits(count: int, number: int):
    codes = torch.randint(count, (number,))
    packed = pack_codes(codes, count)
    assert torch.equal(unpack_codes(packed, count, number), codes)
    bits = 1.6 if count == 3 else (count - 1).bit_length()
    assert len(packed) == -(-number // 5) if count == 3 else len(packed) == -(-number * bits // 8)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_packs_to_its_stated_bits_and_unpacks_exactly(name: str):
    torch.manual_seed(0)
    representation = resolve(name)
    layer = CompressedLinear(256, 40, representation).eval()
    with torch.no_grad():
        layer.weight[5] = 0
        layer(torch.randn(4, 256))  # sets trained scales
        layer.set_progress(1.0)
    packed = layer.pack()
    expected = layer.compressed_weight()
    if representation.weights.grid is None:  # type: ignore[union-attr]
        expected = expected.to(torch.bfloat16).float()
    assert torch.equal(layer.unpack(packed), expected)
    stated = storage_bits(representation, 256, 40).total_bits * 256 * 40
    padding = 8 * 3 + 0.01 * stated * (layer.representation.weights.mask is not None)  # type: ignore[union-attr]
    book = storage_bits(representation, 256, 40).codebook_bits * 256 * 40  # the code book is shared by all matrices
    assert packed_bits(packed) == pytest.approx(stated - book, abs=padding)


def test_noise_has_nothing_to_pack():
    with pytest.raises(QpipeError, match="no codes"):
        CompressedLinear(8, 8, resolve("noise4")).pack()


class Tied(torch.nn.Module):
    """A small model with everything a file must keep: tied tables, a norm, two compressed layers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 64)
        self.up = make_linear(64, 96, resolve(name))
        self.down = make_linear(96, 64, resolve(name))
        self.norm = torch.nn.RMSNorm(64)
        self.head = torch.nn.Linear(64, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.down(self.up(self.embedding(x)).relu())))


@pytest.mark.parametrize("name", ["w4", "w2a4", "2:4+w1.58", "w3a8-lsq", "w2-seq", "mxfp4", "s75"])
def test_a_packed_model_computes_what_the_trained_one_did(name: str, tmp_path: Path):
    torch.manual_seed(0)
    model = Tied(name)
    tokens = torch.randint(11, (4, 9))
    expected = model(tokens)
    size = save_packed(model, tmp_path / "m.safetensors", {"run": "x"})
    assert size.stored_bits == pytest.approx(size.computed_bits, rel=0.01, abs=64)
    packed = read_packed(tmp_path / "m.safetensors")
    assert packed.description == {"run": "x"}
    spec = resolve(name)
    copy = Tied("w4")
    dense = spec.model_copy(update={"weights": None, "rotation": spec.rotation if spec.activations else 0})
    copy.up, copy.down = make_linear(64, 96, dense), make_linear(96, 64, dense)
    copy.load_state_dict(packed.state)
    # Without a grid kept weights become bfloat16, 8 significant bits; codes are exact up to the rotation's rounding.
    tolerance = 2**-8 if spec.weights.grid is None else 1e-5  # type: ignore[union-attr]
    assert (copy(tokens) - expected).norm() <= tolerance * expected.norm()


def test_files_that_are_not_packed_models_are_refused(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"no")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "b")
    for name in ("a", "b", "missing"):
        with pytest.raises(QpipeError, match="no packed model"):
            read_packed(tmp_path / name)
    with pytest.raises(QpipeError, match="nothing to pack"):
        save_packed(torch.nn.Linear(2, 2), tmp_path / "c", {})
    model = Tied("w4")
    with torch.no_grad():
        model.up.weight[0, 0] = float("nan")
    with pytest.raises(QpipeError, match="layer up has weights that are not finite"):
        save_packed(model, tmp_path / "d", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
