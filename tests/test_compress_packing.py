"""Packed weights: real bits, exact round trips, sizes as computed."""

import pytest
import torch

from qpipe.compress.linear import CompressedLinear
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
